"""Private host memory of each rank while a sharded model is read and written: its shard, one tensor, a small constant.

    python benchmarks/checkpoint_memory.py                    a random checkpoint of 1.5 GB on 2 and on 4 ranks
    python benchmarks/checkpoint_memory.py --layers 2         a smaller one

Every rank samples what it has of memory that is no file's (RssAnon) while it reads the checkpoint under FSDP, writes
it, and writes it from the background. What it may have is above what it had before: reading, its shard and one tensor;
writing, one tensor; from the background, a copy of its shard besides. Exits with 1 where a rank had more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchtune.checkpoint.held import Held
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import masters, save_model
from torchtune.checkpoint.steps import write_step
from torchtune.checkpoint.tensor_writer import TensorWriter
from torchtune.checkpoint.training_state import save_training_state
from torchtune.distributed.mesh import MeshSizes, open_mesh
from torchtune.distributed.part import held_tensors
from torchtune.distributed.peers import open_peers
from torchtune.models.build import build_model
from torchtune.modules.stored import stored_shapes, stored_tensors
from torchtune.parallel.fsdp import apply_fsdp
from torchtune.training.allocator import keep_freed_memory

CONSTANT = 64 * 2**20  # buffers of files and sockets, what Python allocates on the way
MB = 2**20
SHARD_BYTES = 300 * 10**6


def main() -> None:
    """Measure each number of ranks in processes of its own, print a line for each rank and phase."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--param-dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-memory-"))
    try:
        num_bytes = make_checkpoint(folder / "source", num_layers=options.layers)
        print(f"a random checkpoint of {num_bytes / 1e9:.2f} GB in bf16, parameters in {options.param_dtype}")
        lines = [line for ranks in options.ranks for line in measure(folder, ranks, options.param_dtype)]
    finally:
        shutil.rmtree(folder)
    print("\n".join(show(line) for line in lines))
    sys.exit(any(line["peak"] > line["allowed"] for line in lines))


def show(line: dict[str, int | str]) -> str:
    """A line for people."""
    numbers = {key: f"{int(line[key]) / MB:6.0f} MB" for key in ("shard", "tensor", "peak", "allowed")}
    return (
        f"{line['ranks']} ranks, rank {line['rank']}, {line['phase']:<22} shard {numbers['shard']}  largest tensor "
        f"{numbers['tensor']}  peak above before {numbers['peak']}  allowed {numbers['allowed']}"
    )


def make_checkpoint(folder: Path, *, num_layers: int) -> int:
    """A Llama of random weights in bf16, in files of 300 MB; returns its bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = stored_shapes(build_model(config))
    files: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    num_bytes = total = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if num_bytes + size > SHARD_BYTES and files[-1]:
            files.append({})
            num_bytes = 0
        files[-1][name] = (shape, torch.bfloat16)
        num_bytes, total = num_bytes + size, total + size
    weight_map = {}
    for number, described in enumerate(files, start=1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        with TensorWriter(folder / file_name, described, {"format": "pt"}) as file:
            for name, (shape, dtype) in described.items():
                file.write(name, torch.empty(shape, dtype=dtype).normal_(std=0.02))
        weight_map.update(dict.fromkeys(described, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure(folder: Path, ranks: int, param_dtype: str) -> list[dict[str, int | str]]:
    """What each rank has at most in each phase, in bytes above what it had before."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    started = [
        context.Process(target=work, args=(rank, ranks, folder, param_dtype, queue), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if failed := [process.exitcode for process in started if process.exitcode]:
        raise SystemExit(f"a rank ended with {failed[0]}")
    lines = [line for _ in started for line in queue.get()]
    return sorted(lines, key=lambda line: (line["phase"], line["rank"]))


def work(rank: int, ranks: int, folder: Path, param_dtype: str, queue: mp.SimpleQueue) -> None:  # type: ignore[type-arg]
    """One rank: read, write, write from the background."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    dtype, device = getattr(torch, param_dtype), torch.device("cpu")
    out = folder / f"out-{ranks}"
    with keep_freed_memory(device), open_mesh(MeshSizes(), device) as mesh, open_peers() as peers:  # as recipes do
        checkpoint = open_checkpoint(folder / "source")
        with torch.device("meta"):
            model = build_model(checkpoint.config)
        whole = {name: tensor.numel() for name, tensor in stored_tensors(model).items()}
        apply_fsdp(model, mesh, dtype=torch.bfloat16)
        reading = peak_above(lambda: checkpoint.load_into(model, param_dtype=dtype))
        shard = sum(tensor.nbytes for tensor in held_tensors(model).values())
        largest = max(whole.values())

        def save(copied: bool) -> None:
            held = Held.by(model, peers, copied=copied)

            def write(step_folder: Path) -> None:
                save_model(step_folder, model, checkpoint, held=held)
                tensors = {"model": masters(model, checkpoint, held)}
                save_training_state(step_folder, tensors, {}, parts=held.parts, peers=peers)

            write_step(out, 1, write, peers=peers)

        writing = peak_above(lambda: save(copied=False))
        copying = peak_above(lambda: save(copied=True))
    held, saved = largest * dtype.itemsize, largest * 2
    phases = [
        ("1 reading", reading, held, shard + held),
        ("2 writing", writing, saved, saved),
        ("3 in the background", copying, saved, shard + saved),
    ]
    common = {"ranks": ranks, "rank": rank, "shard": shard}
    queue.put(
        [
            common | {"phase": phase, "peak": peak, "tensor": tensor, "allowed": allowed + CONSTANT}
            for phase, peak, tensor, allowed in phases
        ]
    )
    dist.destroy_process_group()


def peak_above(function: Callable[[], None]) -> int:
    """The most private memory during a call, above that before, in bytes."""
    before, highest, done = private_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, private_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return max(highest, private_bytes()) - before


def private_bytes() -> int:
    """What this process has in memory that is no file's."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
