"""The command: exit codes, verdicts, the report, what is refused. Runs every group once."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest
from commands import error_line

from qwen_image_mlx.cli.main import main
from qwen_image_mlx.doctor.groups import NAMES


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["doctor", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(exit code, report) of a run of all groups, as a user would run it."""
    path = tmp_path_factory.mktemp("doctor") / "report.json"
    return main(["doctor", "--json", str(path)]), json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.process
def test_this_machine_is_sound(whole):
    code, report = whole
    verdicts = {name: group["verdict"] for name, group in report["groups"].items()}
    assert verdicts == dict.fromkeys(NAMES, "ok"), report["issue"]
    assert (code, report["exit"], report["verdict"], report["version"]) == (0, 0, "sound", 1)


@pytest.mark.process
def test_the_report_has_every_group_s_figures(whole):
    groups = whole[1]["groups"]
    for name, figure in {
        "env": "mlx", "limits": "plans", "probe": "gemm-bf16-12288_error", "parity": "transformer-reference",
        "picture": "demo-edit", "rates": "pass_1024_s", "block": "guided", "vae": "decode", "disk": "read_gbs",
        "errors": "cancel_s",
    }.items():  # fmt: skip
        assert groups[name]["figures"][figure], name
    assert len(groups["parity"]["figures"]) == 13
    assert all(group["peak_bytes"] < 2.5e9 for group in groups.values())


@pytest.mark.process
def test_the_report_names_nobody(whole):
    text = json.dumps(whole[1])
    for secret in (str(Path.cwd()), str(Path.home()) + "/", socket.gethostname(), "/tmp/"):
        assert secret not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


@pytest.mark.process
def test_a_report_is_compared_with_itself_and_an_earlier_one(whole, run, tmp_path):
    old = whole[1]
    old["groups"]["env"]["verdict"] = "slow"
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    code, out, _ = run("--only", "env", "--compare", path)
    assert code == 0
    assert next(line for line in out if line.startswith("env: slow -> ok: "))


@pytest.mark.process
def test_a_falsified_operation_is_named(run, tmp_path):
    path = tmp_path / "report.json"
    code, out, _ = run("--only", "probe,env", "--env", "QWEN_IMAGE_DOCTOR_FALSIFY=gemm-bf16-12288", "--json", path)
    assert code == 2
    assert [line.split()[0] for line in out[:2]] == ["env", "probe"]  # in the table's order
    assert "WRONG this MLX build miscomputes gemm-bf16-12288" in out[1]
    assert "mlx#3797" in out[1]
    assert "wrong numbers" in out
    assert json.loads(path.read_text())["variables"] == {"QWEN_IMAGE_DOCTOR_FALSIFY": "gemm-bf16-12288"}
    issue = out.index("--- Body of a GitHub issue ---")
    assert "gemm-bf16-12288" in "\n".join(out[issue:])


@pytest.mark.process
def test_a_killed_group_loses_itself_alone(run):
    code, out, _ = run("--only", "env,limits,errors", "--env", "QWEN_IMAGE_DOCTOR_CRASH=limits")
    assert code == 1
    assert out[0].startswith("env      ok")
    assert out[1].startswith("limits   LOST  no result, its process was ended by SIGKILL")
    assert out[2].startswith("errors   ok")
    assert "slow or odd" in out


@pytest.mark.process
def test_an_earlier_report_stays(run, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("earlier")
    _, out, _ = run("--only", "env", "--json", path)
    assert path.read_text() == "earlier"
    assert json.loads((tmp_path / "report-1.json").read_text())["exit"] == 0
    assert out[-1] == str(tmp_path / "report-1.json")


@pytest.mark.process
def test_variables_reach_the_groups(run, tmp_path):
    path = tmp_path / "report.json"
    assert run("--only", "env", "--env", "MLX_CONV_WINOGRAD=0", "--json", path)[0] == 0
    figures = json.loads(path.read_text())["groups"]["env"]["figures"]
    assert figures["mlx"]["in_force"]["MLX_CONV_WINOGRAD"] == "0"


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), [
    (["--only", "env,speed"], "--only has 'speed', but the groups are env, network"),
    (["--only", ""], "--only has ''"),
    (["--env", "NAME"], "--env is 'NAME', but must be NAME=VALUE"),
    (["--env", "A-B=1"], "--env is 'A-B=1'"),
    (["--env", "QWEN_IMAGE_DOCTOR_FALSIFI=x"], "the self-tests are QWEN_IMAGE_DOCTOR_FALSIFY, "),
    (["--env", "QWEN_IMAGE_DOCTOR_CRASH=limit"], "QWEN_IMAGE_DOCTOR_CRASH=limit, but the groups are env, network"),
    (["--json", "-"], "--json is '-', but must be a file"),
    (["--golden", "x.safetensors"], "belong together"),
    (["--model", "demo"], "belong together"),
    (["--compare", "missing.json"], "missing.json is not a readable report"),
    (["--json", "no/such/folder.json"], "its folder does not exist"),
    (["--json", "."], "--json is '.', but must be a file"),
    (["--json", ""], "--json is '', but must be a file"),
    (["--golden", "", "--model", "demo"], "--golden is '', but must name something"),
    (["--compare", "", "--only", "env"], "--compare is '', but must name something"),
    (["--golden", "missing.safetensors", "--model", "demo", "--only", "env"], "cannot be read, it is not there"),
])  # fmt: skip
def test_what_is_refused(run, here, arguments, said):
    assert said in error_line(run(*arguments))


def test_a_report_that_cannot_be_written(run, here):
    """It is refused before three minutes are spent on it."""
    (here / "report.json").mkdir()
    assert "--json is 'report.json', but must be a file" in error_line(run("--only", "env", "--json", "report.json"))
