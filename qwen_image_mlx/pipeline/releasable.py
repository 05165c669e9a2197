"""Explicit control of what a pipeline holds in memory; a released component comes back by itself when it is needed."""

from __future__ import annotations

from collections.abc import Sequence

from ..names import LoRAMode
from .core import PipelineCore
from .loras import LoRAReference, read_adapters


class ReleasablePipeline(PipelineCore):
    """What a checkpoint can do, with its components released and reloaded by name."""

    def release_encoders(self) -> None:
        """Gives back the memory of all that encodes: text encoder, vision tower, tokenizer, the VAE's encoder."""
        self.components.release("text_encoder", "language_head", "vision", "tokenizer", "vae_encoder")

    def release_text_encoder(self) -> None:
        """Gives back the memory of the text encoder, its vision tower and its head."""
        self.components.release("text_encoder", "language_head", "vision")

    def release_tokenizer(self) -> None:
        """Gives back the tokenizer's memory."""
        self.components.release("tokenizer")

    def release_transformer(self) -> None:
        """Gives back the memory of the transformer and of its modulation table."""
        self._table = None
        self.components.release("transformer")

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
        self.components.release("vae_encoder", "vae_decoder")

    def reload_text_encoder(self) -> None:
        """Loads the text encoder now, unless it is loaded."""
        _ = self.components.text_encoder

    def reload_tokenizer(self) -> None:
        """Loads the tokenizer now, unless it is loaded."""
        _ = self.components.tokenizer

    @property
    def is_text_encoder_loaded(self) -> bool:
        """Whether the text encoder is in memory."""
        return self.components.is_loaded("text_encoder")

    @property
    def is_tokenizer_loaded(self) -> bool:
        """Whether the tokenizer is in memory."""
        return self.components.is_loaded("tokenizer")

    @property
    def is_transformer_loaded(self) -> bool:
        """Whether the transformer is in memory."""
        return self.components.is_loaded("transformer")

    @property
    def is_vae_loaded(self) -> bool:
        """Whether any half of the autoencoder is in memory."""
        return self.components.is_loaded("vae_encoder") or self.components.is_loaded("vae_decoder")
