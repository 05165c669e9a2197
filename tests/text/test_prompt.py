"""Prompts to tokens: templates, cuts, pictures' places and positions, as the reference has them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from reference import TINY, make_text_encoder, write_tokenizer

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.text.prompt import replace_vision_tokens, tokenize_prompt
from qwen_image_mlx.text.tokenizer import QwenTokenizer
from qwen_image_mlx.variants import VARIANTS

TEXT, EDIT, PLUS = VARIANTS.values()
SUFFIX = [151645, 198, 151644, 77091, 198]
IMAGE_PAD = 151655


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "all", tokenizer_json=True)
    return QwenTokenizer.from_files({"tokenizer.json": folder / "tokenizer.json"})


def kept(tokens):
    return tokens.ids[tokens.first : tokens.last].tolist()


@pytest.mark.parametrize(("variant", "drop"), [(TEXT, 34), (EDIT, 64), (PLUS, 64)])
def test_the_template_s_start_is_dropped(tokenizer, variant, drop):
    tokens = tokenize_prompt(tokenizer, variant, "fox")
    assert tokens.first == drop
    assert tokens.ids[drop - 3 : drop].tolist() == [151644, 872, 198]
    assert kept(tokens) == [*tokenizer.encode("fox").ids, *SUFFIX]


@pytest.mark.parametrize(("prompt", "ids"), [("", SUFFIX), (" ", [220, *SUFFIX])])
def test_empty_prompts_keep_the_suffix(tokenizer, prompt, ids):
    assert kept(tokenize_prompt(tokenizer, TEXT, prompt)) == ids


def test_braces_are_text(tokenizer):
    text = "{prompt} {0} {{}}"
    assert kept(tokenize_prompt(tokenizer, TEXT, text)) == [*tokenizer.encode(text).ids, *SUFFIX]


@pytest.mark.parametrize("prompt", ["\nfox", "\n\n  fox"])
def test_template_and_prompt_are_tokenized_together(tokenizer, prompt):
    whole = tokenizer.encode(TEXT.template.format(prompt=prompt)).ids
    assert kept(tokenize_prompt(tokenizer, TEXT, prompt)) == whole[34:]


@pytest.mark.parametrize(("words", "length"), [(500, 505), (507, 512), (600, 512), (2000, 512)])
def test_long_prompts_are_cut_with_a_warning(tokenizer, caplog, words, length):
    prompt = "word " * words
    tokens = tokenize_prompt(tokenizer, TEXT, prompt.rstrip())
    assert len(kept(tokens)) == length
    if words <= 512:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert "512 tokens" in record.getMessage()
        assert f"after {512 * 5 - 1} of" in record.getMessage()


def test_editing_never_cuts(tokenizer, caplog):
    assert len(kept(tokenize_prompt(tokenizer, PLUS, "word " * 2000))) > 2000
    assert not caplog.records


def test_pictures_take_their_places(tokenizer):
    tokens = tokenize_prompt(tokenizer, PLUS, "x", [(2, 3), (4, 1)])
    ids = kept(tokens)
    assert ids[:5] == [24669, 220, 16, 25, 220]  # "Picture 1: "
    assert tokens.is_image.sum() == 6 + 4
    assert ids.count(IMAGE_PAD) == 10
    single = tokenize_prompt(tokenizer, EDIT, "x", [(2, 3)])
    assert kept(single)[:8] == [151652, *[IMAGE_PAD] * 6, 151653]


@pytest.mark.parametrize("grids", [[], [(3, 5)], [(4, 4), (2, 9)], [(1, 1), (7, 2), (5, 6)]], ids=len)
def test_positions_are_the_reference_s(tokenizer, grids):
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


def test_a_placeholder_in_the_prompt_is_refused(tokenizer):
    with pytest.raises(RequestError, match="image_pad"):
        tokenize_prompt(tokenizer, PLUS, "put <|image_pad|> here", [(2, 2)])


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
    with pytest.raises(RequestError, match="3 places for picture features, but 2"):
        replace_vision_tokens(embeddings, is_image, features[:2])
