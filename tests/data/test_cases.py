"""Public reports, by their number: small files, and what is right for each."""

import json
import random
import time
from pathlib import Path

import pytest

from tests.tiny_checkpoint import CHATML
from tests.tiny_checkpoint import tiny_tokenizer as tiny_hf_tokenizer
from torchtune.data.dataset import open_dataset
from torchtune.data.options import DatasetOptions
from torchtune.errors import DataError
from torchtune.tokenizers.tokenizer import Tokenizer

CASES = Path(__file__).parent.parent / "cases"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    config = {"bos_token": "<s>", "eos_token": END, "pad_token": "<pad>"}
    return Tokenizer.from_json(tiny_hf_tokenizer().backend_tokenizer.to_str().encode(), config)


@pytest.fixture
def prepared(tokenizer):
    """Check a case's file."""

    def run(name, *, template=CHATML, max_seq_len=4096, **options):
        path = CASES / name if isinstance(name, str) else name
        dataset = open_dataset(DatasetOptions(path=str(path), **options), tokenizer, template, stop_tokens=[END])
        return dataset.prepare(max_seq_len=max_seq_len)

    return run


@pytest.fixture
def trained(prepared, tokenizer):
    """The trained texts of each row that gives samples, by its line."""

    def run(name, **options):
        data = prepared(name, **options)
        found = {}
        for row in range(data.num_rows):
            for sample in data.samples_of(row):
                line = int(sample.source.rpartition(":")[2])
                found.setdefault(line, []).extend(spans(sample, tokenizer))
        return found

    return run


def spans(sample, tokenizer):
    texts, ids = [], []
    for token, is_trained in [*zip(sample.input_ids.tolist(), sample.trained.tolist(), strict=True), (0, False)]:
        if is_trained:
            ids.append(token)
        elif ids:
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
    return texts


def refusal(prepared, name, **options):
    with pytest.raises(DataError) as caught:
        prepared(name, **options)
    return str(caught.value)


def test_c001_role_names_of_sharegpt(prepared, trained):
    """Known names are mapped; an unknown one is told with line and the nearest."""
    said = refusal(prepared, "C001.jsonl")
    assert "C001.jsonl:6" in said
    assert "'hummany'; did you mean 'human'?" in said
    found = trained("C001.jsonl", on_bad_row="skip")
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert found[1] == ["The Glomma." + END]
    assert found[3] == ['{"name": "weather", "arguments": {"city": "Lund"}}' + END, "It is four degrees in Lund." + END]


def test_c005_a_byte_order_mark_is_no_text(prepared, tmp_path):
    """The same samples as without it."""
    path = CASES / "C005.jsonl"
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert path.read_bytes() != plain.read_bytes()
    ids = [
        [s.input_ids.tolist() for row in range(d.num_rows) for s in d.samples_of(row)]
        for d in map(prepared, (path, plain))
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("name", "line"), [("C006a", 3), ("C006b", 4), ("C006c", 2)])
def test_c006_broken_lines(prepared, name, line):
    """File, line, column and the line's start."""
    said = refusal(prepared, f"{name}.jsonl")
    assert f"{name}.jsonl:{line}" in said
    assert "column" in said


def test_c007_line_ends_and_blank_lines(prepared, tokenizer):
    """Four rows; the content keeps its own carriage return and no other appears."""
    data = prepared("C007.jsonl")
    texts = [
        tokenizer.decode(s.input_ids, skip_special_tokens=False)
        for r in range(data.num_rows)
        for s in data.samples_of(r)
    ]
    assert len(texts) == 4
    assert ["\r" in text for text in texts] == [False, True, False, False]
    assert "\r\n" in texts[1]


def test_c013_the_ways_of_having_no_input(prepared, tokenizer):
    """Empty, null, absent and spaces give one prompt; null output is refused; None is never written."""
    assert "C013.jsonl:6" in refusal(prepared, "C013.jsonl")
    data = prepared("C013.jsonl", on_bad_row="skip")
    ids = [data.samples_of(row)[0].input_ids.tolist() for row in range(5)]
    assert ids[0] == ids[1] == ids[2] == ids[3] != ids[4]
    assert not any("None" in tokenizer.decode(each) for each in ids)
    said = refusal(prepared, "C013.jsonl", columns={"instruction": "question"}, format="alpaca")
    assert "question" in said
    assert "instruction" in said


def test_c014_several_candidate_columns(prepared, trained):
    """The choice and what is ignored are told; a named column overrides; an absent one is refused."""
    assert "ignored columns: id, text, score, label" in str(prepared("C014.jsonl").report)
    assert trained("C014.jsonl")[1] == ["Answer 0." + END]
    assert trained("C014.jsonl", format="text")[1] != ["Answer 0." + END]
    assert "absent" in refusal(prepared, "C014.jsonl", columns={"text": "absent"}, format="text")


@pytest.mark.parametrize(("name", "num_rows"), [("C015a.json", 2), ("C015b.jsonl", 2)])
def test_c015_the_suffix_does_not_decide(prepared, name, num_rows):
    """Lines in a .json, an array in a .jsonl."""
    assert prepared(name).num_rows == num_rows


def test_c015_one_object_over_many_lines(prepared):
    """One row."""
    assert prepared("C015c.jsonl").num_rows == 1


def test_c016_a_book_in_a_row_takes_linear_time(prepared, tmp_path):
    """Ten times the length takes at most fifteen times the time, with a floor for the clock."""

    def seconds(length):
        path = tmp_path / f"{length}.jsonl"
        path.write_text('{"text": "' + "a" * length + '"}\n{"text": "short"}\n')
        start = time.perf_counter()
        data = prepared(path, max_seq_len=64, too_long="drop")
        assert str(length // 1000)[:1] in str(data.report)
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(300_000) <= max(15 * seconds(30_000), 2.0)


def test_c017_empty_rows(prepared, trained):
    """Five are told by line and reason, two are kept."""
    said = refusal(prepared, "C017.jsonl")
    assert all(f"C017.jsonl:{line}" in said for line in (2, 3, 4, 5, 6))
    assert sorted(trained("C017.jsonl", on_bad_row="skip")) == [1, 7]


def test_c020_tool_calls(trained, prepared, tokenizer):
    """Calls and answers are trained; tool output, schema and the word None are not."""
    found = trained("C020.jsonl")
    assert len(found[1]) == 2
    assert found[1][0].count('"name": "add"') == 2
    assert found[1][1].endswith(END)
    data = prepared("C020.jsonl")
    assert "None" not in tokenizer.decode(data.samples_of(0)[0].input_ids)
    with_tools = CHATML.replace("{% for m", "{{ tools | tojson if tools else '' }}{% for m", 1)
    assert len(prepared("C020.jsonl", template=with_tools).samples_of(0)[0]) > len(data.samples_of(0)[0])


def test_c021_content_in_parts(prepared, trained):
    """Text parts are text; images are refused by line."""
    said = refusal(prepared, "C021.jsonl")
    assert "C021.jsonl:2" in said
    assert "'image'" in said
    assert trained("C021.jsonl", on_bad_row="skip") == {1: ["Right." + END]}


def test_c023_flags_of_single_messages(prepared, trained, tokenizer):
    """weight 0 and train false train nothing; a fraction is refused; the keys are not in the text."""
    assert "C023.jsonl:3" in refusal(prepared, "C023.jsonl")
    found = trained("C023.jsonl", on_bad_row="skip")
    assert found == {1: ["Good greeting." + END], 2: ["No weight given." + END], 4: ["Train me." + END]}


def test_c024_a_template_without_a_system_role(prepared, trained, tokenizer):
    """Its own words, the first line, how many rows, the remedy; folding keeps the text and the trained words."""
    template = (CASES / "C024.jinja").read_text()
    said = refusal(prepared, "C024.jsonl", template=template)
    for part in ("C024.jsonl:2", "This model has no system role", "2 of 4 rows", "dataset.system=fold"):
        assert part in said
    found = trained("C024.jsonl", template=template, system="fold")
    assert sorted(found) == [1, 2, 3, 4]


def test_c025_turns_that_do_not_alternate(prepared, trained):
    """As C024, with merging as the remedy."""
    template = (CASES / "C024.jinja").read_text()
    said = refusal(prepared, "C025.jsonl", template=template)
    assert "C025.jsonl:2" in said
    assert "dataset.merge_turns=true" in said
    assert sorted(trained("C025.jsonl", template=template, merge_turns=True)) == [1, 2, 3]


def test_c030_a_template_without_generation_marks(trained):
    """Each answer and its turn's end, nothing else."""
    template = (CASES / "C030.jinja").read_text()
    found = trained("C030.jsonl", template=template)
    assert all(text.endswith(END) for texts in found.values() for text in texts)
    rows = [json.loads(line)["messages"] for line in (CASES / "C030.jsonl").read_text().splitlines()]
    answers = [[m["content"] + END for m in messages if m["role"] == "assistant"] for messages in rows]
    assert [found[1], found[2]] == answers


def test_c039_every_turn_is_trained_unless_the_last_is_asked_for(trained):
    """All three, or the last."""
    answers = [f"{which} answer." + END for which in ("First", "Second", "Third")]
    assert trained("C039.jsonl")[1] == answers
    assert trained("C039.jsonl", train_on="last_assistant")[1] == answers[-1:]


def test_c040_what_is_cut_is_counted(prepared):
    """Two of four have nothing left; all such: refused."""
    data = prepared("C040.jsonl", max_seq_len=64)
    assert "2 of 4 samples have nothing to train after truncation" in str(data.report)
    assert sum(s.num_trained for row in range(4) for s in data.samples_of(row)) == data.report.num_trained
    with pytest.raises(DataError, match="nothing is left to train on"):
        prepared("C040.jsonl", max_seq_len=4)


def test_c045_a_role_by_its_older_name(trained):
    """Roles are one name after reading; a data set that trains nothing can't pass."""
    assert trained("C001.jsonl", on_bad_row="skip")[2] == ["Blue." + END]


@pytest.mark.parametrize("policy", ["drop", "truncate", "split", "error"])
def test_c052_samples_at_and_over_the_limit(prepared, tmp_path, tokenizer, policy):
    """A sample of exactly the limit is whole; longer ones follow the policy and are counted."""
    rng = random.Random(0)
    path = tmp_path / "texts.jsonl"
    words = ["a", "b", "c", "d"]
    lengths = [59, 60, 120, 29]  # and one more each for the end of the text
    path.write_text("".join(json.dumps({"text": "".join(rng.choices(words, k=n))}) + "\n" for n in lengths))
    counts = [len(tokenizer.encode(line.split('"')[3]).ids) + 1 for line in path.read_text().splitlines()]
    limit = counts[0]
    if policy == "error":
        with pytest.raises(DataError, match="longer than max_seq_len"):
            prepared(path, max_seq_len=limit, too_long=policy)
        return
    data = prepared(path, max_seq_len=limit, too_long=policy)
    kept = [[len(s) for s in data.samples_of(row)] for row in range(4)]
    assert kept[0] == [limit]
    assert kept[3] == [counts[3]]
    wanted = {"drop": 0, "truncate": limit, "split": counts[2]}[policy]
    assert sum(kept[2]) == wanted
    assert "longer than max_seq_len" in str(data.report)
