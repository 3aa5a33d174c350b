"""Rows for the benchmarks: questions about Python's own library, answered by its docstrings. The same on each run."""

from __future__ import annotations

import importlib
import inspect
import json
import random
from pathlib import Path

MODULES = """
argparse ast asyncio base64 bisect calendar cmath collections configparser contextlib copy csv ctypes datetime
decimal difflib dis email.message enum fractions functools glob gzip heapq html http.client inspect io
ipaddress itertools json logging math mimetypes multiprocessing operator os os.path pathlib pickle platform
pprint queue random re sched shelve shlex shutil signal socket sqlite3 statistics string struct subprocess
tarfile tempfile textwrap threading time timeit tokenize traceback types typing unicodedata unittest
urllib.parse uuid weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib
""".split()


def chat_rows(num_rows: int, *, min_chars: int = 120, max_chars: int = 1500) -> list[dict[str, str]]:
    """Questions and answers of varied length, in a shuffled order that is always the same."""
    rows = []
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not attribute.startswith("_") else None
            if text and len(text) >= min_chars:
                rows.append({"question": f"What does {name}.{attribute} do in Python?", "answer": text[:max_chars]})
    random.Random(0).shuffle(rows)
    return rows[:num_rows]


def write_rows(folder: Path, num_rows: int) -> tuple[Path, Path]:
    """The same rows as each side reads them: `messages` for ours, conversational prompt and completion for TRL."""
    ours, theirs = folder / "messages.jsonl", folder / "prompt_completion.jsonl"
    with ours.open("w", encoding="utf-8") as messages, theirs.open("w", encoding="utf-8") as pairs:
        for row in chat_rows(num_rows):
            user = {"role": "user", "content": row["question"]}
            assistant = {"role": "assistant", "content": row["answer"]}
            messages.write(json.dumps({"messages": [user, assistant]}) + "\n")
            pairs.write(json.dumps({"prompt": [user], "completion": [assistant]}) + "\n")
    return ours, theirs
