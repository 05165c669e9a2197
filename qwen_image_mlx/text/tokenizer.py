"""The Qwen2 byte-level BPE tokenizer, from `tokenizer.json` or from `vocab.json` and `merges.txt` alone.

Independent of templates and models. Special tokens inside a text are parsed as such, as the reference does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import CheckpointError, RequestError
from ..outside import MAX_CHARACTERS, why_not_read

# Qwen2's split of a text before BPE; every Qwen2.5 tokenizer.json has it.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = 256
_PANICS = "pyo3_runtime"  # the module of the class of its panics
_MAX_BYTES = 64_000_000  # of a file; Qwen2.5's own have 11 MB
_FIRST_SPECIAL = 151643
_SPECIAL = ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
            "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")  # fmt: skip
_ATOMIC = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
           "<|repo_name|>", "<|file_sep|>")  # fmt: skip


class Tokens(NamedTuple):
    """Token ids, and where in the text each begins and ends (characters)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class QwenTokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: the `tokenizers` object that is wrapped.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def from_files(cls, files: Mapping[str, Path]) -> QwenTokenizer:
        """Builds it from the files of a `tokenizer/` folder, by file name.

        Raises:
            CheckpointError: neither `tokenizer.json` nor both of `vocab.json` and `merges.txt` exist and are valid.
        """
        for path in files.values():
            try:
                why = why_not_read(path, _MAX_BYTES)
            except OSError as error:
                why = error.strerror
            if why:
                raise CheckpointError(f"the tokenizer's file {path} cannot be read: {why}")
        with _library("the tokenizer's files cannot be read: {}"):
            if "tokenizer.json" in files:
                return cls(_as_qwen_splits(Tokenizer.from_file(str(files["tokenizer.json"]))))
            return cls(_from_vocabulary(files))

    def encode(self, text: str) -> Tokens:
        """Ids of the whole text, nothing added.

        Raises:
            RequestError: it is too long.
            CheckpointError: the tokenizer's files contradict themselves.
        """
        if len(text) > MAX_CHARACTERS:
            raise RequestError(f"the prompt has {len(text):,} characters; at most {MAX_CHARACTERS:,} are supported")
        with _library("the tokenizer cannot read a prompt ({}): download its files again"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Tokens(encoding.ids, encoding.offsets)

    def token_id(self, token: str) -> int:
        """Id of a token such as "<|image_pad|>"; raises CheckpointError if the vocabulary lacks it."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointError(f"the tokenizer has no token {token}; this is not a Qwen2.5-VL tokenizer")
        return number

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens skipped."""
        with _library("the tokenizer cannot decode a model's output ({}): download its files again"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _library(sentence: str) -> Iterator[None]:
    """Turns any error of the library into a CheckpointError: bare Exceptions, and panics, which are not Exceptions."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if type(error).__module__ != _PANICS and not isinstance(error, Exception):
            raise
        raise CheckpointError(sentence.format(error)) from error


def _as_qwen_splits(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without padding and truncation; raises CheckpointError if it treats texts differently from Qwen2's.

    A file could contain endless patterns, prefixes, or padding of a prompt to gigabytes.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    normalizer, splitter = (_settings_of(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer))
    if normalizer not in (None, {"type": "NFC"}):
        raise CheckpointError(
            f"the tokenizer normalizes texts by {normalizer['type']}, as no Qwen2.5-VL tokenizer does"
        )
    for part in splitter.get("pretokenizers", [splitter]) if splitter else []:
        if part["type"] != "ByteLevel" and part.get("pattern") != {"Regex": _SPLIT}:
            raise CheckpointError(f"the tokenizer splits texts by {part['type']}, as none of Qwen2.5-VL does")
    return tokenizer


def _settings_of(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _from_vocabulary(files: Mapping[str, Path]) -> Tokenizer:
    missing = [name for name in ("vocab.json", "merges.txt") if name not in files]
    if missing:
        raise CheckpointError(f"the tokenizer folder has no tokenizer.json and lacks {' and '.join(missing)}")
    vocab, merges = models.BPE.read_file(str(files["vocab.json"]), str(files["merges.txt"]))
    if len(vocab) != _BYTES + len(merges):
        raise CheckpointError(
            f"the tokenizer's vocab.json has {len(vocab)} entries, but {_BYTES} bytes and the {len(merges)} merges of "
            "merges.txt make a different number; download both again"
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, number in _added_tokens(files, len(vocab)):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise CheckpointError(f"the tokenizer's added token {token.content} cannot have the id {number}")
    return tokenizer


def _added_tokens(files: Mapping[str, Path], vocab_size: int) -> list[tuple[AddedToken, int]]:
    """Added tokens by rising id: from tokenizer_config.json, else from added_tokens.json, else Qwen2.5's own."""
    config = _read_object(files, "tokenizer_config.json").get("added_tokens_decoder", {})
    if config:
        tokens = [(_added_token(entry["content"], entry.get("special", False)), int(n)) for n, entry in config.items()]
    else:
        named = _read_object(files, "added_tokens.json")
        if not named and vocab_size == _FIRST_SPECIAL:
            spelled = [f"<|{name}|>" for name in _SPECIAL] + list(_ATOMIC)
            named = {content: _FIRST_SPECIAL + n for n, content in enumerate(spelled)}
        special = {f"<|{name}|>" for name in _SPECIAL}
        tokens = [(_added_token(content, content in special), number) for content, number in named.items()]
    return sorted(tokens, key=lambda pair: pair[1])


def _added_token(content: str, special: bool) -> AddedToken:
    return AddedToken(content, special=special, normalized=False)


def _read_object(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}
