"""The queue without any model: limits of time and memory, what listeners hear, and an end whatever the work does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import suppress

import pytest

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.pipeline.progress import Progress
from qwen_image_mlx.server.answers import ApiError
from qwen_image_mlx.server.jobs import Jobs


def run(scenario, **limits):
    """Runs a coroutine function with a queue that works."""

    async def main():
        jobs = Jobs(**limits)
        jobs.start()
        try:
            return await asyncio.wait_for(scenario(jobs), 30)
        finally:
            await jobs.close()

    return asyncio.run(main())


def stepping(feed):
    """Work that goes on until it is told to stop."""
    for step in range(100_000):
        feed(Progress("denoise", step, 100_000))
        time.sleep(0.005)


def test_a_job_that_takes_too_long_is_stopped():
    async def scenario(jobs):
        job = jobs.submit("x", stepping, followed=True)
        await job.finished.wait()
        return job

    job = run(scenario, seconds=0.2)
    assert (job.status, job.error["code"]) == ("failed", "timeout")


def test_what_is_wrong_is_told_and_a_fault_is_not(caplog):
    async def scenario(jobs):
        found = []
        for error in (RequestError("steps are odd"), ApiError("model_error", "no model"), ZeroDivisionError("secret")):

            def work(feed, error=error):
                raise error

            job = jobs.submit("x", work, followed=True)
            await job.finished.wait()
            found.append((job.error["code"], job.error["message"]))
        after = jobs.submit("x", lambda feed: {"fine": 1}, followed=True)
        await after.finished.wait()
        assert json.loads(after.described())["result"] == {"fine": 1}
        return found

    assert run(scenario) == [
        ("invalid_request", "steps are odd"),
        ("model_error", "no model"),
        ("internal", "internal error; the server's log says more"),
    ]
    assert "secret" in caplog.text


@pytest.mark.parametrize(("limits", "left"), [
    ({"kept": 3}, 3),
    ({"kept_bytes": 450}, 4),
    ({"kept_bytes": 1}, 1),
    ({"kept_seconds": 0.0}, 0),
    ({}, 6),
])  # fmt: skip
def test_finished_jobs_are_kept_within_bounds(limits, left):
    async def scenario(jobs):
        ids = []
        for _ in range(6):
            job = jobs.submit("x", lambda feed: "r" * 98, followed=True)
            await job.finished.wait()
            ids.append(job.id)
        await asyncio.sleep(0.01)
        kept = []
        for id in ids:
            with suppress(ApiError):
                kept.append(jobs.get(id).id)
        return [id in kept for id in ids]

    assert run(scenario, **limits) == [False] * (6 - left) + [True] * left


def test_a_job_without_a_follower_is_forgotten_at_once():
    async def scenario(jobs):
        job = jobs.submit("x", lambda feed: 1)
        await job.finished.wait()
        with pytest.raises(ApiError):
            jobs.get(job.id)

    run(scenario)


def test_a_slow_listener_gets_the_latest_preview_and_all_steps():
    async def scenario(jobs):
        heard = threading.Event()

        def work(feed):
            heard.wait(10)
            for step in range(5):
                feed(Progress("denoise", step, 4))
                feed.show(f"picture {step}")

        job = jobs.submit("x", work, followed=True)
        stream = jobs.events(job)
        first = await anext(stream)
        heard.set()
        await job.finished.wait()
        return [first, *[event async for event in stream]]

    events = run(scenario)
    assert [data["step"] for name, data in events if name == "step"] == [0, 1, 2, 3, 4]
    assert [data for name, data in events if name == "preview"] == [{"step": 4, "image": "picture 4"}]
    assert events[-1] == ("done", {})


def test_seconds_left_follow_the_pace_since_the_first_step_over_all_pictures():
    async def scenario(jobs):
        def work(feed):
            feed.pictures = 2
            feed(Progress("denoise", 0, 2))
            time.sleep(0.3)
            feed(Progress("denoise", 1, 2))
            time.sleep(0.1)
            feed(Progress("denoise", 2, 2))
            feed(Progress("denoise", 0, 2))

        job = jobs.submit("x", work, followed=True)
        return [data async for name, data in jobs.events(job) if name == "step"]

    steps = run(scenario)
    assert [(data["step"], data["total"]) for data in steps] == [(0, 4), (1, 4), (2, 4), (2, 4)]
    assert steps[0]["seconds_left"] is None
    assert steps[1]["seconds_left"] == pytest.approx(0.9, abs=0.4)
    assert steps[2]["seconds_left"] == pytest.approx(0.4, abs=0.2)


def test_a_download_is_told_a_few_times_a_second():
    async def scenario(jobs):
        def work(feed):
            for done in range(1001):
                feed(Progress("download", done, 1000, "model.safetensors"))

        job = jobs.submit("x", work, followed=True)
        return [event async for event in jobs.events(job)]

    events = run(scenario)
    assert ("stage", {"stage": "download", "detail": "model.safetensors"}) in events
    steps = [data["step"] for name, data in events if name == "step"]
    assert len(steps) < 10
    assert steps[-1] == 1000


def test_the_worker_outlives_what_it_does_when_idle(caplog):
    async def scenario(jobs):
        job = jobs.submit("x", lambda feed: 1, followed=True)
        await job.finished.wait()
        return job.status

    def fail():
        raise OSError("the idle work failed")

    assert run(scenario, idle=fail, begin=fail) == "done"
    assert "the idle work failed" in caplog.text
