"""The API over real HTTP: the very images of the command line, jobs and their events, models that come and go."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from control_files import BLOCKWISE, half_mask, picture, write_control
from PIL import Image
from served import events_of, serving

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.colour import _matrix_profile
from qwen_image_mlx.images.files import METADATA_KEY
from qwen_image_mlx.images.sources import open_image

pytestmark = pytest.mark.process

PROMPT = "a red circle on a blue background"
DEMO_LAYERS = 4
LONG = {"task": "generate", "prompt": PROMPT, "steps": 60, "num_images": 4}


def png_of(url: str) -> bytes:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data, validate=True)


def image_of(url: str) -> Image.Image:
    return Image.open(io.BytesIO(png_of(url)))


def url_of(picture: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(api, task: str, **fields) -> dict:
    answer = api.post(f"/api/qwen-image/{task}", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def submit(api, **fields) -> str:
    answer = api.post("/jobs", json=fields)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def wait_for(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def circle(server) -> str:
    with server.client() as client:
        return ask(client, "generate", prompt=PROMPT, seed=1)["images"][0]["image"]


# --- the same images ------------------------------------------------------------------------------------------------


def test_server_command_line_and_python_generate_the_same(circle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--model", "demo", "--seed", "1", "-o", "cli.png"]) == 0
    assert Path("cli.png").read_bytes() == png_of(circle)
    pipeline = QwenImagePipeline.from_pretrained("demo")
    (image,) = pipeline.generate(PROMPT, negative_prompt=" ", seed=1)
    assert np.array_equal(np.asarray(image), np.asarray(image_of(circle)))


def test_several_images_are_those_of_the_command_line(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "3", "--aspect", "16:9", "-n", "blurry", "-g", "2.5", "--num-images", "2", "--seed", "9"]
    assert main(["generate", "一只猫 🦊", "--model", "demo", *flags, "-o", "cli.png"]) == 0
    images = ask(api, "generate", prompt="一只猫 🦊", steps=3, aspect="16:9", negative_prompt="blurry", cfg_scale=2.5,
                 num_images=2, seed=9)["images"]  # fmt: skip
    assert [image["index"] for image in images] == [0, 1]
    for name, image in zip(("cli.png", "cli-1.png"), images, strict=True):
        assert Path(name).read_bytes() == png_of(image["image"])
        assert json.loads(image_of(image["image"]).text[METADATA_KEY]) == image["metadata"]


def test_edits_are_those_of_the_command_line(api, circle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("circle.png").write_bytes(png_of(circle))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (10, 10, 40, 40))
    mask.save("mask.png")
    common = ["--model", "demo-edit", "--seed", "2", "--steps", "4", "--image", "circle.png"]
    assert main(["edit", "make it green", *common, "-o", "plain.png"]) == 0
    assert main(["edit", "make it green", *common, "--mask", "mask.png", "--strength", "0.9", "-o", "masked.png"]) == 0
    fields = {"prompt": "make it green", "seed": 2, "steps": 4}
    plain = ask(api, "edit", image=circle, **fields)["images"][0]
    masked = ask(api, "edit", images=[circle], mask=url_of(mask), strength=0.9, **fields)["images"][0]
    for file, image in (("plain.png", plain), ("masked.png", masked)):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(image_of(image["image"])))
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(image_of(masked["image"]))[kept], np.asarray(image_of(circle))[kept])


def test_a_form_with_files_is_the_same_request(api, circle):
    fields = {"prompt": "make it green", "seed": 2, "steps": 2, "num_images": 1}
    files = [("images", ("a.png", png_of(circle), "image/png")), ("images", ("b", png_of(circle)))]
    by_form = api.post("/api/qwen-image/edit", data={k: str(v) for k, v in fields.items()}, files=files).json()
    assert by_form == ask(api, "edit", images=[circle, circle], **fields)


def test_jpeg_and_webp_are_taken_and_turned_upright(api):
    wide = Image.new("RGB", (96, 48), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    wide.save(file, "jpeg", exif=exif)
    turned = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    for url, size in ((turned, (48, 96)), (url_of(wide, "webp"), (96, 48))):
        image = ask(api, "edit", prompt="x", image=url, size="source", steps=1)["images"][0]
        assert image_of(image["image"]).size == size


def test_keep_alpha_keeps_alpha(api):
    picture = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    picture.putalpha(Image.linear_gradient("L").resize((64, 64)))
    image = ask(api, "edit", prompt="x", image=url_of(picture), size="source", keep_alpha=True, steps=1)["images"][0]
    assert np.array_equal(np.asarray(image_of(image["image"]))[..., 3], np.asarray(picture)[..., 3])


def test_layers_are_those_of_the_command_line_and_compose_again(api, circle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("circle.png").write_bytes(png_of(circle))
    flags = ["--model", "demo-layered", "--layers", "2", "--prompt", PROMPT, "--seed", "3", "--steps", "4"]
    assert main(["decompose", "circle.png", *flags, "-o", "layers"]) == 0
    result = ask(api, "decompose", image=circle, num_layers=2, prompt=PROMPT, seed=3, steps=4)
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    for layer in result["layers"]:
        assert Path("layers", f"layer_{layer['layer']}.png").read_bytes() == png_of(layer["image"])
    assert (result["prompt"], result["seed"]) == (PROMPT, 3)
    assert f"PSNR {result['psnr']:.2f} dB" in capsys.readouterr().out
    layers = [{"image": layer["image"]} for layer in result["layers"]]
    composed = image_of(ask(api, "compose", layers=layers)["image"])
    assert np.array_equal(np.asarray(composed), np.asarray(Image.open("layers/composite.png")))


def test_a_profile_is_applied_and_gone(api, tmp_path):
    wide = _matrix_profile(1 / 1.8, (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    Image.new("RGB", (64, 64), (200, 90, 40)).save(tmp_path / "wide.png", icc_profile=wide)
    url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'wide.png').read_bytes()).decode()}"
    converted = open_image(tmp_path / "wide.png")
    composed = image_of(ask(api, "compose", layers=[{"image": url}])["image"])
    assert composed.convert("RGB").tobytes() == converted.tobytes()
    edited = [ask(api, "edit", prompt="x", image=image, size="source", seed=1, steps=1)["images"][0]["image"]
              for image in (url, url_of(converted))]  # fmt: skip
    assert image_of(edited[0]).tobytes() == image_of(edited[1]).tobytes()
    assert not any("icc_profile" in image.info for image in (composed, *map(image_of, edited)))


def test_compose_moves_scales_hides_and_exports(api, tmp_path):
    red, dot = Image.new("RGBA", (40, 30), (255, 0, 0, 255)), Image.new("RGBA", (10, 10), (0, 0, 255, 255))
    layers = [
        {"image": url_of(red), "name": "red"},
        {"image": url_of(dot), "x": 20, "y": 5, "scale": 0.4, "opacity": 0.5},
        {"image": url_of(red), "visible": False},
    ]
    composed = np.asarray(image_of(ask(api, "compose", layers=layers)["image"]))
    blended = (composed == [128, 0, 128, 255]).all(axis=-1)
    assert composed.shape == (30, 40, 4)
    assert [(int(axis.min()), int(axis.max())) for axis in np.nonzero(blended)] == [(8, 11), (23, 26)]
    signatures = {"psd": b"8BPS", "ora": b"PK", "zip": b"PK"}
    for name, signature in signatures.items():
        result = ask(api, "compose", layers=layers, format=name)
        assert result["name"] == f"layers.{name}"
        head, _, data = result["file"].partition(",")
        assert head == "data:application/octet-stream;base64"
        assert base64.b64decode(data).startswith(signature)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_tells_its_stages_and_steps_in_order(api):
    job = submit(api, task="generate", prompt=PROMPT, seed=1, steps=5, num_images=2)
    events = list(events_of(api, job))
    names = [name for name, _ in events]
    assert names[-1] == "done"
    assert {"done", "failed", "cancelled"} & set(names[:-1]) == set()
    steps = [data for name, data in events if name == "step"]
    assert all(before["step"] <= after["step"] for before, after in pairwise(steps))
    assert steps[-1] == {"step": 10, "total": 10, "seconds_left": 0.0}
    assert all(data["total"] == 10 for data in steps)
    stages = [data["stage"] for name, data in events if name == "stage"]
    generated = [stage for stage in stages if stage != "load"]  # a fresh server loads on the way
    assert generated[-4:] == ["denoise", "decode", "denoise", "decode"]
    previews = [data for name, data in events if name == "preview"]
    assert previews
    assert image_of(previews[0]["image"]).size == (64, 64)
    said = api.get(f"/jobs/{job}").json()
    assert (said["status"], said["error"], said["task"]) == ("done", None, "generate")
    assert said["result"] == ask(api, "generate", prompt=PROMPT, seed=1, steps=5, num_images=2)
    assert list(events_of(api, job)) == [("done", {})]


def test_a_job_can_be_cancelled_while_it_waits_and_while_it_generates(api):
    running, waiting = submit(api, **LONG), submit(api, **LONG)
    stream = events_of(api, running)
    for name, _ in stream:
        if name == "step":
            break
    assert api.get(f"/jobs/{waiting}").json()["position"] == 1
    assert api.delete(f"/jobs/{waiting}").json()["status"] == "cancelled"
    api.delete(f"/jobs/{running}")
    rest = list(stream)
    assert rest[-1] == ("cancelled", {})
    assert "done" not in dict(rest)
    for job in (running, waiting):
        assert api.delete(f"/jobs/{job}").json()["status"] == "cancelled"
    assert ask(api, "generate", prompt=PROMPT, steps=1)


def test_a_full_queue_says_when_to_come_again(api):
    jobs = [submit(api, **LONG) for _ in range(4)]
    wait_for(lambda: api.get(f"/jobs/{jobs[0]}").json()["status"] == "running")
    jobs.append(submit(api, **LONG))
    for path, body in (("/jobs", LONG), ("/v1/images/generations", {"prompt": "x"})):
        answer = api.post(path, json=body)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        assert answer.json()["error"]["code"] == "queue_full"
    positions = [api.get(f"/jobs/{job}").json()["position"] for job in jobs]
    assert positions == [0, 1, 2, 3, 4]
    for job in jobs:
        api.delete(f"/jobs/{job}")
    assert ask(api, "generate", prompt=PROMPT, steps=1)


def test_a_waiting_job_hears_that_it_moves_up(api):
    jobs = [submit(api, **LONG), *(submit(api, task="generate", prompt=PROMPT, steps=1) for _ in range(2))]
    wait_for(lambda: api.get(f"/jobs/{jobs[0]}").json()["status"] == "running")
    stream = events_of(api, jobs[2])
    assert next(stream) == ("queued", {"position": 2})
    api.delete(f"/jobs/{jobs[0]}")
    names = [(name, data.get("position")) for name, data in stream]
    assert names[0] == ("queued", 1)
    assert names[-1] == ("done", None)


def test_a_client_that_goes_away_takes_its_job_along_after_the_grace(server, api):
    with server.client() as other, pytest.raises(Exception, match="timed out"):
        other.post("/api/qwen-image/generate", json={k: v for k, v in LONG.items() if k != "task"}, timeout=0.7)
    assert api.get("/health").json()["queue"]["running"] == 1
    wait_for(lambda: api.get("/health").json()["queue"] == {"running": 0, "waiting": 0}, 8.0)


def test_a_job_goes_on_when_its_last_listener_is_gone_and_can_be_listened_to_again(server, api):
    job = submit(api, **LONG)
    last = ""
    for _ in range(2):
        with server.client() as other, other.stream(
            "GET", f"/jobs/{job}/events", headers={"last-event-id": last} if last else {}
        ) as stream:  # fmt: skip
            numbers = []
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    numbers.append(int(line.removeprefix("id: ")))
                    if len(numbers) == 3:
                        break
        assert not last or min(numbers) > int(last)
        last = str(numbers[-1])
    time.sleep(4.0)  # longer than a plain request's grace
    assert api.get(f"/jobs/{job}").json()["status"] == "running"
    assert api.delete(f"/jobs/{job}").status_code == 200
    assert wait_for(lambda: api.get(f"/jobs/{job}").json()["status"] == "cancelled")


def test_a_job_that_fails_says_why(api, circle):
    job = submit(api, task="caption", image=circle)
    ((_, data),) = [event for event in events_of(api, job) if event[0] == "failed"]
    said = api.get(f"/jobs/{job}").json()
    assert said["error"] == data["error"] == {"message": "demo-layered writes no captions", "code": "invalid_request"}
    assert said["result"] is None


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_configuration_is_told(api):
    config = api.get("/api/qwen-image/config").json()
    assert config["tasks"]["generate"]["sizes"]["1:1"] == [64, 64]
    assert (config["tasks"]["generate"]["steps"], config["tasks"]["edit"]["cfg_scale"]) == (12, 2.0)
    assert config["tasks"]["decompose"]["resolutions"] == [64]
    assert config["limits"]["max_pixels"] == 128 * 128


def test_the_document_describes_every_body_that_it_names(api):
    document = api.get("/openapi.json").json()
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named <= document["components"]["schemas"].keys()
    assert {"GenerateBody", "DecomposeJob", "Generation", "LoadBodyForm"} <= named


def test_models_are_released_and_come_back(api):
    before = ask(api, "generate", prompt=PROMPT, seed=4, steps=2)

    def loaded() -> dict[str, bool]:
        return {model["task"]: model["loaded"] for model in api.get("/health").json()["models"]}

    assert loaded()["generate"]
    assert api.post("/models/unload", json={"task": "generate"}).status_code == 200
    assert not loaded()["generate"]
    assert api.post("/models/load", json={"task": "generate"}).json() == {
        "task": "generate", "model": "demo", "loaded": True,
    }  # fmt: skip
    assert loaded()["generate"]
    assert ask(api, "generate", prompt=PROMPT, seed=4, steps=2) == before
    api.post("/models/unload", json={})
    assert not any(loaded().values())
    assert ask(api, "generate", prompt=PROMPT, seed=4, steps=2) == before


def test_equal_prompts_are_encoded_once(api):
    def stages(prompt: str, **more) -> list[str]:
        events = events_of(api, submit(api, task="generate", prompt=prompt, steps=2, **more))
        return [data["stage"] for name, data in events if name == "stage"]

    assert "encode" in stages("a prompt of its own")
    assert "encode" not in stages("a prompt of its own", seed=5, aspect="16:9")
    assert "encode" in stages("a prompt of its own", negative_prompt="another")


def test_an_idle_model_is_released_and_a_profile_fills_what_is_not_said(tmp_path):
    (tmp_path / "config.toml").write_text(
        '[default.qwen_image]\nmodel_path = "demo"\nnum_layers = 3\n'
        '[fast.qwen_image.generation]\nsteps = 2\nseed = 7\naspect = "16:9"\n'
    )
    with serving("--config", tmp_path / "config.toml", "--profile", "fast", "--idle-unload", "1s", models=()) as server:
        api = server.client()
        config = api.get("/api/qwen-image/config").json()
        assert (config["profile"], config["defaults"]["aspect"], config["defaults"]["num_layers"]) == (
            "fast",
            "16:9",
            3,
        )
        assert config["tasks"]["edit"]["model"] == "Qwen/Qwen-Image-Edit-2511"
        metadata = ask(api, "generate", prompt=PROMPT)["images"][0]["metadata"]
        assert [metadata[name] for name in ("steps", "seed", "width", "height")] == [2, 7, 80, 48]
        assert ask(api, "generate", prompt=PROMPT, steps=1, seed=1)["images"][0]["metadata"]["steps"] == 1
        assert api.get("/health").json()["models"][0] == {"task": "generate", "model": "demo", "loaded": True}
        wait_for(lambda: not api.get("/health").json()["models"][0]["loaded"], 10.0)
        assert ask(api, "generate", prompt=PROMPT)


# --- start and end ----------------------------------------------------------------------------------------------------


def test_what_is_refused_at_the_start(server, tmp_path, capsys):
    def refusal(*flags: object) -> str:
        assert main(["serve", *map(str, flags)]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert (out, line[:7]) == ("", "error: ")
        return line

    port = server.url.rpartition(":")[2]
    assert "in use" in refusal("--port", port)
    assert "65535" in refusal("--port", 70000)
    assert "--token-file" in refusal("--host", "0.0.0.0")
    assert "cannot be read" in refusal("--token-file", tmp_path / "none")
    assert "is empty" in refusal("--token-file", "")
    token = tmp_path / "token"
    for text, mode, why in (("", 0o600, "8 to"), ("two words", 0o600, "one word"), ("secrets!", 0o644, "chmod")):
        token.write_text(text)
        token.chmod(mode)
        assert why in refusal("--token-file", token)
    (tmp_path / "folder").mkdir()
    assert "demo is not a model to edit with" in refusal("--port", 0, "--edit-model", "demo")
    assert "is a file" in refusal("--port", 0, "--model", "/dev/null")
    assert "folder" in refusal("--port", 0, "--layered-model", tmp_path / "folder")
    assert "no directory" in refusal("--port", 0, "--model", tmp_path / "nothing")
    assert "--idle-unload" in refusal("--idle-unload", "soon")
    assert "--allow-origin" in refusal("--allow-origin", "https://example.org/page")
    for name in ("http://host.docker.internal", "host.docker.internal:8000", "two names", ""):
        assert "must be only a name" in refusal("--allow-host", name)
    for alias in ("gpt-image-1", "gpt-image-1=draw", "=edit"):
        assert "--alias is" in refusal("--alias", alias)
    assert "--grace" in refusal("--grace", "soon")
    assert "profile" in refusal("--profile", "none")
    assert "quantiz" in refusal("--port", 0, "--quantize", "17")
    assert "256 MiB" in refusal("--port", 0, "--memory", "3")


def test_serving_without_the_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("qwen_image_mlx.cli.serve.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install fastapi uvicorn python-multipart" in capsys.readouterr().err


def test_sigterm_cancels_and_ends_cleanly():
    with serving() as server, server.client() as api:
        job = submit(api, **LONG | {"steps": 100})
        stream = events_of(api, job)
        assert any(name == "step" for name, _ in stream)
        server.process.terminate()
        assert list(stream)[-1] == ("failed", {"error": {"message": "the server is stopping", "code": "stopping"}})
        assert server.process.wait(30) == 0
    assert not [line for line in server.log if "Traceback" in line]


def test_controls_are_those_of_the_command_line_and_only_the_server_s_own(tmp_path, monkeypatch):
    """A request names a ControlNet of the server, never a file."""
    monkeypatch.chdir(tmp_path)
    write_control(tmp_path / "edges.safetensors", "demo", BLOCKWISE, layers=DEMO_LAYERS)
    photo = picture(64, 64)
    photo.save("photo.png")
    asked = {"prompt": PROMPT, "steps": 1, "seed": 3}
    control = {"controlnet": "edges", "image": url_of(photo), "scale": 0.5, "kind": "gray"}
    with serving("--controlnet", tmp_path / "edges.safetensors") as running, running.client() as api:
        said = api.get("/api/qwen-image/config").json()
        assert said["controlnets"] == ["edges"]
        assert said["control_kinds"][:2] == ["image", "canny"]
        (made,) = ask(api, "generate", **asked, controls=[control])["images"]
        (plain,) = ask(api, "generate", **asked)["images"]
        for wrong, sentence in (
            (
                {"controlnet": str(tmp_path / "edges.safetensors")},
                "of this server, which has edges",
            ),
            ({"controlnet": "owner/repo"}, "is not a ControlNet of this server"),
            ({"image": "photo.png"}, "controls.0.image: must be a data URL"),
            ({"scale": 11}, "controls.0.scale is 11, but should be less than or equal to 10"),
            ({"kind": "depth"}, "controls.0.kind is 'depth', but should be 'image', 'canny'"),
            ({"end": 2}, "controls.0.end is 2, but should be"),
            ({"start": 0.6, "end": 0.5}, "after its end"),
            ({"path": "x"}, "controls.0.path: is an unknown field"),
        ):
            answer = api.post("/api/qwen-image/generate", json={**asked, "controls": [{**control, **wrong}]})
            assert (answer.status_code, sentence in answer.text) == (422, True), answer.text
        for wrong, sentence in (
            ({"steps": 0}, "steps is 0, but should be greater than or equal to 1"),
            ({"step_cache": "x" * 200}, f"step_cache is '{'x' * 79}, but must be off, or one of"),
            ({"magic": 1}, "magic: is an unknown field"),
        ):
            message = api.post("/api/qwen-image/generate", json={**asked, **wrong}).json()["error"]["message"]
            assert message.startswith(sentence), message
        seen = ask(api, "control-image", image=url_of(photo), kind="canny")["image"]
        assert set(np.unique(image_of(seen))) <= {0, 255}
        change = {"prompt": "make it green", "image": url_of(photo), "steps": 1, "seed": 3}
        edited = [ask(api, "edit", **change, **more)["images"][0] for more in ({}, {"controls": [control]})]
        assert edited[1]["metadata"]["controls"][0]["scale"] == 0.5
        assert not np.array_equal(*(image_of(image["image"]) for image in edited))
    words = ["--controlnet", "edges.safetensors", "--control-image", "photo.png", "--control-scale", "0.5"]
    words += ["--control-kind", "gray", "--model", "demo", "--steps", "1", "--seed", "3", "--quiet", "-o", "own.png"]
    assert main(["generate", PROMPT, *words]) == 0
    assert np.array_equal(image_of(made["image"]), Image.open("own.png"))
    assert not np.array_equal(image_of(made["image"]), image_of(plain["image"]))


def test_a_request_makes_one_layer_by_its_name_or_a_mask(api):
    photo = url_of(picture(48, 48))
    asked = {"image": photo, "steps": 1, "seed": 3, "cfg_scale": 1}
    assert ask(api, "decompose", image=photo, seed=3, prompt="a", preset="draft")["layers"]
    made = [
        ask(api, "decompose", **asked, **more)
        for more in (
            {"layer_prompt": "the boat"},
            {"layer_mask": url_of(half_mask(48, 48))},
            {"layer_mask": url_of(half_mask(48, 48).rotate(180))},
        )
    ]
    assert [len(one["layers"]) for one in made] == [1, 1, 1]
    assert [one["prompt"] for one in made] == ["the boat", "", ""]
    images = [image_of(one["layers"][0]["image"]) for one in made]
    assert {(image.mode, image.size) for image in images} == {("RGBA", (48, 48))}
    assert not np.array_equal(images[1], images[2])
    for wrong, sentence in (
        ({"layer_prompt": "the boat", "prompt": "a lake"}, "not both"),
        ({"layer_prompt": " "}, "the layer's prompt is empty"),
        ({"layer_mask": url_of(half_mask(9, 9))}, "the layer's mask has 9x9 pixels, but the image 48x48"),
        ({"layer_mask": "brush.png"}, "layer_mask: must be a data URL"),
    ):
        answer = api.post("/api/qwen-image/decompose", json={**asked, **wrong})
        assert (answer.status_code, sentence in answer.text) == (422, True), answer.text


def test_a_request_outpaints(api):
    """Also what is added, and by how much, is checked before the job."""
    photo = picture(48, 48)
    said = {"prompt": PROMPT, "steps": 1, "image": url_of(photo), "outpaint": "16,0,0,0"}
    answer = api.post("/api/qwen-image/generate", json=said)
    assert answer.status_code == 200, answer.text
    made = image_of(answer.json()["images"][0]["image"])
    assert np.array_equal(np.asarray(made)[:, 16:], np.asarray(photo))
    assert api.post("/api/qwen-image/generate", json=said | {"outpaint": "1,2"}).status_code == 422


def test_solvers_guidance_and_step_caches_are_the_command_line_s(api, tmp_path, monkeypatch, capsys):
    """By the table of options alone; a value that its parser refuses is named."""
    fields = {"solver": "unipc", "guidance_interval": "0.1:0.9", "apg": 0.3, "step_cache": "taylorseer", "steps": 10}
    made = ask(api, "generate", prompt=PROMPT, seed=1, **fields)["images"][0]
    assert {name: made["metadata"][name] for name in fields} == fields
    assert made["metadata"]["passes"]["skipped"] > 0
    monkeypatch.chdir(tmp_path)
    flags = "--solver unipc --guidance-interval 0.1:0.9 --apg 0.3 --step-cache taylorseer --steps 10"
    assert main(["generate", PROMPT, "--model", "demo", "--seed", "1", "-o", "x.png", *flags.split()]) == 0
    assert Path("x.png").read_bytes() == png_of(made["image"])
    assert ask(api, "generate", prompt=PROMPT, seed=1, preset="draft")["images"][0]["metadata"]["steps"] == 8
    for wrong in ({"step_cache": "magic"}, {"guidance_interval": "1:0"}, {"solver": "rk4"}, {"preset": "fast"}):
        answer = api.post("/api/qwen-image/generate", json={"prompt": PROMPT, **wrong})
        assert answer.status_code == 422, answer.text
        assert next(iter(wrong)) in answer.text
