"""read_gguf, decode and packed: what the `gguf` package says, and every lie is caught by one CheckpointError."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.weights import gguf as header
from qwen_image_mlx.weights import gguf_blocks
from qwen_image_mlx.weights.gguf import GgufTensor, read_gguf
from qwen_image_mlx.weights.gguf_blocks import DECODED, decode, packed

LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SUPER = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
# where a block's float16 numbers are, in bytes
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def block_sizes(word: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[Type[word]]


def random_rows(word: str, rows: int, columns: int, halves: Any = None, seed: int = 0) -> np.ndarray:
    """Any bits at all in blocks whose float16 numbers are finite, or those of `halves`, repeated."""
    generator = np.random.default_rng(seed)
    elements, size = block_sizes(word)
    blocks = generator.integers(0, 256, (rows * columns // elements, size), np.uint8)
    for at in HALVES[word]:
        values = generator.normal(0, 0.02, len(blocks)) if halves is None else np.resize(halves, len(blocks))
        blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write(path: Path, tensors: dict[str, Any], fill: Any = None) -> Path:
    """Write a file by the package: float arrays as they are, (word, bytes) as blocks of that type."""
    writer = GGUFWriter(path, "qwen_image")
    if fill:
        fill(writer)
    for name, tensor in tensors.items():
        word, data = tensor if isinstance(tensor, tuple) else (None, tensor)
        writer.add_tensor(name, data, raw_dtype=word and Type[word])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def only(path: Path) -> GgufTensor:
    (tensor,) = read_gguf(path)[0].values()
    return tensor


def same(ours: mx.array, theirs: np.ndarray) -> bool:
    """Equal in shape, type and every value, NaN equal to NaN."""
    values = np.array(ours)
    return values.dtype == theirs.dtype and values.shape == theirs.shape and np.array_equal(values, theirs, True)


# The header.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(name: str | bytes = "w", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's description; `dims` in the file's order."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def build(
    entries: tuple[bytes, ...] = (entry(),),
    pairs: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 32,
    alignment: int = 32,
) -> bytes:
    """A whole file by hand, `data` bytes after its header's padding."""
    header = magic + struct.pack("<IQQ", version, *(counts or (len(entries), len(pairs))))
    header += b"".join(pairs) + b"".join(entries)
    return header + bytes(-len(header) % alignment) + bytes(data)


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    arrays = {
        "matrix": np.ones((3, 5), np.float32),
        "vector": np.ones(7, np.float16),
        "kernel": np.ones((2, 3, 4, 5), np.float32),
        "blocks": ("Q4_K", random_rows("Q4_K", 4, 512)),
    }
    path = write(tmp_path / "a.gguf", arrays)
    tensors, metadata = read_gguf(path)
    reader = gguf.GGUFReader(path)
    assert metadata == {"general.architecture": "qwen_image"}
    assert [*tensors] == [*arrays]
    for theirs in reader.tensors:
        tensor = tensors[theirs.name]
        assert (tensor.name, tensor.dtype, tensor.file) == (theirs.name, theirs.tensor_type.name, path)
        assert tensor.shape == tuple(int(size) for size in theirs.shape[::-1])
        assert (tensor.offset, tensor.nbytes) == (theirs.data_offset, theirs.n_bytes)
    assert tensors["blocks"].shape == (4, 512)
    assert read_gguf(str(path))[0] == tensors


def test_reads_every_kind_of_metadata(tmp_path: Path) -> None:
    expected: dict[str, Any] = {"general.architecture": "qwen_image"}

    def fill(writer: GGUFWriter) -> None:
        for kind, value in [
            ("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768), ("uint32", 2**32 - 1),
            ("int32", -(2**31)), ("uint64", 2**64 - 1), ("int64", -(2**63)), ("float32", 0.15625), ("float64", 0.1),
            ("bool", True), ("string", "Ḁ 图"),
        ]:  # fmt: skip
            getattr(writer, f"add_{kind}")(f"a.{kind}", value)
            expected[f"a.{kind}"] = value
        for name, value in {"texts": ["a", "", "图"], "ints": [1, -2], "floats": [0.5], "bools": [True, False]}.items():
            writer.add_array(f"a.{name}", value)
            expected[f"a.{name}"] = value

    metadata = read_gguf(write(tmp_path / "a.gguf", {"w": np.ones(4, np.float32)}, fill=fill))[1]
    assert metadata == expected
    assert [type(value) for value in metadata.values()] == [type(value) for value in expected.values()]


def test_reads_lists_of_lists(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2H", 2, 2, 7, 8)
    path = tmp_path / "a.gguf"
    path.write_bytes(build(pairs=(pair("a", 9, struct.pack("<IQ", 9, 2) + inner + inner),)))
    assert read_gguf(path)[1] == {"a": [[7, 8], [7, 8]]}


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_follows_the_alignment(tmp_path: Path, alignment: int) -> None:
    arrays = {name: np.arange(5, dtype=np.float32) + at for at, name in enumerate("abc")}
    tensors, metadata = read_gguf(
        write(tmp_path / "a.gguf", arrays, lambda writer: writer.add_custom_alignment(alignment))
    )
    assert metadata["general.alignment"] == alignment
    for name, array in arrays.items():
        assert tensors[name].offset % alignment == 0
        assert same(decode(tensors[name]), array)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_both_versions_and_an_unpadded_end(tmp_path: Path, version: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(build((entry(dims=(5,)),), version=version, data=20))
    assert only(path) == GgufTensor("w", "F32", (5,), path, 20, 64)


@pytest.mark.parametrize(("dims", "shape"), [((), ()), ((0,), (0,)), ((4, 0), (0, 4))])
def test_scalars_and_empty_tensors(tmp_path: Path, dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    for kind, dtype in ((0, mx.float32), (30, mx.bfloat16)):
        path = tmp_path / "a.gguf"
        path.write_bytes(
            build((entry("a", dims, kind), entry("b", (8,), 0, 0 if 0 in dims else 32)), data=64 - 32 * (0 in dims))
        )
        tensors = read_gguf(path)[0]
        assert tensors["a"].shape == shape
        assert decode(tensors["a"]).shape == shape
        assert decode(tensors["a"]).dtype == dtype


def test_a_file_without_tensors_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for padding in (0, 8):
        path.write_bytes(build((), data=0)[: 24 + padding])
        assert read_gguf(path) == ({}, {})


def test_knows_every_type_of_the_package() -> None:
    assert {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == header._TYPES
    for word, (elements, layout, _) in gguf_blocks._DECODERS.items():
        assert (elements, layout.itemsize) == block_sizes(word)


# What is wrong with a file.


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return pair("a", 9, struct.pack("<IQ", kind, count) + data)


DAMAGED = {
    "empty": (b"", "not a GGUF file, it begins with b''"),
    "magic": (build(magic=b"GGML"), "not a GGUF file, it begins with b'GGML': give a .gguf file"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}", "not a GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "run 'git lfs pull'"),
    "version 1": (build(version=1), "GGUF version 1; only 2 and 3 are supported"),
    "version 4": (build(version=4), "GGUF version 4"),
    "version 0": (build(version=0), "GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0), "big-endian GGUF file: use the little-endian file"),
    "many tensors": (build(counts=(2**63, 0)), "announces 9223372036854775808 tensors, more than"),
    "more tensors than bytes": (build(counts=(100, 0)), "announces 100 tensors but ends after"),
    "many pairs": (build(counts=(1, 2**40)), "announces 1099511627776 metadata entries, more than"),
    "more pairs than bytes": (build(counts=(1, 100)), "announces 100 metadata entries but ends after"),
    "more tensors than there are": (build(counts=(2, 0)), "missing|overlap|unknown type|twice|does not fit"),
    "long key": (build(pairs=(struct.pack("<Q", 2**62),)), "a text of 4611686018427387904 bytes does not fit"),
    "long text": (build(pairs=(pair("a", 8, struct.pack("<Q", 10**6)),)), "a text of 1000000 bytes does not fit"),
    "key not text": (build(pairs=(pair(b"\xff", 0, b"\0"),)), "not UTF-8"),
    "value not text": (build(pairs=(pair("a", 8, text(b"\xff")),)), "not UTF-8"),
    "key twice": (build(pairs=(pair("a", 0, b"\0"), pair("a", 0, b"\0"))), "its metadata has 'a' twice"),
    "kind": (build(pairs=(pair("a", 13, bytes(8)),)), "value of the unknown kind 13"),
    "kind in a list": (build(pairs=(array(99, 1, bytes(8)),)), "value of the unknown kind 99"),
    "bool": (build(pairs=(pair("a", 7, b"\2"),)), "true-or-false"),
    "long list": (build(pairs=(array(0, 2**62),)), "announces 4611686018427387904 values in one array, more than"),
    "list too long": (build(pairs=(array(12, 50),)), "announces 50 values in one array but ends"),
    "nested": (build(pairs=(array(9, 1, struct.pack("<IQ", 9, 1) * 8),)), "nested too deeply"),
    "alignment 0": (build(pairs=(pair("general.alignment", 4, bytes(4)),)), "general.alignment is 0 and not"),
    "alignment 48": (build(pairs=(pair("general.alignment", 4, b"\x30\0\0\0"),)), "general.alignment is 48 and not"),
    "alignment true": (build(pairs=(pair("general.alignment", 7, b"\1"),)), "general.alignment is True and not"),
    "alignment text": (build(pairs=(pair("general.alignment", 8, text("32")),)), "general.alignment is 32 and not"),
    "name not text": (build((entry(b"\xff"),)), "not UTF-8"),
    "name twice": (build((entry(), entry(offset=32)), data=64), "the tensor 'w' twice"),
    "rank": (build((entry(dims=(1,) * 17),)), "the tensor 'w' has 17 dimensions"),
    "rank 2**32": (build((text("w") + b"\xff" * 4 + bytes(32),)), "4294967295 dimensions"),
    "size": (build((entry(dims=(2**63,)),)), "impossible shape"),
    "sizes": (build((entry(dims=(0, 2**30, 2**30)),)), "impossible shape"),
    "type": (build((entry(kind=77),)), "unknown type 77"),
    "removed type": (build((entry(kind=4),)), "unknown type 4"),
    "rows of half a block": (build((entry(dims=(48, 2), kind=2),)), "(2, 48), whose rows are not whole Q4_0 blocks"),
    "a scalar of a block type": (build((entry(dims=(), kind=2),)), "whose rows are not whole Q4_0"),
    "offset": (build((entry(offset=8),)), "does not begin at a multiple of 32"),
    "hole": (build((entry(offset=32),), data=64), "32 bytes before the tensor 'w' belong to no tensor"),
    "far": (build((entry(offset=2**63),)), "bytes before the tensor 'w'"),
    "overlap": (build((entry("a", (16,)), entry("b", offset=32)), data=64), "tensors 'a' and 'b' overlap"),
    "short": (build(data=31), "1 bytes are missing at its end: download it again"),
    "big tensor": (build((entry(dims=(2**20, 2**10)),)), "4294967264 bytes are missing"),
    "long": (build(data=33), "1 bytes follow its last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_said(tmp_path: Path, name: str) -> None:
    data, message = DAMAGED[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as raised:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = str(raised.value)
    assert any(part in said for part in message.split("|"))
    assert said.startswith(str(path))
    assert ": " in said
    assert "\n" not in said
    assert peak < 2**20


def test_headers_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(build(pairs=(pair("a", 8, text("a" * 400)), pair("b", 0, b"\0"))))
    read_gguf(path)
    with monkeypatch.context() as patch:
        patch.setattr(header, "_MAX_HEADER_BYTES", 300)
        with pytest.raises(CheckpointError, match="takes over 300 bytes"):
            read_gguf(path)
    inner = struct.pack("<IQ", 0, 3) + bytes(3)
    path.write_bytes(build(pairs=(array(9, 2, inner + inner),)))
    read_gguf(path)
    monkeypatch.setattr(header, "_MAX_VALUES", 7)
    with pytest.raises(CheckpointError, match="over 7 values"):
        read_gguf(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_gguf(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    def fill(writer: GGUFWriter) -> None:
        writer.add_array("tokens", ["a", "bc"])
        writer.add_array("scores", [0.5, 1.0])
        writer.add_bool("flag", True)
        writer.add_float64("x", 1.5)

    tensors = {
        "norm": np.ones(3, np.float32),
        "a": ("Q4_0", random_rows("Q4_0", 2, 64)),
        "b": ("Q6_K", random_rows("Q6_K", 1, 256)),
        "c": np.ones((2, 2), np.float16),
    }
    return write(tmp_path_factory.mktemp("good") / "a.gguf", tensors, fill=fill).read_bytes()


def read_whole(path: Path) -> dict[str, mx.array]:
    """Everything of the file, or CheckpointError; anything else is a fault."""
    size = path.stat().st_size
    values = {}
    for name, tensor in read_gguf(path)[0].items():
        assert 0 < tensor.offset <= tensor.offset + tensor.nbytes <= size
        packed(tensor)
        values[name] = decode(tensor)
        mx.eval(values[name])
        assert values[name].shape == tensor.shape
    return values


def test_every_truncation_is_caught(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(good)
    whole = read_whole(path)
    data_end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(path)[0].values())
    for size in range(len(good)):
        path.write_bytes(good[:size])
        if size < data_end:
            with pytest.raises(CheckpointError):
                read_gguf(path)
        else:
            assert [*read_whole(path)] == [*whole]


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_checkpoint_error_or_a_file_that_holds_together(
    tmp_path: Path, good: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.gguf"
    path.write_bytes(damaged)
    try:
        read_whole(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


# The data.


@pytest.mark.parametrize("word", LEGACY)
def test_decodes_what_the_package_quantizes(tmp_path: Path, word: str) -> None:
    values = np.random.default_rng(1).normal(0, 0.02, (6, 96)).astype(np.float32)
    rows = quants.quantize(values, Type[word])
    decoded = decode(only(write(tmp_path / "a.gguf", {"w": (word, rows)})))
    assert same(decoded, quants.dequantize(rows, Type[word]))
    assert np.abs(np.array(decoded) - values).max() < 0.01


@pytest.mark.parametrize("shape", [(3, 512), (130, 768)])
@pytest.mark.parametrize("word", LEGACY + SUPER)
def test_decodes_any_bits(tmp_path: Path, word: str, shape: tuple[int, int]) -> None:
    rows = random_rows(word, *shape)
    decoded = decode(only(write(tmp_path / "a.gguf", {"w": (word, rows)})))
    assert decoded.shape == shape
    assert same(decoded, quants.dequantize(rows, Type[word]))
    assert (packed(only(tmp_path / "a.gguf")) is not None) == (word in PACKED_BITS)


@pytest.mark.parametrize("word", LEGACY + SUPER)
def test_decodes_extreme_scales(tmp_path: Path, word: str) -> None:
    halves = [6e-8, -6e-5, 65504, -65504, 0.0, -0.0, np.inf, np.nan]
    rows = random_rows(word, 8, 256, halves)
    with np.errstate(invalid="ignore"):
        expected = quants.dequantize(rows, Type[word])
    assert same(decode(only(write(tmp_path / "a.gguf", {"w": (word, rows)}))), expected)


@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (2, 2, 2, 256)])
@pytest.mark.parametrize("word", ["Q8_0", "Q5_K"])
def test_blocks_fill_any_shape(tmp_path: Path, word: str, shape: tuple[int, ...]) -> None:
    rows = random_rows(word, int(np.prod(shape[:-1])), 256).reshape(*shape[:-1], -1)
    tensor = only(write(tmp_path / "a.gguf", {"w": (word, rows)}))
    assert same(decode(tensor), quants.dequantize(rows, Type[word]))
    assert packed(tensor) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 5), (200, 300)])
def test_plain_numbers_stay_as_they_are(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(2).normal(size=shape).astype(dtype)
    brain = quants.quantize(values.astype(np.float32), Type.BF16)
    tensors = read_gguf(write(tmp_path / "a.gguf", {"w": values, "bf16": ("BF16", brain)}))[0]
    assert same(decode(tensors["w"]), values)
    assert decode(tensors["bf16"]).dtype == mx.bfloat16
    assert same(decode(tensors["bf16"]).astype(mx.float32), quants.dequantize(brain, Type.BF16))
    assert packed(tensors["w"]) is packed(tensors["bf16"]) is None


@pytest.mark.parametrize("word", ["IQ2_XXS", "IQ4_NL", "TQ1_0", "MXFP4", "Q8_K", "I32", "F64"])
def test_types_that_are_not_decoded_are_named(tmp_path: Path, word: str) -> None:
    kind, size = Type[word].value, block_sizes(word)[1]
    path = tmp_path / "a.gguf"
    path.write_bytes(build((entry("a.weight", (block_sizes(word)[0],), kind),), data=size))
    tensor = only(path)
    assert tensor.dtype == word
    assert word not in DECODED
    assert packed(tensor) is None
    with pytest.raises(
        CheckpointError, match=f"'a.weight' as {word}, which is not decoded: use a file made of BF16, F16"
    ):
        decode(tensor)


def test_reads_only_the_bytes_of_one_tensor_and_keeps_no_hold_on_the_file(tmp_path: Path) -> None:
    arrays = {name: ("Q4_0", random_rows("Q4_0", 4, 64, seed=at)) for at, name in enumerate("ab")}
    path = write(tmp_path / "a.gguf", arrays)
    tensors = read_gguf(path)[0]
    plain, form = decode(tensors["a"]), packed(tensors["a"])
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    expected = quants.dequantize(arrays["a"][1], Type.Q4_0)
    assert same(plain, expected)
    assert form is not None
    assert same(form.dequantize(mx.float32), expected)

    path = write(tmp_path / "b.gguf", arrays)
    tensors = read_gguf(path)[0]
    with path.open("r+b") as file:
        file.truncate(tensors["b"].offset + 1)
    assert same(decode(tensors["a"]), expected)
    for read in (decode, packed):
        with pytest.raises(CheckpointError, match="ends inside the tensor 'b': download it again"):
            read(tensors["b"])
        path.rename(tmp_path / "c.gguf")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(tensors["b"])
        (tmp_path / "c.gguf").rename(path)


@pytest.mark.parametrize("word", ["Q4_0", "Q4_K", "Q3_K"])
def test_decoding_needs_little_more_than_the_result(tmp_path: Path, word: str) -> None:
    tensor = only(write(tmp_path / "a.gguf", {"w": (word, random_rows(word, 2048, 1024))}))
    decode(tensor)
    tracemalloc.start()
    decode(tensor)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's; MLX's copy is not traced
    tracemalloc.stop()
    assert peak < 1.25 * 2048 * 1024 * 4


# The packed form.


@pytest.mark.parametrize("shape", [(1, 32), (6, 96), (130, 768)])
@pytest.mark.parametrize("word", PACKED_BITS)
def test_packed_is_exact(tmp_path: Path, word: str, shape: tuple[int, int]) -> None:
    tensor = only(write(tmp_path / "a.gguf", {"w": (word, random_rows(word, *shape))}))
    form = packed(tensor)
    assert (form.shape, form.bits, form.group_size, form.mode) == (shape, PACKED_BITS[word], 32, "affine")
    assert (form.weight.dtype, form.scales.dtype, form.biases.dtype) == (mx.uint32, mx.float16, mx.float16)
    assert form.weight.shape == (shape[0], shape[1] * form.bits // 32)
    assert form.scales.shape == form.biases.shape == (shape[0], shape[1] // 32)
    assert same(form.dequantize(mx.float32), np.array(decode(tensor)))


@pytest.mark.parametrize("word", PACKED_BITS)
def test_packed_multiplies_as_the_dense_matrix_does(tmp_path: Path, word: str) -> None:
    tensor = only(write(tmp_path / "a.gguf", {"w": (word, random_rows(word, 64, 128))}))
    form = packed(tensor)
    inputs = mx.random.normal((3, 128), key=mx.random.key(0))
    product = mx.quantized_matmul(inputs, form.weight, form.scales, form.biases, True, 32, form.bits)
    np.testing.assert_allclose(np.array(product), np.array(inputs @ decode(tensor).T), atol=2e-4)


@pytest.mark.parametrize(("word", "largest"), [("Q4_0", 8188), ("Q8_0", 511.75)])
def test_packed_widens_scales_whose_bias_would_overflow(tmp_path: Path, word: str, largest: float) -> None:
    above = np.nextafter(np.float16(largest), np.float16(1e4))
    for scale, dtype in ((largest, mx.float16), (above, mx.float32)):
        rows = random_rows(word, 8, 64, [scale, -scale, 6e-8, -6e-8, 6.1e-5, 0.0, 1e-3])
        tensor = only(write(tmp_path / f"{scale}.gguf", {"w": (word, rows)}))
        form = packed(tensor)
        assert form.scales.dtype == form.biases.dtype == dtype
        assert same(form.dequantize(mx.float32), np.array(decode(tensor)))


@pytest.mark.parametrize("word", PACKED_BITS)
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_scales_that_are_no_numbers_are_not_packed(tmp_path: Path, word: str, wrong: float) -> None:
    rows = random_rows(word, 2, 64, [1, wrong])
    assert packed(only(write(tmp_path / "a.gguf", {"w": (word, rows)}))) is None
