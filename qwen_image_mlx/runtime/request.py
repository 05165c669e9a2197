"""What a user asks for: prompts, parameters, seeds; validated once, importable without MLX."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from ..pipeline.parameters import GenerationParameters, check_seed

MAX_IMAGES = 10_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """One or more pictures of one prompt.

    Attributes:
        prompt: what to paint.
        negative_prompt: what to avoid; None paints without guidance.
        parameters: how to paint.
        seeds: at least one.
        image_indices: for each seed, which of its pictures (the reference's num_images_per_prompt counts from 0).
    """

    prompt: str
    negative_prompt: str | None
    parameters: GenerationParameters
    seeds: tuple[int, ...]
    image_indices: range = range(1)

    def __post_init__(self) -> None:
        for seed in self.seeds:
            check_seed(seed)
        if not 1 <= len(self.image_indices) * len(self.seeds) <= MAX_IMAGES:
            raise RequestError(f"the number of pictures must be from 1 to {MAX_IMAGES}")
