"""OpenAI's own Python client against the server, unchanged: it generates, edits with a mask, lists models, and is
refused in its own words."""

from __future__ import annotations

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image
from served import serving

from qwen_image_mlx import QwenImagePipeline

pytestmark = pytest.mark.process

TOKEN = "a-token-of-some-length"
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    with serving("--token-file", file) as server:
        yield server


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=TOKEN, max_retries=0, timeout=60) as client:
        yield client


def image_of(image) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def test_it_generates(client):
    answer = client.images.generate(model="demo", prompt=PROMPT, n=2, size="64x64", extra_body={"seed": 1})
    assert answer.created > 1_700_000_000
    expected = QwenImagePipeline.from_pretrained("demo").generate(PROMPT, negative_prompt=" ", seed=1, num_images=2)
    for image, picture in zip(answer.data, expected, strict=True):
        assert np.array_equal(np.asarray(image_of(image)), np.asarray(picture))


def test_sizes_are_obeyed_and_auto_is_the_model_s_own(client):
    for size, expected in (("auto", (64, 64)), ("96x48", (96, 48)), (openai.omit, (64, 64))):
        answer = client.images.generate(prompt=PROMPT, size=size, response_format="b64_json", extra_body={"steps": 1})
        assert image_of(answer.data[0]).size == expected


def test_it_edits_what_a_mask_leaves_transparent(client):
    picture = Image.new("RGB", (64, 64), (30, 90, 200))
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 8, 32, 40))
    files = [("image.png", png_of(picture)), ("mask.png", png_of(mask))]
    answer = client.images.edit(
        model="demo-edit", image=files[0], mask=files[1], prompt="a yellow square", extra_body={"seed": 1, "steps": 4}
    )
    edited, kept = np.asarray(image_of(answer.data[0])), np.asarray(mask)[..., 3] == 255
    assert (edited[kept] == (30, 90, 200)).all()
    assert (edited[~kept] != (30, 90, 200)).any()


def test_it_edits_several_images(client):
    files = [("a.png", png_of(Image.new("RGB", (64, 64), colour))) for colour in ("red", "blue")]
    answer = client.images.edit(image=files, prompt="put one on the other", n=2, extra_body={"steps": 1})
    assert [image_of(image).size for image in answer.data] == [(64, 64), (64, 64)]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["demo", "demo-edit", "demo-layered"]
    assert client.models.retrieve("demo-edit").owned_by == "qwen-image-mlx"
    assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"


@pytest.mark.parametrize(("fields", "param"), [
    ({"prompt": PROMPT, "size": "65x64"}, "width"),
    ({"prompt": PROMPT, "size": "huge"}, "size"),
    ({"prompt": PROMPT, "n": 99}, "n"),
    ({"prompt": PROMPT, "response_format": "url"}, "response_format"),
    ({"prompt": PROMPT, "model": "demo-edit"}, "model"),
])  # fmt: skip
def test_a_bad_request_is_one_to_the_client(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**fields)
    assert (caught.value.param, caught.value.type, caught.value.code) == (
        param, "invalid_request_error", "invalid_request",
    )  # fmt: skip


def test_other_refusals_have_the_client_s_own_errors(client, served):
    with pytest.raises(openai.NotFoundError, match="this server has demo, demo-edit, demo-layered"):
        client.images.generate(prompt=PROMPT, model="someone-s-model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")
    opaque = ("a.png", png_of(Image.new("RGB", (64, 64))))
    with pytest.raises(openai.BadRequestError, match="no transparency"):
        client.images.edit(image=opaque, mask=opaque, prompt="x")
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="another", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


# --- what asks for nothing, and other formats -------------------------------------------------------------------------

NOTHING = [
    {"model": ""}, {"model": None}, {"n": None}, {"n": 1}, {"size": ""}, {"size": "auto"}, {"size": None},
    {"partial_images": 0}, {"partial_images": None}, {"stream": False}, {"stream": None}, {"output_format": "png"},
    {"output_format": None}, {"output_compression": 100}, {"output_compression": None}, {"quality": "auto"},
    {"quality": ""}, {"background": "auto"}, {"background": ""}, {"moderation": "auto"}, {"style": "vivid"},
    {"style": None}, {"user": ""}, {"user": "someone"}, {"response_format": "b64_json"}, {"response_format": ""},
]  # fmt: skip


def test_values_that_ask_for_nothing_are_as_if_they_were_not_there(served):
    headers = {"authorization": f"Bearer {TOKEN}"}
    with served.client(headers=headers) as client:

        def generated(**more) -> str:
            body = {"prompt": PROMPT, "seed": 1, "steps": 1} | more
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200, (more, answer.text)
            return answer.json()["data"][0]["b64_json"]

        plain = generated()
        for fields in NOTHING:
            assert generated(**fields) == plain, fields
        assert generated(**{name: value for fields in NOTHING for name, value in fields.items()}) == plain


def test_blank_fields_of_a_form_are_as_if_they_were_not_there(served):
    names = (
        "model n size response_format output_format output_compression background quality moderation style stream "
        "partial_images user seed input_fidelity"
    )
    form = dict.fromkeys(names.split(), "") | {"prompt": "a yellow square", "steps": "1"}
    files = [("image[]", ("a.png", png_of(Image.new("RGB", (64, 64), "red")))), ("mask", ("", b""))]
    with served.client(headers={"authorization": f"Bearer {TOKEN}"}) as client:
        answer = client.post("/v1/images/edits", data=form, files=files)
        assert answer.status_code == 200, answer.text
        said = {"stream": "false", "partial_images": "0", "output_compression": "100", "n": "1"}
        answer = client.post("/v1/images/edits", data=form | said, files=files)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_images_come_as_jpeg_and_webp(client, kind):
    fields = {"prompt": PROMPT, "extra_body": {"seed": 1}, "size": "128x128"}
    plain = np.asarray(image_of(client.images.generate(**fields).data[0]), float)
    sizes = []
    for compression in (openai.omit, 100, 10):
        answer = client.images.generate(output_format=kind, output_compression=compression, **fields)
        picture = image_of(answer.data[0])
        assert picture.format == kind.upper()
        assert answer.output_format == kind
        assert np.abs(np.asarray(picture.convert("RGB"), float) - plain).mean() < 8
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[0] == sizes[1] > sizes[2]


@pytest.mark.parametrize("fields", [
    {"output_compression": 50}, {"output_format": "png", "output_compression": 0}, {"output_format": "gif"},
    {"output_format": "jpeg", "output_compression": 101}, {"partial_images": 2}, {"background": "transparent"},
])  # fmt: skip
def test_what_would_be_missed_is_refused(client, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, **fields)
    assert next(iter(fields)) in caught.value.message or "output_compression" in caught.value.message


@pytest.mark.parametrize(("partial", "kind"), [(0, "png"), (1, "webp"), (3, "jpeg")])
def test_partial_images_are_streamed(client, partial, kind):
    with client.images.generate(
        prompt=PROMPT, stream=True, partial_images=partial, output_format=kind, size="64x64",
        extra_body={"seed": 1, "steps": 60},
    ) as stream:  # fmt: skip
        *parts, last = list(stream)
    assert [part.type for part in parts] == ["image_generation.partial_image"] * len(parts)
    assert [part.partial_image_index for part in parts] == list(range(len(parts)))
    assert len(parts) == partial
    assert (last.type, last.output_format, last.usage.total_tokens) == ("image_generation.completed", kind, 0)
    assert {image_of(image).format for image in (*parts, last)} == {kind.upper()}
    if kind == "png":
        plain = client.images.generate(prompt=PROMPT, size="64x64", extra_body={"seed": 1, "steps": 60})
        assert np.array_equal(np.asarray(image_of(last)), np.asarray(image_of(plain.data[0])))


def test_an_edit_is_streamed_and_a_fault_is_told(client):
    image = ("a.png", png_of(Image.new("RGB", (64, 64), "red")))
    events = list(client.images.edit(image=image, prompt="make it blue", stream=True, partial_images=1, n=2))
    assert [event.type for event in events if "completed" in event.type] == ["image_edit.completed"] * 2
    assert "image_edit.partial_image" in {event.type for event in events}
    with pytest.raises(openai.BadRequestError, match="pixels"):
        client.images.generate(prompt=PROMPT, size="9984x9984", stream=True)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-image-1", "dall-e-2", "dall-e-3"])
def test_names_that_clients_have_fixed_are_the_model_that_does_what_is_asked(client, name):
    image = ("a.png", png_of(Image.new("RGB", (64, 64), "red")))
    assert client.images.generate(model=name, prompt=PROMPT, extra_body={"steps": 1}).data
    assert client.images.edit(model=name, image=image, prompt="make it blue", extra_body={"steps": 1}).data


def test_other_names_and_hosts_are_let_in_by_flags():
    flags = ("--alias", "my-model=generate", "--alias", "gpt-image-1=edit", "--allow-host", "host.docker.internal",
             "--allow-host", "My-Mac.local", "--allow-host", "fd00::1")  # fmt: skip
    with serving(*flags) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
            assert client.images.generate(model="my-model", prompt=PROMPT, extra_body={"steps": 1}).data
            for name in ("my-model", "gpt-image-1"):
                assert name in [model.id for model in client.models.list()]
            with pytest.raises(openai.BadRequestError, match="does not generate"):
                client.images.generate(model="gpt-image-1", prompt=PROMPT)
            with pytest.raises(openai.NotFoundError, match="--alias"):
                client.images.generate(model="nobody", prompt=PROMPT)
        with server.client() as other:
            for host in ("host.docker.internal", "host.docker.internal:8000", "my-mac.local", "[fd00::1]:80"):
                answer = other.get("/v1/models", headers={"host": host, "origin": f"http://{host}"})
                assert answer.status_code == 200, (host, answer.text)
            answer = other.get("/v1/models", headers={"host": "gateway.docker.internal:80"})
            assert answer.status_code == 421
            assert "--allow-host gateway.docker.internal" in answer.json()["error"]["message"]


# --- patience ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edits", [False, True])
def test_a_client_that_times_out_and_retries_gets_its_image_generated_once(served, edits):
    """OpenAI's own retries, with its 600 s as a third of one, its two as many, and an image that takes longer."""
    before = len(served.log)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=TOKEN, max_retries=60, timeout=0.3) as client:
        more = {"prompt": PROMPT, "size": "128x128", "extra_body": {"steps": 40, "seed": 3}}
        if edits:
            image = ("a.png", png_of(Image.new("RGB", (64, 64), "red")))
            answer = client.images.edit(image=image, **more)
        else:
            answer = client.images.generate(**more)
        assert image_of(answer.data[0]).size == (128, 128)
    said = "".join(served.log[before:])
    assert (said.count("done in"), said.count("cancelled in")) == (1, 0), said
    assert "a repeated request found its job" in said
