"""What goes together on several ranks, by runs that cover every pair; the table of docs/distributed.md.

    python -m tests.parallel.pairs      writes the table anew

A run takes one value of each factor. Every pair of values that may stand together is in one run at least, and each
run is compared with one device that has neither the ranks nor what must not change a number. A pair that is refused
is refused by name, which a test of its own sees.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "distributed.md"
BEGIN, END = "<!-- made by tests/parallel/pairs.py -->\n", "<!-- end -->\n"

LORA = ("lora_rank=4",)
NUM_RANKS = 4
# Ranks that read other rows, by scheme; TP and CP share the rest with FSDP.
DATA_RANKS = {"TP": 2, "CP": 2}
# For each factor its values, and the keys that give them. The first of each is what one device has, for comparison.
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "method": {
        "full": (),
        "LoRA": LORA,
        "DoRA": (*LORA, "use_dora=true"),
        # Scales of scales are taken over a rank's share, so they are others on other ranks.
        "QLoRA": (*LORA, "base_quantization=nf4", "double_quantization=false"),
    },
    "model": {"dense": (), "mixture": ()},
    "scheme": {
        "replicate": ("data_parallel_replicate=4",),
        "FSDP": (),
        "HSDP": ("data_parallel_replicate=2",),
        "TP": ("tensor_parallel=2",),
        "CP": ("context_parallel=2",),
        "EP": ("expert_parallel=2",),
    },
    "rows": {"packed": ("packed=true",), "padded": ("packed=false",)},
    "accumulation": {
        "1 micro-batch": ("gradient_accumulation_steps=1",),
        "2 micro-batches": ("gradient_accumulation_steps=2",),
    },
    "checkpointing": {
        "none": (),
        "full": ("enable_activation_checkpointing=true",),
        "every 2nd": ("enable_activation_checkpointing=true", "ac_mode=selective", "ac_option=2"),
        "by operator": ("enable_activation_checkpointing=true", "ac_mode=selective", "ac_option=op"),
    },
    "compile": {"eager": (), "compiled": ("compile=true",)},
    "step": {"one step": (), "in backward": ("optimizer_in_bwd=true",)},
    "saves": {"wait": (), "asynchronous": ("enable_async_checkpointing=true",)},
}
# Values that are refused together, by whatever message; a test sees each refused.
REFUSED = {
    frozenset(pair)
    for pair in (
        ("EP", "dense"),
        ("by operator", "compiled"),
        ("in backward", "2 micro-batches"),
        ("in backward", "replicate"),
    )
}

Row = dict[str, str]


def allowed(row: Row) -> bool:
    """Whether no two of its values are refused together."""
    return all(frozenset(pair) not in REFUSED for pair in itertools.combinations(row.values(), 2))


def covering_rows(num_tries: int = 200) -> list[Row]:
    """Runs that have every allowed pair of values among them: each the best of some random ones, a new pair in it."""
    draw = random.Random(0)
    open_pairs = {
        frozenset(pair)
        for one, other in itertools.combinations(FACTORS, 2)
        for pair in itertools.product(FACTORS[one], FACTORS[other])
        if frozenset(pair) not in REFUSED
    }
    factor_of = {value: factor for factor, values in FACTORS.items() for value in values}
    rows = []
    while open_pairs:
        needed = min(open_pairs, key=sorted)
        fixed = {factor_of[value]: value for value in needed}
        candidates = [
            {factor: fixed.get(factor, draw.choice(list(values))) for factor, values in FACTORS.items()}
            for _ in range(num_tries)
        ]
        # To compile takes long, so it is done where a pair needs it.
        best = max(
            filter(allowed, candidates),
            key=lambda row: len(pairs_of(row) & open_pairs) - 8 * (row["compile"] == "compiled"),
        )
        rows.append(best)
        open_pairs -= pairs_of(best)
    return rows


def pairs_of(row: Row) -> set[frozenset[str]]:
    """The pairs of values that a run has."""
    return {frozenset(pair) for pair in itertools.combinations(row.values(), 2)}


def table() -> str:
    """Every value against every one of another factor: yes or refused."""
    covered = set().union(*map(pairs_of, covering_rows()))
    values = [(factor, value) for factor, of_factor in FACTORS.items() for value in of_factor]
    columns = [(factor, value) for factor, value in values if factor in ("method", "scheme")]
    lines = ["| | " + " | ".join(value for _, value in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for factor, value in values:
        if factor == "method":
            continue
        cells = []
        for other_factor, other in columns:
            pair = frozenset((value, other))
            shown = "" if factor == other_factor else "yes" if pair in covered else "refused"
            cells.append(shown)
        lines.append(f"| {factor}: {value} | " + " | ".join(cells) + " |")
    in_table = {value for _, value in columns}
    others = sorted(" with ".join(sorted(pair)) for pair in REFUSED if not pair & in_table)
    return "\n".join(lines) + f"\n\nRefused among the others: {'; '.join(others)}.\n"


def main() -> None:
    """Write the table into the document."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + "\n" + table() + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
