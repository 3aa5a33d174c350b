"""Loading a checkpoint in each of its forms: time against a plain read of the same files, and peak private memory.

    python benchmarks/load_model.py

Each form is loaded by `load_model` in a process of its own, a few rounds interleaved. Private memory is that of no
file: pages that the process wrote or was given (`Private_Dirty` in /proc/self/smaps_rollup), above what it had with
torch imported. The plain read puts every byte of the files into memory of its own, as any loader has to. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from torchtune.checkpoint.load import load_model
from torchtune.models.build import build_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# The same in the first library's and Meta's words.
META_NAMES = {
    "model.layers.": "layers.",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
SPLIT_BY_COLUMN = ("wo.weight", "w2.weight")
FORMS = ("safetensors", "4 shards", ".bin", "old .bin", "consolidated", "2 consolidated")
SAMPLE_S = 0.002


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=Path, help="load this folder and print what it took")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folders = {form: Path(temporary) / form for form in FORMS}
        num_bytes = write_forms(folders, options.layers)
        found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(options.rounds):
            for form, folder in folders.items():
                found[form].append(in_a_process(folder))
    lines = [
        f"# Loading {num_bytes / 1e6:.0f} MB of bfloat16, {date.today()}, torch {torch.__version__}",
        "",
        f"Command: `python {' '.join(['benchmarks/load_model.py', *sys.argv[1:]])}`",
        f"Medians of {options.rounds} rounds, files in the page cache.",
        "",
        "| form | seconds | plain read, seconds | ratio | peak private bytes / bytes of the weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for form, rounds in found.items():
        load, plain, peak = (statistics.median(r[key] for r in rounds) for key in ("load", "plain", "peak"))
        ratio = statistics.median(r["load"] / r["plain"] for r in rounds)
        lines.append(f"| {form} | {load:.2f} | {plain:.2f} | {ratio:.2f} | {peak / num_bytes:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "results" / f"{date.today()}-load-model.md").write_text(text, encoding="utf-8")


def write_forms(folders: dict[str, Path], num_layers: int) -> int:
    """The same random weights in each form; returns their bytes."""
    config = CONFIG | {"num_hidden_layers": num_layers}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_model(config).state_dict().items()}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for form, folder in folders.items():
        folder.mkdir()
        if "consolidated" in form:
            write_consolidated(folder, tensors, num_ranks=2 if form.startswith("2") else 1)
        else:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            write_hugging_face(folder, tensors, form)
    return sum(tensor.nbytes for tensor in tensors.values())


def write_hugging_face(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """One file, or four with an index."""
    if form.endswith(".bin"):
        is_zip = not form.startswith("old")
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    elif form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        names = list(tensors)
        weight_map = {}
        for number in range(4):
            file_name = f"model-{number + 1:05}-of-00004.safetensors"
            shard = names[number * len(names) // 4 : (number + 1) * len(names) // 4]
            save_file({name: tensors[name] for name in shard}, folder / file_name)
            weight_map |= dict.fromkeys(shard, file_name)
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def write_consolidated(folder: Path, tensors: dict[str, torch.Tensor], *, num_ranks: int) -> None:
    """Under Meta's names, each matrix shared among ranks. Random rows need not be reordered."""
    heads = {"n_heads": CONFIG["num_attention_heads"], "n_kv_heads": CONFIG["num_key_value_heads"]}
    num_layers = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    params = {"dim": CONFIG["hidden_size"], "n_layers": num_layers, "multiple_of": 256, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params | heads), encoding="utf-8")
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(num_ranks)]
    for name, tensor in tensors.items():
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        dim = 1 if name.endswith(SPLIT_BY_COLUMN) else 0
        parts = [tensor] * num_ranks if tensor.dim() == 1 else tensor.chunk(num_ranks, dim)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()
    for number, rank in enumerate(ranks):
        torch.save(rank, folder / f"consolidated.{number:02}.pth")


def in_a_process(folder: Path) -> dict[str, float]:
    """What `measured` finds, in memory that nobody used before."""
    command = [sys.executable, __file__, "--measure", str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def measured(folder: Path) -> dict[str, float]:
    """Seconds of a plain read and of loading, and the private bytes that loading took at most."""
    files = [file for file in folder.iterdir() if file.suffix != ".json"]
    read_plainly(files)  # into the page cache
    before = private_bytes()
    with PeakMemory() as memory:
        model = load_model(folder)
    assert next(model.parameters()).dtype == torch.bfloat16
    peak = memory.peak_bytes - before
    del model
    return {"peak": peak, "plain": timed(lambda: read_plainly(files)), "load": timed(lambda: load_model(folder))}


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_plainly(files: list[Path]) -> list[bytearray]:
    """Every byte of the files, in memory of its own."""
    contents = []
    for path in files:
        content = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            view, position = memoryview(content), 0
            while num_read := file.readinto(view[position:]):
                position += num_read
        contents.append(content)
    return contents


class PeakMemory:
    """The most private memory that the process had, looked at every few milliseconds."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = private_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, private_bytes())

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, private_bytes())


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


if __name__ == "__main__":
    main()
