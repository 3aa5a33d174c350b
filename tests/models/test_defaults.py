"""What a config.json leaves out is what transformers takes for it."""

import json

import pytest

from tests.models.oracle import check_other_spelling
from tests.models.support import PARTS, config_of
from torchtune.models.build import FILES

WITHOUT_ROTARY = {"gpt2"}
# transformers saves a Llama 4 of its causal class as the text model that it is.
WITH_TEXT_PART = set(PARTS) - {"llama4"}


@pytest.mark.parametrize("model_type", sorted({*FILES} - WITHOUT_ROTARY))
def test_rotary_options_that_are_left_out(tmp_path, model_type):
    """The family's own base, kind and share of the head, not those of the family that it is made of."""
    config = config_of(model_type)
    key = "text_config.rope_parameters" if model_type in WITH_TEXT_PART else "rope_parameters"
    assert "rope_parameters" in json.dumps(config.to_dict())
    check_other_spelling(tmp_path, config, {}, without=[key])
