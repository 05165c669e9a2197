"""The demo's transformers: born still, trained on batches that need no padding, written as diffusers reads them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from demo import painter
from demo.autoencoder import Autoencoder, module_weights
from demo.checkpoint import pack, transformer_config, write_component, write_frame
from demo.samples import EMPTY, Frame, Samples, decompositions, draw_edits, draw_scenes, edits, paintings, rendered

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.weights import snapshot

pytestmark = pytest.mark.demo

MODELS = ("demo", "demo-edit", "demo-layered")
VAES = {model: VAEConfig(base_dim=4, input_channels=4 if model == "demo-layered" else 3) for model in MODELS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The models with untrained autoencoders, and yet without transformers."""
    folder = tmp_path_factory.mktemp("models")
    for model, config in VAES.items():
        write_frame(folder / model, model, config, module_weights(Autoencoder(config)))
    return folder


@pytest.fixture(scope="module")
def samples(models):
    """A few samples of every kind."""
    frames = {model: Frame(models / model) for model in MODELS}
    return {
        "demo": paintings(frames["demo"], draw_scenes(12, 0)),
        "demo-edit": edits(frames["demo-edit"], draw_edits(8, 0)),
        "demo-layered": decompositions(frames["demo-layered"], draw_scenes(6, 0), 3),
    }


def moved(model: str):
    """A network none of whose weights is zero."""
    network = painter.new_network(transformer_config(model))
    for _, module in network.named_modules():
        for name in ("weight", "bias"):
            if name in module and not module[name].any().item():
                module[name] = 0.05 * mx.random.normal(module[name].shape, key=mx.random.key(module[name].size))
    return network


@pytest.mark.parametrize("model", MODELS)
def test_a_new_network_stands_still(model, samples):
    batch = samples[model].batch(np.random.default_rng(0), 2)
    network = painter.new_network(transformer_config(model))
    velocity = network(batch.latents, batch.text, mx.array([0.3, 0.8]), network.rotary(batch), batch.references)
    assert velocity.shape == batch.latents.shape
    assert not velocity.any().item()
    assert moved(model)(batch.latents, batch.text, mx.array([0.3, 0.8]), network.rotary(batch), batch.references).any()


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_is_of_one_length_and_now_and_then_without_prompts(model, samples):
    kind = samples[model]
    lengths, dropped = set(), 0
    texts = {text.tobytes(): n for n, text in enumerate(kind.texts)}
    for seed in range(60):
        batch = kind.batch(np.random.default_rng(seed), 4, drop=0.3)
        numbers = [texts[np.array(text, np.float16).tobytes()] for text in batch.text]
        without = [n in kind.dropped for n in numbers]
        assert all(without) or not any(without)
        dropped += all(without)
        lengths.add(batch.text.shape[1])
    assert 8 < dropped < 28
    assert len(lengths) > 1


def test_layered_samples_are_the_image_its_layers_and_nothing(samples, models):
    kind, frame = samples["demo-layered"], Frame(models / "demo-layered")
    assert [segment.frame for segment in kind.segments] == [0, 1, 2, 3, -1]
    (scene,) = draw_scenes(1, 0)
    expected = np.concatenate([scene.layers(), EMPTY[None]])
    assert len(expected) == 3, "one thing, so the third layer shows nothing"
    np.testing.assert_allclose(kind.latents[0, 16:].reshape(3, 16, 64), frame.latents(expected), atol=0.01)
    np.testing.assert_array_equal(kind.latents[0, :16], kind.references[0])


def test_edited_scenes_stand_beside_what_they_were(samples, models):
    pairs, kind, frame = draw_edits(8, 0), samples["demo-edit"], Frame(models / "demo-edit")
    np.testing.assert_array_equal(kind.references, frame.latents(rendered([pair.before for pair in pairs])))
    np.testing.assert_array_equal(kind.latents, frame.latents(rendered([pair.after for pair in pairs])))
    assert (kind.references != kind.latents).any(axis=(1, 2)).all()
    assert not any(pair.before.is_held_out or pair.after.is_held_out for pair in pairs)
    assert all(pair.before.is_held_out for pair in draw_edits(8, 0, held_out=True))


def test_samples_are_kept_in_files(samples, tmp_path):
    for kind in samples.values():
        kind.save(tmp_path / "samples.npz")
        again = Samples.load(tmp_path / "samples.npz")
        a, b = (k.batch(np.random.default_rng(1), 3) for k in (kind, again))
        assert mx.array_equal(a.latents, b.latents)
        assert mx.array_equal(a.text, b.text)
        assert (a.segments, a.references is None) == (b.segments, b.references is None)


def test_training_lowers_the_loss_of_what_it_sees(samples, monkeypatch):
    monkeypatch.setattr(painter, "WARM_UP", 1)
    batch = samples["demo-edit"].batch(np.random.default_rng(0), 4, drop=0)
    trainer = painter.new_trainer(painter.new_network(transformer_config("demo-edit")), lambda step: [batch], 1000)
    losses = [trainer.take_step().loss for _ in range(16)]
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])


@pytest.mark.reference
@pytest.mark.parametrize("model", MODELS)
def test_diffusers_reads_the_written_transformer(model, samples, tmp_path):
    import torch
    from diffusers import QwenImageTransformer2DModel

    network, config = moved(model), transformer_config(model)
    trainer = painter.new_trainer(network, lambda step: [], 1000)
    write_component(tmp_path, "transformer", config, painter.file_weights(trainer), mx.float32)
    theirs = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    batch = samples[model].batch(np.random.default_rng(0), 2, drop=0)
    sigma = 0.4
    ours = network(batch.latents, batch.text, mx.full((2,), sigma), network.rotary(batch), batch.references)
    shapes = [[(1, segment.height, segment.width) for segment in batch.segments]] * 2
    both = [batch.latents] if batch.references is None else [batch.latents, batch.references]
    with torch.no_grad():
        out = theirs(
            hidden_states=torch.from_numpy(np.array(mx.concatenate(both, axis=1))),
            encoder_hidden_states=torch.from_numpy(np.array(batch.text)),
            encoder_hidden_states_mask=torch.ones(batch.text.shape[:2], dtype=torch.int64),
            timestep=torch.full((2,), sigma),
            img_shapes=shapes,
            **({"additional_t_cond": torch.zeros(2, dtype=torch.int64)} if config.use_additional_t_cond else {}),
        ).sample[:, : ours.shape[1]]
    np.testing.assert_allclose(np.array(ours), out.numpy(), atol=2e-4 * out.abs().max().item())


def test_packed_models_share_and_generate(models, samples, tmp_path, monkeypatch):
    for model in MODELS:
        trainer = painter.new_trainer(moved("demo-edit" if model == "demo" else model), lambda step: [], 1000)
        write_component(models / model, "transformer", transformer_config(model), painter.file_weights(trainer))
    pack(models, tmp_path)
    own = {model: sorted(path.name for path in (tmp_path / model).iterdir()) for model in MODELS}
    assert own["demo"] == own["demo-edit"] == ["model_index.json"]
    assert own["demo-layered"] == ["model_index.json", "transformer", "vae"]
    monkeypatch.setattr(snapshot, "DEMO_ROOT", tmp_path)
    image = rendered(draw_scenes(1, 0))[0]
    (generated,) = QwenImagePipeline.from_pretrained("demo").generate("a red circle", num_inference_steps=2)
    assert generated.size == (64, 64)
    (edited,) = QwenImagePipeline.from_pretrained("demo-edit").edit(
        "make it red", images=[image], num_inference_steps=2
    )
    assert edited.size == (64, 64)
    apart = QwenImagePipeline.from_pretrained("demo-layered").decompose(image, num_layers=2, num_inference_steps=2)
    assert [layer.size for layer in apart.layers] == [(64, 64)] * 2
