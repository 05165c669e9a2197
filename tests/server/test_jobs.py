"""The queue without any model: limits of time and memory, what listeners hear, and an end whatever the work does."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import threading
import time
import weakref
from contextlib import suppress

import httpx
import pytest
from PIL import Image
from pydantic import BaseModel

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.images.colour import ignore_profiles, profiles_are_ignored
from qwen_image_mlx.pipeline.progress import Progress
from qwen_image_mlx.server.api_errors import ApiError
from qwen_image_mlx.server.app import create_app
from qwen_image_mlx.server.job import Job
from qwen_image_mlx.server.jobs import Jobs
from qwen_image_mlx.server.repeats import Repeats, claim_of
from qwen_image_mlx.server.service import Service, Setup


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
        assert json.loads(after.to_json())["result"] == {"fine": 1}
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


def test_a_late_result_is_dropped_without_being_asked_for():
    async def scenario(jobs):
        job = jobs.submit("x", lambda feed: "r" * 1000, followed=True)
        await job.finished.wait()
        held = weakref.ref(job)
        assert jobs.get(job.id) is job
        del job
        await asyncio.sleep(0.5)
        return held()

    assert run(scenario, kept_seconds=0.2) is None


def test_what_waiting_and_running_jobs_were_sent_is_bounded():
    async def scenario(jobs):
        first = jobs.submit("x", stepping, nbytes=60)
        second = jobs.submit("x", stepping, nbytes=40)
        with pytest.raises(ApiError, match="100 bytes") as refused:
            jobs.submit("x", stepping, nbytes=1)
        assert refused.value.code == "queue_full"
        assert int(refused.value.headers["retry-after"]) >= 1
        for job in (second, first):
            jobs.cancel(job)
            await job.finished.wait()
            jobs.cancel(jobs.submit("x", stepping, nbytes=job.nbytes))

    run(scenario, held_bytes=100)


def test_bytes_are_counted_while_they_arrive_then_with_their_job():
    noise = Image.frombytes("RGB", (200, 200), random.Random(1).randbytes(120_000))
    file = io.BytesIO()
    noise.save(file, "png")
    image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    body = {"prompt": "x", "image": image, "steps": 1}

    async def scenario():
        offers = {task: {"model": "demo", "quantize": None, "loras": []} for task in ("generate", "edit", "decompose")}
        service = Service(Setup(offers=offers, is_own_host=lambda name: True, max_body_bytes=200_000))
        guard = create_app(service)  # its worker is not begun, so that all jobs wait
        room = guard._room
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            request = asyncio.create_task(client.post("/api/qwen-image/edit", json=body))
            while not service.jobs.waiting:
                await asyncio.sleep(0.01)
            assert guard._room == room
            for number in range(2, 8):
                answer = await client.post("/jobs", json=body | {"task": "edit"})
                assert answer.status_code == (202 if number < 7 else 429), (number, answer.text)
                assert guard._room == room
            service.jobs.stop()
            assert (await request).json()["error"]["code"] == "stopping"

    asyncio.run(asyncio.wait_for(scenario(), 30))


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
                feed.show(f"image {step}")

        job = jobs.submit("x", work, followed=True)
        stream = jobs.events(job)
        first = await anext(stream)
        heard.set()
        await job.finished.wait()
        return [first, *[event async for event in stream]]

    events = run(scenario)
    assert [data["step"] for name, data, _ in events if name == "step"] == [0, 1, 2, 3, 4]
    assert [data for name, data, _ in events if name == "preview"] == [{"step": 4, "image": "image 4"}]
    assert events[-1][:2] == ("done", {})


def test_seconds_left_follow_the_pace_since_the_first_step_over_all_images():
    async def scenario(jobs):
        def work(feed):
            feed.images = 2
            for step, seconds in enumerate((0, 0.5, 0.1, 0.1)):
                time.sleep(seconds)
                feed(Progress("denoise", step, 3))
            feed(Progress("denoise", 0, 3))

        job = jobs.submit("x", work, followed=True)
        return [data async for name, data, _ in jobs.events(job) if name == "step"]

    steps = run(scenario)
    assert [(data["step"], data["total"]) for data in steps] == [(0, 6), (1, 6), (2, 6), (3, 6), (3, 6)]
    assert [steps[n]["seconds_left"] for n in (0, 1)] == [None, None]
    assert steps[2]["seconds_left"] == pytest.approx(0.4, abs=0.2)  # of 4 more, with the slow first it were 0.8
    assert steps[3]["seconds_left"] == pytest.approx(0.3, abs=0.15)


def test_a_job_of_one_step_has_no_seconds_left_when_it_is_done():
    async def scenario(jobs):
        job = jobs.submit(
            "x", lambda feed: [feed(Progress("denoise", step, 1)) for step in (0, 1)] and 1, followed=True
        )
        return [data["seconds_left"] async for name, data, _ in jobs.events(job) if name == "step"]

    assert run(scenario) == [None, 0.0]


def test_a_download_is_told_a_few_times_a_second():
    async def scenario(jobs):
        def work(feed):
            for done in range(1001):
                feed(Progress("download", done, 1000, "model.safetensors"))

        job = jobs.submit("x", work, followed=True)
        return [event async for event in jobs.events(job)]

    events = run(scenario)
    assert ("stage", {"stage": "download", "detail": "model.safetensors"}) in [event[:2] for event in events]
    steps = [data["step"] for name, data, _ in events if name == "step"]
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


@pytest.mark.parametrize("ignored", [False, True])
def test_work_reads_colours_as_the_server_was_told(ignored):
    async def scenario(jobs):
        job = jobs.submit("x", lambda feed: {"ignored": profiles_are_ignored()}, followed=True)
        await job.finished.wait()
        return json.loads(job.to_json())["result"]

    with ignore_profiles(ignored):
        assert run(scenario) == {"ignored": ignored}


# --- listeners that come back, requests that are sent again -----------------------------------------------------------


def test_a_listener_that_comes_back_hears_what_it_missed():
    async def scenario(jobs):
        go = threading.Event()

        def work(feed):
            for step in range(4):
                feed(Progress("denoise", step, 8))
            go.wait(10)
            for step in range(4, 9):
                feed(Progress("denoise", step, 8))

        job = jobs.submit("x", work, followed=True)
        heard = []
        stream = jobs.events(job)
        async for event in stream:
            heard.append(event)
            if event[0] == "step" and event[1]["step"] == 2:
                break
        await stream.aclose()
        go.set()
        await job.finished.wait()
        again = [event async for event in jobs.events(job, since=heard[-1][2])]
        late = [event async for event in jobs.events(job, since=again[-1][2])]
        unknown = [event async for event in jobs.events(job, since=10_000)]
        return job.status, again, late, unknown

    status, again, late, unknown = run(scenario)
    assert status == "done"
    assert [data["step"] for name, data, _ in again if name == "step"] == [3, 4, 5, 6, 7, 8]
    assert again[-1][0] == "done"
    assert [event[:2] for event in late] == [event[:2] for event in unknown] == [("done", {})]


class Words(BaseModel):
    """A request's body."""

    prompt: str
    images: list[bytes] = []
    seed: int | None = None


def claim(prompt="a fox", key="", **more):
    return claim_of("/generate", {"idempotency-key": key}, Words(prompt=prompt, **more))


def test_a_listener_that_heard_everything_hears_nothing_twice():
    job = Job(task="generate", work=None, followed=True)
    for step in range(3):
        job.tell("step", {"step": step})
    assert [number for *_, number in job.since(2)] == [3]
    assert job.since(3) == []
    job.status = "done"
    job.tell("done", {})
    assert [name for name, *_ in job.since(3)] == ["done"]
    assert [name for name, *_ in job.since(4)] == ["done"]


def test_a_cut_request_keeps_its_job_for_the_grace_and_an_equal_one_finds_it():
    async def scenario(jobs):
        repeats = Repeats(jobs, grace=0.6)

        def begun(made):
            job = jobs.submit("x", stepping)
            job.claim = made
            return job

        job = begun(claim())
        with repeats.waiting(job):
            assert repeats.find(claim()) is None  # two that both wait want two images
        assert repeats.awaited
        for other in (claim("a wolf"), claim(images=[b"x"]), claim(key="1")):
            assert repeats.find(other) is None
        assert repeats.find(claim()) is job
        with repeats.waiting(job):
            await asyncio.sleep(1.0)  # beyond the grace: somebody waits again
            assert not job.is_over
        await asyncio.wait_for(job.finished.wait(), 5)
        assert (job.status, jobs.all(), repeats.awaited) == ("cancelled", [], False)

    run(scenario)


def test_two_equal_requests_that_both_wait_are_one_job_if_they_name_a_seed():
    async def scenario(jobs):
        repeats = Repeats(jobs, grace=0.6)
        job = jobs.submit("x", stepping)
        job.claim = claim(seed=1)
        with repeats.waiting(job):
            for other in (claim(), claim(seed=2), claim("a wolf", seed=1), claim(seed=1, key="1")):
                assert repeats.find(other) is None
            assert repeats.find(claim(seed=1)) is job
            with repeats.waiting(job):
                pass
            assert job.waiting == 1  # the first still waits, so it goes on
            await asyncio.sleep(1.0)
            assert not job.is_over
        await asyncio.wait_for(job.finished.wait(), 5)

    run(scenario)


def test_a_job_that_ends_while_its_request_is_cut_still_answers_an_equal_one():
    async def scenario(jobs):
        repeats = Repeats(jobs, grace=0.6)
        for comes_back in (True, False):
            job = jobs.submit("x", lambda feed: time.sleep(0.1) or "an image")
            job.claim = claim()
            with repeats.waiting(job):
                pass
            await job.finished.wait()
            if comes_back:
                assert repeats.find(claim()) is job
                with repeats.waiting(job):
                    assert job.result == b'"an image"'
            else:
                await asyncio.sleep(0.8)
            assert repeats.find(claim()) is None
            assert jobs.all() == []

    run(scenario)


def test_a_key_finds_its_job_at_any_time_and_belongs_to_one_request():
    async def scenario(jobs):
        repeats = Repeats(jobs, grace=0.1)
        job = jobs.submit("x", lambda feed: "an image")
        job.claim = claim(key="one")
        with repeats.waiting(job):
            assert repeats.find(claim(key="one")) is job
            await job.finished.wait()
        assert repeats.find(claim(key="one")) is job
        assert repeats.find(claim(key="two")) is repeats.find(claim()) is None
        with pytest.raises(ApiError, match="Idempotency-Key"):
            repeats.find(claim("a wolf", key="one"))

    run(scenario)
