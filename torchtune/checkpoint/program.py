"""A model as a program of torch.export: traced without weights, then filled with them and written.

It takes input_ids [B, S], any number of rows of any length, and gives logits [B, S, V]. Where torch is installed,
`torch.export.load(path).module()` runs it; nothing of this package is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from torchtune.errors import UnsupportedError
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM


def trace_program(config: Mapping[str, Any], dtype: torch.dtype) -> ExportedProgram:
    """The program of a config's model, for the CPU; its weights are stand-ins without values.

    Args:
        dtype: of the weights, and what is computed in.
    Raises:
        UnsupportedError: the model does something that depends on values; names it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to load

    with torch.device("meta"):
        model: CausalLM = build_model(config).to(dtype)
    decoder = model.model
    longest = decoder.embed_positions.num_embeddings if decoder.has_learned_positions else None
    dims = {"input_ids": {0: Dim("batch"), 1: Dim("tokens", max=longest)}}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu").eval()
        # Sizes of one would be taken for constants.
        input_ids = torch.zeros(2, 3, dtype=torch.int64)
    try:
        with torch.no_grad():
            return torch.export.export(model, (input_ids,), dynamic_shapes=dims, strict=False)
    except Exception as error:  # whatever torch came upon
        reason, *_ = f"{error}\n".splitlines()
        raise UnsupportedError(
            f"model_type '{config.get('model_type')}' can't be traced by torch.export: {reason}; "
            "export it with format=safetensors"
        ) from error


def write_program(program: ExportedProgram, path: Path, values: Callable[[str, Tensor], Tensor]) -> None:
    """Give a traced program its weights and write it.

    Args:
        values: makes of a parameter's name and its stand-in what it is; called once for each.
    """
    state = program.state_dict
    for name, stand_in in state.items():
        value = values(name, stand_in).detach().to(dtype=stand_in.dtype, device="cpu")
        state[name] = nn.Parameter(value, requires_grad=False) if isinstance(stand_in, nn.Parameter) else value
    program.example_inputs = ((torch.zeros(2, 3, dtype=torch.int64),), {})
    torch.export.save(program, path)
