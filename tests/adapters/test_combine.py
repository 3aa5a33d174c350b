"""One adapter from several: against the dense sums of their updates, and against PEFT's own combination."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from tests.adapters.peft_oracle import adapted, check_same_logits, disturb, load_peft, load_theirs, meta_model
from tests.models.oracle import save_random
from tests.models.support import config_of
from torchtune.adapters.combine import average_adapters, combine_adapters
from torchtune.adapters.config import LoRAConfig
from torchtune.checkpoint.peft_read import read_adapter
from torchtune.checkpoint.peft_write import save_adapter
from torchtune.errors import ConfigError

# Ranks, scales and layers that differ.
KINDS = {
    "a": {"rank": 3, "alpha": 5.0, "targets": ("attention", "mlp")},
    "b": {"rank": 2, "alpha": 7.0, "targets": ("q_proj", "up_proj", "lm_head"), "rank_pattern": {"q_proj": 4}},
    "c": {"rank": 4, "alpha": 3.0, "targets": ("v_proj", "up_proj", "embed_tokens"), "use_rslora": True},
}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base, and three adapters for it."""
    folder = tmp_path_factory.mktemp("llama")
    save_random(folder / "base", config_of("llama"))
    for seed, (name, options) in enumerate(KINDS.items()):
        ours = adapted(folder / "base", LoRAConfig(**options), seed=seed)
        disturb(ours.model, seed=seed)
        ours.save(folder / name)
    return folder


def read(folder, names):
    model = meta_model(folder / "base")
    return [read_adapter(folder / name, model) for name in names]


def dense(update):
    """s B A in float64."""
    return update.scale * update.b.double() @ update.a.double()


def dense_sum(adapters, weights, name):
    parts = [w * dense(a.updates[name]) for a, w in zip(adapters, weights, strict=True) if name in a.updates]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("names", ["a", "ab", "abc", "cba", "bb"])
def test_a_weighted_sum_is_that_of_the_matrices(llama, names):
    """Exact, layer by layer, of the sum of the ranks; layers that some have not are the others'."""
    adapters, weights = read(llama, names), [WEIGHTS[name] for name in names]
    combined = combine_adapters(adapters, weights)
    assert set(combined.updates) == {name for adapter in adapters for name in adapter.updates}
    for name, update in combined.updates.items():
        assert update.rank == sum(a.updates[name].rank for a in adapters if name in a.updates)
        torch.testing.assert_close(dense(update), dense_sum(adapters, weights, name), rtol=1e-5, atol=1e-6)
    assert combined.base == adapters[0].base


@pytest.mark.parametrize("rank", [1, 2, 5, 100])
def test_a_rank_keeps_the_largest_singular_values(llama, rank):
    """The best approximation of the sum, against a plain singular value decomposition of it."""
    adapters, weights = read(llama, "abc"), list(WEIGHTS.values())
    for name, update in combine_adapters(adapters, weights, rank=rank).updates.items():
        whole = dense_sum(adapters, weights, name)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert update.rank <= rank
        torch.testing.assert_close(dense(update), best, rtol=1e-4, atol=1e-5 * s[0].item())


def test_an_average_is_the_mean(llama):
    """Of the updates, not of A and B apart."""
    adapters = read(llama, "abc")
    for name, update in average_adapters(adapters).updates.items():
        torch.testing.assert_close(dense(update), dense_sum(adapters, [1 / 3] * 3, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 2), ("svd", 4)])
def test_combines_as_peft(llama, tmp_path, method, rank):
    """Its `add_weighted_adapter` over the same layers, exact and cut to a rank: the same logits."""
    for seed in range(2):
        config = LoRAConfig(rank=3, alpha=5.0 + seed, targets=("attention", "down_proj"), use_rslora=bool(seed))
        ours = adapted(llama / "base", config, seed=seed)
        disturb(ours.model, seed=seed)
        ours.save(tmp_path / str(seed))
    theirs = PeftModel.from_pretrained(load_theirs(llama / "base"), tmp_path / "0", adapter_name="zero").eval()
    theirs.load_adapter(tmp_path / "1", "one")
    options = {} if rank is None else {"svd_rank": rank}
    theirs.add_weighted_adapter(["zero", "one"], [0.7, 1.2], "both", combination_type=method, **options)
    theirs.set_adapter("both")
    adapters = [read_adapter(tmp_path / name, meta_model(llama / "base")) for name in "01"]
    combined = combine_adapters(adapters, [0.7, 1.2], rank=rank)
    check_same_logits(adapted(llama / "base", adapter=combined).model, theirs, share=1e-5 if rank is None else 1e-4)


def test_the_combined_adapter_is_an_adapter(llama, tmp_path):
    """Written, PEFT reads it; merged, it is what merging the parts one after another is."""
    adapters, weights = read(llama, "abc"), [1.0, 1.0, 1.0]
    combined = combine_adapters(adapters, weights)
    save_adapter(tmp_path / "sum", combined, meta_model(llama / "base"))
    ours = adapted(llama / "base", adapter=tmp_path / "sum")
    check_same_logits(load_peft(llama / "base", tmp_path / "sum"), ours.model)
    stacked = adapted(llama / "base", adapter=llama / "c", frozen=adapters[:2])
    check_same_logits(stacked.model, ours.model)
    check_same_logits(load_theirs(stacked.save_merged(tmp_path / "merged")), ours.model)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
@pytest.mark.parametrize("rank", [None, 2])
def test_layouts_and_stacks(tmp_path, model_type, rank):
    """GPT-2's weights lie the other way round; experts and routers are combined too."""
    save_random(tmp_path / "base", config_of(model_type))
    targets = ("all-linear", "experts", "gate") if model_type == "mixtral" else ("all-linear",)
    for seed in range(2):
        ours = adapted(tmp_path / "base", LoRAConfig(rank=2 + seed, alpha=5.0, targets=targets), seed=seed)
        disturb(ours.model, seed=seed)
        ours.save(tmp_path / "ab"[seed])
    adapters = read(tmp_path, "ab")
    model, combined = meta_model(tmp_path / "base"), combine_adapters(adapters, [0.5, 0.5], rank=rank)
    for name, update in combined.updates.items():
        whole = dense_sum(adapters, [0.5, 0.5], name)
        left = torch.linalg.svdvals(whole - dense(update))[..., 0]
        torch.testing.assert_close(
            left, torch.linalg.svdvals(whole)[..., rank] if rank else 0 * left, rtol=1e-4, atol=1e-5
        )
        assert update.rank == (rank or 5)
    fresh = adapted(tmp_path / "base", adapter=combined)
    save_adapter(tmp_path / "sum", combined, model)
    check_same_logits(load_peft(tmp_path / "base", tmp_path / "sum"), fresh.model)


def test_several_frozen_adapters_below_another(llama, tmp_path):
    """PEFT's logits with all three active: an update each, on one base."""
    theirs = PeftModel.from_pretrained(load_theirs(llama / "base"), llama / "a", adapter_name="a").eval()
    for name in "bc":
        theirs.load_adapter(llama / name, name)
    theirs.base_model.set_adapter(["a", "b", "c"])
    ours = adapted(llama / "base", adapter=llama / "c", frozen=read(llama, "ab"))
    check_same_logits(ours.model, theirs)
    check_same_logits(load_theirs(ours.save_merged(tmp_path)), theirs)


def test_frozen_adapters_are_merged_in_their_order(llama, tmp_path):
    """A DoRA adapter gives its lengths to the rows with what came before it, and not with what comes after."""
    dora = adapted(llama / "base", LoRAConfig(rank=3, alpha=5.0, use_dora=True))
    disturb(dora.model)
    dora.save(tmp_path / "dora")
    first = adapted(llama / "base", adapter=llama / "b").save_merged(tmp_path / "first")
    second = adapted(first, adapter=tmp_path / "dora").save_merged(tmp_path / "second")
    frozen = [read_adapter(path, meta_model(llama / "base")) for path in (llama / "b", tmp_path / "dora")]
    ours = adapted(llama / "base", adapter=llama / "a", frozen=frozen)
    check_same_logits(ours.model, adapted(second, adapter=llama / "a").model)


def test_what_has_no_sum_is_refused(llama, tmp_path):
    """Nothing, another number of weights, DoRA, and what was trained whole."""
    (plain,) = read(llama, "a")
    for adapters, weights in (([], []), ([plain], [1.0, 2.0])):
        with pytest.raises(ConfigError, match=f"{len(adapters)} adapters and {len(weights)} weights"):
            combine_adapters(adapters, weights)
    for options, message in (
        ({"use_dora": True}, "adapter 1 is DoRA's"),
        ({"modules_to_save": ("norm",)}, "adapter 1 has 'model.norm.weight' trained whole"),
    ):
        ours = adapted(llama / "base", LoRAConfig(rank=3, **options))
        ours.save(tmp_path / message)
        with pytest.raises(ConfigError, match=message):
            combine_adapters([plain, read_adapter(tmp_path / message, meta_model(llama / "base"))], [1.0, 1.0])


def test_the_base_is_named_where_all_agree(llama):
    """Else it is not known."""
    one, other = read(llama, "ab")
    assert combine_adapters([one, other], [1, 1]).base == str(llama / "base")
    assert combine_adapters([one, replace(other, base="org/other")], [1, 1]).base is None
