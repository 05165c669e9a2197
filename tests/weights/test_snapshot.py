"""HubSnapshot against real folders and a real HTTP server that answers as the hub does."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from weights.hub_server import HubServer

from qwen_image_mlx.errors import Cancelled, CheckpointError, HubError, RequestError
from qwen_image_mlx.weights.hub import _Meter
from qwen_image_mlx.weights.snapshot import HubSnapshot

REPO = "ORG/NAME"
STEM = "diffusion_pytorch_model"
ROOT = Path(__file__).parents[2]
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def shard(number: int) -> str:
    return f"{STEM}-0000{number}-of-00003.safetensors"


# Three shards, of which only the first two hold what text-to-image needs.
WEIGHT_MAP = {"blocks.0.w": shard(1), "blocks.1.w": shard(2), "visual.w": shard(3), "visual.b": shard(3)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with a sharded transformer and a VAE in one file."""
    return write_checkpoint(tmp_path / "checkpoint")


def write_checkpoint(root: Path) -> Path:
    for folder in ("transformer", "vae"):
        (root / folder).mkdir(parents=True)
        (root / folder / "config.json").write_text(json.dumps({"of": folder}))
    (root / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    random = np.random.default_rng(0)
    for file in set(WEIGHT_MAP.values()):
        names = [name for name, value in WEIGHT_MAP.items() if value == file]
        save_file({name: random.standard_normal((50, 40)).astype("f4") for name in names}, root / "transformer" / file)
    write_index(root, WEIGHT_MAP)
    save_file({"conv.w": random.standard_normal((100, 10)).astype("f4")}, root / "vae" / f"{STEM}.safetensors")
    return root


def write_index(root: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "transformer" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any connection that would leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test wants to talk to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    for name in (*PROXIES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


@pytest.fixture
def hub(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has the checkpoint; huggingface_hub looks its constants up at each use, so they can be set here."""
    from huggingface_hub import close_session, constants

    with HubServer() as server:
        values = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(cache / "no token"),
            "HF_HUB_ETAG_TIMEOUT": 1,
            "HF_HUB_DOWNLOAD_TIMEOUT": 1,
            "DOWNLOAD_CHUNK_SIZE": 1000,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits between its own retries
        close_session()  # it may hold another test's connections and proxies
        server.add(REPO, checkpoint)
        yield server
        close_session()


def data_requests(hub: HubServer) -> list[str]:
    """The names of the files whose content was asked for, in order."""
    return [
        path.split("/", 5)[-1]
        for path in hub.paths("GET")
        if path.startswith("/cdn/") or (path.startswith(f"/{REPO}/resolve/") and not path.endswith(".safetensors"))
    ]


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert ": " in text, "no cure is given"
    return text


# A directory


def test_a_directory_is_read_in_place(checkpoint: Path) -> None:
    snapshot = HubSnapshot(checkpoint)
    assert (snapshot.model, snapshot.is_local, snapshot.revision) == (str(checkpoint), True, None)
    assert snapshot.read_json("transformer/config.json") == {"of": "transformer"}
    assert snapshot.exists("vae/config.json")
    assert not snapshot.exists("vae")
    assert not snapshot.exists("processor/config.json")
    assert snapshot.file("vae/config.json") == checkpoint / "vae/config.json"
    weights = snapshot.weight_files("transformer", STEM)
    assert weights.files == tuple(checkpoint / "transformer" / shard(number) for number in (1, 2, 3))
    assert weights.index == WEIGHT_MAP
    assert {name: tensor.file.name for name, tensor in weights.tensors.items()} == WEIGHT_MAP
    weights = snapshot.weight_files("vae", STEM)
    assert (weights.files, weights.index) == ((checkpoint / f"vae/{STEM}.safetensors",), None)
    assert list(weights.tensors) == ["conv.w"]


def test_what_macos_hides_beside_weights_is_passed_over(checkpoint: Path) -> None:
    (checkpoint / "vae" / f"{STEM}.safetensors").rename(checkpoint / "vae" / "qwen_vae.safetensors")
    for name in ("._qwen_vae.safetensors", "._config.json"):
        (checkpoint / "vae" / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    snapshot = HubSnapshot(checkpoint)
    assert snapshot.names("vae") == ["vae/config.json", "vae/qwen_vae.safetensors"]
    assert snapshot.weight_files("vae", STEM).files == (checkpoint / "vae" / "qwen_vae.safetensors",)


def test_weights_beside_the_config_of_a_component_alone(checkpoint: Path) -> None:
    assert HubSnapshot(checkpoint / "vae").weight_files("", STEM).files == (checkpoint / f"vae/{STEM}.safetensors",)


def cached(checkpoint: Path, commits: list[str], **refs: str) -> Path:
    """A model's folder in the hub's cache, each commit a copy of a checkpoint that says which it is."""
    folder = checkpoint.parent / "hub" / "models--ORG--NAME"
    for commit in commits:
        shutil.copytree(checkpoint, folder / "snapshots" / commit)
        (folder / "snapshots" / commit / "said.json").write_text(json.dumps({"commit": commit}))
    for name, commit in refs.items():
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(f"{commit}\n")
    return folder


OLD, NEW = "0123456789" * 4, "abcdef0123" * 4


@pytest.mark.parametrize("inside", ["", "snapshots"])
@pytest.mark.parametrize(("commits", "refs", "revision", "meant"), [
    ([OLD], {"main": OLD}, None, OLD), ([OLD, NEW], {"main": NEW}, None, NEW), ([NEW], {}, None, NEW),
    ([OLD, NEW], {"main": NEW, "v1": OLD}, "v1", OLD), ([OLD, NEW], {"main": NEW}, OLD, OLD),
])  # fmt: skip
def test_a_model_s_folder_in_the_cache_means_one_snapshot(checkpoint, inside, commits, refs, revision, meant) -> None:
    folder = cached(checkpoint, commits, **refs) / inside
    snapshot = HubSnapshot(folder, revision=revision)
    assert snapshot.is_local
    assert snapshot.read_json("said.json") == {"commit": meant}
    assert snapshot.revision == meant
    assert HubSnapshot(folder.parent / folder.name / ("" if inside else "snapshots") / commits[0]).exists("said.json")


@pytest.mark.parametrize(("commits", "refs", "says"), [
    ([OLD, NEW], {}, "holds the snapshots 0123456789.*, not the one of main: give ORG/NAME, or .*snapshots with"),
    ([], {"main": OLD}, "holds no snapshot, not the one of main: give ORG/NAME to have it downloaded"),
    ([OLD], {"main": NEW}, "not the one of main"),
])  # fmt: skip
def test_a_cache_that_does_not_say_which_snapshot_is_meant(checkpoint: Path, commits, refs, says) -> None:
    folder = cached(checkpoint, commits, **refs)
    with pytest.raises(CheckpointError, match=says) as error:
        HubSnapshot(folder)
    one_sentence(error)


def test_a_directory_wins_over_an_id(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    Path("Qwen").mkdir()
    checkpoint.rename("Qwen/Qwen-Image")
    assert HubSnapshot("Qwen/Qwen-Image").is_local
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert HubSnapshot("~/Qwen/Qwen-Image").exists("model_index.json")


@pytest.mark.parametrize(
    "model",
    ["/no/such", "./here", "../there", "~/nowhere", "a/b/c", "C:\\x", "with space/x", "x" * 5000, "", " ", Path("a/b")],
)
def test_no_such_directory(model: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no directory") as error:
        HubSnapshot(model)
    one_sentence(error)


def test_a_file_is_not_a_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        HubSnapshot(checkpoint / "model_index.json")


def test_a_directory_has_no_revisions(checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="revision 'main' means nothing"):
        HubSnapshot(checkpoint, revision="main")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "JSON list, not an object"),
    ],
)
def test_json_that_is_none(checkpoint: Path, content: bytes, what: str) -> None:
    (checkpoint / "model_index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        HubSnapshot(checkpoint).read_json("model_index.json")
    assert "model_index.json" in one_sentence(error)


def test_a_missing_file(checkpoint: Path) -> None:
    for ask in (HubSnapshot(checkpoint).file, HubSnapshot(checkpoint).read_json):
        with pytest.raises(CheckpointError, match=r"lacks scheduler/scheduler_config\.json"):
            ask("scheduler/scheduler_config.json")


def test_all_missing_shards_are_named_and_unneeded_ones_are_not_missed(checkpoint: Path) -> None:
    for number in (1, 3):
        (checkpoint / "transformer" / shard(number)).unlink()
    snapshot = HubSnapshot(checkpoint)
    with pytest.raises(CheckpointError) as error:
        snapshot.weight_files("transformer", STEM)
    assert f"lacks transformer/{shard(1)}, transformer/{shard(3)}:" in one_sentence(error)
    with pytest.raises(CheckpointError) as error:
        snapshot.weight_files("transformer", STEM, keep=lambda name: not name.startswith("visual."))
    assert f"lacks transformer/{shard(1)}:" in one_sentence(error)
    weights = snapshot.weight_files("transformer", STEM, keep=lambda name: name == "blocks.1.w")
    assert [file.name for file in weights.files] == [shard(2)]
    assert weights.index == WEIGHT_MAP


def test_a_shard_must_be_whole(checkpoint: Path) -> None:
    path = checkpoint / "transformer" / shard(2)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors .*7 bytes are missing"):
        HubSnapshot(checkpoint).weight_files("transformer", STEM)


def test_a_shard_must_hold_what_the_index_says(checkpoint: Path) -> None:
    write_index(checkpoint, WEIGHT_MAP | {"blocks.2.w": shard(1)})
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'blocks\.2\.w'"):
        HubSnapshot(checkpoint).weight_files("transformer", STEM)


def test_tensors_the_index_does_not_name_are_kept(checkpoint: Path) -> None:
    write_index(checkpoint, {name: file for name, file in WEIGHT_MAP.items() if name != "visual.b"})
    assert "visual.b" in HubSnapshot(checkpoint).weight_files("transformer", STEM).tensors


@pytest.mark.parametrize(
    "path", ["../vae/x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "x.bin", ".."]
)
def test_an_index_may_not_leave_its_folder_or_name_a_pickle(checkpoint: Path, path: str) -> None:
    write_index(checkpoint, WEIGHT_MAP | {"w": path})
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file of its own folder") as error:
        HubSnapshot(checkpoint).weight_files("transformer", STEM, keep=lambda name: name != "w")
    assert repr(path) in one_sentence(error)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"w": 1}, {"w": [shard(1)]}, "x"])
def test_an_index_without_a_map(checkpoint: Path, weight_map: object) -> None:
    write_index(checkpoint, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        HubSnapshot(checkpoint).weight_files("transformer", STEM)


def test_pickles_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "vae" / f"{STEM}.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=rf"vae/{STEM}\.bin .*are pickles, which can run any code") as error:
        HubSnapshot(checkpoint).weight_files("vae", STEM)
    one_sentence(error)


def test_a_component_without_weights(checkpoint: Path) -> None:
    (checkpoint / "vae" / f"{STEM}.safetensors").unlink()
    for component in ("vae", "absent"):
        with pytest.raises(CheckpointError, match=f"lacks {component}/{STEM}.safetensors"):
            HubSnapshot(checkpoint).weight_files(component, STEM)


# The hub


def test_only_what_is_asked_for_is_fetched(hub: HubServer, checkpoint: Path, cache: Path) -> None:
    snapshot = HubSnapshot(REPO)
    assert (snapshot.is_local, snapshot.revision, hub.requests) == (False, None, [])
    assert snapshot.read_json("model_index.json") == {"_class_name": "QwenImagePipeline"}
    assert len(snapshot.revision) == 40
    assert snapshot.exists(f"vae/{STEM}.safetensors")
    assert not snapshot.exists("processor/config.json")
    assert data_requests(hub) == ["model_index.json"]
    weights = snapshot.weight_files("transformer", STEM, keep=lambda name: not name.startswith("visual."))
    wanted = [f"transformer/{shard(number)}" for number in (1, 2)]
    assert data_requests(hub) == ["model_index.json", f"transformer/{STEM}.safetensors.index.json", *wanted]
    assert [file.read_bytes() for file in weights.files] == [(checkpoint / name).read_bytes() for name in wanted]
    assert all(file.is_relative_to(cache) for file in weights.files)
    assert [path for path in hub.paths() if "/api/models/" in path] == [f"/api/models/{REPO}/revision/main"]


def test_a_second_run_fetches_nothing(hub: HubServer) -> None:
    files = HubSnapshot(REPO).weight_files("transformer", STEM).files
    hub.requests.clear()
    assert HubSnapshot(REPO).weight_files("transformer", STEM).files == files
    assert hub.paths() == [f"/api/models/{REPO}/revision/main"]


def test_one_snapshot_is_one_commit(hub: HubServer, checkpoint: Path) -> None:
    snapshot = HubSnapshot(REPO)
    snapshot.read_json("model_index.json")
    first = snapshot.revision
    (checkpoint / "vae/config.json").write_text('{"of": "the next commit"}')
    second = hub.add(REPO, checkpoint)
    assert snapshot.read_json("vae/config.json") == {"of": "vae"}
    assert snapshot.revision == first
    assert HubSnapshot(REPO).read_json("vae/config.json") == {"of": "the next commit"}
    assert HubSnapshot(REPO, revision=first).read_json("vae/config.json") == {"of": "vae"}
    assert HubSnapshot(REPO, revision=second).read_json("vae/config.json") == {"of": "the next commit"}


def test_what_an_earlier_commit_brought_is_not_fetched_or_announced_again(
    hub: HubServer, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    HubSnapshot(REPO).weight_files("transformer", STEM)
    (checkpoint / "README.md").write_text("more words")
    commit = hub.add(REPO, checkpoint)
    hub.requests.clear()
    caplog.set_level(logging.INFO, "qwen_image_mlx")
    snapshot = HubSnapshot(REPO)
    snapshot.weight_files("transformer", STEM)
    assert snapshot.revision == commit
    assert data_requests(hub) == []
    assert caplog.messages == []


def test_the_token_goes_to_the_hub_only(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    HubSnapshot(REPO).weight_files("vae", STEM)
    assert {
        request.authorization for request in hub.requests if "resolve" in request.path or "/api/models" in request.path
    } == {"Bearer hf_secret"}
    assert [request.authorization for request in hub.requests if request.path.startswith("/cdn/")] == [None]


def test_a_missing_file_on_the_hub(hub: HubServer, checkpoint: Path) -> None:
    (checkpoint / "transformer" / shard(2)).unlink()
    path = checkpoint / "vae" / f"{STEM}.safetensors"
    path.rename(path.with_suffix(".bin"))
    hub.add(REPO, checkpoint)
    snapshot = HubSnapshot(REPO)
    with pytest.raises(CheckpointError, match=r"ORG/NAME at commit [0-9a-f]{40} lacks scheduler/x\.json"):
        snapshot.read_json("scheduler/x.json")
    with pytest.raises(CheckpointError, match=f"lacks transformer/{shard(2)}:"):
        snapshot.weight_files("transformer", STEM)
    with pytest.raises(CheckpointError, match="are pickles"):
        snapshot.weight_files("vae", STEM)
    assert data_requests(hub) == [f"transformer/{STEM}.safetensors.index.json"]


def test_no_such_model(hub: HubServer) -> None:
    with pytest.raises(HubError, match=r"the hub has no model named ORG/OTHER.*HF_TOKEN if it is private") as error:
        HubSnapshot("ORG/OTHER").exists("model_index.json")
    one_sentence(error)


@pytest.mark.parametrize(
    ("revision", "what"),
    [
        ("v9", "ORG/NAME has no revision 'v9'"),
        ("../../x", r"'\.\./\.\./x' cannot be a revision"),
        ("/etc", "'/etc' cannot be a revision"),
    ],
)
def test_no_such_revision(hub: HubServer, revision: str, what: str) -> None:
    with pytest.raises(HubError, match=what) as error:
        HubSnapshot(REPO, revision=revision).exists("model_index.json")
    one_sentence(error)


@pytest.mark.parametrize("match", ["/api/models/", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "code", "what"),
    [
        (403, "GatedRepo", r"ORG/NAME is gated: accept its conditions at http://127\.0\.0\.1:\d+/ORG/NAME"),
        (401, "RepoNotFound", "no model named ORG/NAME"),
        (401, "", "does not accept your token"),
        (403, "", "may not read"),
        (404, "", "no model named ORG/NAME"),
        (418, "", "HTTP status 418"),
    ],
)
def test_the_hub_refuses(hub: HubServer, match: str, status: int, code: str, what: str) -> None:
    hub.fail(match, status, code)
    with pytest.raises(HubError, match=what) as error:
        HubSnapshot(REPO).read_json("model_index.json")
    one_sentence(error)


def test_a_listed_file_that_is_gone(hub: HubServer) -> None:
    hub.fail("/resolve/", 404, "EntryNotFound")
    with pytest.raises(HubError, match=r"lists model_index\.json of ORG/NAME but does not have it"):
        HubSnapshot(REPO).read_json("model_index.json")


def break_hub(hub: HubServer, how: str) -> None:
    from huggingface_hub import close_session

    if how in ("refused", "dropped"):
        hub.close()
        if how == "refused":
            close_session()  # an open connection would still be served, and dropped
    elif how == "stalled":
        hub.stall("/")
    else:
        hub.fail("/", int(how))


UNREACHABLE = ["refused", "dropped", "stalled", "500", "503", "429"]


@pytest.mark.parametrize("how", UNREACHABLE)
def test_out_of_reach_with_nothing_cached(hub: HubServer, how: str) -> None:
    break_hub(hub, how)
    start = time.monotonic()
    with pytest.raises(HubError, match=r"cannot be reached .* nothing of ORG/NAME is in the cache") as error:
        HubSnapshot(REPO).exists("model_index.json")
    one_sentence(error)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("how", UNREACHABLE)
def test_out_of_reach_with_a_cache(hub: HubServer, how: str, caplog: pytest.LogCaptureFixture) -> None:
    before = HubSnapshot(REPO)
    files = before.weight_files("transformer", STEM).files
    break_hub(hub, how)
    snapshot = HubSnapshot(REPO)
    assert snapshot.weight_files("transformer", STEM).files == files
    assert not snapshot.exists("model_index.json")
    assert snapshot.revision == before.revision
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("qwen_image_mlx")]
    assert len(warnings) == 1
    assert "using what the cache holds of ORG/NAME" in warnings[0]
    with pytest.raises(HubError, match=f"the cache does not hold vae/{STEM}.safetensors of ORG/NAME"):
        snapshot.weight_files("vae", STEM)


def test_an_answer_that_is_not_the_hubs_counts_as_out_of_reach(hub: HubServer) -> None:
    hub.fail("/api/models/", 200)  # with "{}" for a body, as good as a login page
    with pytest.raises(HubError, match="cannot be reached"):
        HubSnapshot(REPO).exists("model_index.json")


@pytest.mark.parametrize("by_argument", [True, False])
def test_offline(
    hub: HubServer, by_argument: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    hub.add(REPO, write_checkpoint(Path(constants.HF_HUB_CACHE).parent / "tagged"), revision="refs/pr/1")
    online = HubSnapshot(REPO, revision="refs/pr/1")
    files = online.weight_files("transformer", STEM).files
    hub.requests.clear()
    if not by_argument:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("refs/pr/1", online.revision):
        snapshot = HubSnapshot(REPO, revision=revision, offline=by_argument)
        assert snapshot.weight_files("transformer", STEM).files == files
        assert snapshot.revision == online.revision
        with pytest.raises(HubError, match=r"the cache does not hold model_index\.json"):
            snapshot.read_json("model_index.json")
    for model, revision in ((REPO, None), (REPO, "0" * 40), ("ORG/OTHER", None)):
        with pytest.raises(HubError, match=f"nothing of {model} at revision .* offline mode is on: run once online"):
            HubSnapshot(model, revision=revision, offline=by_argument).exists("model_index.json")
    assert hub.requests == []
    assert caplog.messages == []


def test_a_broken_transfer_is_resumed_where_it_broke(hub: HubServer, checkpoint: Path) -> None:
    hub.cut(shard(2), after=3000)
    try:
        files = HubSnapshot(REPO).weight_files("transformer", STEM).files
    except HubError:  # huggingface_hub 1.x gives up at once and resumes in the next call; 2.x does so within the call
        files = HubSnapshot(REPO).weight_files("transformer", STEM).files
    assert files[1].read_bytes() == (checkpoint / "transformer" / shard(2)).read_bytes()
    ranges = [
        request.range for request in hub.requests if request.path.startswith("/cdn/") and shard(2) in request.path
    ]
    assert ranges == [None, "bytes=3000-"]


def test_a_transfer_that_stays_broken_keeps_the_complete_files(hub: HubServer) -> None:
    hub.cut(shard(2), after=0, times=None)
    with pytest.raises(HubError, match=f"fetching transformer/{shard(2)} of ORG/NAME failed") as error:
        HubSnapshot(REPO).weight_files("transformer", STEM)
    assert "run again" in one_sentence(error)
    hub.faults.clear()
    hub.requests.clear()
    HubSnapshot(REPO).weight_files("transformer", STEM)
    assert data_requests(hub) == [f"transformer/{shard(number)}" for number in (2, 3)]


def test_a_file_of_another_size_than_listed(hub: HubServer) -> None:
    name = f"vae/{STEM}.safetensors"
    hub.lies[name] = 5000
    for _ in range(2):
        with pytest.raises(HubError, match=r"arrived with \d+ bytes where the hub lists 5000: run again"):
            HubSnapshot(REPO).weight_files("vae", STEM)
    hub.lies.clear()
    HubSnapshot(REPO).weight_files("vae", STEM)


def test_a_cached_file_cut_short_is_fetched_anew(hub: HubServer, checkpoint: Path) -> None:
    snapshot = HubSnapshot(REPO)
    (file,) = snapshot.weight_files("vae", STEM).files
    os.truncate(file.resolve(), 100)
    (again,) = snapshot.weight_files("vae", STEM).files
    assert again.read_bytes() == (checkpoint / f"vae/{STEM}.safetensors").read_bytes()
    # the same on a disk without symbolic links, where the name is the content
    file.resolve().unlink()
    file.unlink()
    file.write_bytes(b"cut")
    (again,) = snapshot.weight_files("vae", STEM).files
    assert again.read_bytes() == (checkpoint / f"vae/{STEM}.safetensors").read_bytes()
    # and where only the content is cached, by another commit
    os.truncate(file.resolve(), 100)
    (checkpoint / "README.md").write_text("more words")
    hub.add(REPO, checkpoint)
    (again,) = HubSnapshot(REPO).weight_files("vae", STEM).files
    assert again.read_bytes() == (checkpoint / f"vae/{STEM}.safetensors").read_bytes()


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(Path(path))
        return namedtuple("usage", "total used free")(10**15, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return asked


def test_a_full_disk_is_seen_before_the_first_byte(
    hub: HubServer, checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = size(checkpoint / f"vae/{STEM}.safetensors")
    asked = disk_with(monkeypatch, int(needed * 1.04))
    # asked by commit, so that not even a ref is written and the cache's folder does not exist yet
    snapshot = HubSnapshot(REPO, revision=hub.add(REPO, checkpoint))
    with pytest.raises(HubError, match=r"vae of ORG/NAME needs .* MB but only .* MB are free.*HF_HOME") as error:
        snapshot.weight_files("vae", STEM)
    one_sentence(error)
    assert data_requests(hub) == []
    assert asked == [cache.parents[1]]
    disk_with(monkeypatch, int(needed * 1.06))
    snapshot.weight_files("vae", STEM)
    disk_with(monkeypatch, 0)
    snapshot.weight_files("vae", STEM)


def test_a_download_is_announced(hub: HubServer, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qwen_image_mlx")
    snapshot = HubSnapshot(REPO)
    snapshot.file(f"transformer/{shard(1)}")
    snapshot.file(f"transformer/{STEM}.safetensors.index.json")
    caplog.clear()
    snapshot.weight_files("transformer", STEM)
    megabytes = sum(size(checkpoint / "transformer" / shard(number)) for number in (2, 3)) / 1e6
    assert caplog.messages == [f"downloading transformer of ORG/NAME: 2 files, {megabytes:.1f} MB"]


def test_sizes_are_in_decimal_gigabytes(
    hub: HubServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_with(monkeypatch, free=10**12)
    hub.lies[f"vae/{STEM}.safetensors"] = 40_860_000_000
    caplog.set_level(logging.INFO, "qwen_image_mlx")
    with pytest.raises(HubError):
        HubSnapshot(REPO).weight_files("vae", STEM)
    assert "downloading vae of ORG/NAME: 1 file, 40.9 GB" in caplog.messages


def test_progress_adds_up_over_files(hub: HubServer, checkpoint: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    threads = set()

    def progress(*call: object) -> None:
        calls.append(call)
        threads.add(threading.get_ident())

    HubSnapshot(REPO, progress=progress).weight_files("transformer", STEM)
    total = sum(size(checkpoint / "transformer" / shard(number)) for number in (1, 2, 3))
    weights = [(done, of) for name, done, of in calls if name == "transformer"]
    assert {name for name, _, _ in calls} == {f"transformer/{STEM}.safetensors.index.json", "transformer"}
    assert weights[-1] == (total, total)
    assert weights == sorted(set(weights))
    assert len(weights) > 20
    assert threads == {threading.get_ident()}


def test_progress_never_goes_back_when_a_transfer_does() -> None:
    calls: list[tuple[str, int, int]] = []
    bar = _Meter("vae", 100, lambda *call: calls.append(call)).tqdm_class()(total=100, initial=0)
    for step in (50, -50, 30, 40, 60):
        bar.update(step)
    assert [done for _, done, _ in calls] == [50, 70, 100]


def test_nothing_is_shown_unasked(hub: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    HubSnapshot(REPO).weight_files("transformer", STEM)
    HubSnapshot(REPO, progress=lambda *_: None).weight_files("vae", STEM)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Cancelled])
def test_a_download_can_be_stopped(hub: HubServer, stop: type[BaseException]) -> None:
    def progress(*_: object) -> None:
        raise stop

    with pytest.raises(stop):
        HubSnapshot(REPO, progress=progress).weight_files("vae", STEM)
    HubSnapshot(REPO).weight_files("vae", STEM)


def test_xet_downloads_are_counted_once() -> None:
    """Feed huggingface_hub's own Xet reporter, which has two counts per file: bytes received and bytes on disk."""
    reporting = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    if not hasattr(reporting, "XetDownloadProgressReporter"):
        pytest.skip("this version reports Xet downloads through one bar")
    calls: list[tuple[str, int, int]] = []
    meter = _Meter("transformer", 100, lambda *call: calls.append(call))
    report = namedtuple(
        "report",
        "total_bytes total_bytes_completed total_transfer_bytes_completed total_bytes_completion_rate "
        "total_transfer_bytes_completion_rate",
    )
    with reporting.XetDownloadProgressReporter(
        reconstruction_desc="a", total=100, log_level=logging.INFO, tqdm_class=meter.tqdm_class()
    ) as reporter:
        for written, received in ((0, 50), (40, 60), (100, 90)):
            reporter.update_progress(report(100, written, received, 1.0, 1.0))
    assert calls == [("transformer", 40, 100), ("transformer", 100, 100)]


# The environment, in processes of their own since huggingface_hub reads it when it is imported


def run_python(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and name not in PROXIES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_environment_is_honoured(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "from qwen_image_mlx.weights.snapshot import HubSnapshot\n"
        f"print(HubSnapshot({REPO!r}).file('model_index.json'))"
    )
    home = tmp_path / "own home"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret"}
    path = run_python(code, **environment)
    assert Path(path).is_relative_to(home)
    assert {request.authorization for request in hub.requests if "resolve" in request.path} == {"Bearer hf_secret"}
    hub.requests.clear()
    assert run_python(code, HF_HUB_OFFLINE="1", **environment) == path
    assert hub.requests == []


def test_a_directory_needs_no_huggingface_hub(checkpoint: Path) -> None:
    code = (
        "import sys\n"
        "from qwen_image_mlx.weights.snapshot import HubSnapshot\n"
        f"HubSnapshot({str(checkpoint)!r}).weight_files('transformer', {STEM!r})\n"
        "print('huggingface_hub' in sys.modules)"
    )
    assert run_python(code) == "False"
