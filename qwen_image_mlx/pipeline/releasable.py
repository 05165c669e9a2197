"""Explicit control of what a pipeline holds in memory; a released component comes back by itself when it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models.qwen_image.config import TransformerConfig
from ..names import LoRAMode
from ..registry import LANGUAGE_HEAD, TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE_DECODER, VAE_ENCODER, VISION
from ..weights.schemes import Quantization
from .core import PipelineCore
from .loras import LoRAReference, read_adapters
from .request import Request


class ReleasablePipeline(PipelineCore):
    """What a checkpoint can do, with its components released and reloaded by name."""

    @property
    def class_name(self) -> str | None:
        """Of the checkpoint's pipeline, as its index says."""
        return self.components.sources.index.get("_class_name")

    @property
    def transformer_config(self) -> TransformerConfig:
        """What the checkpoint says of its transformer, corrected by what its files show."""
        return self.components.config(TRANSFORMER)

    @property
    def quantization(self) -> Quantization:
        """How matrices are packed while they are loaded."""
        return self.components.quantization

    def lora_targets(self) -> Mapping[str, tuple[int, ...]]:
        """The transformer's modules that have a weight, with its shape: what a LoRA may change."""
        return self.components.lora_targets()

    @property
    def is_loaded(self) -> bool:
        """Whether anything of it is in memory."""
        return bool(self.components.loaded)

    def release(self, *parts: str) -> None:
        """Gives back the memory of parts by their names, as `Components` has them; of all, with no name."""
        names = parts or self.components.loaded
        if TRANSFORMER in names:
            self._table = None
        self.components.release(*names)

    def load(self, request: Request) -> None:
        """Loads now what a request needs, unless it is loaded."""
        parts = self.components
        parts.load(TOKENIZER, TEXT_ENCODER, TRANSFORMER, VAE_DECODER)
        if request.images:
            parts.load(VAE_ENCODER)
        if request.images and self.variant.encoder_area:
            parts.load(VISION)

    def release_encoders(self) -> None:
        """Gives back the memory of all that encodes: text encoder, vision tower, tokenizer, the VAE's encoder."""
        self.components.release(TEXT_ENCODER, LANGUAGE_HEAD, VISION, TOKENIZER, VAE_ENCODER)

    def release_text_encoder(self) -> None:
        """Gives back the memory of the text encoder, its vision tower and its head."""
        self.components.release(TEXT_ENCODER, LANGUAGE_HEAD, VISION)

    def release_tokenizer(self) -> None:
        """Gives back the tokenizer's memory."""
        self.components.release(TOKENIZER)

    def release_transformer(self) -> None:
        """Gives back the memory of the transformer and of its modulation table."""
        self._table = None
        self.components.release(TRANSFORMER)

    def set_loras(self, loras: Sequence[LoRAReference], mode: LoRAMode = "auto") -> None:
        """Other LoRAs from now on, instead of all that were there.

        Where all of them, old and new, run beside the weights (packed ones, or mode "side"), the transformer stays
        loaded; otherwise it is loaded anew when it is next needed.

        Args:
            loras, mode: as in `from_pretrained`; an empty sequence takes all away.

        Raises:
            RequestError, CheckpointError, HubError: one cannot be found or does not fit; the old ones stay.
        """
        parts = self.components
        adapters = None
        if loras:
            targets, offline = parts.lora_targets(), parts.snapshot.offline
            adapters = read_adapters(loras, mode, targets, offline=offline, report=self._report)
        self._table = None
        parts.replace_adapters(adapters)

    def release_vae(self) -> None:
        """Gives back the autoencoder's memory."""
        self.components.release(VAE_ENCODER, VAE_DECODER)

    def reload_text_encoder(self) -> None:
        """Loads the text encoder now, unless it is loaded."""
        self.components.load(TEXT_ENCODER)

    def reload_tokenizer(self) -> None:
        """Loads the tokenizer now, unless it is loaded."""
        self.components.load(TOKENIZER)

    @property
    def is_text_encoder_loaded(self) -> bool:
        """Whether the text encoder is in memory."""
        return self.components.is_loaded(TEXT_ENCODER)

    @property
    def is_tokenizer_loaded(self) -> bool:
        """Whether the tokenizer is in memory."""
        return self.components.is_loaded(TOKENIZER)

    @property
    def is_transformer_loaded(self) -> bool:
        """Whether the transformer is in memory."""
        return self.components.is_loaded(TRANSFORMER)

    @property
    def is_vae_loaded(self) -> bool:
        """Whether any half of the autoencoder is in memory."""
        return self.components.is_loaded(VAE_ENCODER) or self.components.is_loaded(VAE_DECODER)
