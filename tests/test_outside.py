"""What comes from outside is judged before it costs anything: text, files, patterns, numbers."""

from __future__ import annotations

import io
import json
import os
import time

import mlx.core as mx
import numpy as np
import pytest
from commands import error_line
from PIL import Image

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli import results
from qwen_image_mlx.cli.console import ProgressBars
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.cli.output import output_path
from qwen_image_mlx.errors import CheckpointError, RequestError
from qwen_image_mlx.images.files import read_metadata, save_png
from qwen_image_mlx.images.sources import open_image
from qwen_image_mlx.layers.formats import load_layers
from qwen_image_mlx.lora.peft import peft_config
from qwen_image_mlx.outside import escape, printable, why_not_read
from qwen_image_mlx.pipeline.conditioning import GuidanceEncoding
from qwen_image_mlx.pipeline.progress import Progress
from qwen_image_mlx.server.api_errors import ApiError
from qwen_image_mlx.text.tokenizer import MAX_CHARACTERS, QwenTokenizer, Tokens
from qwen_image_mlx.variants import OWN, variant_of
from qwen_image_mlx.weights.gguf import read_gguf
from qwen_image_mlx.weights.safetensors_files import load_tensors, read_header


@pytest.mark.parametrize("text", ["\x1b[2Jgone", "\x9b31m", "a\u202eb", "\ud800", "\x07", "\r", "\u2028", "\x7f"])
def test_what_a_terminal_would_obey_is_escaped(text):
    said = printable(text)
    assert said.isprintable()
    said.encode()


@pytest.mark.parametrize("text", ["a red fox", "Überlänge 狐", "two\nlines", "e\u0301", "🦊"])
def test_usual_text_stays(text):
    assert printable(text) == text


def test_long_text_is_cut_in_the_middle():
    assert printable("a" * 10_000_000 + "end").endswith("aend")
    assert len(printable("a" * 10_000_000)) < 2_010
    assert len(printable("\x1b" * 10_000_000)) < 4 * 2_010


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\x9b2Jb", "x" * 5000])
def test_errors_are_printable(capsys, name):
    code = main(["info", name])
    out, err = capsys.readouterr()
    line = error_line((code, out.splitlines(), err))
    assert line.isprintable()
    assert len(line) < 2_100


HOSTILE = "a\x1b[31m\u202e\x9bb"
SHOWN = r"a\x1b[31m\u202e\x9bb"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA for the demo whose metadata and one tensor's name are hostile."""
    targets = QwenImagePipeline.from_pretrained("demo").components.lora_targets()
    name, (rows, columns) = next((name, shape) for name, shape in targets.items() if "to_q" in name)
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    factors = {f"{name}.lora_A.weight": mx.zeros((2, columns)), f"{name}.lora_B.weight": mx.zeros((rows, 2))}
    mx.save_safetensors(str(path), {**factors, f"{HOSTILE}.lora_A.weight": mx.zeros((2, 2))}, {"title": HOSTILE})
    return path


@pytest.mark.parametrize("command", [["lora", "inspect"], ["info"]])
def test_tables_of_files_are_printable(lora, capsys, command):
    assert main([*command, str(lora)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert len([line for line in lines if SHOWN in line]) == 2  # what matches nothing, and the title


def test_the_table_of_settings_is_printable(tmp_path, capsys):
    config = tmp_path / "a\u202eb.toml"
    config.write_text('[default.qwen_image.generation]\nnegative_prompt = "a\u202e\u2066b"\n')
    assert main(["config", "show", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert any(r'"a\u202e\u2066b"' in line and r"a\u202eb.toml" in line for line in lines)


def test_a_image_s_record_is_printable(tmp_path, capsys):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": HOSTILE, HOSTILE: "two\nlines"})
    assert main(["info", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert out.count(SHOWN) == 2


def test_what_the_server_answers_is_printable_and_short():
    answer = ApiError("malformed", f"{HOSTILE}\n{'x' * 10_000}")
    assert answer.message.isprintable()
    assert answer.message.startswith(SHOWN)
    assert len(answer.message) < 450


def test_progress_bars_are_printable(capsys):
    with ProgressBars() as bars:
        bars(Progress("download", 2, 2, HOSTILE + "x" * 1000))
    err = capsys.readouterr().err
    assert SHOWN in err
    assert "\u202e" not in err
    assert "x" * 300 not in err


def test_an_encoding_s_escapes_are_those_of_messages():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    with results._escaping(stream):
        stream.write("狐é🦊")
    stream.flush()
    assert stream.buffer.getvalue().decode() == escape("狐é🦊")


@pytest.fixture(params=["fifo", "device", "folder"])
def strange(request, tmp_path):
    """What is no regular file."""
    if request.param == "device":
        return "/dev/zero"
    place = tmp_path / "fox.png"
    os.mkfifo(place) if request.param == "fifo" else place.mkdir()
    return str(place)


def refuses_as_damaged(path):
    with pytest.raises((OSError, ValueError), match="not a regular file"):
        load_tensors(path)
    raise CheckpointError("not a regular file")


READERS = [
    open_image, read_metadata, read_header, read_gguf, GuidanceEncoding.load, refuses_as_damaged,
    lambda path: load_layers(path) if not os.path.isdir(path) else open_image(path),
]  # fmt: skip


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused_without_being_opened(strange, read):
    with pytest.raises((RequestError, CheckpointError), match=r"not a regular file|is a folder|holds no layers"):
        read(strange)


def test_files_have_a_bound(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 31)
    assert "2,147 MB" in why_not_read(tmp_path / "a", 1 << 30)
    assert why_not_read(tmp_path / "a", 1 << 31) is None
    with pytest.raises(RequestError, match="more than the maximum of 1,074 MB"):
        open_image(tmp_path / "a")


@pytest.mark.parametrize("kind", ["PCX", "SGI", "EPS", "PDF"])
def test_formats_that_nobody_needs_are_not_read(tmp_path, kind):
    path = tmp_path / f"fox.{kind.lower()}"
    Image.new("RGB", (8, 8)).save(path, kind)
    with pytest.raises(RequestError, match=r"is not an image|is a PDF|is PostScript"):
        open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_usual_formats_are_read(tmp_path, kind):
    Image.new("RGB", (8, 8)).save(tmp_path / "fox", kind)
    assert open_image(tmp_path / "fox").size == (8, 8)


PATTERNS = ["(a+)+b", "(.*)*x", "(a|a)*", "a?" * 30, ".*" * 10, "(a{1,9}){9}", "a" * 201, r"(a)\1", "(?=.*a)"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_could_take_forever_are_refused(tmp_path, field, pattern):
    settings = json.dumps({"r": 4, "lora_alpha": 4, field: {pattern: 2}})
    with pytest.raises(CheckpointError, match="impossible pattern"):
        peft_config(tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})


@pytest.mark.parametrize("pattern", ["to_q", r"blocks\.1\..*proj", r"blocks\.\d+\.attn\.(to_q|to_k)", "^a.[0-9]+$"])
def test_usual_patterns_are_read_and_fast(tmp_path, pattern):
    settings = json.dumps({"r": 4, "lora_alpha": 4, "rank_pattern": {pattern: 2}})
    config = peft_config(tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    since = time.process_time()
    config.rank_of("blocks.1." + "a.1" * 60)
    assert time.process_time() - since < 1


@pytest.mark.parametrize(
    "said",
    [
        {"encoder_area": -1}, {"reference_area": 0}, {"target_area": 10**400}, {"steps": 0}, {"steps": 10**9},
        {"cfg_scale": -1.0}, {"cfg_scale": float("nan")}, {"cfg_scale": float("inf")},
    ],
)  # fmt: skip
def test_own_settings_outside_their_meaning_are_refused(said):
    with pytest.raises(CheckpointError, match="it must be from"):
        variant_of({"_class_name": "QwenImageEditPlusPipeline", OWN: said}, "m")


@pytest.mark.parametrize("sides", [[], [-1], [0, 640], ["640"], [True], [10**9]])
def test_resolutions_outside_their_meaning_are_refused(sides):
    with pytest.raises(CheckpointError, match="it must be from"):
        variant_of({"_class_name": "QwenImageLayeredPipeline", OWN: {"resolutions": sides}}, "m")


class PanicException(BaseException):
    """As pyo3 makes it."""

    __module__ = "pyo3_runtime"


class Panics:
    def encode(self, text, **_):
        raise PanicException("index out of bounds")

    def decode(self, ids, **_):
        raise PanicException("index out of bounds")


@pytest.mark.parametrize("use", [lambda t: t.encode("a fox"), lambda t: t.decode([1])])
def test_a_panic_of_the_tokenizer_is_a_sentence(use):
    with pytest.raises(CheckpointError, match="index out of bounds"):
        use(QwenTokenizer(Panics()))


def test_ctrl_c_inside_the_tokenizer_is_no_fault_of_its_files(monkeypatch):
    def interrupted(self, text, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Panics, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        QwenTokenizer(Panics()).encode("a fox")


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**63 - 1, 2**80])
def test_token_ids_beyond_a_vocabulary_are_found_before_mlx_reads(monkeypatch, number):
    pipeline, real = QwenImagePipeline.from_pretrained("demo"), QwenTokenizer.encode

    def encode(self, text):
        ids, offsets = real(self, text)
        return Tokens([*ids[:-1], number], offsets)

    monkeypatch.setattr(QwenTokenizer, "encode", encode)
    with pytest.raises(CheckpointError, match=rf"the tokenizer gives the token {number}"):
        pipeline.encode_guidance_prompts("a fox")


def test_prompts_have_a_bound_before_they_are_read():
    with pytest.raises(RequestError, match=r"at most 1,000,000"):
        QwenTokenizer(Panics()).encode("a" * (MAX_CHARACTERS + 1))


@pytest.mark.parametrize("output", [".png", "a/.PNG"])
def test_an_ending_is_not_a_name(output):
    with pytest.raises(RequestError, match="no name before"):
        output_path(output)


def test_a_image_of_a_vector_graphic_is_not_drawn(tmp_path):
    (tmp_path / "fox.emf").write_bytes(b"\x01\0\0\0" + bytes(36) + b" EMF" + np.zeros(64, np.uint8).tobytes())
    with pytest.raises(RequestError, match="is not an image"):
        open_image(tmp_path / "fox.emf")
