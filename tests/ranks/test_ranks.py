"""How ranks agree and share, without other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from rank_threads import together
from ranked import OneBlock, environments

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.errors import RankError, RequestError
from qwen_image_mlx.pipeline.conditioning import EncodingSource
from qwen_image_mlx.pipeline.control import Control
from qwen_image_mlx.pipeline.parameters import GenerationParameters
from qwen_image_mlx.pipeline.progress import Passes
from qwen_image_mlx.pipeline.request import Request
from qwen_image_mlx.runtime import ranks as ranks_module
from qwen_image_mlx.runtime.batch import BatchImage, heaviest
from qwen_image_mlx.runtime.memory_plan import Planner, Work
from qwen_image_mlx.runtime.ranks import Link, Ranks, current, ending, exchanging, launched, lost, parts
from qwen_image_mlx.runtime.residency import DEFAULT
from qwen_image_mlx.runtime.shared import SharedPipeline, chosen_mode, facts_of, fingerprint, least_blocks
from qwen_image_mlx.runtime.shared_denoiser import GuidanceDenoiser, LayersDenoiser, RankRelay
from qwen_image_mlx.runtime.shared_encoder import SharedEncodings
from qwen_image_mlx.runtime.traffic import traffic_of
from qwen_image_mlx.weights.safetensors_files import read_header


def test_a_single_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv("MLX_RANK", raising=False)
    current.cache_clear()
    ranks = current()
    assert (ranks.rank, ranks.size, ranks.leads, launched()) == (0, 1, True, False)
    assert ranks.gather(b"a") == [b"a"]
    assert ranks.led(lambda: 5) == 5
    ranks.agree({"a": 1})
    ranks.wait()


def test_rank_0_decides():
    assert together(3, lambda ranks: ranks.led(lambda: 10 + ranks.rank)) == [10, 10, 10]


def test_ranks_that_differ_say_the_same_sentence():
    errors = together(3, lambda ranks: ranks.agree({"the seeds": [1], "the prompt": "ab"[ranks.rank == 2] * 80}))
    assert {type(error) for error in errors} == {RankError}
    (sentence,) = {str(error) for error in errors}
    assert sentence.startswith("rank 2 differs from rank 0 in the prompt: bbb")
    assert "…" in sentence
    assert together(2, lambda ranks: ranks.agree({"the seeds": [1]})) == [None, None]


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe\x00\x00", b"{"])
def test_ranks_of_another_launch_are_recognised(payload, monkeypatch):
    """Two launches on one machine may take the same ports."""
    monkeypatch.setattr(Ranks, "gather", lambda self, own: [own, payload])
    with pytest.raises(RankError, match="do not belong together"):
        Ranks().gather_values({"a": 1})


@pytest.mark.parametrize("length", [-1, 1 << 40])
def test_a_length_that_no_rank_sends_is_recognised(length, monkeypatch):
    monkeypatch.setattr(Ranks, "gathered", lambda self, array: mx.array([3, length]))
    with pytest.raises(RankError, match="do not belong together"):
        Ranks(SimpleNamespace(rank=lambda: 0, size=lambda: 2)).gather(b"abc")


def test_errors_of_the_connection_are_recognised():
    assert lost(ValueError("no such key")) is None
    assert lost(RuntimeError("[metal::malloc] no")) is None
    with pytest.raises(RankError, match="another rank has ended"), exchanging():
        raise RuntimeError("[ring] connection to a peer was lost")
    with pytest.raises(ValueError, match="else"), exchanging():
        raise ValueError("something else")


def test_blocks_are_spread_evenly():
    assert parts(60, 3) == [range(20), range(20, 40), range(40, 60)]
    assert [len(part) for part in parts(7, 3)] == [2, 2, 3]
    with pytest.raises(RequestError, match="3 ranks cannot share 2 blocks"):
        parts(2, 3)


def test_the_time_of_an_exchange():
    assert Link(0.001, 1e9).seconds(500_000_000) == pytest.approx(0.501)


@pytest.mark.parametrize(
    ("asked", "said", "chosen"),
    [
        ("auto", {}, "guidance"),
        ("auto", {"guided": False}, "none"),
        ("auto", {"images": 2}, "images"),
        ("auto", {"images": 2, "ranks": 4}, "guidance"),
        ("auto", {"images": 2, "ranks": 4, "guided": False}, "images"),
        ("auto", {"fits": False}, "layers"),
        ("auto", {"fits": False, "ranks": 61}, "guidance"),
        ("none", {"images": 9}, "none"),
        ("layers", {}, "layers"),
        ("auto", {"fits": False, "ranks": 30, "least": 2}, "layers"),
        ("auto", {"fits": False, "ranks": 31, "least": 2}, "guidance"),
        ("auto", {"fits": False, "runs": False, "ranks": 61}, "none"),
        ("auto", {"fits": False, "runs": False}, "layers"),
    ],
)
def test_how_work_is_shared(asked, said, chosen):
    facts = {"ranks": 2, "images": 1, "guided": True, "fits": True, "blocks": 60}
    assert chosen_mode(asked, **facts | said) == chosen


@pytest.mark.parametrize(
    ("asked", "said", "why"),
    [
        ("guidance", {"guided": False}, "guidance is off"),
        ("images", {}, "there is only one"),
        ("layers", {"ranks": 61}, "61 ranks cannot share 60 blocks"),
        ("layers", {"ranks": 31, "least": 2}, "31 ranks cannot share 60 blocks, at least 2 each: start at most 30"),
    ],
)
def test_a_choice_that_does_not_suit_the_work(asked, said, why):
    facts = {"ranks": 2, "images": 1, "guided": True, "fits": True, "blocks": 60}
    with pytest.raises(RequestError, match=why):
        chosen_mode(asked, **facts | said)


def test_what_goes_to_the_next_rank_in_a_step(tiny, tiny_21):
    """A model that keeps its prefix sends the target alone, but for the first step."""
    for folder, keeps, sends_prefix in ((tiny, True, True), (tiny_21, True, False), (tiny_21, False, True)):
        components = QwenImagePipeline.from_pretrained(folder, dtype="float32").components
        planner = Planner(components, Work(64, 48, steps=2, keeps_prefix=keeps), DEFAULT)
        assert planner.prefix_tokens > 0
        tokens = 12 + (planner.prefix_tokens if sends_prefix else 0)
        assert traffic_of(planner, "layers", 2).relayed == tokens * planner.transformer_config.dim * 4


@pytest.mark.parametrize(("size", "images"), [(2, 5), (3, 5), (3, 1), (4, 2), (3, 3)])
def test_images_are_dealt_out_and_come_back_in_order(size, images):
    ran = [[] for _ in range(size)]

    def work(ranks):
        pipeline = SharedPipeline.__new__(SharedPipeline)
        pipeline.ranks, pipeline.mode = ranks, "images"
        pipeline.components = SimpleNamespace(passes=Passes())
        pipeline._images, pipeline._number, pipeline._round = images, 0, []

        def denoised(number):
            ran[ranks.rank].append(number)
            pipeline.components.passes = Passes(number, 2 * number)
            return mx.full((1, number + 1, 2), number, dtype=mx.bfloat16)

        found = []
        for number in range(images):
            latents = pipeline.shared_latents(lambda number=number: denoised(number))
            if ranks.leads:  # an image's record has them
                assert pipeline.components.passes == (number, 2 * number)
            found.append(np.array(latents.astype(mx.float32)))
        return found

    results = together(size, work)
    assert [latents.shape for latents in results[0]] == [(1, n + 1, 2) for n in range(images)]
    assert [latents.max() for latents in results[0]] == list(range(images))
    assert ran == [list(range(rank, images, size)) for rank in range(size)]
    assert not any(latents.size for others in results[1:] for latents in others)


def test_arrays_of_all_ranks_come_back_as_they_are():
    own = [
        [mx.arange(6, dtype=mx.float32).reshape(1, 2, 3), mx.ones((2, 1), mx.bfloat16)],
        [],
        [mx.array([[7]], mx.int32)],
    ]
    mx.eval(own)
    for everyone in together(3, lambda ranks: ranks.gather_arrays(own[ranks.rank])):
        assert [len(arrays) for arrays in everyone] == [2, 0, 1]
        for found, made in zip(chain(*everyone), chain(*own), strict=True):
            assert found.dtype == made.dtype
            assert mx.array_equal(found, made)


@pytest.mark.parametrize(
    ("stored", "used"),
    [(["a fox", "a fox"], True), (["a fox", None], False), ([None, None], False), (["a fox", "a red fox"], False)],
)
def test_a_stored_encoding_is_used_if_every_rank_has_it(stored, used):
    """Else a rank would wait for a prompt that no other one encodes, or have another caption than the others."""
    encodings = [SimpleNamespace(source=EncodingSource(prompt=prompt)) for prompt in stored]

    def work(ranks):
        found = encodings[ranks.rank] if stored[ranks.rank] else None
        return SharedEncodings(ranks, SimpleNamespace(get=lambda *_: found)).get(None, None)

    assert together(2, work) == (encodings if used else [None, None])


@pytest.mark.parametrize("leader", [True, False])
def test_rank_0_decides_which_passes_are_left_out(leader):
    def work(ranks):
        return GuidanceDenoiser(ranks, None, 2).agreed(ranks.leads == leader)

    assert together(2, work) == [leader] * 2


@pytest.mark.parametrize("order", [1, -1])
def test_a_batch_is_planned_for_the_step_cache_that_needs_most(order):
    """Its name alone says nothing: the one that sees a block needs a second one on each rank."""
    caches = [None, "teacache", "first-block:0.1", "easycache"][::order]
    parameters = [GenerationParameters(width=64, height=64, step_cache=one) for one in caches]
    requests = [Request(prompt="a fox", negative_prompt=None, parameters=one, seeds=(1,)) for one in parameters]
    images = [BatchImage(request, {}, Path("fox.png")) for request in requests]
    assert heaviest(images).parameters.step_cache == "first-block:0.1"
    assert least_blocks(heaviest(images).parameters) == 2


def test_requests_differ_by_everything_that_counts():
    request = Request(
        prompt="a", negative_prompt=None, parameters=GenerationParameters(width=64, height=64), seeds=(1,)
    )
    from dataclasses import replace

    from PIL import Image

    images = [(Image.new("RGB", (2, 2), colour),) for colour in ("red", "blue")]
    others = [
        replace(request, prompt="b"), replace(request, seeds=(2,)), replace(request, image_indices=range(2)),
        replace(request, parameters=GenerationParameters(width=64, height=64, num_inference_steps=7)),
        *(replace(request, images=pair) for pair in images),
        *(replace(request, layer_mask=one) for (one,) in images),
        *(replace(request, controls=(Control("a", image=one, scale=scale),)) for (one,) in images for scale in (1, 2)),
        replace(request, controls=(Control("a", image=images[0][0]), Control("b", image=images[0][0]))),
    ]  # fmt: skip
    found = [repr(facts_of(one)) for one in (request, *others)]
    assert len(set(found)) == len(found)
    assert facts_of(request) == facts_of(replace(request))
    place, other = (replace(request, controls=(Control(name, image=images[0][0]),)) for name in ("a", "elsewhere/a"))
    assert facts_of(place) == facts_of(other)  # its files are compared, not where they lie


def test_a_fine_tune_has_another_fingerprint(tiny, tmp_path):
    (file, *_) = sorted((tiny / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-(len(data) // 2) :] = bytes(len(data) // 2)
    (tmp_path / file.name).write_bytes(data)
    found = [fingerprint(list(read_header(one)[0].values())) for one in (file, tmp_path / file.name)]
    assert found[0] != found[1]
    assert found[0] == fingerprint(list(read_header(file)[0].values()))


def test_one_rank_of_one_exchanges_with_itself():
    """MLX's group of a single process makes every exchange return its input."""
    ranks = Ranks(mx.distributed.init())
    latents = mx.ones((1, 2, 3))
    relay = RankRelay(ranks, range(4))

    def block(targets, evaluation, on_layer):
        return [target * (evaluation + number) for number, target in enumerate(targets, 2)]

    (velocity,) = GuidanceDenoiser(ranks, OneBlock(block), 1).velocities(latents, 1)
    assert mx.array_equal(velocity, latents * 3)
    both = LayersDenoiser(ranks, OneBlock(block, 2), relay).velocities(latents, 0)
    assert [mx.array_equal(one, latents * factor).item() for one, factor in zip(both, (2, 3), strict=True)] == [
        True
    ] * 2
    assert relay.receive(0, [latents])[0] is latents
    relay.send(4, [latents])
    assert relay.sent == 0


@pytest.mark.process
def test_a_signal_ends_a_rank_that_waits_in_mlx(monkeypatch):
    script = (
        "import ctypes, time\n"
        "from qwen_image_mlx.runtime import ranks\n"
        "signal.signal(signal.SIGTERM, lambda *about: None)\n"
        "with ranks.ending(0.2):\n"
        "    print('ready', flush=True)\n"
        "    end = time.monotonic() + 20\n"
        "    wait = ctypes.CDLL(None).sleep\n"
        "    while time.monotonic() < end: wait(20)\n"  # C code, which no signal handler of Python interrupts
    )
    process = subprocess.Popen([sys.executable, "-c", f"import signal\n{script}"], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("hosts", ["\n", '[["127.0.0.1:40000"]]'])
def test_one_process_under_mlx_launch_joins_nobody(tmp_path, monkeypatch, hosts):
    (tmp_path / "hosts").write_text(hosts)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    current.cache_clear()
    assert current().size == 1
    current.cache_clear()


@pytest.mark.process
def test_ctrl_c_ends_a_rank_that_waits_alone_without_a_traceback(tmp_path):
    script = "print('waits', flush=True)\nfrom qwen_image_mlx.runtime import ranks\nranks.current()\n"
    alone = environments(2, tmp_path)[0]
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    process.stdout.readline()
    time.sleep(2)  # until it waits in MLX
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all processes of the command
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


@pytest.mark.process
def test_a_rank_that_waits_alone_ends_with_a_sentence(tmp_path):
    """Rank 0 waits in MLX until rank 1 connects."""
    script = (
        "from qwen_image_mlx.runtime import ranks\n"
        "ranks.JOINING = 1.0\n"
        "ranks.current()\n"
    )  # fmt: skip
    alone = environments(2, tmp_path)[0]
    done = subprocess.run([sys.executable, "-c", script], env=alone, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == (
        "error: another rank has not started within 1 seconds: see what the ranks print, and start again\n"
    )


def test_the_watch_over_signals_ends_with_its_block():
    before = signal.set_wakeup_fd(-1)
    with ending():
        assert signal.set_wakeup_fd(-1) >= 0
    assert signal.set_wakeup_fd(before) == before == -1


def test_a_rank_is_named_by_the_environment(monkeypatch):
    monkeypatch.setitem(os.environ, "MLX_RANK", "3")
    assert ranks_module.environment_rank() == 3
    assert launched()
