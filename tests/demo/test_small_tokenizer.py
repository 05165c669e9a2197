"""The demo's tokenizer splits what it knows as Qwen2.5's does, and falls back to bytes elsewhere."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
from demo.scenes import draw_scene, recolour
from demo.tokenizer import WORDS, demo_tokens, write_tokenizer

from qwen_image_mlx.text.tokenizer import QwenTokenizer
from qwen_image_mlx.variants import VARIANTS

pytestmark = pytest.mark.demo


def opened(folder) -> QwenTokenizer:
    return QwenTokenizer.from_files({path.name: path for path in folder.iterdir()})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return opened(checkpoints.write_tokenizer(tmp_path_factory.mktemp("whole"), tokenizer_json=True))


def test_templates_drop_as_many_tokens_as_they_really_have(small):
    own = [v for v in VARIANTS.values() if v.classes["text_encoder"] == "Qwen2_5_VLForConditionalGeneration"]
    assert len(own) > 3
    for variant in own:
        before = variant.template.text.split("{prompt}")[0]
        assert len(opened(small).encode(before).ids) == variant.template.drop


def test_prompts_are_split_as_by_the_whole_tokenizer(small, whole):
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, things=1 + n % 2) for n in range(50)]
    prompts = [scene.caption for scene in scenes] + [recolour(scene, rng)[1] for scene in scenes[::2]]
    prompts += [" ".join(part) for part in np.array_split(WORDS.split(), 40)]
    own = [v for v in VARIANTS.values() if v.classes["text_encoder"] == "Qwen2_5_VLForConditionalGeneration"]
    assert len(own) > 3
    for variant in own:
        for prompt in prompts:
            text = variant.template.text.format(prompt=variant.template.image.format(n=1) + "the " + prompt)
            assert opened(small).encode(text).offsets == whole.encode(text).offsets, prompt


def test_any_text_comes_back(small):
    text = "Ein Fuchs — 図\n\tquixotic 42"
    assert opened(small).decode(opened(small).encode(text).ids) == text


@pytest.mark.reference
def test_it_is_small_and_numbered_without_gaps(small):
    added = write_tokenizer(small)
    assert len(demo_tokens()) < 1000
    assert sorted(added.values()) == [*range(len(demo_tokens()), len(demo_tokens()) + len(added))]
    assert demo_tokens()[:256] == list(checkpoints.ranks())[:256]


@pytest.mark.reference
def test_transformers_reads_it_to_the_same_ids(small):
    import transformers

    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(small)
    text = VARIANTS["QwenImageEditPlusPipeline"].template.text.format(prompt="make the circle green, please: Ünicode")
    assert tokenizer(text)["input_ids"] == opened(small).encode(text).ids
