"""The part that `generate` and `edit` share: from flags to saved images."""

from __future__ import annotations

import argparse
import logging
from contextlib import ExitStack

from .choices import choose
from .idle import warn_idle

logger: logging.Logger = logging.getLogger(__name__)


def run_images(arguments: argparse.Namespace, default_model: str, task: str, command: str | None = None) -> None:
    """Generates and saves the images. Every fault that can be found without the model is found before it is opened.

    Args:
        arguments: the flags.
        default_model: the model, if neither the flags nor the config name one.
        task: the task that the model must be made for: "generate" or "edit".
        command: the command whose flags these are; None is the one with the task's name.
    """
    chosen = choose(arguments, task)

    from ..images.colour import ignore_profiles
    from ..images.files import save_image
    from ..runtime.session import Session
    from .console import Console

    with Console(arguments) as console, ExitStack() as stack:
        timings = console.timings("timings" in chosen.given)
        stack.enter_context(ignore_profiles(bool(chosen.options.get("ignore_profile"))))  # from a flag or the record
        images, mask, straight = chosen.open_images(alpha=True)
        for control in chosen.draft.controls:
            control.check_images()
        session = Session.open(chosen.options, default_model, timings or console, task=task)
        if images and not session.shows_alpha:
            images, _, _ = chosen.open_images()
        request = session.request(chosen.options, chosen.size, images, mask, straight)
        warn_idle(command or task, chosen.given, request)
        if chosen.drawn:
            logger.info("seed %s", ", ".join(map(str, request.seeds)))
        show = None
        if "preview" in chosen.given:
            from .preview import preview_file

            show = stack.enter_context(preview_file(chosen.first_path))
        for index, made in enumerate(session.generate(request, show), 1):
            metadata = {**made.metadata, **chosen.provenance}
            if "timings" in chosen.given:
                metadata["profile"] = timings.record()
            seed = metadata["seed"]
            written = save_image(made.image, chosen.path(seed, index), metadata)
            if chosen.layer:
                from ..layers.recompose import adopt_layer

                adopt_layer(chosen.given["layer"], written)
            console.result(written, seed=seed, index=metadata["image_index"], metadata=metadata)
        if len(request.image_indices) > 1:
            logger.info("each of these images can be generated again by itself: --from-image FILE")
        if timings:
            console.close()
            logger.info("%s", timings.table())
