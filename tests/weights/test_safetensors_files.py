"""read_header and component_tensors: true files read right, and every lie is caught by one CheckpointError."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.weights.safetensors_files import Tensor, component_tensors, read_header

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: bytes = bytes(24), length: int | None = None) -> Path:
    """Write a file with any header, bytes or JSON, and any announced length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_reads_names_shapes_types_sizes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arrays = {
        "w": np.ones((2, 3), np.float16),
        "scalar": np.array(1, np.float32),
        "empty": np.ones((0, 4), np.int8),
        "mask": np.ones(5, np.bool_),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    tensors, metadata = read_header(path)
    offsets = {name: tensor.offset for name, tensor in tensors.items()}
    assert tensors == {
        "w": Tensor("w", "F16", (2, 3), path, 12, offsets["w"]),
        "scalar": Tensor("scalar", "F32", (), path, 4, offsets["scalar"]),
        "empty": Tensor("empty", "I8", (0, 4), path, 0, offsets["empty"]),
        "mask": Tensor("mask", "BOOL", (5,), path, 5, offsets["mask"]),
    }
    for name, array in arrays.items():
        assert path.read_bytes()[offsets[name] :].startswith(array.tobytes())
    assert metadata == {"format": "pt"}
    assert read_header(str(path))[0] == tensors


def test_a_file_without_tensors_or_metadata_is_fine(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "a", {}, b"")) == ({}, {})


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", [4], 2), ("F6_E2M3", [4], 3), ("BF16", [1, 12], 24)])
def test_types_are_measured_in_bits(tmp_path: Path, dtype: str, shape: list[int], nbytes: int) -> None:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
    assert read_header(write(tmp_path / "a", header, bytes(nbytes)))[0]["w"].nbytes == nbytes


BAD_ENTRIES = [
    ("nothing", "other than an object"),
    ([], "other than an object"),
    ({}, "unknown dtype None"),
    ({**ENTRY, "dtype": "F31"}, "unknown dtype 'F31'"),
    ({**ENTRY, "dtype": ["F32"]}, "unknown dtype"),
    ({**ENTRY, "dtype": "F64"}, "24 bytes, which is not what F64"),
    ({**ENTRY, "dtype": "F4", "shape": [47]}, "24 bytes, which is not what F4"),
    ({**ENTRY, "shape": [2, 4]}, "24 bytes, which is not what F32"),
    ({**ENTRY, "shape": [-2, -3]}, "impossible shape"),
    ({**ENTRY, "shape": [2.0, 3]}, "impossible shape"),
    ({**ENTRY, "shape": [True, 6]}, "impossible shape"),
    ({**ENTRY, "shape": ["2", 3]}, "impossible shape"),
    ({**ENTRY, "shape": 6}, "impossible shape"),
    ({**ENTRY, "shape": None}, "impossible shape"),
    ({**ENTRY, "shape": [1] * 17 + [6]}, "impossible shape"),
    ({**ENTRY, "shape": [0, 2**70]}, "impossible shape"),
    ({**ENTRY, "data_offsets": [24, 0]}, "impossible data_offsets"),
    ({**ENTRY, "data_offsets": [0, 24, 48]}, "impossible data_offsets"),
    ({**ENTRY, "data_offsets": [-24, 0]}, "impossible data_offsets"),
    ({**ENTRY, "data_offsets": "0,24"}, "impossible data_offsets"),
    ({**ENTRY, "data_offsets": [0, 23]}, "23 bytes, which is not what F32"),
    ({**ENTRY, "data_offsets": [8, 32]}, "8 bytes before the tensor 'w' belong to no tensor"),
]


@pytest.mark.parametrize(("entry", "what"), BAD_ENTRIES)
def test_a_bad_entry(tmp_path: Path, entry: object, what: str) -> None:
    assert_refused(write(tmp_path / "bad.safetensors", {"w": entry}), what, "'w'")


def pair(first: list[int], second: list[int]) -> dict[str, object]:
    return {
        name: {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}
        for name, offsets in (("a", first), ("b", second))
    }


BAD_FILES = [
    (b"", "only 0 bytes"),
    (b"\x01\x00\x00", "only 3 bytes"),
    ((1000).to_bytes(8, "little") + b"{}", "header of 1000 bytes but ends after 2"),
    ((100_000_001).to_bytes(8, "little") + b"{}", "more than any checkpoint"),
    ({"w": ENTRY, "__metadata__": "pt"}, "__metadata__"),
    ({"w": ENTRY, "__metadata__": {"format": 1}}, "__metadata__"),
    ([ENTRY], "not a JSON object"),
    ({"w": {**ENTRY, "data_offsets": [0, 48], "shape": [4, 3]}}, "24 bytes are missing at its end"),
    ({"w": {**ENTRY, "data_offsets": [0, 16], "shape": [4]}}, "8 bytes follow its last tensor"),
    (pair([0, 16], [8, 24]), "'a' and 'b' overlap"),
    (pair([0, 24], [0, 24]), "'a' and 'b' overlap"),
    (pair([0, 8], [16, 24]), "8 bytes before the tensor 'b' belong to no tensor"),
]


def test_a_web_page_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(CheckpointError, match="is a web page, not a safetensors file: download the file itself"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("content", "what"), BAD_FILES)
def test_a_bad_file(tmp_path: Path, content: object, what: str) -> None:
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    assert_refused(path, what)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"{'w': 1}", "not JSON"),
        (b'{"w": ', "not JSON"),
        (b"", "not JSON"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"w": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}', ""),
        (b'{"w": {"dtype": "U8"}, "w": {"dtype": "U8"}}', "'w' twice"),
        (b'{"w": {"dtype": "U8", "dtype": "F32", "shape": [24], "data_offsets": [0, 24]}}', "'dtype' twice"),
    ],
)
def test_a_bad_header_text(tmp_path: Path, header: bytes, what: str) -> None:
    assert_refused(write(tmp_path / "bad.safetensors", header), what)


def test_a_truncated_download_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.ones((10, 10), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-123])
    assert_refused(path, "123 bytes are missing")


def test_a_git_lfs_pointer_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9973693184\n")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is a Git LFS pointer.*git lfs pull"):
        read_header(path)


@pytest.mark.parametrize("name", ["absent.safetensors", "."])
def test_what_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / name)


def assert_refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert all(part in message for part in (str(path), *parts)), message
    cut = ("missing at its end", "follow its last", "ends after", "it has only", "not JSON", "not UTF-8", "JSON object",
           "nested too", "announces", "integer string")  # fmt: skip
    damaged = any(words in message for words in cut) and "__metadata__" not in message
    assert message.endswith("download it again" if damaged else "the program that wrote it must write it again"), (
        message
    )
    assert "\n" not in message


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=6),
    keep=st.one_of(st.none(), st.integers(0, 10_000)),
    tail=st.binary(max_size=4),
)
def test_any_damage_is_refused_or_harmless(
    tmp_path: Path, flips: list[tuple[int, int]], keep: int | None, tail: bytes
) -> None:
    arrays = {"first": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.ones(7, np.uint8)}
    content = bytearray(save(arrays, metadata={"format": "pt"}))
    for position, mask in flips:
        content[position % len(content)] ^= mask
    if keep is not None:
        content = content[: keep % (len(content) + 1)]
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content + tail)
    try:
        tensors, metadata = read_header(path)
    except CheckpointError:
        return
    length = int.from_bytes(content[:8], "little")
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(content) + len(tail) - 8 - length
    assert all(tensor.nbytes * 8 >= math.prod(tensor.shape) * 4 for tensor in tensors.values())
    assert all(isinstance(value, str) for value in metadata.values())


def shards(folder: Path, **contents: tuple[str, ...]) -> list[Path]:
    """Write one file per keyword with one small tensor per name."""
    files = []
    for stem, names in contents.items():
        files.append(folder / f"{stem}.safetensors")
        save_file({name: np.ones(2, np.float32) for name in names}, files[-1])
    return files


def test_shards_are_merged_and_extras_kept(tmp_path: Path) -> None:
    files = shards(tmp_path, one=("a", "b"), two=("c", "extra"))
    index = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "three.safetensors"}
    for each in (index, None):
        tensors = component_tensors(files, each)
        assert {name: tensor.file for name, tensor in tensors.items()} == {
            "a": files[0],
            "b": files[0],
            "c": files[1],
            "extra": files[1],
        }


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'b' is in both .*one\.safetensors and .*two\.safetensors"):
        component_tensors(shards(tmp_path, one=("a", "b"), two=("b",)), None)


@pytest.mark.parametrize("index", [{"z": "two.safetensors"}, {"a": "two.safetensors"}])
def test_a_broken_promise_of_the_index(tmp_path: Path, index: dict[str, str]) -> None:
    files = shards(tmp_path, one=("a",), two=("b",))
    with pytest.raises(CheckpointError, match=r"two\.safetensors lacks the tensor '[az]' that its index promises"):
        component_tensors(files, index)


def test_files_written_by_mlx_without_metadata_are_whole(tmp_path: Path) -> None:
    import mlx.core as mx

    path = tmp_path / "mlx.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3))})
    tensors, metadata = read_header(path)
    assert (tensors["a"].shape, metadata) == ((2, 3), {})
