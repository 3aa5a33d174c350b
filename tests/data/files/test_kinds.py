"""Files of every kind give the rows that were written, with places that lead back to them."""

import csv
import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from torchtune.data.files.find import How
from torchtune.data.rows import open_rows
from torchtune.errors import DataError, UnsupportedError

PAIRS = [
    {"prompt": "plain", "completion": "yes"},
    {"prompt": 'with "quotes", commas; semicolons\tand tabs', "completion": "two\nlines\r\nand a third"},
    {"prompt": "ünïcode 🎉", "completion": " spaces around "},
    {"prompt": "long", "completion": "x" * 200_000},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "id": 1},
    {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "2", "name": "add"},
        ],
        "id": 2,
    },
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHTUNE_CACHE", str(tmp_path / "cache"))


def csv_text(rows, delimiter=",", newline="\r\n"):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_table(path, rows, kind):
    import pyarrow as pa
    import pyarrow.feather as feather
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif kind == "feather":
        feather.write_feather(table, path, compression="lz4")
    else:
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_text(lines(rows), encoding="utf-8"),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "rows.csv": lambda path, rows: path.write_bytes(csv_text(rows).encode()),
    "semicolon.csv": lambda path, rows: path.write_bytes(csv_text(rows, ";", "\n").encode("utf-8-sig")),
    "rows.tsv": lambda path, rows: path.write_bytes(csv_text(rows, "\t").encode()),
    "rows.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "rows.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(csv_text(rows).encode())),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(zstd(lines(rows).encode())),
    "rows.parquet": lambda path, rows: write_table(path, rows, "parquet"),
    "rows.arrow": lambda path, rows: write_table(path, rows, "file"),
    "stream.arrow": lambda path, rows: write_table(path, rows, "stream"),
    "rows.feather": lambda path, rows: write_table(path, rows, "feather"),
    "csv_without_suffix": lambda path, rows: path.write_bytes(csv_text(rows).encode()),
    "tsv_without_suffix": lambda path, rows: path.write_bytes(csv_text(rows, "\t").encode()),
    "no_suffix": lambda path, rows: path.write_text(lines(rows), encoding="utf-8"),
    "parquet_without_suffix": lambda path, rows: write_table(path, rows, "parquet"),
}


def zstd(content):
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_every_kind(tmp_path, name):
    """By index, in any order, after being sent to another process, and with a place for each."""
    path = tmp_path / name
    WRITERS[name](path, PAIRS)
    rows = open_rows(path)
    assert [row.record for row in rows] == PAIRS
    assert [row.record for row in pickle.loads(pickle.dumps(rows))] == PAIRS
    assert rows.select(np.array([3, 1]))[1].record == PAIRS[1]
    assert all(row.source.startswith(f"{path}:") for row in rows)


def test_csv_places_are_physical_lines(tmp_path):
    """The third record begins behind one that spans three lines."""
    path = tmp_path / "rows.csv"
    WRITERS["rows.csv"](path, PAIRS)
    assert [row.source.rpartition(":")[2] for row in open_rows(path)] == ["2", "3", "6", "7"]


@pytest.mark.parametrize(("name", "kind"), [("a.parquet", "parquet"), ("a.arrow", "file"), ("a.arrow", "stream")])
def test_tables_nulls_are_dropped_within_a_row(tmp_path, name, kind):
    """Arrow gives every message all keys of every other; what it filled with null was not written."""
    path = tmp_path / name
    write_table(path, MESSAGES, kind)
    assert [row.record for row in open_rows(path)] == MESSAGES


def test_a_folder_of_the_datasets_library(tmp_path):
    """One data set, and several splits: `train` unless another is named."""
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(PAIRS)
    one.save_to_disk(str(tmp_path / "one"))
    assert [row.record for row in open_rows(tmp_path / "one")] == PAIRS
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "two"))
    assert [row.record for row in open_rows(tmp_path / "two")] == PAIRS
    assert [row.record for row in open_rows(tmp_path / "two", how=How(split="test"))] == [PAIRS[2]]
    with pytest.raises(DataError, match="did you mean 'test'"):
        open_rows(tmp_path / "two", how=How(split="tset"))


def test_folders_and_patterns(tmp_path):
    """All data files of a folder in the order of their names; a folder parted by split gives what is trained on."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name, row in (("b.jsonl", 1), ("a.jsonl", 0), ("sub/c.csv", 2)):
        WRITERS["rows.csv" if name.endswith("csv") else "rows.jsonl"](tmp_path / "data" / name, [PAIRS[row]])
    (tmp_path / "data" / "README.md").write_text("about the data")
    (tmp_path / "data" / ".hidden.jsonl").write_text("broken")
    assert [row.record for row in open_rows(tmp_path / "data")] == PAIRS[:3]
    assert [row.record for row in open_rows(str(tmp_path / "data" / "*.jsonl"))] == PAIRS[:2]
    assert [row.record for row in open_rows(str(tmp_path / "data" / "**" / "*.csv"))] == [PAIRS[2]]
    split = tmp_path / "split"
    split.mkdir()
    for name, row in (("train-0.jsonl", 0), ("train-1.jsonl", 1), ("test-0.jsonl", 2)):
        WRITERS["rows.jsonl"](split / name, [PAIRS[row]])
    assert [row.record for row in open_rows(split)] == PAIRS[:2]
    assert [row.record for row in open_rows(split, how=How(split="test"))] == [PAIRS[2]]
    with pytest.raises(DataError, match="splits there: "):
        open_rows(split, how=How(split="validation"))


def test_plain_text(tmp_path):
    """A document a file; paragraphs and lines on request."""
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOne.\r\nStill one.\r\n\r\nTwo.\n \n\nThree.\n".encode())
    (document,) = open_rows(path)
    assert document.record == {"text": "One.\r\nStill one.\r\n\r\nTwo.\n \n\nThree.\n"}
    paragraphs = open_rows(path, how=How(sample_by="paragraph"))
    assert [row.record["text"].strip() for row in paragraphs] == ["One.\r\nStill one.", "Two.", "Three."]
    assert [row.source.rpartition(":")[2] for row in paragraphs] == ["1", "4", "7"]
    by_line = open_rows(path, how=How(sample_by="line"))
    assert [row.record["text"] for row in by_line] == ["One.", "Still one.", "Two.", "Three."]


def test_standard_input(monkeypatch):
    """`-` is read once, whatever kind it is."""

    class Stdin:
        buffer = io.BytesIO(lines(PAIRS).encode())

    monkeypatch.setattr("sys.stdin", Stdin)
    rows = open_rows("-")
    assert [row.record for row in rows] == PAIRS
    assert rows[0].source == "standard input:1"


REFUSED = {
    "short.csv": (b"prompt,completion\na,b\nc\n", "short.csv:3: the row has 1 field"),
    "open.csv": (b'prompt,completion\na,b\n"c,d\n', "open.csv:3: a quote that opens in this row is never closed"),
    "twice.csv": (b"a,a\n1,2\n", "names a twice"),
    "header.csv": (b"prompt,completion\n", "no rows"),
    "latin.csv": (b"prompt,completion\n\xe4,b\n", "latin.csv:2: not UTF-8 text"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16"),
    "zeros.txt": (b"a\0b", "zero byte"),
    "empty.jsonl": (b"", "the file is empty"),
    "blank.txt": (b" \n\n", "only white space"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 100)[:-9], "is damaged"),
    "no.parquet": (b"PAR1 and nothing", "not a whole Parquet file"),
    "no.arrow": (b"ARROW1\0\0cut", "not a whole Arrow file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_broken_is_told_by_place(tmp_path, name):
    """With the file, and the line where there is one; nothing is left in the cache."""
    content, said = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(open_rows(path))
    assert said in str(raised.value)
    assert name in str(raised.value)
    assert not list(Path(tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize(("name", "said"), [("a.xlsx", "Excel"), ("a.zip", "zip"), ("a.pkl", "pickle")])
def test_other_kinds_are_refused_by_name(tmp_path, name, said):
    """And not read as text."""
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedError, match=said):
        open_rows(tmp_path / name)


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    """So are an empty folder and a pattern without a match."""
    (tmp_path / "chats.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    for path, said in (("chat.jsonl", "did you mean 'chats.jsonl'"), ("empty", "holds nothing"), ("*.csv", "no file")):
        with pytest.raises(DataError, match=said):
            open_rows(tmp_path / path)


def test_a_changed_source_is_unpacked_again(tmp_path):
    """The cache goes by size and time."""
    path = tmp_path / "rows.jsonl.gz"
    WRITERS["rows.jsonl.gz"](path, PAIRS[:1])
    assert len(open_rows(path)) == 1
    WRITERS["rows.jsonl.gz"](path, PAIRS)
    assert len(open_rows(path)) == len(PAIRS)
