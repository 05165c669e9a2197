"""Hostile and broken layer files: one sentence, no other exception, and nothing read from outside."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_layer_files import READABLE, STACK, refusal, small
from test_layer_formats import as_is, ora, psd
from test_layer_stacks import noise, plain

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.layers import archive
from qwen_image_mlx.layers import formats as layer_files
from qwen_image_mlx.layers import psd as psd_files
from qwen_image_mlx.layers.folder import read_zip
from qwen_image_mlx.layers.formats import FORMATS, load_layers, save_layers
from qwen_image_mlx.layers.stack import MAX_SIDE


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "fox"
    save_layers(STACK, folder, FORMATS)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    save_layers(small, tmp_path / "small")
    return tmp_path / "small"


def rewrite(folder: Path, **changes) -> None:
    """Changes the manifest; what is None goes."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    text = json.dumps({key: value for key, value in manifest.items() if value is not None})
    (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(("changes", "says"), [
    ({"layers": None}, "layers None, but needs one of type list"),
    ({"layers": {"file": "layer_0.png"}}, "type list"),
    ({"layers": "layer_0.png"}, "type list"),
    ({"layers": []}, "0 layers"),
    ({"layers": [[]]}, "each must be an object"),
    ({"layers": [{}]}, "names its file"),
    ({"layers": [{"file": 3}]}, "names its file"),
    ({"layers": [{"file": None}]}, "names its file"),
    ({"layers": [{"file": ""}]}, "lacks this file"),
    ({"layers": [{"file": "."}]}, "lacks this file"),
    ({"layers": [{"file": "gone.png"}]}, "must hold 'gone.png', but lacks this file; put it there"),
    ({"layers": [{"file": "../secret.png"}]}, "lacks this file"),
    ({"layers": [{"file": "./layer_0.png"}]}, "lacks this file"),
    ({"layers": [{"file": "/etc/passwd"}]}, "lacks this file"),
    ({"layers": [{"file": "sub/inner.png"}]}, "lacks this file"),
    ({"layers": [{"file": "link.png"}]}, "lacks this file"),
    ({"layers": [{"file": "linked/secret.png"}]}, "lacks this file"),
    ({"layers": [{"file": "pipe.png"}]}, "lacks this file"),
    ({"layers": [{"file": "layer_0.png\0"}]}, "lacks this file"),
    ({"layers": [{"file": "\ud83d"}]}, "lacks this file"),
    ({"layers": [{"file": "x" * 100_000}]}, "lacks this file"),
    ({"layers": [{"file": "manifest.json"}]}, "manifest.json in .* is not an image"),
    ({"layers": [{"file": "photo.jpg"}]}, r"is not an image in a format that can be read \(PNG\)"),
    ({"layers": [{"file": "layer_0.png"}] * 1001}, "from 1 to 1000"),
    ({"layers": [{"file": "layer_0.png", "size": [9, 6]}]}, r"is \[8, 6\] px, but manifest.json says \[9, 6\]"),
    ({"layers": [{"file": "layer_0.png", "size": "big"}]}, "manifest.json says"),
    ({"layers": [{"file": "layer_0.png", "offset": [0.5, 0]}]}, "layer_0.png in .*offset"),
    ({"layers": [{"file": "layer_0.png", "offset": [10**400, 0]}]}, "offset"),
    ({"layers": [{"file": "layer_0.png", "offset": None}]}, "offset"),
    ({"layers": [{"file": "layer_0.png", "opacity": math.nan}]}, "opacity is nan"),
    ({"layers": [{"file": "layer_0.png", "opacity": math.inf}]}, "opacity is inf"),
    ({"layers": [{"file": "layer_0.png", "opacity": "1"}]}, "opacity"),
    ({"layers": [{"file": "layer_0.png", "visible": "no"}]}, "visib"),
    ({"layers": [{"file": "layer_0.png", "name": ["x"]}]}, "name"),
    ({"layers": [{"file": "layer_0.png", "name": "\x1b[31m"}]}, "name"),
    ({"size": [8, 0]}, "size"),
    ({"size": [8]}, "size"),
    ({"size": [MAX_SIDE + 1, 8]}, "size"),
    ({"size": [8.0, 6]}, "size"),
    ({"size": [MAX_SIDE, MAX_SIDE]}, "at most 150,000,000 pixels"),
    ({"size": None}, "size"),
    ({"order": "front to back"}, "'back to front'"),
    ({"manifest_version": 2}, "update this program"),
    ({"manifest_version": True}, "manifest_version"),
    ({"manifest_version": 10**4000}, "manifest_version"),
])  # fmt: skip
def test_bad_manifests_are_refused(folder, changes, says):
    plain("blue").save(folder.parent / "secret.png")
    (folder / "sub").mkdir()
    plain("blue").save(folder / "sub" / "inner.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (8, 6)).save(folder / "photo.jpg")
    rewrite(folder, **changes)
    with pytest.raises(RequestError, match=says):
        load_layers(folder)
    assert len(refusal(folder)) < 1000


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 100_000, b" " * (5 << 20),
])  # fmt: skip
def test_manifests_that_are_no_json_are_refused(folder, text):
    (folder / "manifest.json").write_bytes(text)
    assert "manifest.json" in refusal(folder)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *chunks, tail))


WHOLE = io.BytesIO()
noise((8, 6)).save(WHOLE, "PNG")
BAD_PNGS = {
    "empty": b"",
    "cut": WHOLE.getvalue()[:-30],
    "cut in its head": WHOLE.getvalue()[:20],
    "no PNG": b"GIF89a" + bytes(100),
    "huge": png(2**31 - 1, 2**31 - 1),
    "long": png(MAX_SIDE + 1, 1),
    "large": png(MAX_SIDE, MAX_SIDE),
    "without pixels": png(0, 0),
    "a text that grows": png(8, 6, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))),
    "wrong data": png(8, 6),
    "texts that grow": png(8, 6, *[chunk(b"tEXt", b"a\0" + bytes(1 << 20))] * 65),
}


@pytest.mark.slow
@pytest.mark.parametrize("data", BAD_PNGS.values(), ids=BAD_PNGS)
def test_bad_pngs_are_refused(folder, tmp_path, data):
    (folder / "layer_1.png").write_bytes(data)
    assert "layer_1.png" in refusal(folder)
    path = ora(tmp_path / "x.ora", '<stack><layer src="b.png"/></stack>', **{"b.png": data})
    assert "b.png" in refusal(path)


def test_the_sum_of_all_pixels_is_limited(folder, monkeypatch):
    monkeypatch.setattr(archive, "MAX_PIXELS", 95)  # one layer has 48
    assert "more than 95 pixels" in refusal(folder)
    monkeypatch.setattr(archive, "MAX_PIXELS", 96)
    load_layers(folder)


ONE = '<stack><layer src="a.png" {}/></stack>'
LAUGHS = """<?xml version="1.0"?><!DOCTYPE image [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>
<image w="8" h="6"><stack name="&c;"><layer src="a.png"/></stack></image>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE image [<!ENTITY a SYSTEM "file:///etc/passwd">]>
<image w="8" h="6"><stack><layer src="a.png" name="&a;"/></stack></image>"""


@pytest.mark.slow
@pytest.mark.parametrize(("xml", "says"), [
    (LAUGHS, "document type"),
    (OUTSIDE, "document type"),
    ("<stack>", "cannot be read"),
    ("", "holds no layers"),
    ("<stack/>", "holds no layers"),
    ("<stack><text/></stack>", "holds no layers"),
    ("<?xml version='1.0'?><html/>", "must hold <image>"),
    ("<?xml version='1.0' encoding='wrong'?><image/>", "cannot be read"),
    ("<?xml version='1.0'?><image w='8'><stack><layer src='a.png'/></stack></image>", "h=None"),
    ("<?xml version='1.0'?><image w='8' h='0'><stack><layer src='a.png'/></stack></image>", "canvas"),
    ("<?xml version='1.0'?><image w='30000' h='30000'><stack><layer src='a.png'/></stack></image>", "at most 150"),
    ("<?xml version='1.0'?><image w='8' h='1e9'><stack><layer src='a.png'/></stack></image>", "h='1e9'"),
    (ONE.format('opacity="nan"'), "a.png in .*x.ora: .*opacity"),
    (ONE.format('opacity="inf"'), "opacity"),
    (ONE.format('opacity="-1"'), "opacity"),
    (ONE.format('opacity="half"'), "needs a number"),
    (ONE.format('x="1.5"'), "needs a number"),
    (ONE.format(f'x="{"9" * 5000}"'), "needs a number"),
    (ONE.format('x="999999999"'), "offset"),
    ("<stack><layer/></stack>", "lacks this file"),
    ('<stack><layer src="gone.png"/></stack>', "lacks this file"),
    ('<stack><layer src="../a.png"/></stack>', "lacks this file"),
    ('<stack><layer src="/etc/x.png"/></stack>', "lacks this file"),
    ('<stack><layer src="C:/x.png"/></stack>', "lacks this file"),
    ("<stack>" * 200 + "</stack>" * 200, "nests stacks deeper"),
    ("<stack>" * 50_000 + "</stack>" * 50_000, "nests stacks deeper"),
    ("<stack>" + '<layer src="a.png"/>' * 1001 + "</stack>", "from 1 to 1000"),
    ("<stack>" + " " * (5 << 20) + "</stack>", "longer than"),
])  # fmt: skip
def test_bad_oras_are_refused(tmp_path, xml, says):
    path = ora(tmp_path / "x.ora", xml, ("a.png", "../a.png", "/etc/x.png", "C:/x.png"))
    with pytest.raises(RequestError, match=says):
        load_layers(path)
    assert str(path) in refusal(path) or "canvas" in refusal(path) or "stack has" in refusal(path)


def test_an_ora_without_its_index_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ora", "w") as archive:
        archive.writestr("mimetype", "image/openraster")
    assert "must hold 'stack.xml'" in refusal(tmp_path / "x.ora")


def zipped(path: Path, files: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_names_that_leave_a_zip_are_never_found(tmp_path):
    for name in ("../layer_0.png", "/layer_0.png", "a/../../layer_0.png", "C:layer_0.png", "..\\layer_0.png"):
        manifest = {"manifest_version": 1, "size": [8, 6], "order": "back to front", "layers": [{"file": name}]}
        path = zipped(tmp_path / "x.zip", {"manifest.json": json.dumps(manifest), name: WHOLE.getvalue()})
        assert "lacks this file" in refusal(path)
        assert os.listdir(tmp_path) == ["x.zip"]


def test_a_zip_may_name_a_file_nothing(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a": b"", "layer_0.png": WHOLE.getvalue()})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 28 : entry + 32] = struct.pack("<HH", 0, 1)  # its name's letter becomes its extra field
    path.write_bytes(data)
    assert [layer.name for layer in load_layers(path).layers] == ["layer_0"]


@pytest.mark.slow
def test_zip_bombs_are_refused(tmp_path):
    assert "longer than" in refusal(zipped(tmp_path / "x.zip", {"manifest.json": bytes(5 << 20)}))
    many = {f"layer_{n}.png": b"" for n in range(10_001)}
    assert "unpacks to more" in refusal(zipped(tmp_path / "x.zip", many))
    for count, claimed, says in ((2, 2**32 - 2, "unpacks to more"), (1, 2**31, "longer than")):
        path = zipped(tmp_path / "x.zip", {f"layer_{n}.png": bytes(1000) for n in range(count)})
        path.write_bytes(path.read_bytes().replace(struct.pack("<I", 1000), struct.pack("<I", claimed)))
        assert says in refusal(path)


def test_layers_have_a_bound_and_other_files_none(tmp_path):
    for name, begins in (("x.psd", b"8BPS"), ("x.safetensors", b"")):
        with open(tmp_path / name, "wb") as file:
            file.write(begins)
            file.truncate((2 << 30) + 1)
    assert "more than the maximum of 2,147 MB" in refusal(tmp_path / "x.psd")
    assert not layer_files.is_layers(tmp_path / "x.safetensors")


PACKINGS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
GROWTH = """
import resource, sys
from qwen_image_mlx.layers.formats import load_layers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (10 if sys.platform == "darwin" else 0)
before = peak()
try:
    load_layers(sys.argv[1])
except Exception as error:
    print(f"{error} {peak() - before}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("compression", PACKINGS[1:])
def test_a_zip_gives_no_more_than_it_claims(tmp_path, compression):
    size = 300_000_001
    path = zipped(tmp_path / "x.zip", {"layer_0.png": bytes(size)}, compression)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 1000)))
    done = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, timeout=60)
    message, _, kilobytes = done.stdout.strip().rpartition(" ")
    assert "cannot be read" in message or "not an image" in message, done.stderr
    assert int(kilobytes) < 200_000


@pytest.mark.parametrize("damage", ["many files", "a list by zip64"])
def test_a_zip_s_list_of_files_is_bounded_before_it_is_read(tmp_path, monkeypatch, damage):
    path = zipped(tmp_path / "x.zip", {"layer_0.png": WHOLE.getvalue()})
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\5\6")
    if damage == "many files":
        data[end + 12 : end + 16] = struct.pack("<I", 5 << 20)
    else:
        data[end:end] = b"PK\6\7" + bytes(16)
    path.write_bytes(data)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(RequestError, match="holds more than 10,000 files"):
        read_zip(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_in_a_zip_are_one_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for colour in ("red", "blue"):
            buffer = io.BytesIO()
            plain(colour).save(buffer, "PNG")
            archive.writestr("layer_0.png", buffer.getvalue())
    (layer,) = load_layers(tmp_path / "x.zip").layers
    assert layer.image == plain("blue")


@pytest.mark.parametrize("compression", PACKINGS)
def test_damaged_zips_are_refused(tmp_path, compression):
    path = zipped(tmp_path / "x.zip", {"layer_0.png": WHOLE.getvalue()}, compression)
    load_layers(path)
    data = bytearray(path.read_bytes())
    data[50:120] = bytes(70)
    path.write_bytes(data)
    assert "x.zip" in refusal(path)


def test_locked_zips_are_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", {"layer_0.png": WHOLE.getvalue()})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refusal(path)


def test_what_holds_no_layers_is_refused(saved, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("x" * 5000)
    assert "does not exist" in refusal("a\0b")
    assert "neither manifest.json nor layer_0.png" in refusal(tmp_path)
    (tmp_path / "empty").touch()
    assert "give a folder that decompose wrote, its zip, a PSD or an OpenRaster file" in refusal(tmp_path / "empty")
    assert "no layers that can be read" in refusal(saved / "layer_0.png")
    assert "neither manifest.json nor layer_0.png" in refusal(saved / "layers.pptx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_what_may_not_be_read_is_refused(folder):
    for path in (folder / "layer_0.png", folder):
        path.chmod(0)
        assert "cannot be read" in refusal(folder)
    folder.chmod(0o700)


@pytest.mark.parametrize(("data", "says"), [
    (b"8BPS", "cannot be read as a PSD"),
    (b"8BPS" + bytes(500), "cannot be read as a PSD"),
    (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 4, 30_000, 30_000, 8, 3) + bytes(14), "at most"),
])  # fmt: skip
def test_psds_that_are_none_are_refused(tmp_path, data, says):
    (tmp_path / "x.psd").write_bytes(data)
    assert says in refusal(tmp_path / "x.psd")


def test_psds_that_claim_too_much_are_refused(tmp_path, monkeypatch):
    path = psd(tmp_path / "x.psd", ({"name": "a"}, as_is), ({"name": "b"}, as_is))
    monkeypatch.setattr(psd_files, "MAX_PIXELS", 95)  # one layer has 48
    assert "more than 95 pixels" in refusal(path)
    monkeypatch.setattr(psd_files, "MAX_PIXELS", 96)
    load_layers(path)


def test_cut_psds_are_refused(saved, tmp_path):
    data = (saved / "layers.psd").read_bytes()
    for length in (30, len(data) // 3, len(data) // 2):
        (tmp_path / "x.psd").write_bytes(data[:length])
        assert "cannot be read as a PSD" in refusal(tmp_path / "x.psd")


@pytest.mark.slow
@pytest.mark.parametrize("name", READABLE)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_damage_raises_nothing_else(tmp_path_factory, name, seed):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("damaged") / "x"
    save_layers(small, folder, [name])
    path = folder / (FORMATS[name].file or str(rng.choice(["manifest.json", "layer_0.png"])))
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, len(data), rng.integers(1, 6)):
        data[place] = rng.integers(0, 256)
    path.write_bytes(data[: rng.integers(1, len(data)) if rng.random() < 0.3 else None])
    with suppress(RequestError):
        load_layers(folder / FORMATS[name].file)


def test_reading_says_nothing_of_what_is_right(saved, caplog):
    with caplog.at_level(logging.DEBUG, "qwen_image_mlx"):
        for name in READABLE:
            load_layers(saved / FORMATS[name].file)
    assert not [record for record in caplog.records if record.name.startswith("qwen_image_mlx")]
