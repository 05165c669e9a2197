"""What a single file of weights is: a component of which kind, or a LoRA; told from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..config import TextEncoderConfig, TransformerConfig, VAEConfig
from ..errors import CheckpointError
from .loader import RESIDENT, ComponentWeights
from .lora import read_lora
from .lora_inspect import describe
from .mapping import canonical_names, matrix_shapes, shown_settings
from .shards import Tensor
from .snapshot import weight_file

# A tensor that every file of a component has, by canonical name, and no LoRA.
_SIGNATURES = {
    "transformer": "transformer_blocks.0.attn.add_k_proj.weight",
    "text_encoder": "model.layers.0.input_layernorm.weight",
    "vae": "decoder.conv_in.weight",
}
# The released models' configs.
_CONFIGS = {"transformer": TransformerConfig(), "text_encoder": TextEncoderConfig(), "vae": VAEConfig()}
# Tensors that say more, by canonical name: (label, what is said).
_MARKS = {
    "__index_timestep_zero__": ("zero_cond_t", "on, as editing models of 2511 want it"),
    "time_text_embed.addition_t_embedding.weight": ("layered", "yes"),
}


@dataclass(frozen=True)
class FileReport:
    """A file of weights.

    Attributes:
        path: where it is.
        kind: "transformer", "text_encoder", "vae" or "LoRA".
        tensors: how many it holds.
        file_bytes: of their data.
        forms: how they lie in it, and how many bytes so.
        facts: what else is to be said, by label.
        resident_bytes: what it takes in memory once it is loaded, in bf16 (an autoencoder in fp32); None for a LoRA,
            and for a component that is not of the released models' size.
    """

    path: str
    kind: str
    tensors: int
    file_bytes: int
    forms: dict[str, int]
    facts: dict[str, str]
    resident_bytes: int | None = None


def identify(path: Path) -> FileReport:
    """Says what a safetensors or GGUF file is.

    Raises:
        RequestError: there is no such file.
        CheckpointError: it is damaged, a pickle, or holds nothing this package knows.
    """
    tensors = weight_file(path).tensors
    forms: dict[str, int] = {}
    for tensor in tensors.values():
        forms[tensor.dtype] = forms.get(tensor.dtype, 0) + tensor.nbytes
    forms = dict(sorted(forms.items(), key=lambda form: -form[1]))
    total = sum(forms.values())
    for kind, signature in _SIGNATURES.items():
        names = set(canonical_names(kind, tensors).values())
        if signature in names:
            facts = dict(said for name, said in _MARKS.items() if name in names)
            return FileReport(str(path), kind, len(tensors), total, forms, facts, _resident_bytes(kind, tensors))
    try:
        lora = read_lora(path, matrix_shapes("transformer", TransformerConfig()))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is neither a part of a Qwen-Image model nor a LoRA for one: {error}") from error
    return FileReport(str(path), "LoRA", len(tensors), total, forms, dict(describe(lora)))


def _resident_bytes(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    parts, own_dtype = RESIDENT[kind]
    config = replace(_CONFIGS[kind], **shown_settings(kind, tensors))
    try:
        weights = ComponentWeights(kind, config, tensors, parts)
    except CheckpointError:
        return None
    return sum(weights.resident_bytes(part, own_dtype or mx.bfloat16) for part in parts)
