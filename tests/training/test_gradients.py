"""Every trained parameter is reached by the backward pass, or the run says so."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.models.support import config_of
from torchtune.errors import TrainingError
from torchtune.models.build import FILES, build_model
from torchtune.modules.documents import Documents
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.training.gradients import check_all_reached


class Reentrant(torch.nn.Module):
    """A layer, checkpointed in the old way: its gradients are lost where its input needs none."""

    def __init__(self, size):
        super().__init__()
        self.linear = torch.nn.Linear(size, size)

    def forward(self, x):
        return checkpoint(self.linear, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_case_c086_a_layer_without_a_gradient_is_told():
    """Frozen embeddings under reentrant checkpointing: the first layer is named, the reached and the frozen are not."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), Reentrant(4), torch.nn.Linear(4, 4), Reentrant(4))
    model[0].weight.requires_grad_(False)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TrainingError, match=r"2 of 6 .*: 1\.linear\.weight, 1\.linear\.bias\. Nothing"):
        check_all_reached(model)


def test_not_more_than_a_few_are_named():
    """The others are counted."""
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(8))
    with pytest.raises(TrainingError, match=r"8 of 8 .*: 0\.weight, .*, 4\.weight and 3 more\."):
        check_all_reached(model)


@pytest.mark.parametrize("model_type", sorted(FILES))
def test_no_family_has_a_parameter_that_a_step_misses(model_type):
    """One trained token reaches all: experts that no token was sent to have gradients of zeros."""
    torch.manual_seed(0)
    model = build_model(config_of(model_type).to_dict()).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    documents, labels = Documents.from_lengths([2]), torch.tensor([4, -100])
    loss = model(torch.tensor([3, 4]), documents, labels=labels, trained=torch.tensor([0]), loss=LinearCrossEntropy())
    loss.backward()
    check_all_reached(model)
