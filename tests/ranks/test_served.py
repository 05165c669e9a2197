"""A server in front of two ranks: the images of one process, jobs that fail or are cancelled, and one end for all."""

from __future__ import annotations

import base64
import io
import json
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from PIL import Image
from ranked import start

from qwen_image_mlx.server.job import Job
from qwen_image_mlx.server.jobs import Feed
from qwen_image_mlx.server.models import Models
from qwen_image_mlx.server.schema import BODIES
from qwen_image_mlx.server.tasks import Limits, Tasks
from qwen_image_mlx.variants import OWN
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

pytestmark = pytest.mark.process

JOB = {"prompt": "a fox", "width": 64, "height": 48, "steps": 2, "cfg_scale": 4.0, "seed": 5}
PHOTO = Image.linear_gradient("L").resize((64, 48)).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a small model, and a layered one that writes captions."""
    folder = tmp_path_factory.mktemp("served")
    config = replace(TINY["transformer"], num_layers=4)
    write_checkpoint(folder / "tiny", TINY | {"transformer": config})
    layered = TINY | {"transformer": replace(config, use_additional_t_cond=True, use_layer3d_rope=True)}
    write_checkpoint(folder / "layered", layered, pipeline="QwenImageLayeredPipeline")
    index = folder / "layered" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_bytes()) | {OWN: {"resolutions": [64]}}))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The result of a job in one process."""
    offer = {"model": str(folder / "tiny"), "quantize": None, "loras": [], "parallel": "auto"}
    offers = {"generate": offer, "decompose": offer | {"model": str(folder / "layered")}}
    tasks = Tasks(Models(offers, None, None), {"generate": {}, "decompose": {}}, Limits())

    def result(body, task="generate"):
        feed = Feed(Job(task, None), lambda function, *arguments: None, 60)
        return tasks.work(task, BODIES[task].model_validate(body))(feed)

    return result


@contextmanager
def served(folder, *flags, configs=(None, None), layered="demo-layered"):
    """A client of some ranks, the ranks, and what each said on stderr; each has its own config.toml, or none."""
    ranks = start(len(configs), folder, "serve", "--port", "0", "--model", str(folder / "tiny"), "--edit-model",
                  "demo-edit", "--layered-model", str(layered), *flags, configs=configs)  # fmt: skip
    said: list[list[str]] = [[] for _ in ranks]
    readers = [
        threading.Thread(target=lines.extend, args=(rank.stderr,)) for lines, rank in zip(said, ranks, strict=True)
    ]
    for reader in readers:
        reader.start()
    try:
        url = ranks[0].stdout.readline().strip()
        assert url.startswith("http://"), said
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as api:
            yield api, ranks, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.stdout.close()
        for reader in readers:
            reader.join(10)


def generate(api, **fields):
    return api.post("/api/qwen-image/generate", json=JOB | fields)


def begin(api, **fields):
    """A job of many steps that has begun to denoise; its address."""
    address = f"/jobs/{api.post('/jobs', json=JOB | {'task': 'generate', 'steps': 100} | fields).json()['id']}"
    wait_for(lambda: api.get(address).json()["step"] >= 2)
    return address


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(ranks, seconds=10):
    """The exit codes of ranks that end by themselves in time."""
    deadline = time.monotonic() + seconds
    return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]


def test_jobs_are_shared_and_end_alike(folder, alone):
    data = io.BytesIO()
    PHOTO.save(data, "PNG")
    photo = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    with served(folder) as (api, ranks, _):
        assert api.get("/health").json()["ranks"] == {"number": 2, "mode": None, "parts": []}
        jobs = [({}, "guidance"), ({"num_images": 3}, "images"), ({"cfg_scale": 1.0}, "none"),
                ({"image": photo, "strength": 0.9}, "guidance")]  # fmt: skip
        for fields, mode in jobs:
            answer = generate(api, **fields)
            raw = {"image": data.getvalue()} if "image" in fields else {}
            assert answer.json() == alone(JOB | fields | raw), (mode, answer.text[:300])
            assert api.get("/health").json()["ranks"]["mode"] == mode
        assert generate(api, seed=None).json()["images"][0]["seed"] != 5  # a random one, the same on both
        caption = api.post("/api/qwen-image/caption", json={"image": photo})
        assert caption.json()["error"]["message"] == "demo-layered writes no captions"  # all ranks refuse it
        fields = {"image": photo, "prompt": "a fox", "steps": 1, "num_layers": 2}
        layers = api.post("/api/qwen-image/decompose", json=fields)
        assert len(layers.json()["layers"]) == 2, layers.text[:300]
        for fields in ({}, {"num_images": 2, "steps": 20}):
            job = begin(api, **fields)
            api.delete(job)
            wait_for(lambda job=job: api.get(job).json()["status"] == "cancelled")
        assert api.post("/models/unload", json={}).status_code == 200
        assert api.post("/models/load", json={"task": "generate"}).json()["loaded"]
        assert generate(api).json() == alone(JOB)
        ranks[0].send_signal(signal.SIGTERM)
        assert ended(ranks) == [0, 0]


def test_a_rank_that_dies_ends_the_server(folder, alone):
    with served(folder, "--parallel", "layers") as (api, ranks, said):
        assert generate(api).json() == alone(JOB)
        assert api.get("/health").json()["ranks"]["parts"] == ["blocks 0 to 1", "blocks 2 to 3"]
        cached = {"step_cache": "first-block:0.5", "steps": 9}
        assert generate(api, **cached).json() == alone(JOB | cached)
        job = begin(api)
        api.delete(job)
        wait_for(lambda: api.get(job).json()["status"] == "cancelled")
        assert generate(api).json() == alone(JOB)
        job = begin(api)
        ranks[1].kill()
        wait_for(lambda: api.get("/health").status_code == 503, 10)
        assert "another rank has ended" in api.get("/health").json()["fault"]
        assert api.get(job).json()["error"]["code"] == "rank_error"
        assert ended(ranks) == [2, -signal.SIGKILL]
    assert "".join(said[0]).count("error: another rank has ended") == 1
    assert "Traceback" not in "".join(said[0] + said[1])


@pytest.mark.parametrize(("mode", "shared"), [("layers", "layers"), ("images", "guidance")])
def test_rank_0_writes_captions_and_shared_blocks_stay(folder, alone, mode, shared):
    data = io.BytesIO()
    PHOTO.save(data, "PNG")
    photo = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    with served(folder, "--parallel", mode, layered=folder / "layered") as (api, ranks, _):
        answer = api.post("/api/qwen-image/caption", json={"image": photo, "resolution": 64})
        assert answer.json() == alone({"image": data.getvalue(), "resolution": 64}, "caption")
        assert api.get("/health").json()["ranks"]["mode"] == shared
        ranks[0].send_signal(signal.SIGTERM)
        assert ended(ranks) == [0, 0]


def test_a_rank_that_dies_between_jobs_is_noticed(folder):
    with served(folder) as (api, ranks, said):
        ranks[1].send_signal(signal.SIGINT)
        wait_for(lambda: api.get("/health").status_code == 503, 10)
        assert ended(ranks) == [2, 130]
    assert "rank 1: interrupted" in "".join(said[1])


def test_three_ranks(folder, alone):
    """Of guidance's two branches the third has none; images go to all."""
    with served(folder, configs=(None, None, None)) as (api, ranks, _):
        assert generate(api).json() == alone(JOB)
        assert api.get("/health").json()["ranks"] == {
            "number": 3, "mode": "guidance", "parts": ["the positive branch", "the negative branch", "nothing to do"]
        }  # fmt: skip
        assert generate(api, num_images=4).json() == alone(JOB | {"num_images": 4})
        assert api.get("/health").json()["ranks"]["mode"] == "images"
        job = begin(api)
        api.delete(job)
        wait_for(lambda: api.get(job).json()["status"] == "cancelled")
        assert generate(api).json() == alone(JOB)
        ranks[0].send_signal(signal.SIGTERM)
        assert ended(ranks) == [0, 0, 0]


def test_a_rank_without_the_memory_refuses_for_all(folder, alone):
    small = folder / "small.toml"
    small.write_text('[default.qwen_image]\nmemory = "1GB"\n')
    with served(folder, configs=(None, small)) as (api, ranks, _):
        refused = generate(api, width=2048, height=2048)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request"), refused.text[:300]
        assert "rank 1" in refused.json()["error"]["message"]
        assert generate(api).json() == alone(JOB)
        ranks[0].send_signal(signal.SIGTERM)
        assert ended(ranks) == [0, 0]
