"""Captions by Qwen3-VL: the tokens that the model itself finds most likely, with and without its cache."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from checkpoints_21 import TINY_TEXT_ENCODER, values_21
from goldens import image

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.pipeline import caption
from qwen_image_mlx.text.tokenizer import QwenTokenizer

PHOTO = image(90, 120, mode="RGBA")
WORDS = 6


@pytest.fixture
def written(monkeypatch):
    """The tokens of the captions that are written, which are short."""
    found: list[int] = []
    monkeypatch.setattr(caption, "MAX_TOKENS", WORDS)
    monkeypatch.setattr(QwenTokenizer, "decode", lambda self, ids: found.extend(ids) or self._tokenizer.decode(ids))
    return found


def with_head(source, folder):
    """A copy of a checkpoint whose text encoder has a head."""
    shutil.copytree(source, folder)
    file = folder / "text_encoder" / "model.safetensors"
    head = {name: mx.array(value) for name, value in values_21("language_head", TINY_TEXT_ENCODER).items()}
    mx.save_safetensors(str(file), {**mx.load(str(file)), **head})
    return folder


@pytest.mark.slow
def test_the_cache_changes_nothing(tiny_21, tmp_path, written, capsys, monkeypatch):
    """The same tokens as those found by running the whole anew for each."""
    from qwen_image_mlx.models.qwen3_vl.text import Prompt

    folder = with_head(tiny_21, tmp_path / "model")
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    kept: list[Prompt] = []
    encoder_class = type(pipeline.components.network("text_encoder"))
    go_on = encoder_class.__call__

    def keep(self, prompt, caches, on_layer=None):
        kept.append(prompt)
        return go_on(self, prompt, caches, on_layer)

    monkeypatch.setattr(encoder_class, "__call__", keep)
    pipeline.caption_image(PHOTO, resolution=96)
    encoder, head = (pipeline.components.network(name) for name in ("text_encoder", "language_head"))
    assert len(written) == WORDS
    for count, token in enumerate(written):
        given = kept[: count + 1]
        taps = [mx.concatenate([tap, mx.zeros((1, count, tap.shape[-1]))], axis=1) for tap in given[0].additions]
        whole = Prompt(*(mx.concatenate(parts, axis=1) for parts in zip(*(p[:2] for p in given), strict=True)), taps)
        (states,) = encoder.together([whole])
        assert int(mx.argmax(head(encoder.normed(states)[:, -1]))) == token
    (tmp_path / "a.png").write_bytes(b"")
    PHOTO.save(tmp_path / "a.png")
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(folder), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.reference
def test_captions_are_the_reference_s_greedy_ones(tiny_21, tmp_path, written):
    import torch
    from checkpoints import write_tokenizer
    from checkpoints_21 import TINY_PROCESSOR
    from reference_21 import Processor21
    from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

    from qwen_image_mlx.images.geometry import size_of_area
    from qwen_image_mlx.images.pixels import on_white
    from qwen_image_mlx.variants import CAPTION_TEMPLATES

    folder = with_head(tiny_21, tmp_path / "model")
    QwenImagePipeline.from_pretrained(folder, dtype="float32").caption_image(PHOTO, resolution=96)
    path = write_tokenizer(tmp_path / "tokenizer", tokenizer_json=True) / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<|endoftext|>")
    template = CAPTION_TEMPLATES["en"]
    shown = on_white(PHOTO.resize(size_of_area(96**2, PHOTO.size), 1))
    inputs = Processor21(tokenizer, TINY_PROCESSOR)(
        text=[template.text.format(prompt=template.image)], images=[shown], return_tensors="pt"
    )
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(text | {"dtype": "float32"}))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)
    expected = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(expected) == WORDS
    np.testing.assert_array_equal(written, expected)
