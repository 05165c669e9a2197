"""Writes checkpoints as other programs do, from their own descriptions: a second opinion on every dialect.

Made with numpy, torch, safetensors and the gguf package alone; nothing of `qwen_image_mlx` is imported. Every writer
takes tensors by their released names and returns, beside what it wrote, the numbers that a reader should find there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from foreign_names import llama_name, mflux_text_name, mflux_transformer_name
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn


def read(folder: Path) -> Tensors:
    """All tensors of a component's folder, in fp32."""
    return {n: t.float() for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def save(path: Path, tensors: Tensors, **metadata: str) -> Path:
    """One file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata or {"format": "pt"}
    )
    return path


def replace_weights(
    folder: Path, files: dict[str, Tensors], index: str | None = None, listed: Iterable[str] = ()
) -> None:
    """Other weights in a component's folder; `listed` are the names its index has, all if none are given."""
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    for name, tensors in files.items():
        save(folder / name, tensors)
    if index:
        where = {tensor: file for file, tensors in files.items() for tensor in tensors}
        where = {name: where[name] for name in listed} or where
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


# --- MLX's affine form --------------------------------------------------------------------------------------------


def pack(w: torch.Tensor, bits: int, group: int) -> tuple[Tensors, torch.Tensor]:
    """({"weight", "scales", "biases"}, what they stand for); elements little end first."""
    rows, columns = w.shape
    groups = w.double().numpy().reshape(rows, -1, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scales, low = (((high - low) / (2**bits - 1)).astype(np.float32), low.astype(np.float32))
    q = np.clip(np.round((groups - low) / np.maximum(scales, 1e-20)), 0, 2**bits - 1).astype(np.uint32)
    stream = (q.reshape(rows, columns, 1) >> np.arange(bits, dtype=np.uint32)) & 1
    words = np.packbits(stream.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little").view(np.uint32)
    packed = {"weight": torch.from_numpy(words), "scales": torch.from_numpy(scales[..., 0]),
              "biases": torch.from_numpy(low[..., 0])}  # fmt: skip
    return packed, torch.from_numpy((scales * q + low).reshape(rows, columns).astype(np.float32))


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def pack_mxfp4(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """OCP's MXFP4: 32 columns share a power of two, and there are no biases."""
    rows, columns = w.shape
    groups = w.numpy().reshape(rows, -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True))) - 2
    codes = np.abs((groups / 2.0**exponents)[..., None] - E2M1).argmin(-1).astype(np.uint8)
    pairs = codes.reshape(rows, columns // 2, 2)
    words = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8).view(np.uint32)
    scales = (exponents[..., 0] + 127).astype(np.uint8)
    values = (E2M1[codes] * 2.0**exponents).reshape(rows, columns).astype(np.float32)
    return {"weight": torch.from_numpy(words), "scales": torch.from_numpy(scales)}, torch.from_numpy(values)


def pack_all(
    tensors: Tensors, choose: Callable[[str], tuple[int, int] | None], form: Callable | None = None
) -> tuple[Tensors, Tensors]:
    """Packs every matrix for which `choose` gives (bits, group) that divide its rows."""
    written, numbers = {}, {}
    for name, tensor in tensors.items():
        chosen = choose(name) if name.endswith(".weight") and tensor.ndim == 2 else None
        if chosen and tensor.shape[1] % chosen[1] == 0:
            packed, numbers[name] = form(tensor) if form else pack(tensor, *chosen)
            written |= {f"{name.removesuffix('weight')}{word}": part for word, part in packed.items()}
        else:
            written[name] = numbers[name] = tensor
    return written, numbers


# --- ComfyUI ------------------------------------------------------------------------------------------------------


def _rounded(tensors: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    written = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return written, {name: tensor.float() for name, tensor in written.items()}


def comfy_bf16(tensors: Tensors) -> tuple[Tensors, Tensors]:
    return _rounded(tensors, torch.bfloat16)


def comfy_fp8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Everything cast, without scales."""
    return _rounded(tensors, FP8)


def comfy_scaled(
    tensors: Tensors, *, words: tuple[str, str], extras: bool, rows: bool = False
) -> tuple[Tensors, Tensors]:
    """Matrices in fp8 with a scale beside them, the rest in bf16."""
    written, numbers = comfy_bf16(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or tensor.ndim != 2 or "embed_tokens" in name:
            continue
        layer = name.removesuffix("weight")
        scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()) / 448
        written[name] = (tensor / scale).to(FP8)
        numbers[name] = written[name].float() * scale
        written[layer + words[0]] = scale
        if words[1]:
            written[layer + words[1]] = torch.tensor(0.5)
        if extras:
            blob = json.dumps({"format": "float8_e4m3fn"}).encode()
            written[layer + "comfy_quant"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    if words[0] == "scale_weight":
        written["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    return written, numbers


COMFY = {
    "bf16": comfy_bf16,
    "fp8": comfy_fp8,
    "weight_scale": lambda t: comfy_scaled(t, words=("weight_scale", "input_scale"), extras=True),
    "scale_weight": lambda t: comfy_scaled(t, words=("scale_weight", "scale_input"), extras=False),
    "scale of rows": lambda t: comfy_scaled(t, words=("weight_scale", ""), extras=True, rows=True),
}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# --- Wan's names of the VAE ---------------------------------------------------------------------------------------


# --- mflux 0.24 ---------------------------------------------------------------------------------------------------


def mflux_vae(tensors: Tensors) -> Tensors:
    """Its 3-D convolutions are inside a module `conv3d`, down blocks are nested, gammas are flat, channels last."""
    written = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder.down_blocks.5.time_conv"):
            continue  # its second down block does not resample time
        path, word = name.rsplit(".", 1)
        if word == "gamma":
            word, tensor = "weight", tensor.flatten()
        elif tensor.ndim > 2:
            tensor = tensor.movedim(1, -1)
        path = path.replace("resample.1", "resample_conv").replace("conv_shortcut", "skip_conv")
        if re.search(r"(conv_in|conv_out|conv1|conv2|skip_conv|time_conv|quant_conv)$", path):
            path += ".conv3d"
        path = re.sub(r"^decoder\.up_blocks\.(\d)", r"decoder.up_block\1", path)
        if found := re.match(r"encoder\.down_blocks\.(\d+)", path):
            block, inside = divmod(int(found[1]), 3)
            kind = "downsamplers.0" if inside == 2 else f"resnets.{inside}"
            path = f"encoder.down_blocks.{block}.{kind}{path[found.end() :]}"
        written[f"{path}.{word}"] = tensor
    return written


def write_mflux(folder: Path, bits: int | None, record: dict | None) -> dict[str, Tensors]:
    """Turns a checkpoint into what `mflux-save` writes of it, the tiny configs left; returns the numbers."""
    numbers: dict[str, Tensors] = {}

    def choose(name: str) -> tuple[int, int] | None:
        return bits and (8 if bits == 4 and ".img_mod." in name else bits, 64)

    def write(part: str, written: Tensors) -> None:
        names = list(written)
        shards = {f"{n}.safetensors": {name: written[name] for name in half}
                  for n, half in enumerate([names[::2], names[1::2]])}  # fmt: skip
        replace_weights(folder / part, shards, "model.safetensors.index.json")

    written, numbers["transformer"] = pack_all(read(folder / "transformer"), choose)
    write("transformer", {mflux_transformer_name(name): tensor for name, tensor in written.items()})
    numbers["text_encoder"] = read(folder / "text_encoder")
    text = {mflux_text_name(name): tensor for name, tensor in numbers["text_encoder"].items()}
    text.pop(None, None)
    text |= {
        "encoder.rotary_emb.inv_freq": torch.ones(4),
        "encoder.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    if any(name.startswith("encoder.visual") for name in text):
        patches = "encoder.visual.patch_embed.proj.weight"
        text |= {"encoder.visual.rotary_pos_emb.inv_freq": torch.ones(4), patches: text[patches].movedim(1, -1)}
    write("text_encoder", text)
    numbers["vae"] = read(folder / "vae")
    write("vae", mflux_vae(numbers["vae"]))
    for place in ("model_index.json", "scheduler/scheduler_config.json", "processor/preprocessor_config.json"):
        (folder / place).unlink(missing_ok=True)
    if record is not None:
        (folder / "mflux_model.json").write_text(json.dumps(record))
    return numbers


# --- mlx-vlm ------------------------------------------------------------------------------------------------------


def mlx_vlm(tensors: Tensors, bits: int) -> tuple[Tensors, Tensors]:
    """A text encoder converted by mlx-vlm: the language model packed, the vision tower as it was, channels last."""
    written, numbers = pack_all(tensors, lambda name: None if name.startswith("visual.") else (bits, 64))
    patches = "visual.patch_embed.proj.weight"
    if patches in written:
        written[patches] = written[patches].movedim(1, -1)
    spelled = {re.sub(r"^visual\.", "vision_tower.", n) if n.startswith("visual.") else f"language_model.{n}": t
               for n, t in written.items()}  # fmt: skip
    return spelled, numbers


# --- Swift --------------------------------------------------------------------------------------------------------


def write_swift(folder: Path, bits: int, group: int, mode: str) -> dict[str, Tensors]:
    """Packs every matrix of transformer and text encoder; the index keeps the names it had."""
    numbers, layers = {}, []
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors = read(folder / part)
        form = pack_mxfp4 if mode == "mxfp4" else None
        written, numbers[part] = pack_all(tensors, lambda name: (bits, group), form)
        names = list(tensors)
        files = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        file_of = {name: files[n % 2] for n, name in enumerate(names)}
        shards = {file: {} for file in files}
        for name, tensor in written.items():
            base = name.rpartition(".")[0]
            shards[file_of.get(name) or file_of[f"{base}.weight"]][name] = tensor
        replace_weights(folder / part, shards, f"{stem}.safetensors.index.json", names)
        layers += [
            {"component": part, "name": n.removesuffix(".weight"), "file": file_of[n], "quant_file": file_of[n],
             "shape": list(t.shape), "in_dim": t.shape[1], "out_dim": t.shape[0], "group_size": group, "bits": bits,
             "mode": mode}
            for n, t in tensors.items() if f"{n.removesuffix('.weight')}.scales" in written
        ]  # fmt: skip
    plan = {"version": 1, "group_size": group, "bits": bits, "mode": mode, "layers": layers}
    (folder / "quantization.json").write_text(json.dumps(plan))
    return numbers


def swift_single(tensors: Tensors, bits: int, modulation: int | None) -> tuple[Tensors, Tensors]:
    """One file with renamed keys; attention and MLPs packed, modulation in bf16 or at its own bits."""

    def choose(name: str) -> tuple[int, int] | None:
        if "_mod." in name:
            return modulation and (modulation, 64)
        return (bits, 64) if re.search(r"\.(attn|img_mlp|txt_mlp)\.", name) else None

    written, numbers = pack_all(tensors, choose)
    renames = {"_mod.1.": "_mod.", "_mlp.net.0.proj.": "_mlp.proj_in.", "_mlp.net.2.": "_mlp.proj_out."}
    spelled = {}
    for name, tensor in written.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        spelled[name] = tensor
    return spelled, numbers


# --- GGUF ---------------------------------------------------------------------------------------------------------

_HALVES = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]}


def _blocks(word: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blocks of any bits, whose scales keep the numbers small: the gguf package cannot quantize to these types."""
    generator = np.random.default_rng(seed)
    elements, size = gguf.GGML_QUANT_SIZES[Type[word]]
    blocks = generator.integers(0, 256, (int(np.prod(shape)) // elements, size), np.uint8)
    for at in _HALVES[word]:
        scales = (generator.uniform(1, 2, len(blocks)) * 2e-5).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def write_llama(
    path: Path, tensors: Tensors, word: str = "F32", split: bool = True, spell: Callable[[str], str] = llama_name
) -> Path:
    """A text encoder, or its vision tower as an mmproj file, as convert_hf_to_gguf.py writes them.

    Matrices in `word`, the rest in F32; with `split` queries, keys and values by themselves, as most files have them;
    `spell` is `foreign_names.llama_name`, or its counterpart for Qwen3-VL.
    """
    vision = all("visual." in name for name in tensors)
    writer = gguf.GGUFWriter(path, "clip" if vision else "qwen2vl")
    for name, tensor in tensors.items():
        spelled, array = spell(name), tensor.numpy()
        if spelled == "v.patch_embd.weight":
            pieces = {spelled: array[:, :, 0], f"{spelled}.1": array[:, :, 1]}
        elif ".attn_qkv." in spelled and split:
            pieces = dict(
                zip((spelled.replace("attn_qkv", f"attn_{p}") for p in "qkv"), np.split(array, 3), strict=True)
            )
        else:
            pieces = {spelled: array}
        for piece, values in pieces.items():
            kind = Type[word] if values.ndim == 2 else Type.F32
            writer.add_tensor(piece, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf(path: Path, tensors: Tensors, word: str, prefix: str = "", metadata: bool = True) -> Tensors:
    """Matrices of the transformer blocks in `word`, the others in BF16, the rest in F32, like city96's converter."""
    writer = gguf.GGUFWriter(path, "qwen_image")
    if not metadata:
        writer.kv_data = [{}]
    numbers = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        array, kind = tensor.numpy(), Type.F32
        if tensor.ndim == 2:
            kind = Type[word] if "transformer_blocks" in name else Type.BF16
            if array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = Type.F16
        data = _blocks(word, array.shape, number) if kind.name in _HALVES else gguf.quants.quantize(array, kind)
        numbers[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).reshape(array.shape).astype(np.float32))
        writer.add_tensor(prefix + name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers
