"""How other programs name this family's tensors, from their own descriptions; needs no library."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")
_WAN_BLOCK = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
              "conv_shortcut": "shortcut"}  # fmt: skip
_WAN_TOP = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def wan_name(name: str) -> str:
    """A VAE tensor's name in Wan 2.1's own code (`WanVAE_`, wan/modules/vae.py)."""
    first, *rest = name.split(".")
    if first in ("quant_conv", "post_quant_conv"):
        return ".".join([{"quant_conv": "conv1", "post_quant_conv": "conv2"}[first], *rest])
    if rest[0] in _WAN_TOP:
        return ".".join([first, _WAN_TOP[rest[0]], *rest[1:]])
    if rest[0] == "down_blocks":
        place, tail = f"downsamples.{rest[1]}", rest[2:]
    elif rest[0] == "mid_block":
        place = f"middle.{1 if rest[1] == 'attentions' else 2 * int(rest[2])}"
        tail = rest[3:]
    else:
        block, kind, number = int(rest[1]), rest[2], int(rest[3])
        place, tail = f"upsamples.{4 * block + (3 if kind == 'upsamplers' else number)}", rest[4:]
    return ".".join([first, place, _WAN_BLOCK.get(tail[0], tail[0]), *tail[1:]])


MFLUX_BLOCK = {
    "img_mod.1": "img_mod_linear", "txt_mod.1": "txt_mod_linear", "attn.to_out.0": "attn.attn_to_out.0",
    "img_mlp.net.0.proj": "img_ff.mlp_in", "img_mlp.net.2": "img_ff.mlp_out",
    "txt_mlp.net.0.proj": "txt_ff.mlp_in", "txt_mlp.net.2": "txt_ff.mlp_out",
}  # fmt: skip


def mflux_transformer_name(name: str) -> str:
    found = re.fullmatch(r"(transformer_blocks\.\d+)\.(.+)\.(\w+)", name)
    return f"{found[1]}.{MFLUX_BLOCK.get(found[2], found[2])}.{found[3]}" if found else name


def mflux_text_name(name: str) -> str | None:
    """None for what mflux does not keep."""
    if name.startswith("lm_head"):
        return None
    name = re.sub(r"^visual\.", "encoder.visual.", re.sub(r"^model\.", "encoder.", name))
    return name.replace("merger.mlp.0.", "merger.mlp_0.").replace("merger.mlp.2.", "merger.mlp_1.")


_LLAMA = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
          "post_attention_layernorm": "ffn_norm"}  # fmt: skip
_CLIP = {"attn.proj": "attn_out", "attn.qkv": "attn_qkv", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "norm1": "ln1", "norm2": "ln2"}  # fmt: skip


def llama_name(name: str) -> str:
    """A text encoder tensor's name in llama.cpp (gguf-py/gguf/tensor_mapping.py), the vision tower's in its mmproj."""
    top = {"model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output.",
           "visual.patch_embed.proj.": "v.patch_embd.", "visual.merger.ln_q.": "v.post_ln.",
           "visual.merger.mlp.": "mm.", "model.layers.": "blk.", "visual.blocks.": "v.blk."}  # fmt: skip
    words = _CLIP if name.startswith("visual.") else _LLAMA
    old, new = next((old, new) for old, new in top.items() if name.startswith(old))
    name = new + name.removeprefix(old)
    for old, new in words.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


_LLAMA_3 = {
    "model.language_model.embed_tokens.": "token_embd.", "model.language_model.norm.": "output_norm.",
    "model.language_model.layers.": "blk.", "lm_head.": "output.",
    "model.visual.patch_embed.proj.": "v.patch_embd.", "model.visual.pos_embed.": "v.position_embd.",
    "model.visual.blocks.": "v.blk.", "model.visual.merger.norm.": "v.post_ln.",
    "model.visual.merger.linear_fc1.": "mm.0.", "model.visual.merger.linear_fc2.": "mm.2.",
}  # fmt: skip
_WORDS_3 = {
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out", "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down", "norm1": "ln1", "norm2": "ln2",
}  # fmt: skip


def llama_name_21(name: str) -> str:
    """A tensor's name of Qwen3-VL-8B in llama.cpp; a merger is named by its layer of the vision tower, 8, 16 or 24."""
    found = re.fullmatch(r"model\.visual\.deepstack_merger_list\.(\d)\.(?:linear_)?(.+)", name)
    if found:
        return f"v.deepstack.{8 * (int(found[1]) + 1)}.{found[2]}"
    old = next(old for old in _LLAMA_3 if name.startswith(old))
    name = _LLAMA_3[old] + name.removeprefix(old)
    for words in (_WORDS_3, _LLAMA):
        for long, short in words.items():
            name = name.replace(f".{long}.", f".{short}.")
    return name


def fused_21(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """How ComfyUI names a transformer's tensors of Qwen-Image-2.1, and whose rows each has: the gate's come first."""
    fused: dict[str, tuple[str, ...]] = {}
    for name in names:
        gate = name.replace("img_mlp.proj.", "img_mlp.gate_layer.")
        whole = gate.replace("img_mlp.gate_layer.", "img_mlp.gate_up.")
        fused[whole] = (gate, gate.replace("gate_layer.", "proj.")) if "img_mlp.gate_up." in whole else (name,)
    return fused
