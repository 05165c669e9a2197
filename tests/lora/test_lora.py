"""LoRA files: every dialect gives one change, which is PEFT's, diffusers' and the formula's; the rest is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from checkpoints import REAL_CONFIGS, TINY
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from hypothesis import given
from hypothesis import strategies as st
from reference import make_transformer
from safetensors.torch import load_file, save_file

from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.errors import CheckpointError, RequestError
from qwen_image_mlx.lora.description import describe, distillation_of
from qwen_image_mlx.lora.distillations import LIGHTNING
from qwen_image_mlx.lora.file import LoRA, read_lora, weights_file
from qwen_image_mlx.lora.references import Source, kind_of, parse_reference
from qwen_image_mlx.sampling.schedule import make_schedule, static_shift, uniform_sigmas

pytestmark = pytest.mark.reference

Q, MLP, MOD, OUT = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.txt_mlp.net.0.proj",
    "transformer_blocks.0.img_mod.1",
    "transformer_blocks.1.attn.to_out.0",
)
TIME = "time_text_embed.timestep_embedder.linear_1"
USED = (Q, MLP, MOD, OUT, TIME, "img_in", "norm_out.linear")


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    """The weights and biases of a tiny transformer of the reference."""
    model = make_transformer(TINY["transformer"])
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def targets(base) -> dict[str, tuple[int, ...]]:
    """Every module with a weight, as the loader would give them."""
    return {name.removesuffix(".weight"): value.shape for name, value in base.items() if name.endswith(".weight")}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).standard_normal(shape).astype(np.float32)


def write(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata)
    return path


def lora_of(tmp_path: Path, tensors: dict, targets, strength: float = 1.0, metadata: dict | None = None) -> LoRA:
    return read_lora(write(tmp_path / "a.safetensors", tensors, metadata), targets, strength)


def delta(lora: LoRA, target: str, base) -> np.ndarray:
    change = lora.updates[target].delta(mx.array(base[f"{target}.weight"]))
    assert change.dtype == mx.float32
    return np.array(change)


def plain(shape: tuple[int, int], rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return normal(rank, shape[1], seed=seed), normal(shape[0], rank, seed=seed + 1000)


def close(actual, desired) -> None:
    np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-5 * np.abs(desired).max())


# --- one LoRA, every dialect -----------------------------------------------------------------------------------------

SUFFIXES = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "adapter": ("lora_A.default.weight", "lora_B.default.weight"),
    "adapters": ("lora_A.default_0.default.weight", "lora_B.default_0.default.weight"),
    "old": ("lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}
PREFIXES = (
    "", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "pipe.dit.",
    "module.", "_orig_mod.", "transformer._orig_mod.", "module._orig_mod.base_model.model.",
    "diffusion_model.transformer.", "base_model.model.transformer.", "transformer.base_model.model.",
)  # fmt: skip
FLAT_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_", "lora_unet__orig_mod_", "lora_transformer_module_")
DOTTED = [(suffix, prefix, False) for suffix in SUFFIXES for prefix in PREFIXES]
FLAT = [(suffix, prefix, True) for suffix in SUFFIXES for prefix in FLAT_PREFIXES]


def spell(suffix: str, prefix: str, flat: bool, targets, alpha: float | None = 3.0) -> dict[str, np.ndarray]:
    tensors = {}
    for seed, target in enumerate(USED):
        name = prefix + (target.replace(".", "_") if flat else target)
        for key, value in zip(SUFFIXES[suffix], plain(targets[target], 4 + seed % 2, seed), strict=True):
            tensors[f"{name}.{key}"] = value
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.float32(alpha)
    return tensors


@pytest.mark.parametrize(("suffix", "prefix", "flat"), DOTTED + FLAT)
@pytest.mark.parametrize("alpha", [3.0, None])
def test_every_dialect_gives_the_same_changes(tmp_path, targets, base, suffix, prefix, flat, alpha) -> None:
    lora = lora_of(tmp_path, spell(suffix, prefix, flat, targets, alpha), targets, strength=-0.7)
    assert set(lora.updates) == set(USED)
    assert not lora.unmatched
    assert (lora.matched, lora.total) == (7, sum(len(shape) == 2 for shape in targets.values()))
    for seed, target in enumerate(USED):
        rank = 4 + seed % 2
        a, b = plain(targets[target], rank, seed)
        desired = -0.7 * (1.0 if alpha is None else alpha / rank) * b @ a
        close(delta(lora, target, base), desired)
        side_a, side_b = lora.updates[target].factors()
        assert side_a.dtype == side_b.dtype == mx.float32
        assert side_a.shape == (rank, targets[target][1])
        close(np.array(side_b) @ np.array(side_a), desired)
        assert lora.updates[target].bias_delta() is None


DIFFUSERS_LOADS = [
    ("peft", "transformer.", False),
    ("peft", "diffusion_model.", False),
    ("adapter", "", False),
    ("kohya", "", False),
    ("kohya", "diffusion_model.", False),
    ("kohya", "lora_unet_", True),
]

DIFFUSERS_FAILS = {
    ("peft", "transformer.", 3.0): "diffusers adds the prefix twice where there are alphas",
    ("kohya", "", None): "without alphas diffusers loads nothing of it, and says nothing",
}


def diffusers_merge(path: Path, strength: float) -> dict[str, np.ndarray]:
    """The tiny transformer's state with a LoRA file loaded and fused by diffusers."""
    model = make_transformer(TINY["transformer"])
    state, metadata = QwenImagePipeline.lora_state_dict(str(path), return_lora_metadata=True)
    QwenImagePipeline.load_lora_into_transformer(state, model, adapter_name="a", metadata=metadata)
    return fused(model, strength)


def fused(model, strength: float) -> dict[str, np.ndarray]:
    model.set_adapters("a", weights=strength)
    model.fuse_lora()
    model.unload_lora()
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def merge(lora: LoRA, base) -> dict[str, np.ndarray]:
    """The tiny transformer's state with every update applied."""
    merged = dict(base)
    for target, update in lora.updates.items():
        merged[f"{target}.weight"] = base[f"{target}.weight"] + delta(lora, target, base)
        if (bias := update.bias_delta()) is not None:
            merged[f"{target}.bias"] = base[f"{target}.bias"] + np.array(bias)
    return merged


def same_models(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], base) -> None:
    assert ours.keys() == theirs.keys()
    assert any(not np.array_equal(theirs[name], base[name]) for name in base)
    for name in ours:
        close(ours[name], theirs[name])


@pytest.mark.parametrize(("suffix", "prefix", "flat"), DIFFUSERS_LOADS)
@pytest.mark.parametrize("alpha", [3.0, None])
def test_diffusers_merges_the_same_file_to_the_same_weights(
    tmp_path, targets, base, suffix, prefix, flat, alpha
) -> None:
    if (suffix, prefix, alpha) in DIFFUSERS_FAILS:
        pytest.skip(DIFFUSERS_FAILS[suffix, prefix, alpha])
    path = write(tmp_path / "a.safetensors", spell(suffix, prefix, flat, targets, alpha))
    same_models(merge(read_lora(path, targets, 0.6), base), diffusers_merge(path, 0.6), base)


# --- PEFT itself -----------------------------------------------------------------------------------------------------

MODULES = ["to_q", "net.0.proj", "img_mod.1", "to_out.0"]
CONFIGS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 7, "img_mod.1": 2, r"transformer_blocks\.1\..*proj": 5},
        "alpha_pattern": {"_q": 99, "to_q": 11, r"^transformer_blocks.1.attn.to_out.0": 1, "net.0.proj": 0.5},
    },
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "everything": {
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"to_q": 7},
        "alpha_pattern": {"to_q": 11, "to_out.0": 1},
    },
}


def shaken(module) -> None:
    """Non-trivial values in every adapter parameter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if any(word in name for word in ("lora_", "hada_", "lokr_")):
                noise = torch.randn(value.shape, generator=generator) * 0.3
                value.copy_(value * (1 + noise) if "magnitude" in name else noise)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strength", [1.0, -0.4, 0.0])
def test_adapters_saved_by_diffusers_change_what_peft_changes(tmp_path, targets, base, name, strength) -> None:
    model = make_transformer(TINY["transformer"])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, **CONFIGS[name])
    model.add_adapter(config, adapter_name="a")
    shaken(model)
    model.save_lora_adapter(tmp_path, adapter_name="a")
    lora = read_lora(tmp_path, targets, strength)
    assert not lora.unmatched
    assert lora.peft is not None
    theirs = fused(model, strength)
    assert np.array_equal(theirs[f"{Q}.weight"], base[f"{Q}.weight"]) == (
        not strength and "use_dora" not in CONFIGS[name]
    )
    ours = merge(lora, base)
    for key in ours:
        close(ours[key], theirs[key])


@pytest.mark.parametrize("name", ["plain", "patterns", "dora"])
def test_pipelines_save_settings_under_the_transformers_name(tmp_path, targets, base, name) -> None:
    model = make_transformer(TINY["transformer"])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, **CONFIGS[name])
    model.add_adapter(config, adapter_name="a")
    shaken(model)
    QwenImagePipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="a"),
        transformer_lora_adapter_metadata=model.peft_config["a"].to_dict(),
    )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", targets, 0.5)
    assert "transformer.r" in json.loads(lora.metadata["lora_adapter_metadata"])
    same_models(merge(lora, base), fused(model, 0.5), base)


PEFT_METHODS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, use_dora=True),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=MODULES),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=MODULES),
    "lokr, both factored": peft.LoKrConfig(r=2, alpha=6, target_modules=MODULES, decompose_both=True),
    "lokr, full": peft.LoKrConfig(r=64, alpha=6, target_modules=MODULES),
}


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_folders_saved_by_peft_take_their_scale_from_adapter_config(tmp_path, targets, base, name) -> None:
    model = peft.get_peft_model(make_transformer(TINY["transformer"]), PEFT_METHODS[name])
    shaken(model)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path, targets)
    assert not lora.unmatched
    state = model.merge_and_unload().state_dict()
    same_models(merge(lora, base), {key: value.detach().numpy() for key, value in state.items()}, base)
    assert (lora.updates[MLP].factors() is None) == (name in ("dora", "lokr, full"))
    if branch := lora.updates[MLP].factors():
        close(np.array(branch[1] @ branch[0]), delta(lora, MLP, base))


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("alpha", [2.0, None])
def test_loha_is_a_product_of_two_products(tmp_path, targets, base, flat, alpha) -> None:
    name = f"lycoris_{Q.replace('.', '_')}" if flat else f"diffusion_model.{Q}"
    out, width = targets[Q]
    p, q, r, s = normal(out, 3, seed=1), normal(3, width, seed=2), normal(out, 3, seed=3), normal(3, width, seed=4)
    tensors = {
        f"{name}.hada_{key}": value for key, value in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (p, q, r, s), strict=True)
    }
    if alpha:
        tensors[f"{name}.alpha"] = np.float32(alpha)
    lora = lora_of(tmp_path, tensors, targets, 0.5)
    desired = 0.5 * (alpha / 3 if alpha else 1) * (p @ q) * (r @ s)
    close(delta(lora, Q, base), desired)
    a, b = lora.updates[Q].factors()
    assert a.shape == (9, width)
    close(np.array(b @ a), desired)


LOKR = {
    "full": ("w1", "w2"),
    "second factored": ("w1", "w2_a", "w2_b"),
    "first factored": ("w1_a", "w1_b", "w2"),
    "both factored": ("w1_a", "w1_b", "w2_a", "w2_b"),
}


@pytest.mark.parametrize("roles", LOKR.values(), ids=LOKR)
def test_lokr_is_a_kronecker_product(tmp_path, targets, base, roles) -> None:
    out, width = targets[MLP]
    sizes = {"w1": (4, 8), "w2": (out // 4, width // 8)}
    ranks = {"w1": 2, "w2": 3}
    values = {}
    for seed, role in enumerate(roles):
        rows, columns = sizes[role[:2]]
        rank = ranks[role[:2]]
        shape = {"": (rows, columns), "_a": (rows, rank), "_b": (rank, columns)}[role[2:]]
        values[role] = normal(*shape, seed=seed)
    w1, w2 = (values[w] if w in values else values[f"{w}_a"] @ values[f"{w}_b"] for w in ("w1", "w2"))
    # alpha counts only where something is factored; of two ranks the second side's
    scale = 1 if len(roles) == 2 else 6 / (3 if "w2_b" in roles else 2)
    tensors = {f"transformer.{MLP}.lokr_{role}": value for role, value in values.items()}
    lora = lora_of(tmp_path, {**tensors, f"transformer.{MLP}.alpha": np.float32(6)}, targets, -2)
    desired = -2 * scale * np.kron(w1, w2)
    close(delta(lora, MLP, base), desired)
    pair = lora.updates[MLP].factors()
    assert (pair is None) == ("w2" in roles and "w1" in roles)
    if pair:
        close(np.array(pair[1] @ pair[0]), desired)


MAGNITUDES = {"rows": lambda o, i: (o, 1), "flat rows": lambda o, i: (o,), "columns": lambda o, i: (1, i)}


@pytest.mark.parametrize("target", [Q, MLP])
@pytest.mark.parametrize("shape", MAGNITUDES.values(), ids=MAGNITUDES)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_dora_rescales_rows_or_columns_to_the_magnitude(tmp_path, targets, base, target, shape, strength) -> None:
    a, b = plain(targets[target], 4)
    magnitude = np.abs(normal(*shape(*targets[target]), seed=9)) + 0.5
    name = f"lora_unet_{target.replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": a,
        f"{name}.lora_up.weight": b,
        f"{name}.alpha": np.float32(2),
        f"{name}.dora_scale": magnitude,
    }
    lora = lora_of(tmp_path, tensors, targets, strength)
    weight = base[f"{target}.weight"]
    moved = weight + strength * 0.5 * b @ a
    axis = 0 if magnitude.shape == (1, targets[target][1]) else 1
    desired = (
        magnitude.reshape((1, -1) if axis == 0 else (-1, 1)) * moved / np.linalg.norm(moved, axis=axis, keepdims=True)
    )
    close(delta(lora, target, base), desired - weight)
    assert lora.updates[target].factors() is None


def test_a_dora_row_without_length_stays_zero(tmp_path, targets) -> None:
    a, b = plain(targets[Q], 2)
    b[0] = 0
    tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b, f"{Q}.dora_scale": np.ones(targets[Q][0], np.float32)}
    lora = lora_of(tmp_path, tensors, targets)
    change = np.array(lora.updates[Q].delta(mx.zeros(targets[Q])))
    assert np.isfinite(change).all()
    assert not change[0].any()


def test_differences_replacements_and_biases(tmp_path, targets, base) -> None:
    out, width = targets[Q]
    a, b = plain(targets["img_in"], 4)
    norm = "transformer_blocks.0.attn.norm_q"
    values = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate([
        (f"diffusion_model.{Q}.diff", (out, width)),
        (f"diffusion_model.{Q}.diff_b", (out,)),
        (f"diffusion_model.{MLP}.set_weight", targets[MLP]),
        (f"diffusion_model.{norm}.diff", targets[norm]),
        (f"lycoris_{MOD.replace('.', '_')}.b_norm", (targets[MOD][0],)),
        ("diffusion_model.img_in.lora_up.bias", (targets["img_in"][0],)),
        ("diffusion_model.img_in.diff_b", (targets["img_in"][0],)),
    ])}  # fmt: skip
    d, d_bias, replacement, d_norm, mod_bias, up_bias, in_bias = values.values()
    pair = {"diffusion_model.img_in.lora_down.weight": a, "diffusion_model.img_in.lora_up.weight": b}
    alpha = {"diffusion_model.img_in.alpha": np.float32(1), f"diffusion_model.{Q}.alpha": np.float32(100)}
    lora = lora_of(tmp_path, {**values, **pair, **alpha}, targets, 0.5)
    assert not lora.unmatched
    close(delta(lora, Q, base), 0.5 * d)
    close(np.array(lora.updates[Q].bias_delta()), 0.5 * d_bias)
    close(delta(lora, MLP, base), 0.5 * (replacement - base[f"{MLP}.weight"]))
    close(delta(lora, norm, base), 0.5 * d_norm)
    assert not lora.updates[MOD].changes_weight
    assert not delta(lora, MOD, base).any()
    close(np.array(lora.updates[MOD].bias_delta()), 0.5 * mod_bias)
    close(np.array(lora.updates["img_in"].bias_delta()), 0.5 * (up_bias / 4 + in_bias))
    assert all(lora.updates[name].factors() is None for name in (Q, MLP, MOD, norm))
    assert lora.updates["img_in"].factors() is not None
    assert lora.matched == 3  # the norm is no matrix, and of img_mod only the bias moves


@pytest.mark.parametrize("place", ["{}_orig_mod.{}", "{}attn._orig_mod.{}", "{}attn._fsdp_wrapped_module.{}"])
def test_wrappers_inside_a_name_mean_nothing(tmp_path, targets, base, place) -> None:
    """Blocks that were compiled or sharded each by itself."""
    first, last = Q.split("attn.")
    name = place.format(first, last if "attn" in place else f"attn.{last}")
    a, b = plain(targets[Q], 4)
    close(delta(lora_of(tmp_path, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, targets), Q, base), b @ a)


@pytest.mark.parametrize(("fused", "names"), [
    ("to_qkv", ("to_q", "to_k", "to_v")),
    ("add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
])  # fmt: skip
@pytest.mark.parametrize("name", ["diffusion_model.{}", "lora_unet_{}"])
def test_fused_projections_change_each_of_their_three(tmp_path, targets, base, fused, names, name) -> None:
    module = f"transformer_blocks.0.attn.{fused}"
    module = name.format(module.replace(".", "_") if "unet" in name else module)
    a, b, bias = normal(4, 96), normal(288, 4, seed=1), normal(288, seed=2)
    tensors = {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.alpha": np.float32(2),
               f"{module}.diff_b": bias}  # fmt: skip
    lora = lora_of(tmp_path, tensors, targets)
    assert set(lora.updates) == {f"transformer_blocks.0.attn.{part}" for part in names}
    for n, part in enumerate(names):
        rows, target = slice(96 * n, 96 * (n + 1)), f"transformer_blocks.0.attn.{part}"
        close(delta(lora, target, base), b[rows] @ a / 2)
        close(np.array(lora.updates[target].bias_delta()), bias[rows])
        down, up = lora.updates[target].factors()
        close(np.array(up @ down), b[rows] @ a / 2)


def test_a_fused_loha_and_its_magnitudes_come_apart(tmp_path, targets, base) -> None:
    parts = {"hada_w1_a": (288, 2), "hada_w1_b": (2, 96), "hada_w2_a": (288, 2), "hada_w2_b": (2, 96)}
    values = {key: normal(*shape, seed=n) for n, (key, shape) in enumerate(parts.items())}
    name = "transformer_blocks.0.attn.to_qkv"
    lora = lora_of(tmp_path, {f"{name}.{key}": value for key, value in values.items()}, targets)
    whole = (values["hada_w1_a"] @ values["hada_w1_b"]) * (values["hada_w2_a"] @ values["hada_w2_b"])
    close(delta(lora, "transformer_blocks.0.attn.to_v", base), whole[192:])


@pytest.mark.parametrize("more", [(1, 1), (1,)])
def test_1x1_convolutions_are_matrices(tmp_path, targets, base, more) -> None:
    a, b = plain(targets[Q], 4)
    tensors = {f"{Q}.lora_down.weight": a.reshape(*a.shape, *more), f"{Q}.lora_up.weight": b.reshape(*b.shape, *more)}
    close(delta(lora_of(tmp_path, tensors, targets), Q, base), b @ a)


@pytest.mark.parametrize("where", ["alpha", "counter", "factor", "difference"])
def test_double_precision_is_read_wherever_it_stands(tmp_path, targets, base, where) -> None:
    """MLX opens no tensor of a file that has one."""
    a, b = plain(targets[Q], 4)
    tensors = {f"{Q}.lora_down.weight": a, f"{Q}.lora_up.weight": b, f"{Q}.alpha": np.float32(2)}
    change = b @ a / 2
    if where == "counter":
        tensors["steps"] = np.float64(3)
    elif where == "difference":
        tensors[f"{Q}.diff"] = np.full((96, 96), 0.5)
        change = change + 0.5
    else:
        key = {"alpha": f"{Q}.alpha", "factor": f"{Q}.lora_up.weight"}[where]
        tensors[key] = np.asarray(tensors[key], np.float64)
    lora = lora_of(tmp_path, tensors, targets)
    lora.check()
    close(delta(lora, Q, base), change)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_stored_types_are_read_as_they_stand(tmp_path, targets, base, dtype) -> None:
    a, b = (torch.as_tensor(value).to(dtype) for value in plain(targets[Q], 4))
    tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b, f"{Q}.alpha": torch.tensor(8)}
    lora = read_lora(write(tmp_path / "a.safetensors", tensors), targets)
    close(delta(lora, Q, base), 2 * (b.float() @ a.float()).numpy())


# --- what is read, and when ------------------------------------------------------------------------------------------


def test_values_are_read_when_asked_for_and_given_back(tmp_path, targets) -> None:
    big = {f"transformer_blocks.{n}.attn.to_q": (2048, 2048) for n in range(16)}
    tensors = {}
    for n, target in enumerate(big):
        for key, value in zip(SUFFIXES["peft"], plain((2048, 2048), 64, n), strict=True):
            tensors[f"{target}.{key}"] = value
    lora = lora_of(tmp_path, tensors, big)
    before = mx.get_active_memory()
    lora.check()
    for update in lora.updates.values():
        mx.eval(update.factors())
    assert mx.get_active_memory() - before < lora.nbytes / 8
    mx.clear_cache()


def test_names_without_a_module_are_kept_for_a_warning(tmp_path, targets) -> None:
    extra = {
        "transformer.transformer_blocks.77.attn.to_q.lora_A.weight": normal(4, 96),
        "transformer.transformer_blocks.77.attn.to_q.lora_B.weight": normal(96, 4),
        "transformer.img_in.something": normal(3),
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight": normal(4, 64),
        "transformer.txt_in.alpha": np.float32(3),
    }
    lora = lora_of(tmp_path, {**spell("peft", "transformer.", False, targets, None), **extra}, targets)
    assert set(lora.unmatched) == set(extra)
    assert lora.matched == 7


# --- what is wrong ---------------------------------------------------------------------------------------------------

FOREIGN = {
    "FLUX": ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX"),
    "FLUX, diffusers": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
    "SDXL": ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "Stable Diffusion 1, 2 or XL"),
    "Wan": ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
    "Wan, flattened": ("lora_unet_blocks_24_cross_attn_o.lora_down.weight", "Wan"),
    "2.1": ("transformer.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight", "Qwen-Image-2.1"),
    "Z-Image": ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "Z-Image or Lumina"),
    "unknown": ("transformer.encoder.3.lora_A.weight", "a different model: none of its"),
    "text encoder": ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "changes only a text encoder"),
    "whole model": ("transformer_blocks.0.attn.to_q.weight", "is not a LoRA"),
}


@pytest.mark.parametrize(("name", "said"), FOREIGN.values(), ids=FOREIGN)
def test_a_lora_of_another_model_is_refused_with_its_name(tmp_path, targets, name, said) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        lora_of(tmp_path, {name: normal(4, 96)}, targets)
    assert name in str(caught.value)


def test_a_lora_of_another_model_is_refused_although_some_names_fit(tmp_path, targets) -> None:
    tensors = spell("peft", "transformer.", False, targets)
    tensors["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"] = normal(4, 96)
    with pytest.raises(CheckpointError, match=r"made for FLUX.*although some of its names fit"):
        lora_of(tmp_path, tensors, targets)


def pair(target: str, down: tuple[int, ...], up: tuple[int, ...], **more) -> dict[str, np.ndarray]:
    return {
        f"{target}.lora_down.weight": normal(*down),
        f"{target}.lora_up.weight": normal(*up),
        **{f"{target}.{key}": value for key, value in more.items()},
    }


NORM = "transformer_blocks.0.attn.norm_q"
H = f"{Q}.hada_"
K = f"{Q}.lokr_"
BROKEN = {
    "width": (pair(Q, (4, 95), (96, 4)), r"to_q.*\(rank, 96\) and has \(4, 95\)"),
    "height": (pair(Q, (4, 96), (95, 4)), r"to_q.*\(96, 4\) and has \(95, 4\)"),
    "rank": (pair(Q, (4, 96), (96, 5)), r"to_q.*\(96, 4\) and has \(96, 5\)"),
    "no rank": (pair(Q, (0, 96), (96, 0)), r"\(rank, 96\) and has \(0, 96\)"),
    "scalar": (pair(Q, (), (96, 4)), r"\(rank, 96\) and has \(\)"),
    "convolution": (pair(Q, (4, 96, 3, 3), (96, 4, 1, 1)), r"\(rank, 96\) and has \(4, 96, 3, 3\)"),
    "vector": (pair(NORM, (4, 32), (32, 4)), "a vector of 32"),
    "up alone": ({f"{Q}.lora_up.weight": normal(96, 4)}, "half a LoRA for .*to_q: .*lora_up.weight without its down"),
    "down alone": ({f"{Q}.lora_A.weight": normal(4, 96)}, "half a LoRA .* without its up"),
    "half LoHa": ({f"{H}w1_a": normal(96, 2), f"{H}w1_b": normal(2, 96)}, "half a LoHa .*hada_w2_a and hada_w2_b"),
    "half LoKr": ({f"{K}w1": normal(2, 2), f"{K}w2_a": normal(48, 2)}, "half a LoKr .*without its lokr_w2_b"),
    "LoHa": (
        {f"{H}w1_a": normal(96, 2), f"{H}w1_b": normal(2, 96), f"{H}w2_a": normal(96, 3), f"{H}w2_b": normal(2, 96)},
        r"hada_w2_a should have \(96, 2\) and has \(96, 3\)",
    ),
    "LoKr": ({f"{K}w1": normal(2, 2), f"{K}w2": normal(48, 47)}, r"lokr_w2 .* has \(48, 47\)"),
    "LoKr ranks": (
        {f"{K}w1": normal(2, 2), f"{K}w2_a": normal(48, 3), f"{K}w2_b": normal(2, 48)},
        r"lokr_w2_a should have \(48, 2\) and has \(48, 3\)",
    ),
    "LoKr dimensions": ({f"{K}w1": normal(2), f"{K}w2": normal(48, 48)}, r"two dimensions and has \(2,\)"),
    "magnitude": (pair(Q, (4, 96), (96, 4), dora_scale=normal(95)), r"dora_scale.*\(96,\).*has \(95,\)"),
    "magnitude alone": ({f"{Q}.dora_scale": normal(96)}, "half a DoRA"),
    "alpha": (pair(Q, (4, 96), (96, 4), alpha=normal(2)), r"alpha should have one number and has \(2,\)"),
    "difference": ({f"{Q}.diff": normal(96, 95)}, r"diff should have \(96, 96\) and has \(96, 95\)"),
    "bias": ({f"{Q}.diff_b": normal(95)}, r"diff_b should have \(96,\)"),
    "replacement": ({f"{Q}.set_weight": normal(95, 96)}, "set_weight"),
    "Tucker": ({f"{Q}.hada_t1": normal(2, 2)}, "Tucker factor, which only convolutions have .*hada_t1"),
    "OFT": ({f"{Q}.oft_blocks": normal(2, 2, 2)}, "uses OFT"),
    "fused LoKr": ({f"{Q}kv.lokr_w1": normal(3, 2), f"{Q}kv.lokr_w2": normal(96, 48)}, "3 matrices in one"),
    "fused height": (pair(f"{Q}kv", (4, 96), (287, 4)), r"\(96, 4\) and has \(287, 4\)"),
    "twice": ({**pair(Q, (4, 96), (96, 4)), f"transformer.{Q}.lora_A.weight": normal(4, 96)}, "gives .*to_q twice"),
    "two kinds": (
        pair(Q, (4, 96), (96, 4)) | {f"{K}w1": normal(2, 2), f"{K}w2": normal(48, 48)},
        "gives .*to_q twice, as LoRA and as LoKr",
    ),
    "integers": ({f"{Q}.lora_A.weight": np.ones((4, 96), np.int8), f"{Q}.lora_B.weight": normal(96, 4)}, "as I8"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "said"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_said_before_anything_is_read(tmp_path, targets, tensors, said) -> None:
    assert targets[Q] == (96, 96)
    with pytest.raises(CheckpointError, match=said) as caught:
        lora_of(tmp_path, tensors, targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["up alone", "down alone", "half LoHa", "half LoKr", "magnitude alone"])
def test_a_whole_file_that_contradicts_itself_is_not_to_be_downloaded_again(tmp_path, targets, name) -> None:
    with pytest.raises(CheckpointError) as caught:
        lora_of(tmp_path, BROKEN[name][0], targets)
    assert "download" not in str(caught.value)
    assert "save it again" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["lora_down.weight", "lora_up.weight", "dora_scale", "lora_up.bias"])
def test_nan_and_infinity_are_found(tmp_path, targets, key, bad) -> None:
    tensors = pair(Q, (4, 96), (96, 4), dora_scale=normal(96), **{"lora_up.bias": normal(96)})
    tensors[f"{Q}.{key}"].flat[-1] = bad
    lora = lora_of(tmp_path, tensors, targets)
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {Q}.{key}"):
        lora.check()
    uses = lora.updates[Q].bias_delta if "bias" in key else lambda: lora.updates[Q].delta(mx.zeros((96, 96)))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        uses()


def test_an_alpha_that_is_no_number_is_found_at_once(tmp_path, targets) -> None:
    with pytest.raises(CheckpointError, match=r"NaN or infinity in .*alpha"):
        lora_of(tmp_path, pair(Q, (4, 96), (96, 4), alpha=np.float32(math.nan)), targets)


def test_a_truncated_file_is_found_at_once_and_a_shrinking_one_when_read(tmp_path, targets) -> None:
    path = write(tmp_path / "a.safetensors", spell("peft", "", False, targets))
    lora = read_lora(path, targets)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="5 bytes are missing"):
        read_lora(path, targets)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="could not be read to its end"):
        lora.check()
    gone = read_lora(write(path, spell("peft", "", False, targets, None)), targets)
    path.unlink()
    with pytest.raises(CheckpointError, match="could not be read to its end"):
        gone.updates[Q].factors()


def test_a_folder_holds_one_lora(tmp_path, targets) -> None:
    with pytest.raises(RequestError, match=r"holds no \.safetensors file"):
        weights_file(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(RequestError, match="pickle, which can run any code"):
        read_lora(tmp_path, targets)
    first = write(tmp_path / "a.safetensors", spell("peft", "", False, targets))
    (tmp_path / "._a.safetensors").write_bytes(b"")
    assert weights_file(tmp_path) == first
    shutil.copy(first, tmp_path / "b.safetensors")
    with pytest.raises(RequestError, match=r"2 LoRA files \(a.safetensors, b.safetensors\)"):
        read_lora(tmp_path, targets)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
def test_pickles_are_refused(tmp_path, targets, suffix) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"\x80\x02.")
    with pytest.raises(RequestError, match="pickle, which can run any code when it is read"):
        read_lora(tmp_path / f"a{suffix}", targets)


def test_a_missing_file_and_a_bad_strength_are_refused(tmp_path, targets) -> None:
    with pytest.raises(RequestError, match=r"the LoRA .* (does not exist|was not found)"):
        read_lora(tmp_path / "none.safetensors", targets)
    path = write(tmp_path / "a.safetensors", spell("peft", "", False, targets))
    for strength in (math.nan, math.inf, "1", True, None):
        with pytest.raises(RequestError, match="give a finite number"):
            read_lora(path, targets, strength)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_lora(write(tmp_path / "empty.safetensors", {}), targets)


SETTINGS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "not a JSON object"),
    "no alpha": ({"r": 4}, "gives lora_alpha as None"),
    "alpha": ({"r": 4, "lora_alpha": "8"}, "gives lora_alpha as '8'"),
    "no rank": ({"r": 0, "lora_alpha": 8}, "rank r as 0"),
    "other rank": (
        {"r": 5, "lora_alpha": 8},
        "contradicts itself: .*to_q the rank 5 and its tensors have 4; correct r",
    ),
    "pattern": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}}, "impossible pattern"),
    "pattern value": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": "4"}}, "does not map names to numbers"),
    "patterns": ({"r": 4, "lora_alpha": 8, "rank_pattern": [4]}, "does not map names to numbers"),
    "DoRA": ({"r": 4, "lora_alpha": 8, "use_dora": True}, "says it is a DoRA and has no magnitude"),
}


@pytest.mark.parametrize(("settings", "said"), SETTINGS.values(), ids=SETTINGS)
def test_impossible_settings_are_refused(tmp_path, targets, settings, said) -> None:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    tensors = pair(Q, (4, 96), (96, 4))
    with pytest.raises(CheckpointError, match=said):
        lora_of(tmp_path, tensors, targets, metadata={"lora_adapter_metadata": text})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_lora(write(tmp_path / "adapter_model.safetensors", tensors), targets)


def test_settings_outrank_alpha_tensors_and_those_of_other_models_are_ignored(tmp_path, targets) -> None:
    tensors = pair(Q, (4, 96), (96, 4), alpha=np.float32(1))
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 5}
    lora = lora_of(tmp_path, tensors, targets, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert lora.updates[Q].scale == 2
    settings = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    lora = lora_of(tmp_path, tensors, targets, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert lora.updates[Q].scale == 0.25


# --- references ------------------------------------------------------------------------------------------------------


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="@"), min_size=1).filter(str.strip),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_reference_and_its_strength_come_apart(reference, strength) -> None:
    text = f"{reference}@{strength!r}"
    assert parse_reference(text) == (reference.lstrip(), strength)


@given(st.text())
def test_a_reference_is_read_or_refused(text) -> None:
    try:
        reference, strength = parse_reference(text)
        assert reference
        assert math.isfinite(strength)
        kind_of(reference)
    except RequestError:
        pass


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors@-0.5", ("a.safetensors", -0.5)),
        ("owner/repo:sub/a.safetensors@1.5", ("owner/repo:sub/a.safetensors", 1.5)),
        ("a@b/c.safetensors", ("a@b/c.safetensors", 1.0)),
        ("a@b/c.safetensors@2", ("a@b/c.safetensors", 2.0)),
        ("style@2.safetensors", ("style@2.safetensors", 1.0)),
    ],
)
def test_the_last_at_sign_separates_the_strength(text, parsed) -> None:
    assert parse_reference(text) == parsed


@pytest.mark.parametrize("text", ["a@nan", "a@inf", "a@high", "a@", "@1", "", " "])
def test_an_impossible_strength_is_refused(text) -> None:
    with pytest.raises(RequestError):
        parse_reference(text)


def test_an_existing_path_with_an_at_sign_is_a_path(tmp_path) -> None:
    path = tmp_path / "style@0.5"
    path.mkdir()
    assert parse_reference(str(path)) == (str(path), 1.0)
    assert parse_reference(f"{path}@0.7") == (str(path), 0.7)


REPO = "lightx2v/Qwen-Image-Lightning"
HUB = f"https://huggingface.co/{REPO}"
SOURCES = {
    REPO: Source(repo=REPO),
    f"{REPO}:a.safetensors": Source(repo=REPO, file="a.safetensors"),
    f"{REPO}:sub/a b.safetensors": Source(repo=REPO, file="sub/a b.safetensors"),
    HUB: Source(repo=REPO),
    f"{HUB}/": Source(repo=REPO),
    f"{HUB}/blob/main/a.safetensors": Source(repo=REPO, file="a.safetensors", revision="main"),
    f"{HUB}/resolve/v2/sub/a%20b.safetensors?download=true": Source(
        repo=REPO, file="sub/a b.safetensors", revision="v2"
    ),
}


@pytest.mark.parametrize(("reference", "source"), SOURCES.items())
def test_references_to_the_hub(reference, source) -> None:
    assert kind_of(reference) == source


def test_what_exists_is_on_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(REPO).mkdir(parents=True)
    assert kind_of(REPO) == Source(path=Path(REPO))
    assert kind_of(str(tmp_path)) == Source(path=tmp_path)


@pytest.mark.parametrize(
    "reference",
    [
        "none.safetensors",
        "sub/none.safetensors",
        "/abs/none",
        "name",
        "a/b/c",
        "owner/repo:a.bin",
        "owner/repo:../a.safetensors",
        "owner/repo:/a.safetensors",
        "https://example.com/owner/repo/blob/main/a.safetensors",
        "https://civitai.com/models/1",
        f"{HUB}/tree/main",
        f"{HUB}/blob/main",
        f"{HUB}/blob/main/a.bin",
        f"{HUB}/blob/main/%2e%2e/a.safetensors",
        "ftp://huggingface.co/owner/repo",
        "https://huggingface.co/owner",
        "https://[",
        "",
    ],
)
def test_other_references_are_refused(reference) -> None:
    with pytest.raises(RequestError) as caught:
        kind_of(reference)
    assert "\n" not in str(caught.value)


# --- distilled LoRAs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("Qwen-Image-Lightning-4steps-V1.0-bf16", 4),
        ("Qwen-Image-Edit-2511-Lightning-8steps-V1.0-fp32", 8),
        ("qwen_image_8step_lightning", 8),
        ("Qwen-Image-Lightning-4stepsV2", 4),
        ("lightning-strike-2000-steps", None),
        ("style-4steps", None),
        ("Qwen-Image-Lightning", None),
        ("lightning-99steps", None),
    ],
)
def test_lightning_is_known_by_its_name(tmp_path, targets, name, steps) -> None:
    lora = read_lora(write(tmp_path / f"{name}.safetensors", spell("kohya", "", False, targets)), targets)
    distilled = distillation_of(lora)
    assert (distilled and distilled.steps) == steps
    if distilled:
        assert dict(describe(lora))["distilled"] == f"{steps} steps, cfg 1, by its name"
        assert (distilled.cfg_scale, distilled.shift, distilled.evidence) == (1.0, 3.0, "its name")


@pytest.mark.parametrize(("name", "steps", "shift"), [
    ("qwen_image_distill_3step", 3, 2.5),
    ("Qwen-Image-Distill-LoRA", 15, None),
    ("models--DiffSynth-Studio--Qwen-Image-Distill-LoRA/snapshots/0a1b/model", 15, None),
    ("Qwen-Image-Rapid-AIO-v2", 4, 3.0),
    ("models--someone--a-style/snapshots/0a1b/model", None, None),
])  # fmt: skip
def test_other_distillations_are_known_by_name_or_folder(tmp_path, targets, name, steps, shift) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    distilled = distillation_of(read_lora(write(path, spell("kohya", "", False, targets)), targets))
    assert (distilled and (distilled.steps, distilled.static_shift)) == (steps and (steps, shift))


def test_lightning_is_known_by_its_metadata(tmp_path, targets) -> None:
    metadata = {"modelspec.title": "Qwen-Image Lightning 4 steps"}
    lora = lora_of(tmp_path, spell("kohya", "", False, targets), targets, metadata=metadata)
    assert distillation_of(lora).steps == 4
    assert distillation_of(lora).evidence == "its metadata"


def lightning_shaped(targets, rank: int = 64, alpha: float = 8) -> dict[str, np.ndarray]:
    tensors = {}
    for target, shape in targets.items():
        if ("attn.to_" in target or "attn.add_" in target or "_mlp.net." in target) and len(shape) == 2:
            tensors |= pair(target, (rank, shape[1]), (shape[0], rank), alpha=np.float32(alpha))
    return tensors


def test_lightning_is_known_by_rank_alpha_and_targets(tmp_path, targets) -> None:
    tensors = lightning_shaped(targets)
    assert len(tensors) == 2 * 12 * 3
    distilled = distillation_of(lora_of(tmp_path, tensors, targets))
    assert (distilled.steps, distilled.evidence) == (8, "its rank and alpha")
    assert distillation_of(lora_of(tmp_path, lightning_shaped(targets, alpha=64), targets)) is None
    assert distillation_of(lora_of(tmp_path, lightning_shaped(targets, rank=32, alpha=4), targets)) is None
    more = tensors | pair(MOD, (64, 96), (576, 64), alpha=np.float32(8))
    assert distillation_of(lora_of(tmp_path, more, targets)) is None
    fewer = {name: value for name, value in tensors.items() if Q not in name}
    assert distillation_of(lora_of(tmp_path, fewer, targets)) is None


@pytest.mark.parametrize("steps", [4, 8])
def test_a_distillations_shift_gives_the_sigmas_of_the_official_scheduler(tmp_path, targets, steps) -> None:
    # scheduler_config of generate_with_diffusers.py in ModelTC/Qwen-Image-Lightning
    official = {
        "base_image_seq_len": 256,
        "base_shift": math.log(3),
        "max_image_seq_len": 8192,
        "max_shift": math.log(3),
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    }
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(official)
    scheduler.set_timesteps(sigmas=uniform_sigmas(steps), mu=math.log(3))
    name = f"Qwen-Image-Lightning-{steps}steps.safetensors"
    lora = read_lora(write(tmp_path / name, spell("kohya", "", False, targets)), targets)
    for released in ("scheduler", "scheduler-layered"):
        config = SchedulerConfig.from_dict({k: v for k, v in REAL_CONFIGS[released].items() if k[0] != "_"})
        ours = make_schedule(static_shift(config, distillation_of(lora).shift), uniform_sigmas(steps), mu=1.0)
        np.testing.assert_allclose(ours.sigmas, scheduler.sigmas.numpy(), rtol=1e-6)


def test_official_files_are_references_with_their_steps() -> None:
    for model, files in LIGHTNING.items():
        assert files.keys() == {4, 8}
        for steps, reference in files.items():
            source = kind_of(reference)
            assert source.repo.startswith("lightx2v/")
            assert f"-Lightning-{steps}steps-" in source.file
            assert model.split("/")[1] in source.file
    assert LIGHTNING["Qwen/Qwen-Image-Edit-2509"][4] == (
        f"{REPO}:Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors"
    )


def test_description_says_what_a_file_is(tmp_path, targets) -> None:
    tensors = spell("kohya", "lora_unet_", True, targets)
    tensors[f"diffusion_model.{NORM}.diff"] = normal(32)
    metadata = {"ss_network_dim": "4", "name": "x\ny\x1b[2J" + "z" * 300, "ss_tag_frequency": "{}"}
    rows = dict(describe(lora_of(tmp_path, tensors, targets, metadata=metadata)))
    assert rows["dialect"] == "kohya, ComfyUI"
    assert rows["kinds"] == "LoRA (7), difference (1)"
    assert rows["targets"] == f"7 of {sum(len(shape) == 2 for shape in targets.values())}"
    assert rows["rank"] == "4 (4), 5 (3)"
    assert rows["alpha / rank"] == "0.75 (4), 0.6 (3) (alpha tensors)"
    assert "transformer_blocks.*.attn.to_q (1)" in rows["changes"]
    assert rows["dtype"] == "F32"
    assert rows["metadata ss_network_dim"] == "4"
    assert rows["metadata name"].startswith(r"x y\x1b[2Jzzz")
    assert len(rows["metadata name"]) < 220
    assert "metadata ss_tag_frequency" not in rows
    assert "distilled" not in rows
    assert "unmatched" not in rows


def test_a_saved_file_is_left_as_it_was(tmp_path, targets) -> None:
    path = write(tmp_path / "a.safetensors", spell("peft", "", False, targets))
    before = load_file(path)
    read_lora(path, targets).check()
    assert all(torch.equal(before[name], value) for name, value in load_file(path).items())
