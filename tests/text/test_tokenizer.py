"""The tokenizer against transformers' own, from either layout of its files."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import write_tokenizer
from transformers import Qwen2Tokenizer

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.text.tokenizer import QwenTokenizer

TEXTS = [
    "", " ", "A red fox in the snow.", "一只红色的狐狸，在雪地里。", "🦊❄️👩‍👩‍👧 emoji", "café cafe\u0301 Å A\u030a",
    "def f(x):\n    return x**2  # code\r\n\r\n\t", "  leading and trailing  ", "\n\n\n", "a\n\n b \n",
    "don't I'LL we've",
    "1234567 3.14 ١٢٣", "<|im_start|>user\nhi<|im_end|>", "<|image_pad|><|vision_end|>x", "<tool_call>y</tool_call>",
    "한국어 русский العربية हिन्दी", "x" * 500,
]  # fmt: skip
LAYOUTS = {
    "tokenizer.json": ("tokenizer.json",),
    "vocabulary and config": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "vocabulary and added tokens": ("vocab.json", "merges.txt", "added_tokens.json"),
    "vocabulary alone": ("vocab.json", "merges.txt"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "all", tokenizer_json=True)


@pytest.fixture(scope="module")
def theirs(folder):
    return Qwen2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def ours(request, folder):
    return QwenTokenizer.from_files({name: folder / name for name in request.param})


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_ids_are_the_reference_s(ours, theirs, text):
    assert ours.encode(text).ids == theirs(text)["input_ids"]


@settings(deadline=None, max_examples=150)
@given(text=st.text())
def test_any_text(folder, theirs, text):
    ours = QwenTokenizer.from_files({name: folder / name for name in LAYOUTS["vocabulary alone"]}) if not hasattr(
        test_any_text, "kept") else test_any_text.kept  # fmt: skip
    test_any_text.kept = ours
    assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_offsets_and_decoding_lead_back_to_the_text(ours):
    text = "A red fox, 你好 🦊!"
    ids, offsets = ours.encode(text)
    assert offsets[-1][1] == len(text)
    assert ours.decode(ids) == text
    assert ours.decode([*ids, ours.token_id("<|im_end|>")]) == text


def test_a_token_that_is_not_there(ours):
    with pytest.raises(CheckpointError, match="nothing"):
        ours.token_id("<|nothing|>")


@pytest.mark.parametrize("harm", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_a_clear_error(folder, tmp_path, harm):
    names = ("tokenizer.json",) if harm == "tokenizer.json" else ("vocab.json", "merges.txt", "tokenizer_config.json")
    for name in names:
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / harm).write_text("{broken")
    with pytest.raises(CheckpointError, match="tokenizer"):
        QwenTokenizer.from_files({name: tmp_path / name for name in names})


@pytest.mark.parametrize("names", [(), ("vocab.json",), ("merges.txt",), ("tokenizer_config.json",)])
def test_missing_files_are_named(folder, names):
    with pytest.raises(CheckpointError, match=r"vocab\.json|merges\.txt"):
        QwenTokenizer.from_files({name: folder / name for name in names})
