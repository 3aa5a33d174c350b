"""Training a model of ours and PEFT's on the same batches, step by step."""

import torch
from torch.nn import functional as F

from tests.adapters.peft_oracle import token_ids, trained_parameters

STEPS = 20


def batches():
    """Ids [2, 12] and labels, of which each position says what comes next; some are not trained."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = token_ids(2, 12, seed=step)
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = torch.where(torch.rand(2, 11, generator=generator) < 0.7, ids[:, 1:], -100)
        yield ids, labels


def train_ours(model, optimizer):
    """The loss of each step, the head fused with it as in the recipe."""
    model.train()
    losses = []
    for ids, labels in batches():
        optimizer.zero_grad()
        loss = model(ids, labels=labels) / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_theirs(model, optimizer):
    """The same, the loss written out. The model stays in evaluation: GPT-2 has dropout outside of its adapter."""
    losses = []
    for ids, labels in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_all(build):
    """Makes the optimizer of all that is trained."""
    return lambda model: build(trained_parameters(model).values())


def check_same_steps(ours, theirs, optimizers):
    """Losses within 1e-4, and whatever is trained moves.

    Args:
        optimizers: what makes ours and theirs, of a model each.
    """
    begin = {name: parameter.detach().clone() for name, parameter in trained_parameters(ours).items()}
    losses = train_ours(ours, optimizers[0](ours))
    torch.testing.assert_close(losses, train_theirs(theirs, optimizers[1](theirs)), rtol=0, atol=1e-4)
    still = [name for name, value in trained_parameters(ours).items() if value.equal(begin[name])]
    assert begin
    assert not still, f"did not move: {still}"
