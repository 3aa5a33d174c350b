"""The loss on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from torchtune.data.batch import Batch
from torchtune.distributed.mesh import Mesh
from torchtune.errors import DataError
from torchtune.modules.decoder import CausalLM
from torchtune.parallel.context_parallel import shard_context
from torchtune.parallel.fsdp import reshard


@torch.no_grad()
def held_out_loss(
    model: CausalLM,
    steps: Iterable[list[Batch]],
    loss_fn: Callable[..., torch.Tensor],
    mesh: Mesh,
    device: torch.device,
) -> float:
    """Mean cross-entropy over every trained token of the held-out data, in nats.

    One sum over all tokens and ranks, divided once: a mean of batch means would change with the batch size.

    Args:
        steps: an epoch of the held-out loader.
    Raises:
        DataError: the held-out data has no token to predict.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for micro_batches in steps:
        for batch in micro_batches:
            batch = shard_context(batch, mesh.context, multiple=mesh.tensor.size).to(device)
            loss = model(batch.input_ids, batch.documents, labels=batch.labels, trained=batch.trained, loss=loss_fn)
            total[0] += loss.double()
            total[1] += batch.num_trained
    model.train(was_training)
    reshard(model)
    loss_sum, num_trained = mesh.tokens.sum(total).tolist()
    if num_trained == 0:
        raise DataError("the held-out data has no trained token to measure the loss on")
    return loss_sum / num_trained
