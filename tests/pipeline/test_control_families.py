"""The ControlNets that diffusers does not have, against independent implementations in torch.

They are written from the descriptions of VideoX-Fun's and DiffSynth's code; the transformer and its blocks are
diffusers' own. One step's velocity of each branch is compared.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import write_text_to_image
from checkpoints_21 import TINY_TRANSFORMER, write_checkpoint_21
from control_files import BLOCKWISE, FUN, FUN_21, half_mask, picture, write_control
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TransformerBlock
from PIL import Image
from reference import load_reference, to_numpy
from reference_21 import make_transformer_21
from safetensors.torch import load_file

from qwen_image_mlx import Control, QwenImagePipeline
from qwen_image_mlx.pipeline.conditioning import Reference
from qwen_image_mlx.pipeline.reporter import Reporter
from qwen_image_mlx.pipeline.seams import Conditions

pytestmark = pytest.mark.reference

WIDTH, HEIGHT = 64, 48
ROWS, COLUMNS = HEIGHT // 16, WIDTH // 16
SIGMAS = np.array([0.9, 0.4], np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_text_to_image(tmp_path_factory.mktemp("families") / "tiny", transformer={"num_layers": 4})


@pytest.fixture(scope="module")
def reference(tiny):
    return load_reference(tiny)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32")


def tensor(array):
    return torch.from_numpy(np.array(array.astype(mx.float32)))


@torch.no_grad()
def velocity(transformer, latents, states, sigma, hints):
    """The transformer's forward pass with `hints(tokens, text, time, rotary)` -> a function of block and tokens."""
    image, text = transformer.img_in(latents), transformer.txt_in(transformer.txt_norm(states))
    time = transformer.time_text_embed(torch.tensor([sigma]), image)
    rotary = transformer.pos_embed([(1, ROWS, COLUMNS)], max_txt_seq_len=text.shape[1], device="cpu")
    hint = hints(image, text, time, rotary)
    for number, block in enumerate(transformer.transformer_blocks):
        text, image = block(image, text, None, time, rotary)
        image = hint(number, image)
    return transformer.proj_out(transformer.norm_out(image, time))


@torch.no_grad()
def latents_of(vae, image, hole=None, fill=0.0):
    """Normalised latents (1, 16, h, w): the autoencoder's mode, with the hole's pixels replaced."""
    pixels = torch.from_numpy(np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)).copy()).float()
    pixels = (pixels / 127.5 - 1).permute(2, 0, 1)[None]
    if hole is not None:
        pixels = torch.where(hole > 0.5, torch.tensor(fill), pixels)
    mode = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (mode - mean) / std


def hole_of(mask):
    grey = np.asarray(mask.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), np.float32) / 255
    return torch.from_numpy((grey >= 0.5).astype(np.float32))[None, None]


def packed(latents):
    """(1, C, h, w) to (1, h/2 * w/2, 4 C), as the pipelines' _pack_latents."""
    channels = latents.shape[1]
    cells = latents.view(1, channels, ROWS, 2, COLUMNS, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(1, ROWS * COLUMNS, 4 * channels)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def fun_hints(state, config, context, scale):
    """VideoX-Fun: a chain of blocks whose hints are added after blocks 0, every, 2 every, …"""
    blocks = []
    for number in range(2):
        block = QwenImageTransformerBlock(96, config.num_attention_heads, config.attention_head_dim)
        prefix, own = f"control_blocks.{number}.", {}
        for name, value in state.items():
            if name.startswith(prefix) and "_proj." not in name.removeprefix(prefix)[:12]:
                own[name.removeprefix(prefix)] = value
        block.load_state_dict(own)
        blocks.append(block)

    def hints(image, text, time, rotary):
        state_of, made = linear(state, "control_blocks.0.before_proj", linear(state, "control_img_in", context)), []
        state_of = state_of + image
        for number, block in enumerate(blocks):
            text, state_of = block(state_of, text, None, time, rotary)
            made.append(linear(state, f"control_blocks.{number}.after_proj", state_of))
        return lambda number, x: x + scale * made[number // 2] if number % 2 == 0 else x

    return hints


def blockwise_hints(nets):
    """DiffSynth: RMS norms of both, a matrix, the exact GELU, a matrix; several see the same tokens."""

    def rms(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def hints(image, text, time, rotary):
        seen = [linear(state, "img_in", context) for state, context, _ in nets]

        def add(number, x):
            path, total = f"controlnet_blocks.{number}", x
            for (state, _, scale), y in zip(nets, seen, strict=True):
                both = rms(x, state[f"{path}.x_rms.weight"]) + rms(y, state[f"{path}.y_rms.weight"])
                hidden = torch.nn.functional.gelu(linear(state, f"{path}.input_proj", both))
                total = total + scale * linear(state, f"{path}.output_proj", hidden)
            return total

        return add

    return hints


def compare(pipeline, reference, controls, hints):
    """One step of both branches; and that the control matters."""
    states = [pipeline.encode_guidance_prompts(prompt).positive for prompt in ("a red fox", "something else, blurry")]
    latents = mx.random.normal((1, ROWS * COLUMNS, 64), key=mx.random.key(5))
    inputs = pipeline.encode_controls(controls, (WIDTH, HEIGHT))
    make = pipeline.components.use_of("transformer")
    ours, plain = (
        make(
            pipeline.components, Conditions(tuple(states), (), 1, ROWS, COLUMNS, SIGMAS, given), Reporter()
        ).velocities(latents, 1)
        for given in (inputs, ())
    )  # fmt: skip
    for state, got, without in zip(states, ours, plain, strict=True):
        expected = to_numpy(velocity(reference.transformer, tensor(latents), tensor(state), float(SIGMAS[1]), hints))
        error = np.abs(np.array(got) - expected).max() / np.abs(expected).max()
        print("relative error", error)
        assert error < 2e-5
        assert np.abs(np.array(without) - expected).max() / np.abs(expected).max() > 0.01


@pytest.mark.parametrize("case", ["control", "inpaint", "both"])
def test_fun(pipeline, reference, tiny, case):
    file = write_control(tiny.parent / "fun.safetensors", tiny, FUN, layers=2, extra=17)
    photo, other, mask = picture(80, 70), picture(90, 60, 1), half_mask(80, 70)
    hole = hole_of(mask)
    keep = 1 - hole[:, :, ::8, ::8]
    nothing = torch.zeros(1, 16, HEIGHT // 8, WIDTH // 8)
    said, parts = {
        "control": ({}, (latents_of(reference.vae, photo), torch.zeros_like(keep), nothing)),
        "inpaint": ({"mask": mask}, (nothing, keep, latents_of(reference.vae, photo, hole))),
        "both": ({"mask": mask, "source": other},
                 (latents_of(reference.vae, photo), keep, latents_of(reference.vae, other, hole))),
    }[case]  # fmt: skip
    context = packed(torch.cat(parts, dim=1))
    hints = fun_hints(load_file(file), reference.transformer.config, context, 0.8)
    compare(pipeline, reference, [Control(file, photo, scale=0.8, **said)], hints)


def test_block_wise(pipeline, reference, tiny):
    """A control image, and an image to inpaint, together."""
    files = [
        write_control(tiny.parent / f"blockwise{extra}.safetensors", tiny, BLOCKWISE, layers=4, extra=extra, seed=extra)
        for extra in (0, 1)
    ]
    photo, mask = picture(80, 70), half_mask(80, 70)
    hole = hole_of(mask)
    masked = torch.cat([latents_of(reference.vae, photo, hole, -1.0), 1 - hole[:, :, ::8, ::8]], dim=1)
    contexts = [packed(latents_of(reference.vae, photo)), packed(masked)]
    nets = [(load_file(file), context, scale) for file, context, scale in zip(files, contexts, (0.7, 1.2), strict=True)]
    controls = [Control(files[0], photo, scale=0.7), Control(files[1], photo, scale=1.2, mask=mask)]
    compare(pipeline, reference, controls, blockwise_hints(nets))


# Qwen-Image-2.1 -------------------------------------------------------------------------------------------------------


def steered_21(transformer, state, context, scale):
    """Hooks on the transformer's blocks: the control chain runs on the joint sequence with each block's own arguments.

    The control's tokens stand where the target is, at the end; elsewhere they are zeros.
    """
    blocks = []
    for number in range(2):
        block = QwenImage21TransformerBlock(96, 3, 32, mlp_ratio=3, eps=1e-6).eval()
        prefix = f"control_blocks.{number}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        block.load_state_dict({name: value for name, value in own.items() if "_proj." not in name[:12]})
        blocks.append(block)
    hints = []

    def begin(_, arguments, named):
        named = {**named, "layer_cache": None, "kv_cache_mode": None, "cache_write_slice": None}
        joint = arguments[0] if arguments else named.pop("hidden_states")
        placed = torch.zeros_like(joint)
        placed[:, -context.shape[1] :] = linear(state, "control_img_in", context)
        chain = linear(state, "control_blocks.0.before_proj", placed) + joint
        hints.clear()
        for number, block in enumerate(blocks):
            chain = block(chain, *arguments[1:], **named)
            hints.append(linear(state, f"control_blocks.{number}.after_proj", chain))

    handles = [transformer.transformer_blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    for number in range(2):
        handles.append(
            transformer.transformer_blocks[2 * number].register_forward_hook(
                lambda _, __, out, number=number: out + scale * hints[number]
            )
        )
    return handles


@pytest.mark.parametrize("places", [(), ((3, 4, 6),)], ids=["text alone", "with a reference"])
def test_fun_21(tmp_path, places):
    """Three blocks of the transformer, two of the control: hints after the first and the third."""
    folder, grid = write_checkpoint_21(tmp_path / "tiny"), (4, 6)
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    theirs = make_transformer_21(TINY_TRANSFORMER)
    theirs.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    file = write_control(tmp_path / "fun21.safetensors", folder, FUN_21, layers=2, extra=65)
    size = (grid[1] * 16, grid[0] * 16)
    made = Control(file, picture(80, 70), scale=0.7, mask=half_mask(80, 70), source=picture(80, 70, 1))
    inputs = pipeline.encode_controls([made], size)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, grid[0] * grid[1], 64)).astype(np.float32)
    states = [3 * rng.standard_normal((1, length, 64)).astype(np.float32) for length in (20, 14)]
    shown = [rng.standard_normal((1, h * w, 64)).astype(np.float32) for _, h, w in places]
    references = tuple(Reference(mx.array(r), h, w, start) for r, (start, h, w) in zip(shown, places, strict=True))
    conditions = Conditions(tuple(map(mx.array, states)), references, 1, *grid, SIGMAS, inputs)
    make = pipeline.components.use_of("transformer")
    ours = make(pipeline.components, conditions, Reporter()).velocities(mx.array(noise), 1)
    plain = make(
        pipeline.components, Conditions(tuple(map(mx.array, states)), references, 1, *grid, SIGMAS), Reporter()
    ).velocities(mx.array(noise), 1)
    handles = steered_21(theirs, load_file(file), tensor(inputs[0].tokens), 0.7)
    for given, got, without in zip(states, ours, plain, strict=True):
        is_image = np.zeros(given.shape[1] + noise.shape[1] // 4, bool)
        is_image[given.shape[1] :] = True
        for start, h, w in places:
            is_image[start : start + h * w // 4] = True
        with torch.no_grad():
            out = theirs(
                hidden_states=torch.from_numpy(np.concatenate([*shown, noise], axis=1)),
                encoder_hidden_states=torch.from_numpy(given),
                timestep=torch.tensor([float(SIGMAS[1])]),
                img_shapes=[[*((1, h, w) for _, h, w in places), (1, *grid)]],
                img_mask=torch.from_numpy(is_image)[None],
                return_dict=False,
            )[0]
        expected = to_numpy(out)[:, -noise.shape[1] :]
        error = np.abs(np.array(got) - expected).max() / np.abs(expected).max()
        print("relative error", error)
        assert error < 2e-5
        assert np.abs(np.array(without) - expected).max() / np.abs(expected).max() > 0.01
    for handle in handles:
        handle.remove()
