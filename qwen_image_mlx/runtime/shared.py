"""How ranks share the work: the branches of guidance, the images of a request, or the transformer's blocks.

A `SharedPipeline` has the calls of any pipeline, and rank 0 gets the results. The denoising loop runs on every rank
that has a part; what a step needs from elsewhere is exchanged in `shared_denoiser.py`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..images.sources import open_rgba
from ..names import Parallel
from ..options import ImageFile, options_of
from ..pipeline.control import Control
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.progress import Passes
from ..pipeline.seams import ConditionEncoder, Conditions, Denoiser, DenoiserClass
from ..registry import TEXT_ENCODER, TRANSFORMER, VAE
from .ranks import REPORT, Ranks, current, parts
from .shared_denoiser import GuidanceDenoiser, LayersDenoiser, RankRelay
from .shared_encoder import SharedEncoder, SharedEncodings
from .traffic import is_worth_splitting

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline.components import Components
    from ..pipeline.conditioning import Encodings, GuidanceEncoding, InitialImage
    from ..pipeline.parameters import GenerationParameters
    from ..pipeline.progress import ProgressCallback
    from ..pipeline.reporter import Reporter
    from ..pipeline.request import Request
    from ..weights.safetensors_files import Tensor
    from .memory import Memory
    from .memory_plan import MemoryPlan, Work

logger: logging.Logger = logging.getLogger(__name__)

SHARED_WORDS: dict[Parallel, str] = {
    "guidance": "the branches of guidance",
    "images": "the images",
    "layers": "the transformer's blocks",
    "none": "nothing: rank 0 works alone",
}
_SAMPLES = 64  # tensors of which a few bytes are compared: headers of two fine-tunes are equal
_SAMPLE_BYTES = 64


class SharedPipeline(QwenImagePipeline):
    """A pipeline whose work the ranks of this run share; made by `from_pretrained` like any other.

    Attributes:
        ranks: of this run.
        mode: how the work is shared now: "guidance", "images", "layers" or "none", which leaves it to rank 0.
    """

    def __init__(self, components: Components, report: Reporter, denoiser: DenoiserClass | None = None):
        super().__init__(components, report, denoiser)
        self._denoiser = _SharedDenoisers(self, self._denoiser)
        self.ranks: Ranks = current()
        self.mode: Parallel = "none"
        self.relay: RankRelay | None = None
        self._compared = False
        self._images = 1
        self._number = 0
        self._round: list[tuple[mx.array, Passes] | None] = []

    def begin(self, mode: Parallel, images: int) -> None:
        """Begins a piece of work; every rank calls this with the same values.

        Args:
            mode: how it is shared.
            images: how many will be denoised.

        Raises:
            RequestError: there are more ranks than blocks.
        """
        self.mode, self._images, self._number, self._round = mode, images, 0, []
        self.relay = None
        if mode == "layers":
            self.relay = RankRelay(self.ranks, self._blocks_of(self.ranks.rank))
        self.components.connect(self.relay)
        self.ranks.shared = mode, [self.part_of(rank) for rank in range(self.ranks.size)]

    @property
    def works(self) -> bool:
        """Whether this rank has a part in the work."""
        return self._works(self.ranks.rank)

    def _works(self, rank: int) -> bool:
        return rank == 0 or (self.mode != "none" and (self.mode != "images" or rank < self._images))

    def _blocks_of(self, rank: int) -> range:
        return parts(self.components.depth(TRANSFORMER), self.ranks.size)[rank]

    def part_of(self, rank: int) -> str:
        """A rank's part, in a few words."""
        if not self._works(rank) or (self.mode == "guidance" and rank > 1):
            return "nothing to do"
        if self.mode == "layers":
            blocks = self._blocks_of(rank)
            return f"blocks {blocks.start} to {blocks.stop - 1}"
        return {"guidance": f"the {('positive', 'negative')[rank % 2]} branch", "images": "a share of the images"}.get(
            self.mode, "everything"
        )

    def own_images(self, count: int) -> int:
        """How many of some images are denoised here."""
        return -(-(count - self.ranks.rank) // self.ranks.size) if self.mode == "images" else count

    def attend(self) -> None:
        """Takes part in the exchanges of work in which this rank has no other part."""
        if self.mode == "images":
            for _ in range(self._images):
                self.shared_latents(_nobody)

    def prepare(self) -> None:
        """As `QwenImagePipeline.prepare`; raises RankError unless all ranks opened the same model in the same way."""
        super().prepare()
        if self._compared:
            return
        self.ranks.meet()
        self._compared = True
        parts = self.components
        self.ranks.agree(
            {
                "the pipeline's class": self.class_name,
                "the dtype": str(self.dtype),
                "the quantization": str(parts.quantization),
                "the LoRAs": list(parts.adapters.references) if parts.adapters else [],
                **files_of(parts, (TRANSFORMER, TEXT_ENCODER, VAE)),
            }
        )

    @property
    def _shares_encoding(self) -> bool:
        """Whether all ranks take part in encoding."""
        return self.mode in ("guidance", "layers")

    def _encoder(self) -> ConditionEncoder:
        encoder = super()._encoder()
        return SharedEncoder(self.ranks, encoder) if self._shares_encoding else encoder

    def encodings(self, stored: Encodings | None) -> Encodings | None:
        """What looks encodings up for the work: this rank's store, or all ranks' together."""
        return SharedEncodings(self.ranks, stored) if self._shares_encoding else stored

    def denoise_latents(
        self, parameters: GenerationParameters, encoding: GuidanceEncoding, *,
        seed: int = 0, image_index: int = 0, latents: mx.array | np.ndarray | None = None,
        initial: InitialImage | None = None, progress: ProgressCallback | None = None, **more: Any,
    ) -> mx.array:  # fmt: skip
        """As `QwenImagePipeline.denoise_latents`; on ranks that do not decode the result may be empty."""

        def denoised() -> mx.array:
            return super(SharedPipeline, self).denoise_latents(
                parameters, encoding, seed=seed, image_index=image_index, latents=latents, initial=initial,
                progress=progress, **more,
            )  # fmt: skip

        if self.mode != "images":
            return denoised() if self.works else mx.zeros((0,))
        return self.shared_latents(denoised)

    def shared_latents(self, denoised: Callable[[], mx.array]) -> mx.array:
        """The next image's latents on rank 0, whoever makes them; on other ranks an empty array.

        The images of a round, one for each rank, are made at the same time, and then gathered.

        Args:
            denoised: makes them; called on one rank.
        """
        place = self._number % self.ranks.size
        together = min(self.ranks.size, self._images - (self._number - place))  # images of this round
        self._number += 1
        mine = (denoised(), self.components.passes) if place == self.ranks.rank else None
        if place == self.ranks.rank and self.ranks.leads:
            self._round = [mine]
        elif together > 1 and place == max(1, min(self.ranks.rank, together - 1)):
            self._round = self._gathered(mine)
        found = self._round[place] if self.ranks.leads else None
        if found is None:
            return mx.zeros((0,))
        latents, self.components.passes = found
        return latents

    def _gathered(self, mine: tuple[mx.array, Passes] | None) -> list[tuple[mx.array, Passes] | None]:
        """Every rank's latents of this round, and the passes that they took."""
        self.ranks.meet()
        everyone = self.ranks.gather_arrays([] if mine is None else [mine[0]])
        passes = self.ranks.gather_values(None if mine is None else mine[1])
        return [
            (arrays[0], Passes(*counts)) if arrays else None for arrays, counts in zip(everyone, passes, strict=True)
        ]

    def decode_frames(
        self, parameters: GenerationParameters, latents: mx.array, *, progress: ProgressCallback | None = None
    ) -> Iterator[mx.array]:
        """As `QwenImagePipeline.decode_frames`; only rank 0 decodes, the others yield nothing."""
        return super().decode_frames(parameters, latents, progress=progress) if self.ranks.leads else iter(())


class _SharedDenoisers:
    """The `DenoiserClass` of a shared pipeline.

    Args:
        pipeline: says how the work is shared.
        make: makes the denoiser of a single process.
    """

    def __init__(self, pipeline: SharedPipeline, make: DenoiserClass):
        self._pipeline, self._make = pipeline, make
        self.check = make.check
        self.kept_values = make.kept_values

    def __call__(self, components: Components, conditions: Conditions, report: Reporter) -> Denoiser:
        """Makes the denoiser of an image; see `DenoiserClass`."""
        ranks, mode, relay = self._pipeline.ranks, self._pipeline.mode, self._pipeline.relay
        branches = conditions.branches
        if mode == "guidance" and len(branches) > 1:
            own: Any = None
            if ranks.rank < len(branches):
                mine = replace(conditions, branches=(branches[ranks.rank],), prompt_states=branches[0])
                own = self._make(components, mine, report)
            return GuidanceDenoiser(ranks, own, len(branches))
        made: Any = self._make(components, conditions, report)
        return LayersDenoiser(ranks, made, relay) if relay is not None else made


def begin(
    pipeline: SharedPipeline, request: Request, work: Work, whole: MemoryPlan, memory: Memory, choice: Parallel
) -> None:
    """Lets the ranks agree on a request and on how they share it; every rank calls this.

    Args:
        pipeline: of this rank.
        request: the request.
        work: its work.
        whole: the plan for it with the whole transformer on this rank.
        memory: what this rank may use.
        choice: the user's choice.

    Raises:
        RankError: they have different requests.
        RequestError: the choice does not suit the request.
    """
    ranks = pipeline.ranks
    pipeline.prepare()
    ranks.meet()
    ranks.agree(facts_of(request) | files_of(pipeline.components, work.controls))
    kept = TRANSFORMER not in whole.residency.streamed
    runs = whole.peak <= memory.budget
    stays = runs and (kept or all(TRANSFORMER in row.streamed for row in memory.residencies))
    everyone = ranks.gather_values([runs, stays])
    can, everywhere = all(runs for runs, _ in everyone), all(stays for _, stays in everyone)
    choice = ranks.led(lambda: choice)
    if choice == "auto" and can and not everywhere:
        link = ranks.link
        with pipeline.components.unconnected():
            everywhere = not is_worth_splitting(pipeline.components, work, ranks.size, link)
        everywhere = ranks.led(lambda: everywhere)
    facts: dict[str, Any] = {
        "ranks": ranks.size,
        "images": work.images,
        "guided": work.guided,
        "blocks": pipeline.components.depth(TRANSFORMER),
        "runs": can,
        "least": least_blocks(request.parameters),
    }
    mode = chosen_mode(choice, fits=everywhere, **facts)
    pipeline.begin(mode, work.images)
    if ranks.leads:
        logger.info("%d ranks share %s", ranks.size, SHARED_WORDS[mode])
    else:
        logger.log(REPORT, "rank %d of %d: %s", ranks.rank, ranks.size, pipeline.part_of(ranks.rank))


def chosen_mode(
    choice: Parallel, *, ranks: int, images: int, guided: bool, fits: bool, blocks: int, runs: bool = True,
    least: int = 1,
) -> Parallel:  # fmt: skip
    """How work is shared.

    Args:
        choice: the user's choice; "auto" leaves it to this function.
        ranks: how many there are.
        images: how many are generated.
        guided: whether there are two branches.
        fits: whether the whole transformer stays in memory on every rank, or splitting it would be slower than
            reading it again in each step.
        blocks: of the transformer.
        runs: whether each rank has the memory for a whole transformer, be it read again in each step.
        least: blocks that a rank has at least, if blocks are shared.

    Raises:
        RequestError: the choice does not suit the work.
    """
    if choice == "guidance" and not guided:
        raise RequestError(
            "parallel is guidance, but guidance is off, so there is only one branch: give a negative prompt and a "
            "cfg_scale above 1, or choose auto"
        )
    if choice == "images" and images < 2:
        raise RequestError("parallel is images, but there is only one image: make several, or choose auto")
    if choice == "layers":
        parts(blocks, ranks, least)
    if choice != "auto":
        return choice
    if not fits and ranks * least <= blocks:
        return "layers"
    if not runs:
        return "none"
    if images >= ranks or (images > 1 and not guided):
        return "images"
    return "guidance" if guided else "none"


def least_blocks(parameters: GenerationParameters) -> int:
    """How many blocks a rank needs: one more than a step cache sees before it decides."""
    if parameters.step_cache is None:
        return 1
    from ..sampling.step_caches import method_of  # here: most runs have no step cache

    return 1 + method_of(parameters.step_cache).first


def facts_of(request: Request) -> dict[str, Any]:
    """What ranks must agree on before they run a request, keyed by what a sentence calls it."""
    images = list(request.images)
    if request.canvas is not None:
        images += request.canvas.initial
    return {
        "the prompt": request.prompt,
        "the negative prompt": request.negative_prompt,
        **{f"the option {name}": str(value) for name, value in vars(request.parameters).items()},
        "the seeds": list(request.seeds),
        "the number of images": len(request.image_indices),
        "the reference pixels": request.reference_pixels,
        "the caption's language": request.caption_language,
        "the images": [_digest(image) for image in (*images, request.layer_mask)],
        "the controls": [_control_facts(control) for control in request.controls],
    }


def files_of(components: Components, roles: Iterable[str]) -> dict[str, Any]:
    """The fingerprints of some components, keyed by what a sentence calls them."""
    return {f"the files of the {role}": fingerprint(components.weights(role).tensors) for role in roles}


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """A short hash of a component's headers, and of a few bytes of some of its tensors."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    found = hashlib.sha256(repr([(t.name, t.dtype, t.shape) for t in ordered]).encode())
    for tensor in ordered[:: max(1, len(ordered) // _SAMPLES)]:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + tensor.nbytes // 2)
            found.update(file.read(min(_SAMPLE_BYTES, tensor.nbytes - tensor.nbytes // 2)))
    return found.hexdigest()[:12]


def _nobody() -> mx.array:
    raise AssertionError("this rank has no images")


def _control_facts(control: Control) -> list[Any]:
    """A control's values but for its place, which may differ; its images by their pixels."""
    rows = [row for row in options_of(Control) if row.field != "controlnet"]
    values = [(row.kind, getattr(control, row.field)) for row in rows]
    return [
        _digest(open_rgba(value)) if isinstance(kind, ImageFile) and value is not None else value
        for kind, value in values
    ]


def _digest(image: Image | None) -> str | None:
    if image is None:
        return None
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()[:12]
