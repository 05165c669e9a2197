"""How a server's job ends on all ranks alike, without other processes."""

from __future__ import annotations

import asyncio

import mlx.core as mx
import pytest
from rank_threads import together
from ranked import OneBlock

from qwen_image_mlx.errors import Cancelled, GPUError, RankError, RequestError
from qwen_image_mlx.runtime.ranks import Ranks
from qwen_image_mlx.runtime.shared_denoiser import GuidanceDenoiser, LayersDenoiser, RankRelay
from qwen_image_mlx.server.api_errors import ApiError
from qwen_image_mlx.server.jobs import Jobs
from qwen_image_mlx.server.schema import BODIES, EditBody
from qwen_image_mlx.server.shared import SharedTasks, _packed, _unpacked


def jobs(size, work):
    """How a job of several ranks ends on each; `work(ranks)` is a rank's part."""
    return together(size, lambda ranks: SharedTasks(ranks, None, None)._together(lambda: work(ranks)))


def fails_on(rank, error, exchanges=0):
    """A job that exchanges something, and then fails on one rank."""

    def work(ranks):
        for number in range(exchanges + 2):
            if number == exchanges and ranks.rank == rank:
                raise error
            ranks.meet()
            ranks.gather(b"velocity")
        return ranks.rank

    return work


def test_a_job_that_succeeds_gives_each_rank_its_result():
    assert jobs(3, fails_on(None, None)) == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("exchanges", [0, 1])
@pytest.mark.parametrize("error", [
    RequestError("too large"), Cancelled("cancelled: timeout"), ApiError("model_error", "no files"),
])  # fmt: skip
def test_an_error_of_one_rank_is_that_of_all(rank, exchanges, error):
    found = jobs(3, fails_on(rank, error, exchanges))
    assert found.pop(rank) is error
    named = "rank 2: " if rank and not isinstance(error, Cancelled) else ""
    assert [(type(other), str(other)) for other in found] == [(type(error), f"{named}{error}")] * 2


def test_a_gpu_fault_of_one_rank_is_that_of_all():
    first, second = jobs(2, fails_on(1, GPUError("too little memory", fault="memory", fatal=True)))
    assert (str(first), first.fault, first.fatal) == ("rank 1: too little memory", "memory", True)
    assert isinstance(second, GPUError)


def test_a_fault_of_the_program_is_internal_on_the_other_ranks(caplog):
    first, second = jobs(2, fails_on(1, ZeroDivisionError("a bug")))
    assert (first.code, type(second)) == ("internal", ZeroDivisionError)
    assert "ZeroDivisionError: a bug" in caplog.text


def test_jobs_after_a_failed_one():
    def work(ranks):
        shared, found = SharedTasks(ranks, None, None), []
        for rank, error in ((1, RequestError("refused")), (0, RequestError("again")), (None, None)):
            try:
                found.append(shared._together(lambda rank=rank, error=error: fails_on(rank, error)(ranks)))
            except RequestError as refusal:
                found.append(str(refusal))
        return found

    assert together(2, work) == [["rank 1: refused", "again", 0], ["refused", "again", 1]]


def test_a_rank_that_fails_where_others_wait_has_to_end():
    ranks = Ranks()
    shared = SharedTasks(ranks, None, None)

    def work():
        ranks.awaited = True
        raise RequestError("a file is gone")

    with pytest.raises(RankError, match="rank 0 failed where others wait for it: a file is gone"):
        shared._together(work)
    assert shared._lost


def watched():
    """Ranks of one, what happens to them, and a callback for layers that cancels."""
    ranks, steps = Ranks(mx.distributed.init()), []
    ranks.meet = lambda: steps.append(("meets", ranks.awaited))

    def cancel(arrays):
        steps.append(("layer", ranks.awaited))
        raise Cancelled("cancelled")

    return ranks, steps, cancel


def test_layers_are_cancelled_after_the_exchange():
    ranks, steps, cancel = watched()

    def block(targets, evaluation, on_layer):
        for target in targets:
            on_layer([target])
        return targets

    denoiser = LayersDenoiser(ranks, OneBlock(block, 2), RankRelay(ranks, range(1)))
    for _ in range(2):
        with pytest.raises(Cancelled):
            denoiser.velocities(mx.ones((1, 2, 3)), 0, cancel)
        assert steps == [("meets", False), ("layer", True), ("layer", True)]
        assert not ranks.awaited
        steps.clear()
    assert len(denoiser.velocities(mx.ones((1, 2, 3)), 0)) == 2  # what was cancelled is over


def test_a_cancel_before_the_ranks_decide_comes_after_the_exchange():
    ranks, steps, cancel = watched()

    def block(targets, evaluation, on_layer):
        on_layer(targets)
        return targets

    denoiser = LayersDenoiser(ranks, OneBlock(block), RankRelay(ranks, range(2)))
    hidden = denoiser.run(denoiser.enter(mx.ones((1, 2, 3)), 0), 0, slice(1), cancel)
    assert denoiser.agreed(True)
    with pytest.raises(Cancelled):
        denoiser.leave(hidden, 0)
    assert steps == [("layer", False), ("meets", False), ("meets", False)]
    assert not ranks.awaited


def test_branches_of_guidance_meet_between_computing_and_exchange():
    ranks, steps = Ranks(mx.distributed.init()), []

    def meet():
        steps.append("meets")
        raise Cancelled("cancelled")

    def block(targets, *_):
        steps.append("computes")
        return targets

    ranks.meet, ranks.gathered = meet, lambda array: steps.append("exchanges")
    with pytest.raises(Cancelled):
        GuidanceDenoiser(ranks, OneBlock(block), 1).velocities(mx.ones((1, 2, 3)), 0)
    assert steps == ["computes", "meets"]


def test_a_body_is_the_same_on_the_other_ranks():
    fields = {"prompt": "a fox", "images": [b"\x00\xff", b"b"], "mask": b"m", "seed": 3, "strength": 0.5}
    fields["controls"] = [{"controlnet": "edges", "image": b"c", "scale": 0.5}]
    body = EditBody.model_validate(fields)
    (first, second) = together(2, lambda ranks: ranks.led(lambda: _packed(body)))
    assert EditBody.model_validate(_unpacked(second)) == body
    assert first == second
    assert set(BODIES["edit"].model_validate(_unpacked(first)).model_fields_set) == set(fields)


def test_a_lost_rank_ends_the_queue():
    gave_up = []

    def idle():
        raise RankError("another rank has ended")

    async def run():
        queue = Jobs(idle=idle, give_up=lambda: gave_up.append(True))
        queue.start()
        while not gave_up:
            await asyncio.sleep(0.001)
        assert (queue.health.fault, type(queue.health.over)) == ("another rank has ended", RankError)
        with pytest.raises(ApiError, match="stopping"):
            queue.check_room()
        await queue.close()

    asyncio.run(asyncio.wait_for(run(), 10))
