"""Control over a pipeline's memory: what is loaded, released, loaded again; and which LoRAs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .. import registry as r
from ..names import LoRAMode
from .components import Components
from .foreign_names import Answering
from .opening import replace_loras
from .reporter import Reporter

if TYPE_CHECKING:
    from ..lora.fetch import LoRAReference


class Holding(Answering):
    """The part of `QwenImagePipeline` that decides what is in memory; a released component is loaded again when needed.

    Attributes:
        components: the checkpoint's components.
    """

    components: Components
    _report: Reporter

    def lora_targets(self) -> Mapping[str, tuple[int, ...]]:
        """The transformer's modules that a LoRA can change, with the shapes of their weights."""
        return self.components.lora_targets()

    @property
    def is_loaded(self) -> bool:
        """Whether any component is in memory."""
        return bool(self.components.loaded)

    def release(self, *parts: str) -> None:
        """Frees the memory of components by name; of all components without a name."""
        self.components.release(*(parts or self.components.loaded))

    def release_encoders(self) -> None:
        """Frees the memory of all encoders: text encoder, vision tower, tokenizer, the VAE's encoder."""
        self.components.release(*r.ENCODING, r.TOKENIZER, r.VAE_ENCODER)

    def release_text_encoder(self) -> None:
        """Frees the memory of the text encoder, its vision tower and its head."""
        self.components.release(*r.ENCODING)

    def release_tokenizer(self) -> None:
        """Frees the tokenizer's memory."""
        self.components.release(r.TOKENIZER)

    def release_transformer(self) -> None:
        """Frees the memory of the transformer and its modulation table."""
        self.components.release(r.TRANSFORMER)

    def set_loras(self, loras: Sequence[LoRAReference], mode: LoRAMode = "auto") -> None:
        """Replaces all LoRAs; the arguments are those of `from_pretrained`, and () removes all.

        If all of them, old and new, are unmerged (quantized weights, or mode "side"), the transformer stays loaded;
        otherwise it is loaded again when it is next needed.

        Raises:
            RequestError, CheckpointError, HubError: one cannot be found or does not fit; the old ones stay.
        """
        replace_loras(self.components, self._report, loras, mode)

    def release_vae(self) -> None:
        """Frees the autoencoder's memory."""
        self.components.release(r.VAE_ENCODER, r.VAE_DECODER)

    def reload_text_encoder(self) -> None:
        """Loads the text encoder now, unless it is loaded."""
        self.components.load(r.TEXT_ENCODER)

    def reload_tokenizer(self) -> None:
        """Loads the tokenizer now, unless it is loaded."""
        self.components.load(r.TOKENIZER)

    @property
    def is_text_encoder_loaded(self) -> bool:
        """Whether the text encoder is in memory."""
        return self.components.is_loaded(r.TEXT_ENCODER)

    @property
    def is_tokenizer_loaded(self) -> bool:
        """Whether the tokenizer is in memory."""
        return self.components.is_loaded(r.TOKENIZER)

    @property
    def is_transformer_loaded(self) -> bool:
        """Whether the transformer is in memory."""
        return self.components.is_loaded(r.TRANSFORMER)

    @property
    def is_vae_loaded(self) -> bool:
        """Whether the VAE's encoder or decoder is in memory."""
        return self.components.is_loaded(r.VAE_ENCODER) or self.components.is_loaded(r.VAE_DECODER)
