"""The tokenizer against transformers' own, from either layout of its files."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata

import pytest
from checkpoints import ADDED_TOKENS, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.text.tokenizer import QwenTokenizer

TEXTS = [
    "", " ", "A red fox in the snow.", "一只红色的狐狸，在雪地里。", "🦊❄️👩‍👩‍👧 emoji", "café cafe\u0301 Å A\u030a",
    "def f(x):\n    return x**2  # code\r\n\r\n\t", "  leading and trailing  ", "\n\n\n", "a\n\n b \n",
    "don't I'LL we've", "'tis x'', the 60's'", "'re'veal 'LLama",
    "1234567 3.14 ١٢٣", "<|im_start|>user\nhi<|im_end|>", "<|image_pad|><|vision_end|>x", "<tool_call>y</tool_call>",
    "한국어 русский العربية हिन्दी", "x" * 500,
]  # fmt: skip
LAYOUTS = {
    "tokenizer.json": ("tokenizer.json",),
    "vocabulary and config": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "vocabulary and added tokens": ("vocab.json", "merges.txt", "added_tokens.json"),
    "vocabulary, config and added tokens": ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
    "vocabulary alone": ("vocab.json", "merges.txt"),
}
# Any text, with what the splitter and the normaliser look at more often than chance would have it.
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*ADDED_TOKENS, "\n", "\r\n", "  ", "\t", "\u3000", "'s", "'LL", "e\u0301", "é", "🦊", "狐", "42"]),
)
STRINGS = st.lists(PIECES, max_size=8).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "all", tokenizer_json=True)


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def ours(request, folder):
    return QwenTokenizer.from_files({name: folder / name for name in request.param})


@pytest.mark.reference
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_ids_are_the_reference_s(ours, theirs, text):
    assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.reference
@settings(deadline=None, max_examples=25)
@given(text=STRINGS)
def test_any_text_is_encoded_and_decoded_like_the_reference(ours, theirs, text):
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(text=st.text().filter(lambda text: "<" not in text))
def test_decoding_leads_back_to_the_composed_text(ours, text):
    assert ours.decode(ours.encode(text).ids) == unicodedata.normalize("NFC", text)


@pytest.mark.slow
@pytest.mark.parametrize("token", ADDED_TOKENS)
def test_added_tokens_are_one_id_each(ours, token):
    assert ours.encode(f"a{token}b").ids[1:-1] == [ADDED_TOKENS[token]] == [ours.token_id(token)]


@pytest.mark.slow
def test_offsets_say_which_characters_a_token_covers(ours):
    text = "A red fox, 你好 🦊 e\u0301!"
    ids, offsets = ours.encode(text)
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
    assert [text[slice(*offsets[n])] for n in range(3)] == ["A", " red", " fox"]
    assert ours.decode([*ids, ours.token_id("<|im_end|>")]) == unicodedata.normalize("NFC", text)


def test_a_token_that_is_not_there(ours):
    with pytest.raises(CheckpointError, match="nothing"):
        ours.token_id("<|nothing|>")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{broken", b"[]", b"\xff\xfe\x00"], ids=repr)
@pytest.mark.parametrize("harm", ["vocab.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_a_clear_error(folder, tmp_path, harm, content):
    names = ("tokenizer.json",) if harm == "tokenizer.json" else LAYOUTS["vocabulary and config"]
    files = {name: folder / name for name in names} | {harm: tmp_path / harm}
    files[harm].write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer"):
        QwenTokenizer.from_files(files)


HARMS = {
    "prepends": ("normalizer", {"type": "Prepend", "prepend": "a" * 1_000_000}, "normalizes texts by Prepend"),
    "grows": ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}, "by Replace"),
    "forever": ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"}, "by Replace"),
    "several": ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "by Sequence"),
    "splits forever": ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                                         "invert": False}, "splits texts by Split"),
    "another": ("pre_tokenizer", {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
                "by Metaspace"),
}  # fmt: skip


def changed(folder, place, **changes):
    path = place / "tokenizer.json"
    path.write_text(json.dumps(json.loads((folder / "tokenizer.json").read_bytes()) | changes))
    return {"tokenizer.json": path}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_changes_texts_as_qwen_does_not_is_refused(folder, tmp_path, harm):
    key, value, says = HARMS[harm]
    with pytest.raises(CheckpointError, match=says):
        QwenTokenizer.from_files(changed(folder, tmp_path, **{key: value}))


@pytest.mark.slow
def test_padding_and_truncation_of_a_file_do_not_count(folder, tmp_path, ours):
    padding = {"strategy": {"Fixed": 100_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "a"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    read = QwenTokenizer.from_files(changed(folder, tmp_path, padding=padding, truncation=truncation))
    assert read.encode("a red fox").ids == ours.encode("a red fox").ids


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_files_without_an_end_are_not_read(folder, tmp_path, name):
    os.mkfifo(tmp_path / name)
    files = {n: folder / n for n in ("vocab.json", "merges.txt")} | {name: tmp_path / name}
    with pytest.raises(CheckpointError, match="not a regular file"):
        QwenTokenizer.from_files(files)


@pytest.mark.parametrize("content", ["{broken", "a b c", "no merge"])
def test_damaged_merges_are_a_clear_error(folder, tmp_path, content):
    files = {"vocab.json": folder / "vocab.json", "merges.txt": tmp_path / "merges.txt"}
    files["merges.txt"].write_text(f"#version: 0.2\n{content}\n")
    with pytest.raises(CheckpointError, match="tokenizer"):
        QwenTokenizer.from_files(files)


@pytest.mark.slow
def test_an_added_token_that_cannot_have_its_id_is_a_clear_error(folder, tmp_path):
    files = {name: folder / name for name in ("vocab.json", "merges.txt")}
    files["added_tokens.json"] = tmp_path / "added_tokens.json"
    files["added_tokens.json"].write_text(json.dumps(ADDED_TOKENS | {"<|image_pad|>": 151700}))
    with pytest.raises(CheckpointError, match="added token"):
        QwenTokenizer.from_files(files)


@pytest.mark.parametrize("names", [(), ("vocab.json",), ("merges.txt",), ("tokenizer_config.json",)])
def test_missing_files_are_named(folder, names):
    with pytest.raises(CheckpointError, match=r"vocab\.json|merges\.txt"):
        QwenTokenizer.from_files({name: folder / name for name in names})


@pytest.mark.slow
def test_merges_cut_at_the_end_of_a_line_are_noticed(folder, tmp_path):
    shutil.copy(folder / "vocab.json", tmp_path / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(lines[:1000]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"merges\.txt"):
        QwenTokenizer.from_files({name: tmp_path / name for name in ("vocab.json", "merges.txt")})
