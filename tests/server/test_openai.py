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


def picture_of(image) -> Image.Image:
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
        assert np.array_equal(np.asarray(picture_of(image)), np.asarray(picture))


def test_sizes_are_obeyed_and_auto_is_the_model_s_own(client):
    for size, expected in (("auto", (64, 64)), ("96x48", (96, 48)), (openai.omit, (64, 64))):
        answer = client.images.generate(prompt=PROMPT, size=size, response_format="b64_json", extra_body={"steps": 1})
        assert picture_of(answer.data[0]).size == expected


def test_it_edits_what_a_mask_leaves_transparent(client):
    picture = Image.new("RGB", (64, 64), (30, 90, 200))
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 8, 32, 40))
    files = [("picture.png", png_of(picture)), ("mask.png", png_of(mask))]
    answer = client.images.edit(
        model="demo-edit", image=files[0], mask=files[1], prompt="a yellow square", extra_body={"seed": 1, "steps": 4}
    )
    edited, kept = np.asarray(picture_of(answer.data[0])), np.asarray(mask)[..., 3] == 255
    assert (edited[kept] == (30, 90, 200)).all()
    assert (edited[~kept] != (30, 90, 200)).any()


def test_it_edits_several_pictures(client):
    files = [("a.png", png_of(Image.new("RGB", (64, 64), colour))) for colour in ("red", "blue")]
    answer = client.images.edit(image=files, prompt="put one on the other", n=2, extra_body={"steps": 1})
    assert [picture_of(image).size for image in answer.data] == [(64, 64), (64, 64)]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["demo", "demo-edit", "demo-layered"]
    assert client.models.retrieve("demo-edit").owned_by == "qwen-image-mlx"


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
    with pytest.raises(openai.NotFoundError, match="there are demo, demo-edit, demo-layered"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
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
