"""Written GGUF files in llama.cpp itself: it loads them, cuts text alike, computes the same, and ends where it should.

    pip install llama-cpp-python && pytest tests/checkpoint/test_llama_cpp.py

llama.cpp is built from source for that, some ten minutes of two cores, and is no part of the extra `dev`: without it
these tests are skipped. Each file is opened in a process of its own, since a failed check of llama.cpp ends the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any
from unicodedata import normalize

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.test_gguf import TEXTS
from tests.checkpoint.test_gguf_write import (
    BY_LAYERS,
    SENTENCEPIECE,
    WRITABLE,
    sentencepiece_folder,
    trained,
    with_tokenizer,
    write,
)
from tests.models.oracle import assert_close, save_random
from tests.trained_vocabularies import TEXTS as SENTENCEPIECE_TEXTS
from tests.trained_vocabularies import python_lines, random_texts
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.modules.linear import Linear
from torchtune.recipes.generate import GenerateParams, GenerateRecipe
from torchtune.recipes.quickstart import packaged_model
from torchtune.tokenizers.gguf_write import PREFERRED, PROBES
from torchtune.tokenizers.splits import LAYOUTS, byte_level_tokenizer

pytest.importorskip("llama_cpp")

# Asks llama.cpp what stands in a JSON file; keys and values in float32, as ours are.
SCRIPT = """
import json, sys
import llama_cpp, numpy, torch
from safetensors.torch import save_file
asked = json.load(open(sys.argv[2]))
model = llama_cpp.Llama(sys.argv[1], n_ctx=asked.get("context", 128), logits_all=True, verbose=False,
                        type_k=0, type_v=0, n_threads=1)
found = {}
if "ids" in asked:
    logits = []
    for row in asked["ids"]:
        model.reset()
        model.eval(row)
        logits.append(torch.tensor(numpy.array(model.scores[: len(row)])))
    save_file({"logits": torch.stack(logits)}, sys.argv[2] + ".safetensors")
if "texts" in asked:
    found["ids"] = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
if "stops" in asked:
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    found["ends"] = [bool(llama_cpp.llama_vocab_is_eog(vocab, token)) for token in asked["stops"]]
if "chats" in asked:
    found["answers"] = []
    for text in asked["chats"]:
        answer = model.create_chat_completion(
            [{"role": "user", "content": text}], max_tokens=asked["max_tokens"], temperature=0)["choices"][0]
        found["answers"].append([answer["message"]["content"], answer["finish_reason"]])
json.dump(found, sys.stdout)
"""
# ggml looks GELU up in a table of float16.
GELU = ("gemma", "starcoder2", "phi2", "gpt2", "gptneox")
QUESTIONS = ("What is a list in Python?", "Name three colours.", "Say yes.", "Translate 'good morning' into French.")


def ask(path, folder, **asked: Any) -> Any:
    """What llama.cpp says; logits [rows, tokens, vocabulary] under that name."""
    file = folder / "asked.json"
    file.write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, file], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits = load_file(f"{file}.safetensors") if "ids" in asked else {}
    return json.loads(done.stdout) | logits


@pytest.mark.parametrize("name", WRITABLE)
def test_llama_cpp_computes_what_we_do(tmp_path, name):
    """Logits of two texts beyond windows and contexts: within 1e-5 of the largest, or what a table of GELU allows."""
    case = WRITABLE[name]
    save_random(tmp_path / "hf", case.config(**case.options))
    write(tmp_path / "hf", tmp_path / "tiny.gguf")
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    found = ask(tmp_path / "tiny.gguf", tmp_path, ids=ids.tolist())["logits"]
    with torch.no_grad():
        expected = load_model(tmp_path / "tiny.gguf")(ids)
    # Many random layers lose digits in both.
    allowed = 5e-3 if case.arch.startswith(GELU) else 1e-4 if name in BY_LAYERS else 1e-5
    assert_close(found, expected, allowed, "logits")


@pytest.mark.parametrize("layout", PREFERRED)
def test_llama_cpp_cuts_text_as_we_do(tmp_path, layout):
    """By the name that is written for each way; special and added tokens among the texts.

    llama.cpp composes no letters and marks (NFC), as some of these tokenizers do first.
    """
    folder = with_tokenizer(tmp_path / "hf", trained(byte_level_tokenizer({}, [], LAYOUTS[layout])))
    write(folder, tmp_path / "tiny.gguf")
    tokenizer = open_checkpoint(folder).tokenizer()
    texts = [normalize("NFC", text) for text in (*TEXTS, *PROBES, "a<tool>b <|turn|>c", "<s>x</s>")]
    found = ask(tmp_path / "tiny.gguf", tmp_path, texts=texts)["ids"]
    different = [text for text, ids in zip(texts, found, strict=True) if tokenizer.encode(text).ids != ids]
    assert not different


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_llama_cpp_cuts_text_by_pieces_as_we_do(tmp_path, kind):
    """Scores, bytes for what has no piece, spaces; special tokens among the texts.

    Gemma's pieces of several spaces llama.cpp looks for before it writes spaces as ▁: a ▁ of the text is none to it.
    """
    folder, _ = sentencepiece_folder(tmp_path / "hf", kind)
    write(folder, tmp_path / "tiny.gguf")
    tokenizer = open_checkpoint(tmp_path / "tiny.gguf").tokenizer()
    texts = [*SENTENCEPIECE_TEXTS, *TEXTS, *PROBES, *random_texts(200), *python_lines()[:200], "a<s>b </s> c"]
    found = ask(tmp_path / "tiny.gguf", tmp_path, texts=texts)["ids"]
    assert {begin for begin, *_ in found} == {tokenizer.bos_id}
    different = [text for text, ids in zip(texts, found, strict=True) if [*tokenizer.encode(text).ids] != ids[1:]]
    assert not [text for text in different if kind == "llama" or "▁" not in text]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The packaged chat model, written anew in a type; once each."""
    made = {}

    def path_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "chat.gguf"
            write(packaged_model(), made[kind], kind)
        return made[kind]

    return path_of


def test_a_chat_model_answers_alike_and_ends_alike(written, tmp_path):
    """Greedy answers in float32, by the template in the file: text and why they end; and what ends a generation."""
    path, length = written("f32"), 24
    stops = open_checkpoint(path).stop_ids
    found = ask(path, tmp_path, chats=QUESTIONS, max_tokens=length, stops=stops, context=256)
    assert all(found["ends"])
    params = GenerateParams(
        model_checkpoint=str(path), prompt=list(QUESTIONS), max_new_tokens=length, dtype="fp32", device="cpu"
    )
    recipe = GenerateRecipe(params)
    recipe.setup(params)
    assert [[row["text"], row["finish_reason"]] for row in recipe.generate()] == found["answers"]


def in_blocks(x):
    """Whole numbers of 8 bits in blocks of 32, as llama.cpp rounds what it multiplies quantised weights with (Q8_0)."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scale > 0, blocks / scale, 0.0).round() * scale.half().float()).flatten(-2)


HALVES = {"f32": lambda x: x, "f16": lambda x: x.half().float(), "bf16": lambda x: x.bfloat16().float()}
ROUNDED = HALVES | dict.fromkeys(("q8_0", "q5_0", "q5_1", "q4_0", "q4_1"), in_blocks)


@pytest.mark.parametrize("kind", ROUNDED)
def test_types_are_read_alike(written, tmp_path, kind):
    """Logits of a text, at most twice as far from ours as ours move by rounding what goes into products.

    llama.cpp rounds it to a type that is like the weight's. From layer to layer this model makes much of such a change.
    """
    path = written(kind)
    checkpoint = open_checkpoint(path)
    ids = checkpoint.tokenizer().encode("The quick brown fox jumps over the lazy dog. In Python, a list is").ids
    found = ask(path, tmp_path, ids=[ids])["logits"]
    model = load_model(path, dtype=torch.float32)
    with torch.no_grad():
        exact = model(torch.tensor([ids]))
        for module in model.modules():
            if isinstance(module, Linear):
                module.register_forward_pre_hook(lambda _, inputs: ROUNDED[kind](inputs[0]))
        model.model.norm.register_forward_hook(lambda *seen: ROUNDED[kind](seen[-1]))
        rounded = model(torch.tensor([ids]))
    scale = exact.square().mean().sqrt()
    off, allowed = ((x - exact).square().mean().sqrt() / scale for x in (found, rounded))
    assert off <= 2 * allowed + 1e-5, f"llama.cpp {off:.2g}, our rounding {allowed:.2g}"
