"""Prompts to tokens: templates, cuts, images' places and positions, as the reference has them."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import TINY, write_tokenizer

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.text.prompt import replace_vision_tokens, tokenize_prompt
from qwen_image_mlx.text.tokenizer import QwenTokenizer
from qwen_image_mlx.variants import VARIANTS

TEXT, EDIT, PLUS = (variant.template for variant in list(VARIANTS.values())[:3])
SUFFIX = [151645, 198, 151644, 77091, 198]
IMAGE_PAD = 151655


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "all", tokenizer_json=True)
    return QwenTokenizer.from_files({"tokenizer.json": folder / "tokenizer.json"})


def kept(tokens):
    return tokens.ids[tokens.first :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "drop"), [(TEXT, 34), (EDIT, 64), (PLUS, 64)])
def test_the_template_s_start_is_dropped(tokenizer, variant, drop):
    tokens = tokenize_prompt(tokenizer, variant, "fox")
    assert tokens.first == drop
    assert tokens.ids[drop - 3 : drop].tolist() == [151644, 872, 198]
    assert kept(tokens) == [*tokenizer.encode("fox").ids, *SUFFIX]


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "ids"), [("", SUFFIX), (" ", [220, *SUFFIX])])
def test_empty_prompts_keep_the_suffix(tokenizer, prompt, ids):
    assert kept(tokenize_prompt(tokenizer, TEXT, prompt)) == ids


def test_braces_are_text(tokenizer):
    text = "{prompt} {0} {{}}"
    assert kept(tokenize_prompt(tokenizer, TEXT, text)) == [*tokenizer.encode(text).ids, *SUFFIX]


@pytest.mark.parametrize("prompt", ["\nfox", "\n\n  fox"])
def test_template_and_prompt_are_tokenized_together(tokenizer, prompt):
    whole = tokenizer.encode(TEXT.text.format(prompt=prompt)).ids
    assert kept(tokenize_prompt(tokenizer, TEXT, prompt)) == whole[34:]


@pytest.mark.parametrize(("words", "length"), [(500, 505), (507, 512), (508, 512), (512, 512)])
def test_a_prompt_that_fits_is_not_warned_about(tokenizer, caplog, words, length):
    """At the limit the suffix goes first, as in the reference; every word still counts."""
    tokens = tokenize_prompt(tokenizer, TEXT, " ".join(["word"] * words))
    assert len(kept(tokens)) == length
    assert tokens.ids[34 + words :].tolist() == SUFFIX[: 512 - words]
    assert not caplog.records


@pytest.mark.parametrize("word", ["word ", "狐狸，", "🦊👩\u200d👧 ", "cafe\u0301 Å\n", "'ll 42 "])
@pytest.mark.parametrize("words", [513, 2000])
def test_a_long_prompt_is_cut_with_a_warning_that_quotes_its_end(tokenizer, caplog, words, word):
    prompt = "".join(f"{word}{n} " for n in range(words))
    tokens = tokenize_prompt(tokenizer, TEXT, prompt)
    whole = tokenizer.encode(TEXT.text.format(prompt=prompt)).ids
    assert (tokens.first, len(kept(tokens))) == (34, 512)
    assert tokens.ids.tolist() == whole[: 34 + 512]
    (record,) = caplog.records
    message = record.getMessage()
    characters = int(re.search(rf"after (\d+) of its {len(prompt)} characters", message)[1])
    assert "limit: 512 tokens" in message
    assert message.endswith(f"“…{prompt[characters - 60 : characters]}”")
    # What is said to count is what counts: the tokens of that much text, whose last may be cut inside a character.
    quoted = tokenizer.encode(TEXT.text.split("{prompt}")[0] + prompt[:characters]).ids
    assert quoted[: 34 + 505] == whole[: 34 + 505]
    assert 0 <= len(quoted) - (34 + 512) <= 4


def test_a_tokenized_prompt_has_at_most_1058_tokens(tokenizer):
    """The reference's first cut, which its second hides."""
    tokens = tokenize_prompt(tokenizer, replace(TEXT, max_embeddings=None), "word " * 2000)
    assert (tokens.first, len(tokens.ids)) == (34, 1058)


def test_editing_never_cuts(tokenizer, caplog):
    assert len(kept(tokenize_prompt(tokenizer, PLUS, "word " * 2000))) > 2000
    assert not caplog.records


@pytest.mark.parametrize("grids", [[(2, 3)], [(2, 3), (4, 1)], [(1, 1), (7, 2), (5, 6)]], ids=len)
def test_images_take_their_places(tokenizer, grids):
    tokens = tokenize_prompt(tokenizer, PLUS, "a fox", grids)
    expected = []
    for n, (rows, cols) in enumerate(grids):
        expected += [24669, 220, 16 + n, 25, 220]  # "Picture 1: "
        expected += [151652, *[IMAGE_PAD] * (rows * cols), 151653]
    assert kept(tokens) == [*expected, *tokenizer.encode("a fox").ids, *SUFFIX]
    np.testing.assert_array_equal(tokens.is_image, tokens.ids == IMAGE_PAD)


def test_a_single_image_has_no_number(tokenizer):
    tokens = tokenize_prompt(tokenizer, EDIT, "x", [(2, 3)])
    assert kept(tokens) == [151652, *[IMAGE_PAD] * 6, 151653, *tokenizer.encode("x").ids, *SUFFIX]


@pytest.mark.reference
@pytest.mark.parametrize("grids", [[], [(3, 5)], [(4, 4), (2, 9)], [(1, 1), (7, 2), (5, 6)]], ids=len)
def test_positions_are_the_reference_s(tokenizer, grids):
    import torch
    from reference import make_text_encoder

    model = make_text_encoder({**TINY["text_encoder"], "vocab_size": 300})
    tokens = tokenize_prompt(tokenizer, PLUS if grids else TEXT, "a fox", grids)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
    expected, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=torch.from_numpy(tokens.is_image.astype(np.int64))[None],
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * cols] for rows, cols in grids]) if grids else None,
        attention_mask=torch.ones_like(ids),
    )
    np.testing.assert_array_equal(tokens.positions, expected[:, 0].numpy())


def test_sequential_positions_count_up(tokenizer):
    tokens = tokenize_prompt(tokenizer, PLUS, "x", [(3, 3)], sequential_positions=True)
    np.testing.assert_array_equal(tokens.positions, np.broadcast_to(np.arange(len(tokens.ids)), (3, len(tokens.ids))))


@pytest.mark.parametrize(("variant", "grids"), [(EDIT, [(2, 2)]), (PLUS, [(2, 2)]), (PLUS, [(2, 2), (1, 3)])])
def test_a_placeholder_in_the_prompt_is_refused(tokenizer, variant, grids):
    with pytest.raises(RequestError, match="image_pad"):
        tokenize_prompt(tokenizer, variant, "put <|image_pad|> here", grids)


@pytest.mark.parametrize("prompt", [None, 3, b"fox", "broken \udc80"])
def test_prompts_that_are_no_text(tokenizer, prompt):
    with pytest.raises(RequestError, match="prompt"):
        tokenize_prompt(tokenizer, TEXT, prompt)


def test_features_replace_placeholders_in_order():
    embeddings = mx.arange(12, dtype=mx.float32).reshape(1, 6, 2)
    is_image = np.array([False, True, True, False, True, False])
    features = mx.array([[-1.0, -2], [-3, -4], [-5, -6]])
    expected = [[0, 1], [-1, -2], [-3, -4], [6, 7], [-5, -6], [10, 11]]
    assert replace_vision_tokens(embeddings, is_image, features)[0].tolist() == expected


@pytest.mark.parametrize("count", [0, 2, 4])
def test_features_and_places_that_do_not_match_in_number_are_refused(count):
    with pytest.raises(RequestError, match=f"3 placeholders for image features, but {count}"):
        replace_vision_tokens(mx.zeros((1, 6, 2)), np.arange(6) % 2 == 1, mx.zeros((count, 2)))
