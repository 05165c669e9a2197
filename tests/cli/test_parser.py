"""Words with a dash, flags of other programs and slips of the pen: read, or answered with what is meant."""

from __future__ import annotations

import pytest
from commands import error_line

from qwen_image_mlx.cli.foreign import FOREIGN, answer
from qwen_image_mlx.cli.main import build_parser, main


def parsed(*words):
    return vars(build_parser().parse_args(list(words)))


def refused(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return error_line((code, out.splitlines(), err))


@pytest.mark.parametrize(("words", "name", "value"), [
    (("generate", "x", "-n", "-blurry"), "negative_prompt", "-blurry"),
    (("generate", "x", "--negative-prompt", "-5 fingers"), "negative_prompt", "-5 fingers"),
    (("generate", "x", "-n", "-", "-s", "3"), "negative_prompt", "-"),
    (("generate", "x", "-n=-blurry"), "negative_prompt", "-blurry"),
    (("generate", "x", "-o", "-fox.png", "--seed", "3"), "output", "-fox.png"),
    (("generate", "--model", "demo", "--", "-portrait"), "prompt", "-portrait"),
    (("generate", "-a red circle"), "prompt", "-a red circle"),
    (("edit", "x", "--image", "-a.png", "-i", "b.png"), "images", ["-a.png", "b.png"]),
    (("decompose", "a.png", "--prompt", "-night"), "prompt", "-night"),
    (("train", "--data", "d", "--output", "o", "--steps", "1", "--sample-prompt", "-hat"), "sample_prompts", ["-hat"]),
    (("generate", "x", "--seed", "-1"), "seed", [-1]),
])  # fmt: skip
def test_a_text_may_begin_with_a_dash(words, name, value):
    assert parsed(*words)[name] == value


@pytest.mark.parametrize("words", [
    ("-portrait",), ("-asd", "--model", "demo"), ("-night",), ("-old",), ("-smiling",),
    ("--model", "demo", "-portrait"),
])  # fmt: skip
def test_a_prompt_that_begins_with_a_dash_is_told_where_to_stand(capsys, words):
    assert " -- " in refused(capsys, "generate", *words)


@pytest.mark.parametrize(("words", "said"), [
    (("generate", "x", "-n", "-s", "3"), "as in -n=-blurry"),
    (("generate", "x", "-n", "-s3"), "as in -n=-blurry"),
    (("generate", "x", "--output", "--force"), "as in -o=-blurry"),
    (("generate", "x", "-n"), "as in -n=-blurry"),
    (("generate", "a", "red", "circle"), "in quotes"),
    (("generate", "--seed", "1", "a red circle"), "put the prompt before --seed"),
    (("generate", "x", "--stepz", "4"), "did you mean --steps? (see qwen-image-mlx generate --help)"),
    (("config", "shwo"), "did you mean show? (see qwen-image-mlx config --help)"),
    (("genrate", "x"), "did you mean generate?"),
    (("generate", "x", "--negative", "3"), "give --negative-prompt"),
    (("serve", "--low-ram"), "give --memory auto"),
    (("quantize", "-q", "4"), "the following arguments are required"),
])  # fmt: skip
def test_what_is_meant_is_said(capsys, words, said):
    assert said in refused(capsys, *words)


@pytest.mark.parametrize("flag", FOREIGN)
def test_a_flag_of_another_program_is_answered_with_ours(capsys, flag):
    assert f"; {answer(flag)} (see" in refused(capsys, "generate", "x", flag, "1")


def test_what_stands_in_for_them_is_a_flag_of_ours():
    known = {option for action in build_parser()._subparsers._group_actions[0].choices["generate"]._actions
             for option in action.option_strings}  # fmt: skip
    assert not known & FOREIGN.keys()
    assert {ours.split()[0].rstrip(",") for ours in FOREIGN.values() if ours.startswith("--")} <= known
