"""A GPU that fails while a server works: what clients are told, what /health says, and when the server ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import failing_gpu
import httpx
import pytest
from gpu_texts import BUSY, MEMORY, REFUSED, TIMEOUT
from served import events_of, serving

from qwen_image_mlx.errors import GPUError
from qwen_image_mlx.server.health import Health
from qwen_image_mlx.server.jobs import Jobs

pytestmark = pytest.mark.process

WORDS = {"prompt": "a red circle", "seed": 3, "steps": 2}


@pytest.fixture
def faults(tmp_path) -> Path:
    """A text written here is the next fault of the server's GPU."""
    return tmp_path / "fault"


@pytest.fixture
def server(faults):
    with serving("--max-steps", 60, "--queue", 4, program=(failing_gpu.__file__, faults)) as running:
        yield running


@pytest.fixture
def api(server):
    with server.client() as client:
        yield client


def generate(api: httpx.Client) -> httpx.Response:
    return api.post("/api/qwen-image/generate", json=WORDS)


def health(api: httpx.Client) -> tuple[int, str, str | None]:
    answer = api.get("/health")
    said = answer.json()
    return answer.status_code, said["status"], said["fault"]


def loaded(api: httpx.Client) -> list[bool]:
    return [model["loaded"] for model in api.get("/health").json()["models"]]


def end_of(server) -> tuple[int, list[str]]:
    """Exit code, and lines of stderr that say why."""
    code = server.process.wait(30)
    lines = [line.strip() for line in server.log]
    assert not [line for line in lines if "Traceback" in line]
    return code, [line for line in lines if line.startswith("error: ")]


def test_too_little_memory_is_told_and_forgiven(api, faults):
    assert health(api) == (200, "ok", None)
    before = generate(api).json()["images"]
    assert loaded(api)[0]

    faults.write_text(MEMORY)
    answer = generate(api)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "gpu_error")
    assert "quantize" in error["message"]
    assert "Insufficient Memory" in error["message"]
    assert health(api) == (503, "failing", error["message"])
    assert not any(loaded(api)), "what is in memory may be wrong"

    faults.write_text(MEMORY)
    answer = api.post("/v1/images/generations", json={"prompt": "a red circle", "steps": 2})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "gpu_error")

    faults.write_text(MEMORY)
    job = api.post("/jobs", json={"task": "generate", **WORDS}).json()["id"]
    name, data = list(events_of(api, job))[-1]
    assert (name, data["error"]["code"]) == ("failed", "gpu_error")

    assert generate(api).json()["images"] == before
    assert health(api) == (200, "ok", None)


def test_the_second_fault_of_another_kind_ends_the_server(server, api, faults):
    faults.write_text(TIMEOUT)
    assert generate(api).json()["error"]["code"] == "gpu_error"
    assert generate(api).status_code == 200
    code, status, fault = health(api)
    assert (code, status) == (503, "failing")
    assert "Caused GPU Timeout Error" in fault

    faults.write_text(BUSY)
    assert generate(api).json()["error"]["code"] == "gpu_error"
    code, (line,) = end_of(server)
    assert code == 1
    assert "Impacting Interactivity" in line


def test_a_refused_process_ends_the_server_and_every_job_is_answered(server, api, faults):
    long = {"task": "generate", "prompt": "x", "steps": 60}
    jobs = [api.post("/jobs", json=long).json()["id"] for _ in range(3)]
    streams = [events_of(api, job) for job in jobs[::2]]
    assert [next(stream)[0] for stream in streams] in (["stage", "queued"], ["queued", "queued"])
    faults.write_text(REFUSED)
    first, last = [list(stream)[-1] for stream in streams]
    assert (first[0], first[1]["error"]["code"]) == ("failed", "gpu_error")
    assert (last[0], last[1]["error"]["code"]) == ("failed", "stopping")
    code, (line,) = end_of(server)
    assert code == 1
    assert line.startswith("error: the server ends and must be started again: macOS refuses this process the GPU")


# --- without a model -------------------------------------------------------------------------------------------------


def faulty(kind: str, fatal: bool = False) -> GPUError:
    return GPUError(f"the GPU: {kind}", fault=kind, fatal=fatal)


@pytest.mark.parametrize(("course", "fault", "over"), [
    ([], "", False),
    ([faulty("memory")], "the GPU: memory", False),
    ([faulty("memory"), None], "", False),
    ([faulty("memory")] * 5, "the GPU: memory", False),
    ([faulty("timeout"), None], "the GPU: timeout", False),
    ([faulty("timeout"), faulty("memory"), None], "the GPU: memory", False),
    ([faulty("timeout"), None, faulty("unknown")], "the GPU: unknown", True),
    ([faulty("refused", fatal=True)], "the GPU: refused", True),
    ([faulty("refused", fatal=True), None], "the GPU: refused", True),
])  # fmt: skip
def test_what_faults_come_to(course, fault, over):
    health = Health()
    for error in course:
        if error is None:
            health.succeeded()
        else:
            health.failed(error)
    assert (health.fault, bool(health.over)) == (fault, over)


def test_after_a_fault_memory_is_distrusted_before_the_next_job_and_a_bug_is_no_fault():
    order = []

    async def scenario():
        jobs = Jobs(distrust=lambda: order.append("distrust"), give_up=lambda: order.append("give up"))
        jobs.start()

        async def ended(error):
            def work(feed):
                order.append("work")
                if error is not None:
                    raise error
                return {}

            job = jobs.submit("x", work, followed=True)
            await job.finished.wait()
            return job.error and job.error["code"]

        try:
            found = [await ended(error) for error in (
                ZeroDivisionError(), RuntimeError(MEMORY), GPUError("raised by the pipeline", fault="memory"), None,
                RuntimeError(REFUSED),
            )]  # fmt: skip
        finally:
            await jobs.close()
        return found, jobs.health

    found, health = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert found == ["internal", "gpu_error", "gpu_error", None, "gpu_error"]
    assert order == ["work", "work", "distrust", "work", "distrust", "work", "work", "distrust", "give up"]
    assert health.over
