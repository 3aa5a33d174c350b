"""A task of lm-eval's for each kind of request, as files, over rows of a file."""

import json

import torch
import yaml

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "it",
    "rained",
    "and",
    "rained",
]


def sentence(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())


def write_tasks(folder):
    """local_choice, local_likelihood, local_rolling, local_until."""
    rows = [
        {"question": sentence(n, 5 + n % 9), "choices": [sentence(10 * n + c, 1 + c) for c in range(4)], "label": n % 4}
        for n in range(16)
    ]
    rows[3]["choices"] = ["one", "two", "six", "ten"]
    (folder / "rows.json").write_text(json.dumps(rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json"), "train": str(folder / "rows.json")}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{question}}\nAnswer:",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    acc = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    named = {
        "local_choice": {**common, **choice, "metric_list": acc},
        "local_likelihood": {
            **common,
            "output_type": "loglikelihood",
            "doc_to_target": "{{choices[2]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        "local_rolling": {
            **common,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{(question + ' ') * 30}}",
            "metric_list": [
                {"metric": name, "aggregation": aggregation, "higher_is_better": False}
                for name, aggregation in (
                    ("word_perplexity", "weighted_perplexity"),
                    ("bits_per_byte", "bits_per_byte"),
                )
            ],
        },
        "local_until": {
            **common,
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, task in named.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
