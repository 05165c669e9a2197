"""What a single file of weights is: a component of which kind, or a LoRA; told from its header alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import TransformerConfig
from ..errors import CheckpointError
from .gguf import read_gguf
from .lora import read_lora
from .lora_inspect import describe
from .mapping import canonical_names, matrix_shapes
from .shards import read_header

# A tensor that every file of a component has, by canonical name, and no LoRA.
_SIGNATURES = {
    "transformer": "transformer_blocks.0.attn.add_k_proj.weight",
    "text_encoder": "model.layers.0.input_layernorm.weight",
    "vae": "decoder.conv_in.weight",
}
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
    """

    path: str
    kind: str
    tensors: int
    file_bytes: int
    forms: dict[str, int]
    facts: dict[str, str]


def identify(path: Path) -> FileReport:
    """Says what a safetensors or GGUF file is.

    Raises:
        CheckpointError: it is damaged, or holds nothing this package knows.
    """
    tensors = (read_gguf if path.suffix == ".gguf" else read_header)(path)[0]
    forms: dict[str, int] = {}
    for tensor in tensors.values():
        forms[tensor.dtype] = forms.get(tensor.dtype, 0) + tensor.nbytes
    total = sum(forms.values())
    for kind, signature in _SIGNATURES.items():
        names = set(canonical_names(kind, tensors).values())
        if signature in names:
            facts = dict(said for name, said in _MARKS.items() if name in names)
            return FileReport(str(path), kind, len(tensors), total, forms, facts)
    try:
        lora = read_lora(path, matrix_shapes("transformer", TransformerConfig()))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is neither a part of a Qwen-Image model nor a LoRA for one: {error}") from error
    return FileReport(str(path), "LoRA", len(tensors), total, forms, dict(describe(lora)))
