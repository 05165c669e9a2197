"""What a server asks for at its door: tokens that clients can send, from files that can be one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.server.listen import read_token


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    return path


@pytest.mark.parametrize("content", [b"s3cret-!~", b"  s3cret-!~\n", b"s3cret-!~\r\n"])
def test_a_token_is_a_file_s_one_word(file, content):
    file.write_bytes(content)
    assert read_token(str(file)) == "s3cret-!~"


@pytest.mark.parametrize(("content", "says"), [
    (b"", "one word"),
    (b"short", "one word"),
    (b"two words-of-it", "one word"),
    (b"x" * 1025, "one word"),
    (b"x" * (5 << 20), "one word"),
    (b"\0" * 16, "ASCII"),
    (b"a-token\0-of-it", "ASCII"),
    (b"a-token\x07-of-it", "ASCII"),
    (b"a-token\x7f-of-it", "ASCII"),
    ("ein-schlüssel".encode(), "ASCII"),
    (b"\xff\xfe-of-a-token", "ASCII"),
])  # fmt: skip
def test_a_token_that_no_client_can_send_is_refused(file, content, says):
    file.write_bytes(content)
    with pytest.raises(RequestError, match=says):
        read_token(str(file))


@pytest.mark.parametrize(("path", "says"), [
    ("", "is empty"),
    (os.devnull, "not a regular file"),
    ("/dev/zero", "not a regular file"),
    (".", "not a regular file"),
    ("~nosuchuser-of-this-machine/x", "unknown user"),
    ("a\0b", "not a valid file name"),
    ("none/of/it", "cannot be read"),
])  # fmt: skip
def test_what_is_no_token_file_is_refused(path, says):
    with pytest.raises(RequestError, match=says):
        read_token(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(RequestError, match="not a regular file"):
        read_token(str(tmp_path / "pipe"))
