"""What a report says, and what it does not tell."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest

from qwen_image_mlx.doctor import report
from qwen_image_mlx.doctor.outcome import Outcome
from qwen_image_mlx.errors import CheckpointError


def made(**verdicts):
    groups = {}
    for name, verdict in verdicts.items():
        outcome = Outcome(f"{name} is fine", {"gemm_gflops": 100.0, "deep": {"peak_bytes": 10**9}, "device": "CPU"})
        if verdict != "ok":
            outcome.find(verdict, f"{name} is {verdict}")
        groups[name] = outcome.as_dict() | {"seconds": 1.0, "peak_bytes": 2 * 10**9}
    return report.summarize({"version": 1, "program": "1", "created": "2026-01-01", "variables": {}, "groups": groups})


@pytest.mark.parametrize(("verdicts", "code"), [
    (["ok", "ok"], 0), (["ok", "odd"], 1), (["slow", "ok"], 1), (["lost", "ok"], 1), (["wrong", "lost"], 2),
])  # fmt: skip
def test_exit_codes(verdicts, code):
    assert made(**dict(zip(("env", "rates"), verdicts, strict=True)))["exit"] == code


def test_the_worst_finding_is_the_verdict_and_others_are_said():
    outcome = Outcome("fine")
    outcome.find("odd", "a")
    outcome.find("wrong", "b")
    outcome.find("wrong", "c")
    found = outcome.as_dict()
    assert (found["verdict"], found["sentence"]) == ("wrong", "b")
    assert report.other_findings({"groups": {"probe": found}}) == ["probe    odd   a", "probe    WRONG c"]


def test_the_issue_holds_verdicts_and_figures():
    issue = made(env="ok", rates="slow")["issue"]
    assert "| rates | slow | rates is slow |" in issue
    assert "gemm_gflops" in issue
    assert "100 GFLOP/s" in issue
    assert "1.00 GB" in issue


@pytest.mark.parametrize(("text", "clean"), [
    ("cannot read /Users/jane/models/a b", "cannot read <path> b"),
    ("File '/home/x/y.py', line 3", "File '<path>', line 3"),
    ("Qwen/Qwen-Image-2512 at 9.6 GB/s, and 1/2", "Qwen/Qwen-Image-2512 at 9.6 GB/s, and 1/2"),
    ("https://example.org/a/b", "https://example.org/a/b"),
    (r"C:\Users\jane\x", "<path>"),
])  # fmt: skip
def test_paths_are_left_out(text, clean):
    assert report.scrub({"a": [text]}) == {"a": [clean]}


def test_user_and_host_are_left_out(monkeypatch):
    report._names.cache_clear()
    monkeypatch.setattr(getpass, "getuser", lambda: "janedoe")
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-mac.local")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/Users/janehome")))
    try:
        said = report.scrub("janedoe on janes-mac.local, janehome; janedoes")
    finally:
        report._names.cache_clear()
    assert said == "<user> on <host>, <user>; janedoes"


def test_differences():
    old, new = made(env="ok", rates="ok"), made(env="ok", rates="slow")
    new["groups"]["rates"]["figures"]["gemm_gflops"] = 50.0
    new["groups"]["env"]["figures"]["gemm_gflops"] = 105.0
    for found, errors in ((old, (0.0, 1e-7, 1e-3)), (new, (0.0, 1e-6, 2e-3))):
        found["groups"]["env"]["figures"] |= dict(zip(("a_error", "b_error", "c_error"), errors, strict=True))
    del new["groups"]["env"]["figures"]["deep"]
    lines = report.differences(old, new)
    assert lines == [
        "env.c_error: 1.0e-03 -> 2.0e-03 (2.00x)",
        "rates: ok -> slow: rates is slow",
        "rates.gemm_gflops: 100 GFLOP/s -> 50 GFLOP/s (0.50x)",
    ]


@pytest.mark.parametrize(("content", "said"), [
    ("{", "not a readable report"), ("[]", "is not a report"), ('{"groups": {}, "version": 2}', "has version 2"),
    ('{"groups": {"env": {}}, "version": 1}', "damaged"), (None, "not a readable report"),
])  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path, content, said):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=said):
        report.read_report(path)


def test_a_report_is_read_back(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(made(env="ok")))
    assert report.read_report(path)["exit"] == 0


def test_numbers_beyond_a_float_are_passed_over():
    old, new = made(env="ok"), made(env="ok")
    old["groups"]["env"]["figures"] |= {"gemm_gflops": 10**400, "peak_bytes": float("nan")}
    new["groups"]["env"]["figures"]["peak_bytes"] = 1
    assert report.differences(old, new) == []
