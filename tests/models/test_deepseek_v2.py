"""DeepSeek V2 against transformers."""

import pytest
from transformers import DeepseekV2Config

from tests.models.oracle import check_family, check_other_spelling
from tests.models.test_deepseek_v3 import SMALL, YARN

LITE = SMALL | {"q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None}
BY_GROUP = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        BY_GROUP | {"q_lora_rank": 12, "routed_scaling_factor": 2.5, "rope_parameters": YARN},
        {"attention_bias": True, "mlp_bias": True, "q_lora_rank": 12, "first_k_dense_replace": 2, "v_head_dim": 28},
    ],
)
def test_equals_transformers(tmp_path, changes):
    """Experts among all and by group, with biases, yarn in the scale, values larger than keys."""
    check_family(tmp_path, DeepseekV2Config(**LITE | changes))


def test_equals_transformers_where_the_config_is_of_the_release(tmp_path):
    """`rope_scaling` with `type`, the base at the top level, and keys of DeepSeek's own code."""
    old = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    own = {"scoring_func": "softmax", "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
    check_other_spelling(
        tmp_path,
        DeepseekV2Config(**LITE),
        {"rope_scaling": old, "rope_theta": 500, **own},
        without=["rope_parameters", "head_dim", "qk_head_dim"],
    )
