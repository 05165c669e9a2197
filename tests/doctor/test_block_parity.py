"""Blocks of real width against stored values; the small ones here, all of them in tests/cli/test_doctor.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.doctor import measure, parity, picture
from qwen_image_mlx.doctor.outcome import FALSIFY, Outcome
from qwen_image_mlx.doctor.parts import PARTS
from qwen_image_mlx.weights.synthetic import FULL

pytestmark = pytest.mark.slow

NAMES = [part.cases[0].name for part in PARTS]
SMALL = [part for part in PARTS if part.cases[0].name.startswith(("vision", "vae"))]
every_part = pytest.mark.parametrize("part", PARTS, ids=NAMES)


def checked(part, large=False):
    outcome = Outcome()
    parity.check(part, large, outcome)
    return outcome


@pytest.mark.parametrize("part", SMALL, ids=[part.cases[0].name for part in SMALL])
def test_a_part_is_right_and_one_percent_is_seen(part, monkeypatch):
    outcome = checked(part)
    assert outcome.findings == []
    assert all(figures["stored_error"] < part.tolerance for figures in outcome.figures.values())
    monkeypatch.setenv(FALSIFY, part.cases[-1].name)
    assert {found.verdict for found in checked(part).findings} == {"wrong"}


def test_a_wrong_weight_is_seen():
    (part,) = [part for part in SMALL if part.cases[0].name == "vision-windowed"]

    def build():
        module = part.build()
        module.attn.proj.weight = module.attn.proj.weight.at[:, 0].add(0.01)
        return module

    findings = checked(part._replace(build=build)).findings
    assert [found.sentence.split()[0] for found in findings if "fp32 is" in found.sentence] == [
        "vision-windowed", "vision-full",
    ]  # fmt: skip


def test_other_bits_in_a_second_run_are_seen(monkeypatch):
    part, runs = SMALL[0], []
    case = part.cases[0]

    def run(module, shape, dtype):
        runs.append(dtype)
        return case.run(module, shape, dtype) + len(runs) % 2 * 1e-5

    findings = checked(part._replace(cases=(case._replace(run=run),))).findings
    assert "vision-windowed in fp32 gives other bits when it is run again" in [found.sentence for found in findings]


def test_a_gpu_that_is_right(monkeypatch):
    monkeypatch.setattr(parity, "on_gpu", lambda: True)
    outcome = checked(next(part for part in SMALL if part.cases[0].name == "vae-decoder"))
    assert outcome.findings == []
    figures = outcome.figures["vae-decoder"]
    assert figures.pop("stored_error") < 1e-5
    assert figures == {"cpu_error": 0, "levels_changed_ratio": 0, "most_levels": 0}


def test_a_gpu_that_is_wrong_in_both_dtypes(monkeypatch):
    """Each case runs twice on the default device, here one per cent off, and then on the CPU."""
    monkeypatch.setattr(parity, "on_gpu", lambda: True)
    case, runs = SMALL[0].cases[0], []

    def run(module, shape, dtype):
        runs.append(dtype)
        return case.run(module, shape, dtype) * (1 if len(runs) % 3 == 0 else 1.01)

    found = [found.sentence for found in checked(SMALL[0]._replace(cases=(case._replace(run=run),))).findings]
    assert [sentence.partition(",")[0].partition(" is ")[0] for sentence in found] == [
        "vision-windowed in fp32", "vision-windowed in fp32", "vision-windowed in bf16",
    ]  # fmt: skip
    assert "off the values stored" in found[0]
    assert "off the CPU" in found[1]
    assert runs == 3 * [mx.float32] + 3 * [mx.bfloat16]


def test_widths_are_real():
    block = PARTS[0].build()
    assert block.img_mlp.net[0].proj.weight.shape == (4 * FULL["transformer"].dim, FULL["transformer"].dim)
    assert set(parity.stored_values()) == {
        parity.key_of(case.name, large) for part in PARTS for case in part.cases for large in (False, True)
    }


@pytest.mark.nightly
@every_part
def test_parts_are_right_at_the_shapes_of_a_gpu(part):
    assert checked(part, large=True).findings == []


@pytest.mark.metal
@every_part
def test_parts_are_right_on_apple_s_gpu(part):
    assert measure.on_metal()
    outcome = checked(part, large=True)
    assert outcome.findings == []
    assert all("cpu_error" in figures for figures in outcome.figures.values())


def test_stored_images_are_small_and_images_are_compared(monkeypatch):
    made = {name: picture.stored_image(name) for name in ("demo", "demo-edit", "demo-layer-1", "demo-layer-2")}
    assert all((picture.STORED / f"{name}.png").stat().st_size < 6000 for name in made)
    monkeypatch.setattr(picture, "images", lambda source: made)
    assert picture.run({}).findings == []
    monkeypatch.setenv(FALSIFY, "demo-edit")
    assert [found.verdict for found in picture.run({}).findings] == ["wrong"]


def test_a_fingerprint_sees_values_and_norms():
    result = np.array(mx.arange(1000, dtype=mx.float32))
    sample = parity.sample(result)
    assert (len(sample["values"]), len(sample["norms"])) == (64, 4)
    changed = result.copy()
    changed[1] += 500  # not one of the 64
    assert parity.sample(changed)["values"] == sample["values"]
    assert parity.sample(changed)["norms"] != sample["norms"]
