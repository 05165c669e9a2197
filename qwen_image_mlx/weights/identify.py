"""What a single file of weights is: a component of which kind, or a LoRA; told from its header alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import TransformerConfig
from ..errors import CheckpointError
from .gguf import read_gguf
from .lora import read_lora
from .lora_inspect import describe
from .mapping import canonical_names, known_share, matrix_shapes
from .shards import read_header

COMPONENTS = ("transformer", "text_encoder", "vision", "vae")
_ENOUGH = 0.5  # of a file's names must be a component's


@dataclass(frozen=True)
class FileReport:
    """A file of weights.

    Attributes:
        path: where it is.
        kind: "transformer", "text_encoder", "vision", "vae" or "LoRA".
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
    tensors, metadata = read_gguf(path) if path.suffix == ".gguf" else read_header(path)
    forms: dict[str, int] = {}
    for tensor in tensors.values():
        forms[tensor.dtype] = forms.get(tensor.dtype, 0) + tensor.nbytes
    total = sum(forms.values())
    kind = max(COMPONENTS, key=lambda component: known_share(component, tensors))
    if known_share(kind, tensors) >= _ENOUGH:
        names = set(canonical_names(kind, tensors).values())
        facts = {label: text for label, (found, text) in _MARKS.items() if found in names}
        return FileReport(str(path), kind, len(tensors), total, forms, facts)
    try:
        lora = read_lora(path, matrix_shapes("transformer", TransformerConfig()))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is neither a component of a Qwen-Image model nor a LoRA for one: {error}") from error
    return FileReport(str(path), "LoRA", len(tensors), total, forms, dict(describe(lora)))


_MARKS = {
    "zero_cond_t": ("__index_timestep_zero__", "on: an editing model of 2511"),
    "layered": ("time_text_embed.addition_t_embedding.weight", "yes"),
}
