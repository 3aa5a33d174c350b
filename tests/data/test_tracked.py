"""Tracked texts against an oracle that can't be fooled: each field is written in letters of its own."""

import random

import pytest

from torchtune.data.tracked import Tracked, concat, covered, formatted, join, mark

FIRST, SECOND = (0, "content"), (1, "content")


def letters_of(text: str) -> list[object]:
    """Where each character comes from, by what it is: a-m the first field, n-z the second, else the template."""
    return [FIRST if c in "abcdefghijklm" else SECOND if c in "nopqrstuvwxyz" else None for c in text.lower()]


def labels_of(text: Tracked) -> list[object]:
    labels: list[object] = [None] * len(text)
    for start, end, label in text.spans:
        labels[start:end] = [label] * (end - start)
    return labels


def mixed(rng: random.Random) -> Tracked:
    """Pieces of both fields and the template's own characters (digits, blanks)."""
    pieces = []
    for _ in range(rng.randint(0, 6)):
        kind = rng.randint(0, 2)
        alphabet = ("abm ", "nyz ", "01 \n")[kind]
        text = "".join(rng.choice(alphabet).strip() or "0" for _ in range(rng.randint(0, 4)))
        pieces.append((mark(text, FIRST), mark(text, SECOND), text)[kind] if "0" not in text or kind == 2 else "")
        pieces.append(rng.choice(["", " ", "\n", "1"]))
    return concat(pieces)


OPERATIONS = {
    "strip": lambda t: t.strip(),
    "strip of letters": lambda t: t.strip("ab1"),
    "lstrip": lambda t: t.lstrip(),
    "rstrip": lambda t: t.rstrip("\n"),
    "slice": lambda t: t[1:-2],
    "empty slice": lambda t: t[3:1],
    "backwards": lambda t: t[::-1],
    "every second": lambda t: t[::2],
    "add": lambda t: "x1"[1:] + t + "2",
    "times": lambda t: t * 2,
    "upper": lambda t: t.upper(),
    "swapcase": lambda t: t.swapcase(),
    "last of split": lambda t: t.split("1")[-1],
    "split on white space": lambda t: concat(t.split()),
    "split on white space, once": lambda t: t.split(None, 1)[-1] if t.split() else t,
    "rsplit": lambda t: t.rsplit("1", 1)[0],
    "splitlines": lambda t: concat(t.splitlines()),
    "splitlines, ends kept": lambda t: concat(t.splitlines(True)),
    "partition": lambda t: t.partition("1")[2],
    "rpartition": lambda t: t.rpartition(" ")[0],
    "replace by the template's": lambda t: t.replace("a", "0"),
    "replace by a field's": lambda t: t.replace("1", mark("nz", SECOND)),
    "replace once": lambda t: t.replace("a", "00", 1),
    "removeprefix": lambda t: t.removeprefix("a"),
    "removesuffix": lambda t: t.removesuffix("z"),
    "join": lambda t: join(", ", [t, t]),
    "join of characters": lambda t: Tracked("-").join(t),
    "center": lambda t: t.center(30, "0"),
    "ljust": lambda t: t.ljust(30),
    "rjust": lambda t: t.rjust(30),
    "format": lambda t: formatted(lambda v: "<{}|{}>".format(*tuple(v)), "<%s|%s>", [t, "1"]),
    "expandtabs": lambda t: t.expandtabs(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_text_and_origin_survive(name):
    """What an operation gives is what str gives, and each character still has its origin."""
    rng = random.Random(name)
    for _ in range(200):
        text = mixed(rng)
        assert labels_of(text) == letters_of(text)  # the oracle holds for what goes in
        result = OPERATIONS[name](text)
        assert isinstance(result, Tracked)
        assert labels_of(result) == letters_of(result)
        assert result == OPERATIONS[name](Tracked(text))  # spans change no text


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (lambda t: t.split("1"), lambda s: s.split("1")),
        (lambda t: t.split(), lambda s: s.split()),
        (lambda t: t.rsplit(None, 2), lambda s: s.rsplit(None, 2)),
        (lambda t: t.splitlines(), lambda s: s.splitlines()),
        (lambda t: t.replace("", "0"), lambda s: s.replace("", "0")),
        (lambda t: t.replace("1", "", 2), lambda s: s.replace("1", "", 2)),
        (lambda t: t.zfill(40), lambda s: s.zfill(40)),
        (lambda t: t.title(), lambda s: s.title()),
        (lambda t: t.capitalize(), lambda s: s.capitalize()),
        (lambda t: t[5:2], lambda s: s[5:2]),
        (lambda t: t * 3, lambda s: s * 3),
        (lambda t: f"{t:>30}", lambda s: f"{s:>30}"),
    ],
)
def test_text_is_what_str_gives(ours, plain):
    rng = random.Random(0)
    for _ in range(100):
        text = mixed(rng)
        assert ours(text) == plain("".join(text))


def test_what_cannot_be_followed_counts_as_all_that_went_in():
    """Never too little: a title's letters come from both fields."""
    text = concat((mark("ab", FIRST), mark("nz", SECOND)))
    assert text.title() == "Abnz"
    assert text.title().spans == ((0, 4, FIRST), (0, 4, SECOND))
    assert covered("xyz", [{"a": [mark("m", FIRST)]}]).spans == ((0, 3, FIRST),)


def test_letters_that_grow_keep_their_origin():
    text = concat((mark("ß", FIRST), mark("z", SECOND)))
    assert text.upper() == "SSZ"
    assert text.upper().spans == ((0, 2, FIRST), (2, 3, SECOND))


def test_str_and_hash_are_those_of_the_text():
    """Templates look up keys and compare roles with tracked texts."""
    text = mark("role", FIRST)
    assert str(text) is text
    assert {"role": 1}[text] == 1
    assert text == "role"
    assert text.startswith("ro")
