"""What is found in a folder or a manifest, and one sentence for everything that is wrong with it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.training.examples import Example, bucket_of, buckets_of, read_examples


def image(path, size=(8, 8), kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, kind)
    return path


def manifest(folder, *rows):
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_folder_of_images_with_captions(tmp_path):
    for name, caption in {"b.PNG": "ein Fuchs 🦊\n", "a.jpg": "a fox"}.items():
        image(tmp_path / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    for hidden in ("._a.jpg", "._a.txt", ".DS_Store"):  # which macOS writes
        (tmp_path / hidden).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert read_examples(tmp_path, "t2i") == [
        Example("a fox", tmp_path / "a.jpg"), Example("ein Fuchs 🦊", tmp_path / "b.PNG"),
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["folder", "file"])
def test_manifests_of_every_task(tmp_path, given):
    for name in ("a.png", "b.png", "sub/0.png", "sub/1.png"):
        image(tmp_path / name)
    a, b, layers = tmp_path / "a.png", tmp_path / "b.png", (tmp_path / "sub/0.png", tmp_path / "sub/1.png")
    rows = {
        "t2i": ({"image": "a.png", "caption": "x"}, Example("x", a)),
        "edit": ({"source": "a.png", "target": "b.png", "instruction": "y"}, Example("y", b, (a,))),
        "layered": ({"image": "a.png", "layers": ["sub/0.png", "sub/1.png"], "caption": "z"},
                    Example("z", a, layers=layers)),
    }  # fmt: skip
    for task, (row, example) in rows.items():
        path = manifest(tmp_path, row, "", row)
        assert read_examples(path if given == "file" else str(tmp_path), task) == [example, example]
    manifest(tmp_path, {"source": ["a.png", "b.png"], "target": "b.png", "instruction": "join them"})
    assert read_examples(tmp_path, "edit") == [Example("join them", b, (a, b))]


def broken(tmp_path):
    """(what is wrong, the data, the task, what is said)"""

    def folder(name):
        path = tmp_path / name
        path.mkdir()
        image(path / "a.png")
        return path

    yield tmp_path / "none", "t2i", "do not exist"
    yield "/dev/null", "t2i", "neither a folder nor a file"
    yield "~nosuchuser/x", "t2i", "leads nowhere"
    yield "", "t2i", "data is empty"
    yield (tmp_path / "empty", (tmp_path / "empty").mkdir())[0], "t2i", "holds nothing to train on"
    yield folder("silent"), "t2i", r"1 of 1 images in .* have no caption in a .txt file of the same name: a.png"
    blank = folder("blank")
    (blank / "a.txt").write_text(" \n")
    yield blank, "t2i", r"1 of 1 captions are missing or empty: .*a\.png"
    twice = folder("twice")
    image(twice / "a.jpg")
    (twice / "a.txt").write_text("x")
    yield twice, "t2i", r"share a caption, because only their endings differ: a\.jpg, a\.png"
    yield folder("edit"), "edit", r"has no metadata\.jsonl; training edit needs one, with target, source, instruction"
    rows = [
        ("no json", "{", "line 1 .* is not JSON"), ("list", "[]", "line 1 .* is not a JSON object"),
        ("no image", {"caption": "x"}, "line 1 .* has no image"),
        ("no text", {"image": "a.png", "caption": 5}, "line 1 .* has no caption"),
        ("half a character", r'{"image": "a.png", "caption": "\ud800"}',
         r"line 1 .* has no caption \(text, prompt\), or no text in it"),
        ("gone", {"image": "b.png", "caption": "x"}, r"1 images are missing: .*b\.png"),
        ("too long", {"image": "a" * 5000, "caption": "x"}, r"1 images are missing: .{300}$"),
        ("no caption", {"image": "a.png"}, "1 of 1 captions are missing or empty"),
    ]  # fmt: skip
    for name, row, said in rows:
        path = folder(name)
        manifest(path, row)
        yield path, "t2i", said
    path = folder("layers")
    manifest(path, {"image": "a.png", "layers": [], "caption": "x"})
    yield path, "layered", "line 1 .* has no layers"
    path = folder("binary")
    (path / "a.txt").write_bytes(b"\xff\xfe\xff")
    yield path, "t2i", r"a\.txt cannot be read as text"


def test_every_fault_is_one_sentence(tmp_path):
    for data, task, said in broken(tmp_path):
        with pytest.raises(RequestError, match=said) as raised:
            read_examples(data, task)
        assert "\n" not in str(raised.value)


def test_a_line_of_a_manifest_ends_with_a_line_feed_alone(tmp_path):
    image(tmp_path / "a.png")
    for space in "\u2028\x85":
        (tmp_path / "metadata.jsonl").write_bytes(f'{{"image": "a.png", "caption": "a{space}fox"}}\r\n'.encode())
        assert read_examples(tmp_path, "t2i") == [Example(f"a{space}fox", tmp_path / "a.png")]


@pytest.mark.parametrize("row", [
    {"image": "a.png", "caption": None}, {"image": None, "caption": "a"}, {"image": "x" * 5000, "caption": "a"},
    {"image": "a\0b", "caption": "a"}, {"image": "a.png", "caption": "a" * 1_000_001}, {"image": ["a.png"]}, [], None,
])  # fmt: skip
def test_a_line_that_means_nothing_is_one_sentence(tmp_path, row):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(RequestError) as caught:
        read_examples(tmp_path, "t2i")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "狐" * 83 + ".png"])
def test_names_too_long_for_a_caption_are_said(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(RequestError, match=r"1 of 1 images .* have no caption"):
        read_examples(tmp_path, "t2i")


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_captions_and_manifests_have_a_bound(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(RequestError, match=r"more than the maximum of 64 MB"):
        read_examples(tmp_path, "t2i")


def test_long_lists_are_cut_short(tmp_path):
    for n in range(9):
        image(tmp_path / f"{n}.png")
    with pytest.raises(RequestError, match=r"9 of 9 .*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 4 more$"):
        read_examples(tmp_path, "t2i")


def captioned(path, caption="a fox", ending=".txt"):
    image(path).with_suffix(ending).write_text(caption)
    return path


def test_every_format_that_is_read_is_trained_on_and_told(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.avif", "b.gif", "c.webp", "d.jp2", "e.tif"):
        captioned(tmp_path / name)
    assert [example.image.name for example in read_examples(tmp_path, "t2i")] == [
        "a.avif", "b.gif", "c.webp", "d.jp2", "e.tif",
    ]  # fmt: skip
    assert "1 .avif, 1 .gif, 1 .jp2, 1 .tif, 1 .webp images" in caplog.text


@pytest.mark.parametrize("name", ["b.heic", "b.HEIF", "b.jxl", "b.dng", "b.svg", "b.psd"])
def test_formats_that_are_not_read_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("qwen_image_mlx.images.formats.formats", lambda: ["PNG"])
    captioned(tmp_path / "a.png")
    (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(RequestError, match=rf"1 files in .* not read: {name}; convert them to JPEG .*sips"):
        read_examples(tmp_path, "t2i")


def test_captions_of_other_trainers(tmp_path):
    captioned(tmp_path / "a.png", "a fox", ".caption")
    captioned(tmp_path / "b.png", "a cat")
    (tmp_path / "b.caption").write_text("a cat\n")
    assert [example.caption for example in read_examples(tmp_path, "t2i")] == ["a fox", "a cat"]
    (tmp_path / "b.caption").write_text("a dog")
    with pytest.raises(RequestError, match=r"two captions, in \.txt and \.caption, that differ: b\.png"):
        read_examples(tmp_path, "t2i")


def test_what_is_left_out_is_named(tmp_path, caplog):
    captioned(tmp_path / "a.png")
    (tmp_path / "alone.txt").write_text("x")
    image(tmp_path / "samples" / "s.png")
    assert len(read_examples(tmp_path, "t2i")) == 1
    assert "1 files in" in caplog.text
    assert "have no image of the same name and are left out: alone.txt" in caplog.text
    assert "and are left out: samples/s.png" in caplog.text


@pytest.mark.parametrize("listed", [True, False])
def test_images_deep_inside_are_named(tmp_path, caplog, listed):
    for place in ("a.png", "set/b.png", "set/deep/c.jfif", "10_fox/d.png", "10_fox/more/e.avif", ".hidden/f.png"):
        image(tmp_path / place, kind="PNG").with_suffix(".txt").write_text("x")
    (tmp_path / "set/g.jxl").write_bytes(b"x")
    if listed:
        manifest(tmp_path, {"image": "a.png", "caption": "x"})
    examples = read_examples(tmp_path, "t2i")
    assert len(examples) == (1 if listed else 11)
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    taken = set() if listed else {"10_fox/d.png"}
    for name in {"set/b.png", "set/deep/c.jfif", "10_fox/d.png", "10_fox/more/e.avif", "set/g.jxl"} - taken:
        assert name in said
    assert "hidden" not in said


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPEG"])
def test_jpegs_by_other_names_are_trained_on(tmp_path, ending):
    image(tmp_path / f"a{ending}", kind="JPEG").with_suffix(".txt").write_text("x")
    assert [example.image.name for example in read_examples(tmp_path, "t2i")] == [f"a{ending}"]


def test_folders_that_say_how_often_they_count(tmp_path, caplog):
    captioned(tmp_path / "3_red fox" / "a.png")
    captioned(tmp_path / "1_cat" / "b.png", "a cat")
    found = read_examples(tmp_path, "t2i")
    assert [example.caption for example in found] == ["a cat", "a fox", "a fox", "a fox"]
    assert "3_red fox: 1 images, each counted 3 times" in caplog.text
    image(tmp_path / "1_cat" / "silent.png")
    with pytest.raises(RequestError, match=r"have no caption .*silent\.png"):
        read_examples(tmp_path, "t2i")


@pytest.mark.parametrize(("task", "row"), [
    ("t2i", {"file_name": "a.png", "text": "a fox"}),
    ("t2i", {"file_name": "a.png", "caption": "a fox", "text": None}),
    ("t2i", {"image": "a.png", "prompt": "a fox"}),
    ("edit", {"edited_image": "a.png", "original_image": "b.png", "edit_prompt": "a fox"}),
    ("edit", {"file_name": "a.png", "input_image": "b.png", "text": "a fox"}),
    ("layered", {"file_name": "a.png", "layers": ["b.png"], "text": "a fox"}),
])  # fmt: skip
def test_manifests_of_others(tmp_path, task, row):
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    manifest(tmp_path, row)
    (example,) = read_examples(tmp_path, task)
    assert (example.caption, example.image) == ("a fox", tmp_path / "a.png")
    if task != "t2i":
        assert example.files == (tmp_path / "a.png", tmp_path / "b.png")


def test_a_manifest_as_csv(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name)
    path = tmp_path / "metadata.csv"
    path.write_text('file_name,text\na.png,"a fox, red"\nb.png,a cat\n')
    found = read_examples(tmp_path, "t2i")
    assert [example.caption for example in found] == ["a fox, red", "a cat"]
    assert read_examples(path, "t2i") == found
    assert "1 files in" in caplog.text
    assert "are not in its manifest and are left out: c.png" in caplog.text
    path.write_text('file_name,text\na.png,"a fox')
    with pytest.raises(RequestError, match=r"metadata\.csv is not CSV"):
        read_examples(tmp_path, "t2i")
    path.write_text("name,words\na.png,x\n")
    with pytest.raises(RequestError, match=r"line 2 .* has no image \(file_name\)"):
        read_examples(tmp_path, "t2i")
    manifest(tmp_path, {"image": "a.png", "caption": "x"})
    with pytest.raises(RequestError, match="give the one that counts"):
        read_examples(tmp_path, "t2i")


@pytest.mark.parametrize("inside", ["train", "photos"])
def test_examples_one_folder_down_are_found(tmp_path, inside):
    captioned(tmp_path / inside / "a.png")
    with pytest.raises(RequestError, match=f"holds nothing to train on: give .*{inside}, which does"):
        read_examples(tmp_path, "t2i")


@given(st.sampled_from([64, 256, 512, 768, 1024, 2048]), st.integers(1, 5000), st.integers(1, 5000))
def test_buckets_are_sizes_that_a_model_generates_at_the_area_that_was_asked_for(resolution, width, height):
    buckets = buckets_of(resolution)
    assert buckets[0] == (resolution, resolution)
    assert len({*buckets}) == len(buckets) <= 35
    bucket = bucket_of((width, height), buckets)
    assert all(side % 16 == 0 for side in bucket)
    assert 0.85 < bucket[0] * bucket[1] / resolution**2 < 1.15
    if bucket[0] != bucket[1]:
        assert (bucket[0] > bucket[1]) == (width > height)
    if resolution >= 256 and 1 / 4 <= width / height <= 4:
        assert 0.9 < bucket[0] / bucket[1] / (width / height) < 1.1
