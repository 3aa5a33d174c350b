"""Numbers and nulls as people write them: in YAML files and on the command line (C103, C111)."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.errors import ConfigError
from torchtune.recipes.params import FinetuneParams

CASES = Path(__file__).parent.parent / "cases"
NEEDED = ("model_checkpoint=m", "dataset=d.jsonl")


@dataclass(config=STRICT, kw_only=True)
class Numbers:
    """The keys of C111.yaml."""

    a_float: float
    b_float: float
    c_float: float
    d_float: float
    e_float: float
    f_float: float
    g_float: float
    h_int: int
    i_int: int
    j_int: int
    maybe: float | None = Field(default=1.0, gt=0, allow_inf_nan=True)


MEANT = {
    **{"a_float": 2e-5, "b_float": 2e-5, "c_float": 1e5, "d_float": 5e-4, "e_float": 0.5, "f_float": 2e-5},
    **{"g_float": 3.0, "h_int": 1000, "i_int": 3, "j_int": 1000, "maybe": 1.0},
}


def test_case_c111_yaml_numbers():
    """YAML 1.1 reads 2e-5 as text; the number is meant."""
    assert asdict(parse_params(Numbers, ["--config", str(CASES / "C111.yaml")])) == MEANT


def test_case_c111_command_line_numbers():
    """The same spellings on the command line give the same numbers."""
    lines = (CASES / "C111.yaml").read_text().splitlines()
    assert asdict(parse_params(Numbers, [line.replace(": ", "=", 1) for line in lines])) == MEANT


@pytest.mark.parametrize(
    ("argument", "said"),
    [("h_int=3.5", "h_int"), ("j_int=many", "j_int"), ("a_float=fast", "a_float"), ("a_float=nan", "a_float")],
)
def test_what_is_no_such_number_is_refused_by_key(argument, said):
    """Not truncated, not guessed."""
    with pytest.raises(ConfigError) as raised:
        parse_params(Numbers, ["--config", str(CASES / "C111.yaml"), argument])
    assert [problem.key for problem in raised.value.problems] == [said]
    assert argument.partition("=")[2] in str(raised.value)


@pytest.mark.parametrize(("written", "meant"), [("null", None), ("inf", math.inf), (".inf", math.inf), ("'1.0'", 1.0)])
def test_case_c103_norms_that_mean_something(written, meant):
    """null is off, inf only measures, quoted numbers are numbers."""
    assert parse_params(FinetuneParams, [*NEEDED, f"clip_grad_norm={written}"]).clip_grad_norm == meant


@pytest.mark.parametrize("written", ["0", "-1", "nan", "-.inf"])
def test_case_c103_norms_that_would_ruin_gradients(written):
    """torch would clip to zero, or flip the sign; refused before anything runs."""
    with pytest.raises(ConfigError, match="clip_grad_norm"):
        parse_params(FinetuneParams, [*NEEDED, f"clip_grad_norm={written}"])
