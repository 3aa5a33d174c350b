"""Opening, refusing and writing Hugging Face-layout folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.build import build_model

CASES = Path(__file__).parent.parent / "cases"


def built(checkpoint):
    with torch.device("meta"):
        return build_model(checkpoint.config)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    return save_tiny_checkpoint(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return save_tiny_checkpoint(tmp_path / "sharded", max_shard_size="100KB")


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_load_then_save_changes_no_byte(tmp_path, kind):
    """Names, types, values and config fields come out as they went in, sharded or not."""
    size = {"max_shard_size": "100KB"} if kind == "sharded" else {}
    source = save_tiny_checkpoint(tmp_path / "source", tiny_config(tie_word_embeddings=False), **size)
    checkpoint = open_checkpoint(source)
    model = built(checkpoint)
    checkpoint.load_into(model)
    target = tmp_path / "target"
    save_model(target, model, checkpoint, max_shard_bytes=100_000 if size else 10**9)
    before = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((source / "config.json").read_text()) == json.loads((target / "config.json").read_text())
    assert (len(list(target.glob("model-*.safetensors"))) > 1) == bool(size)
    _, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_copy_of_a_tied_head_is_written_again(tmp_path, folder):
    """C058: output names are input names, whether or not the source held the copy."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    model = built(checkpoint)
    checkpoint.load_into(model)
    save_model(tmp_path / "out", model, checkpoint)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_a_tied_head_that_differs_from_the_embedding_is_refused(folder):
    """Reading it as tied would throw away a head that somebody trained."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        checkpoint.load_into(built(checkpoint))


def test_case_c054_a_missing_shard(sharded):
    """The index, the file and how many tensors it holds."""
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=rf"index.json: names {shard.name}, which is missing; it holds \d+ tensors"
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_case_c075_a_file_cut_short(folder, size):
    """Refused by name with its size and the one it should have, before a weight is read."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: size or 0])
    with pytest.raises(CheckpointError, match="model.safetensors: .*bytes"):
        open_checkpoint(folder)


def test_missing_extra_and_misshaped_tensors_are_told_together(folder):
    """Every problem, with the nearest name, and no weight read."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_prj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(built(checkpoint))
    text = str(caught.value)
    assert "'model.layers.0.mlp.up_proj.weight' is missing; did you mean 'model.layers.0.mlp.up_prj.weight'?" in text
    assert "'model.norm.weight' has the shape (3,), the config says (64,)" in text
    assert "'model.layers.0.mlp.up_prj.weight' belongs to no part" in text


def test_weights_that_are_no_floats_and_a_config_that_is_no_mapping_are_refused(folder):
    """Quantised or broken files are not taken for weights."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has the type torch.float8_e4m3fn.*model.safetens"):
        checkpoint.check(built(checkpoint))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="config.json: holds a list, not keys and values"):
        open_checkpoint(folder)


def test_case_c063_more_ids_than_rows(folder):
    """Both sizes and the tokens concerned."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for index in range(400, 405):
        extra = {**tokenizer["added_tokens"][0], "id": index, "content": f"<extra{index}>"}
        tokenizer["added_tokens"].append(extra)
    path.write_text(json.dumps(tokenizer))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"405 ids, the embedding 400 rows: '<extra400>' \(400\)"):
        checkpoint.check(built(checkpoint), checkpoint.tokenizer())


@pytest.mark.parametrize("config", json.loads((CASES / "C066_configs.json").read_text()).values())
def test_case_c066_dtype_spellings(folder, tmp_path, config, caplog):
    """Old, new, both, none and auto load; both and different are told; the output has the base's key."""
    path = folder / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    spelled = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    path.write_text(json.dumps(values | spelled))
    checkpoint = open_checkpoint(folder)
    if len({str(value).removeprefix("torch.") for value in spelled.values()}) > 1:
        assert "dtype wins" in caplog.text
    model = built(checkpoint)
    checkpoint.load_into(model)
    save_model(tmp_path / "out", model, checkpoint)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key for key in ("dtype", "torch_dtype") if key in saved} == set(spelled)


def test_case_c087_a_quantised_base_is_refused_by_method(folder):
    """Before a weight is read."""
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match="quantised by 'gptq'"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lama"}, "the nearest that are: llama"),
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"hidden_act": "tanh"}, "hidden_act: 'tanh'"),
        ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}}, "did you mean 'yarn'?"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
    ],
)
def test_what_is_not_built_here_is_refused_by_name(folder, changes, said):
    """An option that would change the numbers is never ignored."""
    change_config(folder, **changes)
    with pytest.raises(UnsupportedError) as caught:
        built(open_checkpoint(folder))
    assert said in str(caught.value)


def test_dropout_of_pre_training_is_said_to_be_left_off(folder, caplog):
    """Fine-tuning uses none, so a config that has one is loaded, and not silently."""
    change_config(folder, attention_dropout=0.5)
    built(open_checkpoint(folder))
    assert "attention_dropout: 0.5 is not applied" in caplog.text


def test_an_index_can_not_reach_outside_its_folder(sharded):
    """A path in the index is a name, never a way out."""
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(sharded)


def test_sidecars_and_templates_are_carried_over(folder, tmp_path):
    """Licence, generation config, tokenizer and template files; no weights of another form."""
    (folder / "LICENSE").write_text("free")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1], "temperature": 0.6}')
    (folder / "training_args.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.stop_ids == [3, 1]
    model = built(checkpoint)
    checkpoint.load_into(model)
    save_model(tmp_path / "out", model, checkpoint)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"training_args.bin"}
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        before, after = (folder / name).read_text(), (tmp_path / "out" / name).read_text()
        assert (json.loads(before) == json.loads(after)) if name.endswith("json") else before == after


def test_another_tokenizer_replaces_the_checkpoints(folder, tmp_path):
    """tokenizer=PATH is used and saved."""
    other = tmp_path / "tokenizer"
    shutil.copytree(folder, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "</s>"}))
    assert open_checkpoint(folder, tokenizer=other).tokenizer().eos_token == "</s>"


@pytest.mark.parametrize("make", [Qwen2Config, Qwen3Config])
def test_other_families_round_trip(tmp_path, make):
    """Biases and head norms are read and written."""
    config = make(
        **{k: getattr(tiny_config(), k) for k in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    source = save_tiny_checkpoint(tmp_path / "source", config)
    checkpoint = open_checkpoint(source)
    model = built(checkpoint)
    checkpoint.load_into(model)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.arange(30)[None]
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
