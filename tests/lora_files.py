"""Writes one random LoRA in every spelling."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

BLOCK = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "img_mlp.net.0.proj", "txt_mlp.net.2")
TARGETS = [f"transformer_blocks.{n}.{name}" for n in range(2) for name in BLOCK]
TARGETS.remove("transformer_blocks.1.txt_mlp.net.2")  # the last block's text is read by nobody
MODULATION = ["transformer_blocks.0.img_mod.1", "norm_out.linear"]
DIALECTS = {
    "peft": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "adapter": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
    "old": ("{}.lora.down.weight", "{}.lora.up.weight", None),
    "dotted": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "diffusion_model.{}.alpha"),
    "flat": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}


def write_lora(path, shapes, dialect="peft", targets=TARGETS, size=0.3, seed=0):
    """A rank-4 LoRA; `size` is that of its change beside the weights."""
    down, up, alpha = DIALECTS[dialect]
    rng, tensors = np.random.default_rng(seed), {}
    for target in targets:
        out, width = shapes[target]
        a, b = rng.standard_normal((4, width)), rng.standard_normal((out, 4)) * size / 2 / width**0.5
        name = target.replace(".", "_") if dialect == "flat" else target
        tensors[down.format(name)], tensors[up.format(name)] = (mx.array(x.astype(np.float32)) for x in (a, b))
        if alpha:
            tensors[alpha.format(name)] = mx.array(4.0)
    mx.save_safetensors(str(path), tensors)
    return path
