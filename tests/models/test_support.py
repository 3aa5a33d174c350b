"""The table of docs/models.md says what the checks find."""

import pytest

from tests.models.support import BEGIN, DOCUMENT, END, row
from torchtune.models.build import FILES


@pytest.mark.parametrize("model_type", sorted(FILES))
def test_the_table_has_the_family_as_it_is(tmp_path, two_ranks, model_type):
    """Write it anew with `python -m tests.models.support` where this fails and the change is meant."""
    table = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert row(model_type, tmp_path, two_ranks) in table
