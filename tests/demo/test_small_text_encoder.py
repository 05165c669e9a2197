"""The demo's text encoder: transformers reads it to the same states, and its states tell what a caption says."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from demo.autoencoder import Autoencoder, module_weights
from demo.checkpoint import write_frame, write_json
from demo.samples import Frame
from demo.scenes import COLOURS, PLACES, SHAPES, draw_scene

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.models.qwen_image.config import TransformerConfig, VAEConfig

pytestmark = pytest.mark.demo

TINY = VAEConfig(base_dim=4)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """The models without their transformers, their autoencoders untrained."""
    folder = tmp_path_factory.mktemp("frames")
    for model in ("demo", "demo-edit"):
        write_frame(folder / model, model, TINY, module_weights(Autoencoder(TINY)))
        write_json(folder / model / "transformer" / "config.json", asdict(TransformerConfig(num_layers=1)))
    return folder


@pytest.mark.reference
def test_transformers_reads_the_same_language_model(frames):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(frames / "demo" / "text_encoder", dtype=torch.float32)
    tokenizer = Qwen2Tokenizer.from_pretrained(frames / "demo" / "tokenizer")
    frame = Frame(frames / "demo")
    template = frame.template
    for prompt in ("a red circle at the left on a blue background", ""):
        with torch.no_grad():
            ids = tokenizer(template.text.format(prompt=prompt), return_tensors="pt")
            out = model(**ids, output_hidden_states=True).hidden_states[-1][0, template.drop :]
        np.testing.assert_allclose(frame.texts([prompt])[0], out.numpy(), atol=2e-3)


@pytest.mark.parametrize("model", ["demo", "demo-edit"])
def test_samples_are_encoded_as_the_pipeline_encodes(frames, model):
    """Prompts, images in prompts, references: the quick batches of training against the pipeline, one by one."""
    from PIL import Image

    folder = frames / model
    frame = Frame(folder)
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    rng = np.random.default_rng(2)
    scenes = [draw_scene(rng) for _ in range(3)]
    pictures = np.stack([scene.render() for scene in scenes])
    edit = model == "demo-edit"
    texts = frame.texts([s.caption for s in scenes], frame.features(pictures) if edit else None)
    latents = frame.latents(pictures)
    for n, scene in enumerate(scenes):
        images = [Image.fromarray(pictures[n])] if edit else []
        expected = pipeline.encode_guidance_prompts(scene.caption, images=images)
        np.testing.assert_allclose(texts[n], np.array(expected.positive)[0], atol=2e-2)
        if edit:
            np.testing.assert_allclose(latents[n], np.array(expected.references[0].latents)[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("words", [COLOURS, SHAPES, PLACES])
def test_what_a_caption_says_of_its_thing_can_be_read_off_its_last_state(frames, words):
    rng = np.random.default_rng(3)
    prompts = [draw_scene(rng).caption for _ in range(1200)]
    states = np.stack([text[-1] for text in Frame(frames / "demo").texts(prompts)]).astype(np.float64)
    said = np.array([[f" {word}" in prompt.split(" on a")[0] for word in words] for prompt in prompts])
    inputs = np.hstack([states, np.ones((len(states), 1))])
    train, test = slice(0, 1000), slice(1000, None)
    ridge = inputs[train].T @ inputs[train] + 0.1 * np.eye(inputs.shape[1])
    weights = np.linalg.solve(ridge, inputs[train].T @ said[train])
    assert ((inputs[test] @ weights > 0.5) == said[test]).all(axis=1).mean() > 0.97
