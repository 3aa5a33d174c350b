"""lora_finetune by the command line: what it says of its losses is what PEFT and transformers compute from its files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import GPT2Config, MixtralConfig

from tests.models.oracle import HEADS, SIZES
from tests.recipes.conftest import ROWS, metrics_of
from tests.recipes.lora_runs import (
    FROZEN,
    SGD,
    assert_same_logits,
    first_rows,
    keys_of,
    last_step,
    logits_of,
    lora,
    lora_recipe,
    loss_of,
    peft_model,
    transformers_model,
)
from tests.recipes.test_kill_and_resume import finish
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.cli.tune import run
from torchtune.recipes.registry import configs

pytestmark = pytest.mark.usefixtures("one_thread")
NF4 = "base_quantization=nf4"


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """A tiny Llama checkpoint with a head of its own."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("untied") / "untied", tiny_config(tie_word_embeddings=False))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    """A few rows to evaluate on."""
    return first_rows(tmp_path_factory.mktemp("held_out") / "held_out.jsonl", 6)


@pytest.fixture(scope="session")
def models(checkpoint, untied, tmp_path_factory):
    """Checkpoints by name."""
    folder = tmp_path_factory.mktemp("models")
    sizes = SIZES | {"vocab_size": 400, "num_hidden_layers": 2}
    mixture = MixtralConfig(**sizes | HEADS | {"num_local_experts": 4, "tie_word_embeddings": True})
    gpt2 = GPT2Config(vocab_size=400, n_embd=32, n_head=4, n_layer=2, n_positions=512, pad_token_id=4)
    return {
        "tied": checkpoint,
        "untied": untied,
        "mixtral": save_tiny_checkpoint(folder / "tiny-mixtral", mixture),
        "gpt2": save_tiny_checkpoint(folder / "tiny-gpt2", gpt2),
    }


# By what is special: the model, the keys, and what the adapter then holds besides the seven linears of each layer.
KINDS = {
    "plain": ("tied", ()),
    "gaussian": ("tied", ("lora_init=gaussian", "lora_alpha=7")),
    "rslora": ("tied", ("use_rslora=true", "lora_alpha=5.5")),
    "dora": ("tied", ("use_dora=true",)),
    "pissa": ("tied", ("lora_init=pissa",)),
    "attention": ("tied", ("lora_targets=attention",)),
    "regex": ("tied", (r"lora_targets=[model\.layers\.1\..*(q|up)_proj, o_proj]",)),
    "last-layer": ("tied", ("lora_layers=[-1]", "lora_targets=mlp")),
    "patterns": ("tied", (r"lora_rank_pattern={o_proj: 2, layers\.1\..*: 6}", "lora_alpha_pattern={q_proj: 5}")),
    "rslora-patterns": ("tied", ("use_rslora=true", "lora_rank_pattern={o_proj: 2}", "lora_alpha_pattern={q_proj: 5}")),
    "tied-head": ("tied", ("modules_to_save=[lm_head]",)),
    "norms": ("tied", ("modules_to_save=[norm, input_layernorm]",)),
    "untied-both": ("untied", ("modules_to_save=[lm_head, embed_tokens]",)),
    "untied-head-adapted": ("untied", ("lora_targets=[lm_head, q_proj]",)),
    "embedding-adapted": ("untied", ("lora_targets=[embed_tokens, v_proj]",)),
    "loraplus": ("tied", ("loraplus_lr_ratio=4",)),
    "unpacked": ("tied", ("packed=false", "batch_size=5", "gradient_accumulation_steps=2")),
    "checkpointing": ("tied", ("enable_activation_checkpointing=true", "lora_dropout=0.1")),
    "experts": ("mixtral", ("lora_targets=[attention, experts]",)),
    "conv1d": ("gpt2", ("use_dora=true",)),
    "nf4": ("tied", (NF4,)),
    "nf4-single": ("tied", (NF4, "double_quantization=false")),
    "nf4-dora": ("tied", (NF4, "use_dora=true")),
    "nf4-pissa": ("tied", (NF4, "lora_init=pissa")),
    "nf4-loftq": ("tied", (NF4, "lora_init=loftq")),
    "nf4-whole": ("untied", (NF4, "modules_to_save=[lm_head]")),
    "nf4-experts": ("mixtral", (NF4, "lora_targets=[attention, experts]")),
    "nf4-conv1d": ("gpt2", (NF4,)),
    "int8": ("tied", ("base_quantization=int8",)),
    "int4": ("tied", ("base_quantization=int4",)),
    "int4-loftq": ("tied", ("base_quantization=int4", "lora_init=loftq")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_is_that_of_the_files(models, held_out, tmp_path, kind):
    """What is logged after the last step is the loss of `merged/` in transformers, and of the adapter in PEFT.

    An adapter over a quantised base has no such base in PEFT here, so there only `merged/` is asked.
    """
    model, keys = KINDS[kind]
    out = tmp_path / "out"
    metrics = lora(models[model], out, f"eval_dataset={held_out}", "save_merged=true", *keys)
    folder = out / "step_3"
    expected = metrics[-1]["eval_loss"]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.02
    assert loss_of(transformers_model(folder / "merged"), folder, held_out) == pytest.approx(expected, abs=2e-5)
    if not any("quantization=" in key for key in keys):
        assert loss_of(peft_model(models[model], folder), folder, held_out) == pytest.approx(expected, abs=2e-5)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items()), "a part that has not moved from zero"


def test_a_fresh_adapter_changes_nothing(checkpoint, held_out, tmp_path):
    """At a rate of 0 the loss is the base's; PiSSA takes out what it adds, and LoftQ comes nearer than NF4 alone."""
    base = loss_of(transformers_model(checkpoint), checkpoint, held_out)
    found = {}
    for name, keys in {"lora": (), "dora": ("use_dora=true",), "pissa": ("lora_init=pissa",)}.items():
        metrics = lora(checkpoint, tmp_path / name, f"eval_dataset={held_out}", *FROZEN, *keys)
        assert metrics[-1]["eval_loss"] == pytest.approx(base, abs=1e-5)
    for name in ("default", "loftq", "pissa"):
        keys = (NF4, f"lora_init={name}", "lora_rank=16", "save_merged=true")
        lora(checkpoint, tmp_path / f"nf4-{name}", f"eval_dataset={held_out}", *FROZEN, *keys)
        logits = logits_of(transformers_model(tmp_path / f"nf4-{name}" / "step_1" / "merged"))
        found[name] = (logits - logits_of(transformers_model(checkpoint))).norm().item()
    assert 0 < found["loftq"] < 0.9 * found["default"]
    assert 0 < found["pissa"] < found["default"]


@pytest.mark.parametrize("name", [name for name, config in configs().items() if config.recipe == "lora_finetune"])
def test_a_shipped_config_trains(checkpoint, tmp_path, name):
    """Two steps on a tiny model, from the config's own keys."""
    keys = [f"model_checkpoint={checkpoint}", f"dataset={ROWS}", f"output_dir={tmp_path}/out", "max_steps=2"]
    assert run(["run", "lora_finetune", "--config", name, *keys]) == 0
    assert (last_step(tmp_path / "out") / "adapter_model.safetensors").exists()


def test_batching_changes_nothing(checkpoint, tmp_path):
    """Packed, padded, or in six micro-batches: every trained token of the step weighs the same."""
    found = []
    for name, keys in {
        "packed": (),
        "padded": ("packed=false", "batch_size=24"),
        "accumulated": ("packed=false", "batch_size=4", "gradient_accumulation_steps=6"),
    }.items():
        metrics = lora(checkpoint, tmp_path / name, *SGD, "use_dora=true", *keys)
        found.append([line[key] for line in metrics for key in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=2e-5)
    assert found[2] == pytest.approx(found[0], rel=2e-5)


@pytest.mark.parametrize("keys", [(), ("lora_dropout=0.3", "lora_targets=mlp"), ("use_dora=true", NF4)])
def test_activation_checkpointing_changes_no_bit(checkpoint, tmp_path, keys):
    """The same operations on the same numbers, and the same dropout when a layer is computed again."""
    found = []
    for enabled in ("false", "true"):
        metrics = lora(checkpoint, tmp_path / enabled, *keys, f"enable_activation_checkpointing={enabled}")
        found.append([line[key] for line in metrics for key in ("loss", "grad_norm")])
    assert found[0] == found[1]


def test_the_groups_have_loraplus_rates(checkpoint, tmp_path):
    """lora_B's rate is so many times lora_A's, at each step of the schedule; a rate given by name stands."""
    given = r"param_groups=[{pattern: 'layers\.1\..*lora_B', lr: 0.5}]"
    keys = ("loraplus_lr_ratio=8", "lr_scheduler.min_lr_ratio=0.5", "optimizer.lr=1e-3", given)
    recipe = lora_recipe(checkpoint, tmp_path / "out", *keys)
    names = {parameter: name for name, parameter in recipe._model.named_parameters()}
    rates = {names[p]: group["lr"] for group in recipe._optimizer.param_groups for p in group["params"]}
    last = metrics_of(tmp_path / "out")[-1]["lr"]
    assert 0.5e-3 <= last < 1e-3
    for name, rate in rates.items():
        peak = 1.0 if "lora_A" in name else 500.0 if "layers.1." in name else 8.0
        assert rate == pytest.approx(last * peak, rel=1e-6), name


def test_only_the_adapter_is_trained_and_stepped(checkpoint, tmp_path):
    """No gradient, no optimizer state and no float32 copy of the base."""
    recipe = lora_recipe(checkpoint, tmp_path / "out", "dtype=bf16")
    held = {name: parameter for name, parameter in recipe._model.named_parameters() if not parameter.requires_grad}
    assert {parameter.dtype for parameter in held.values()} == {torch.bfloat16}
    assert all(parameter.grad is None for parameter in held.values())
    stepped = {p for group in recipe._optimizer.param_groups for p in group["params"]}
    assert all("lora_" in name for name, p in recipe._model.named_parameters() if p in stepped)
    assert len(stepped) == len(recipe._optimizer.state) == 2 * 7 * 2


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((), ()),
        (("use_dora=true", "use_rslora=true", "lora_rank_pattern={o_proj: 2}"), ()),
        (("modules_to_save=[lm_head]",), ()),
        (("lora_init=pissa",), ("lora_rank=8",)),
        ((NF4,), (NF4,)),
        (("new_tokens=[<think>]",), ("new_tokens=[<think>]",)),
    ],
    ids=["lora", "dora", "whole", "pissa", "nf4", "new-tokens"],
)
def test_going_on_from_an_adapter_begins_where_it_ended(checkpoint, tmp_path, first, then):
    """The first loss is the last evaluation's, on the same rows; and the adapter's own rank is kept."""
    before = lora(checkpoint, tmp_path / "one", f"eval_dataset={ROWS}", *first)
    after = lora(checkpoint, tmp_path / "two", f"adapter={tmp_path}/one/step_3", *then)
    assert after[0]["loss"] == pytest.approx(before[-1]["eval_loss"], abs=1e-5)
    assert after[-1]["loss"] < after[0]["loss"]
    files = [load_file(tmp_path / out / "step_3" / "adapter_model.safetensors") for out in ("one", "two")]
    assert {name: tensor.shape for name, tensor in files[0].items()} == {n: t.shape for n, t in files[1].items()}


def test_an_adapter_of_peft_is_gone_on_from(checkpoint, tmp_path, held_out):
    """Made by PEFT, with its defaults' spelling."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(transformers_model(checkpoint), config)
    expected = loss_of(model.eval(), checkpoint, held_out)
    model.save_pretrained(tmp_path / "theirs")
    keys = (f"adapter={tmp_path}/theirs", "lora_rank=3", f"eval_dataset={held_out}", *FROZEN)
    metrics = lora(checkpoint, tmp_path / "out", *keys)
    assert metrics[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("lora_rank=5",), ["lora_rank: 5, and the adapter has 4"]),
        (("lora_alpha=1", "use_dora=true"), ["lora_alpha: 1.0, and the adapter has 32.0", "use_dora: True"]),
        (("lora_targets=[q_proj]", "lora_layers=[0]"), ["lora_targets: the adapter", "lora_layers: the adapter"]),
        (
            ("modules_to_save=[norm]", "lora_rank_pattern={o_proj: 2}"),
            ["modules_to_save: the", "lora_rank_pattern: the"],
        ),
        (("lora_init=pissa",), ["lora_init: an adapter to go on from is given"]),
        (("new_tokens=[<think>]",), ["new_tokens: the vocabulary grows, and the adapter"]),
    ],
)
def test_keys_that_clash_with_the_adapter_are_refused(checkpoint, adapter, tmp_path, capsys, keys, said):
    """Each by its name, before anything is loaded; the adapter's own values may be given again."""
    keys = keys_of(checkpoint, tmp_path / "out", f"adapter={adapter}", *keys)
    assert run(["validate", "lora_finetune", *keys]) == 2
    told = capsys.readouterr().err
    assert all(text in told for text in said), told


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory):
    """The checkpoint of a plain run."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    lora(checkpoint, out)
    return last_step(out)


@pytest.mark.parametrize("keys", [(), (NF4,)], ids=["dense", "nf4"])
def test_frozen_adapters_are_part_of_the_base(checkpoint, adapter, held_out, tmp_path, keys):
    """A new adapter begins where they end; they do not change, and `merged/` has them too."""
    out = tmp_path / "out"
    frozen = f"frozen_adapters=[{adapter}]"
    below = loss_of(peft_model(checkpoint, adapter), checkpoint, held_out)
    metrics = lora(checkpoint, tmp_path / "fresh", f"eval_dataset={held_out}", frozen, *FROZEN, *keys)
    assert metrics[-1]["eval_loss"] == pytest.approx(below, abs=1e-5 if not keys else 0.1)
    metrics = lora(checkpoint, out, f"eval_dataset={held_out}", frozen, "save_merged=true", *keys)
    merged = transformers_model(out / "step_3" / "merged")
    assert loss_of(merged, checkpoint, held_out) == pytest.approx(metrics[-1]["eval_loss"], abs=2e-5)
    if not keys:
        both = peft_model(peft_model(checkpoint, adapter).merge_and_unload(), out / "step_3")
        assert_same_logits(logits_of(merged), logits_of(both))


def test_new_tokens_are_trained_and_saved_with_the_adapter(checkpoint, tmp_path, capsys):
    """Their rows are in the adapter, the tokenizer has them, and PEFT loads it on a base of as many rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "<think>b</think>"}) + "\n")
    out = tmp_path / "out"
    lora(checkpoint, out, "new_tokens=[<think>, </think>]", f"dataset={rows}", "save_merged=true")
    assert "the vocabulary grows, so model.embed_tokens are trained whole" in capsys.readouterr().err
    folder = out / "step_3"
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert {"<think>", "</think>"} <= {token["content"] for token in added}
    merged = transformers_model(folder / "merged")
    assert merged.config.vocab_size == merged.lm_head.weight.shape[0] == 402
    rows_trained = load_file(folder / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(merged.model.embed_tokens.weight, rows_trained)
    assert not torch.equal(rows_trained[400], rows_trained[401])  # both began as the mean of all others
    grown = transformers_model(checkpoint)
    grown.resize_token_embeddings(402)
    assert_same_logits(logits_of(peft_model(grown, folder)), logits_of(merged))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
@pytest.mark.parametrize("keys", [(), ("use_dora=true",), (NF4,)], ids=["lora", "dora", "nf4"])
def test_half_precision_follows_fp32(checkpoint, tmp_path, dtype, tolerance, keys):
    """Ten steps stay within 2 % (bf16, 8 bits) and 0.5 % (fp16, 11 bits) of fp32's loss; the adapter is float32."""
    found = []
    for name in ("fp32", dtype):
        # A small alpha, for at 8 times the update the first loss scale overflows, and fp16 begins a step late.
        metrics = lora(checkpoint, tmp_path / name, "max_steps=10", f"dtype={name}", "lora_alpha=4", *keys)
        found.append([line["loss"] for line in metrics])
    assert found[1] == pytest.approx(found[0], rel=tolerance)
    assert found[1] != found[0]
    tensors = load_file(tmp_path / dtype / "step_10" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_bf16_parameters_follow_fp32_and_are_saved_so(checkpoint, tmp_path):
    """param_dtype=bf16: half the adapter, rounded at random, within 2 % of fp32's loss."""
    exact = lora(checkpoint, tmp_path / "fp32", "max_steps=6")
    half = lora(checkpoint, tmp_path / "bf16", "max_steps=6", "param_dtype=bf16")
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in exact], rel=0.02)
    tensors = load_file(tmp_path / "bf16" / "step_6" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_dropout_acts_in_training_alone(checkpoint, held_out, tmp_path):
    """Losses differ once B is not zero; at a rate of 0 the held-out loss is that without dropout, to the bit."""
    start = tmp_path / "start"
    lora(checkpoint, start)
    found = {}
    for p in ("0.0", "0.5"):
        keys = (f"adapter={start}/step_3", f"lora_dropout={p}", f"eval_dataset={held_out}")
        metrics = lora(checkpoint, tmp_path / p, *keys, *FROZEN)
        found[p] = metrics[-1]
    assert abs(found["0.0"]["loss"] - found["0.5"]["loss"]) > 1e-4
    assert found["0.0"]["eval_loss"] == found["0.5"]["eval_loss"]
    config = json.loads((tmp_path / "0.5" / "step_1" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_losses_are_the_plain_ones(checkpoint, tmp_path):
    """Within 1e-4, with an evaluation at the end; plain LoRA is compiled in test_lora_cases.py (C083)."""
    found = []
    counters.clear()
    for compiled in ("false", "true"):
        keys = (NF4, "use_dora=true", f"compile={compiled}", f"eval_dataset={ROWS}", "max_steps=2")
        metrics = lora(checkpoint, tmp_path / compiled, "eval_every_n_steps=2", *keys)
        found.append([*(line["loss"] for line in metrics), metrics[-1]["eval_loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert counters["frames"]["ok"] > 0, "nothing was compiled"


def command(recipe, checkpoint, out, *keys, ranks):
    launch = ("--nproc_per_node", str(ranks)) if ranks > 1 else ()
    return [sys.executable, "-m", "torchtune.cli.tune", "run", *launch, recipe, *keys_of(checkpoint, out, *keys)]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "keys",
    [
        ("lora_dropout=0.2", "packed=false"),
        (NF4, "double_quantization=false", "use_dora=true", "modules_to_save=[lm_head]", "packed=true"),
    ],
    ids=["dropout", "nf4"],
)
def test_two_ranks_equal_one(checkpoint, tmp_path, keys):
    """The same micro-batches with the same dropout: losses, norms and held-out losses agree to 1e-5 in fp32."""
    one, two = tmp_path / "one", tmp_path / "two"
    keys = ("batch_size=3", "eval_fraction=0.2", "max_seq_len=128", *SGD, *keys)
    lora(checkpoint, one, *keys, "gradient_accumulation_steps=2")
    done = finish(command("lora_finetune", checkpoint, two, *keys, ranks=2))
    assert done.returncode == 0, done.stderr
    for line, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert line["tokens"] == other["tokens"]
        for key in ("loss", "grad_norm", "eval_loss"):
            assert other.get(key) == (pytest.approx(line[key], rel=1e-5) if key in line else None)


TELLING_RECIPE = """
import hashlib
from torchtune.distributed.process_group import rank
from torchtune.recipes import lora_finetune
from torchtune.recipes.lora_finetune import LoRAFinetuneParams, LoRAFinetuneRecipe, check


class Telling(LoRAFinetuneRecipe):
    def cleanup(self):
        trained = [p.detach().float() for p in self._model.parameters() if p.requires_grad]
        digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in trained)).hexdigest()
        (self._output.path.parent / f"digest-{rank()}").write_text(digest)
        super().cleanup()


def main():
    lora_finetune.LoRAFinetuneRecipe = Telling
    lora_finetune.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_hold_the_same_adapter(checkpoint, tmp_path):
    """Also where bf16 parameters are rounded at random, and each rank's dropout is another."""
    recipe = tmp_path / "telling.py"
    recipe.write_text(TELLING_RECIPE)
    keys = ("param_dtype=bf16", "lora_dropout=0.1", "max_seq_len=128", "batch_size=1", "data_parallel_replicate=2")
    done = finish(command(str(recipe), checkpoint, tmp_path / "out", *keys, ranks=2))
    assert done.returncode == 0, done.stderr
    digests = [(tmp_path / f"digest-{rank}").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]


MEASURED_LOAD = """
import sys, threading, time
import torch
torch.set_num_threads(1)
from torchtune.config.parse import parse_params
from torchtune.quantization.kinds import packer
from torchtune.recipes.lora_finetune import LoRAFinetuneParams, LoRAFinetuneRecipe

packer("nf4")(torch.randn(64, 64))  # what the library takes by itself

def private_bytes():
    lines = open("/proc/self/smaps_rollup").readlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))

def watch():
    global peak
    while not done:
        peak = max(peak, private_bytes())
        time.sleep(0.002)

params = parse_params(LoRAFinetuneParams, sys.argv[1:])
recipe = LoRAFinetuneRecipe(params=params)
before = peak = private_bytes()
done = False
watcher = threading.Thread(target=watch)
watcher.start()
recipe.setup(params=params)
done = True
watcher.join()
print("measured", peak - before)
recipe.cleanup()
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_base_is_never_whole_in_high_precision(tmp_path):
    """Private memory while 257 MB of bf16 are loaded as NF4: what they become, 40 MB to pack, and all else of a start."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    base = save_tiny_checkpoint(tmp_path / "base", tiny_config(**sizes | heads), dtype=torch.bfloat16)
    num_bytes = (base / "model.safetensors").stat().st_size
    assert 250e6 < num_bytes < 265e6
    program = [sys.executable, "-c", MEASURED_LOAD, *keys_of(base, tmp_path / "out", NF4, "dtype=bf16", "lora_rank=8")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("measured ")[1])
    packed = 0.516 * num_bytes / 2
    assert packed < peak < packed + 55e6 < 0.48 * num_bytes
