"""Fixtures shared by all tests: one tiny checkpoint and one loaded reference pipeline per session.

The reference libraries take seconds to import, so they are imported only when a test asks for one of these.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline

# Started in the background a run ignores Ctrl-C, and so do the programs it starts; the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of one example says nothing on a machine with other work.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_WHOLE_FILE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", re.MULTILINE)

os.environ["QWEN_IMAGE_CONFIG"] = os.devnull  # not the config of whoever runs the tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-goldens", action="store_true", help="write tests/goldens anew, from the reference")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files whose tests are all left out by their mark are not imported: torch and the like need not be there."""
    if collection_path.suffix != ".py":
        return None
    left_out = re.findall(r"\bnot (\w+)", config.option.markexpr)
    mark = _WHOLE_FILE.search(collection_path.read_text(encoding="utf-8"))
    return True if mark and mark[1] in left_out else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes some cases of a `sampled` test nightly; each value of each parameter stays in one of the others.

    Cases are taken as they come, if they have a value that none before had; `sampled(n)` takes at most n.
    """
    seen: dict[str, set[tuple[str, str]]] = {}
    taken: Counter[str] = Counter()
    for item in items:
        mark, cases = item.get_closest_marker("sampled"), getattr(item, "callspec", None)
        if mark is None or cases is None:
            continue
        test = item.nodeid.partition("[")[0]
        values = {(name, repr(value)) for name, value in cases.params.items()}
        new = values - seen.setdefault(test, set())
        if new and taken[test] < (mark.args or (math.inf,))[0]:
            seen[test] |= values
            taken[test] += 1
        else:
            item.add_marker(pytest.mark.nightly)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image checkpoint in the official layout; shared, so copy it before changing it."""
    from checkpoints import write_text_to_image

    return write_text_to_image(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny_21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Qwen-Image-2.1; shared, so copy it before changing it."""
    from checkpoints_21 import write_checkpoint_21

    return write_checkpoint_21(tmp_path_factory.mktemp("checkpoints") / "tiny-21")


@pytest.fixture(scope="session")
def reference(tiny: Path) -> QwenImagePipeline:
    """The reference's pipeline of the tiny checkpoint, in fp32 on the CPU."""
    from reference import load_reference

    return load_reference(tiny)
