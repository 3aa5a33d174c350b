"""A Hugging Face-layout folder as a source of weights: one safetensors file, or shards with an index."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from torchtune.checkpoint.headers import TensorHeader, read_json, read_safetensors_header
from torchtune.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of a folder, read one at a time.

    Raises:
        CheckpointError: files are missing, cut, or disagree with the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers = self._headers()
        self._open: dict[Path, safe_open] = {}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the type that it is saved in, on the CPU."""
        file = self.headers[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()

    def _headers(self) -> dict[str, TensorHeader]:
        if (self.path / INDEX).exists():
            return self._sharded_headers(self.path / INDEX)
        if (self.path / SINGLE).exists():
            return read_safetensors_header(self.path / SINGLE)
        others = sorted(p.name for p in self.path.glob("*.safetensors"))
        if len(others) == 1:
            return read_safetensors_header(self.path / others[0])
        if others:
            raise CheckpointError(f"has several safetensors files but no {INDEX}: {', '.join(others)}", path=self.path)
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"holds its weights as {', '.join(pickles[:3])} only: pickles, which can run code when they are read. "
                'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{self.path}').save_pretrained('{self.path}-safetensors')\"",
                path=self.path,
            )
        raise CheckpointError(f"holds no weights: neither {SINGLE} nor {INDEX}", path=self.path)

    def _sharded_headers(self, index: Path) -> dict[str, TensorHeader]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError("has no 'weight_map'", path=index)
        headers: dict[str, TensorHeader] = {}
        for file_name in sorted(set(weight_map.values())):
            names = [name for name, file in weight_map.items() if file == file_name]
            file = self.path / file_name
            if Path(file_name).name != file_name:
                raise CheckpointError(f"names the file '{file_name}', which is outside its folder", path=index)
            if not file.exists():
                raise CheckpointError(
                    f"names {file_name}, which is missing; it holds {len(names)} tensors. Download it again", path=index
                )
            shard = read_safetensors_header(file)
            if absent := sorted(set(names) - set(shard)):
                raise CheckpointError(f"says that {file_name} holds '{absent[0]}', which it does not", path=index)
            headers.update({name: shard[name] for name in names})
        return headers
