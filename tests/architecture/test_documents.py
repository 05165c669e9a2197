"""The documents are part of the contract: Python runs, commands parse, links resolve, figures and tables are fresh."""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.foreign import FOREIGN
from qwen_image_mlx.cli.main import build_parser
from qwen_image_mlx.settings import load_settings
from qwen_image_mlx.weights.mapping import expected_tensors
from qwen_image_mlx.weights.synthetic import FULL, ROWS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import docs_site  # noqa: E402
import make_docs  # noqa: E402

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md"]
LONGEST_README = 180
# What the glossary in CONTRIBUTING.md keeps out of the prose, and patterns that are hard to read.
UNWANTED = r"pictures?\b|\bpaint(s|ed|ing|er)?\b|tak(e|es|en|ing) apart|laid together|\bso many\b|\b(is|are) no\b"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def prose(page: str) -> str:
    """A page without code, generated parts and links' targets."""
    text = make_docs.MARKED.sub("", text_of(page))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", text))


# Code ----------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_python_examples_run(tiny, tmp_path, monkeypatch, tmp_path_factory):
    from checkpoints import write_edit, write_layered
    from control_files import INSTANTX, picture, write_control
    from lora_files import TARGETS, write_lora

    from qwen_image_mlx import variants

    edit = write_edit(tmp_path_factory.mktemp("readme") / "edit", "edit_plus")
    layered = write_layered(tmp_path_factory.mktemp("readme") / "layered")
    changes = {"encoder_area": 96 * 96, "reference_area": 96 * 96, "target_area": 96 * 96, "steps": 2}
    for name, changed in (
        ("QwenImageEditPlusPipeline", changes),
        ("QwenImageLayeredPipeline", {"steps": 2, "resolutions": (64,)}),
    ):
        monkeypatch.setitem(variants.VARIANTS, name, replace(variants.VARIANTS[name], **changed))
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 20:50] = 255
    Image.fromarray(mask).save("hat-mask.png")
    targets = QwenImagePipeline.from_pretrained(tiny).components.lora_targets()
    write_lora(Path("fox-style.safetensors"), targets, targets=TARGETS)
    write_control(Path("union.safetensors"), tiny, INSTANTX, layers=1)
    picture(64, 64).save("sketch.jpg")
    smaller = {
        '"InstantX/Qwen-Image-ControlNet-Union"': '"union.safetensors"',
        '"Qwen/Qwen-Image"': repr(str(tiny)),
        '"Qwen/Qwen-Image-2512"': repr(str(tiny)),
        '"Qwen/Qwen-Image-Edit-2511"': repr(str(edit)),
        '"Qwen/Qwen-Image-Layered"': repr(str(layered)),
        "1024": "64",
        "640": "64",
        "num_inference_steps=30": "num_inference_steps=3",
    }
    scopes: dict[str, dict] = {}
    for page in ("README.md", "docs/python.md", "docs/layers.md", "docs/loras-and-training.md", "docs/control.md"):
        scope = scopes[page] = {}
        for example in blocks(page, "python"):
            for old, new in smaller.items():
                example = example.replace(old, new)
            exec(compile(example, page, "exec"), scope)
    assert (
        sum(len(blocks(page, "python")) for page in PAGES) == sum(len(blocks(page, "python")) for page in scopes) == 9
    )
    assert Image.open("fox.png").size == (64, 64)
    assert Image.open("fox-with-hat.png").size == (64, 64)
    assert scopes["docs/python.md"]["pixels"].shape == (1, 64, 64, 3)
    assert scopes["docs/loras-and-training.md"]["image"].size == (64, 64)
    assert len({image.tobytes() for image in scopes["docs/python.md"]["sweep"]}) == 3
    assert [layer.size for layer in scopes["docs/layers.md"]["result"].layers] == 4 * [(64, 64)]
    assert json.loads(scopes["docs/control.md"]["image"].info["qwen_image_mlx"])["controls"][0]["scale"] == 0.8
    assert Image.open("moved.png").mode == "RGBA"


parser = cache(build_parser)


def commands() -> Iterator[tuple[str, str]]:
    """(page, line) of each of our commands in a block of shell lines."""
    for page in (*PAGES, "CONTRIBUTING.md"):
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                if match := re.search(r"(^|/)(qwen-image-mlx .*)", line):
                    yield page, match[2]


def test_there_are_as_many_commands_as_before():
    assert len({line for _, line in commands()}) >= 60
    readme = [line for page, line in commands() if page == "README.md"]
    assert len(readme) >= 6


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_parse(page, line):
    parser().parse_args(shlex.split(line)[1:])


def flags_of(found: argparse.ArgumentParser) -> set[str]:
    """The long flags of a parser and of those below it."""
    flags: set[str] = set()
    for action in found._actions:
        flags |= {flag for flag in action.option_strings if flag.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            flags |= set().union(*map(flags_of, action.choices.values()))
    return flags


def unknown_flags(text: str) -> set[str]:
    """Flags in the code spans of a document's written parts that no command has; MLX's launcher has its own."""
    text = re.sub(r"```.*?```", "", make_docs.MARKED.sub("", text), flags=re.DOTALL)
    ours = [code for code in re.findall(r"`[^`]+`", text) if not code.startswith("`mlx.launch ")]
    said = {flag for code in ours for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", code)}
    return said - flags_of(parser())


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    theirs = set(FOREIGN) if page == "docs/coming-from.md" else set()
    assert unknown_flags(text_of(page)) - theirs == set()


def test_an_unknown_flag_is_found():
    assert unknown_flags("Use `--seed 1`, `--sede 2` or `lora inspect --json`.") == {"--sede"}


def test_the_example_config_is_read(tmp_path):
    (example,) = blocks("docs/command-line.md", "toml")
    (tmp_path / "config.toml").write_text(example)
    settings = load_settings(tmp_path / "config.toml", "draft")
    assert (settings["memory"], settings["steps"], settings["cfg_scale"]) == ("16GB", 8, 1.0)


# Generated parts ------------------------------------------------------------------------------------------------------

PARTS = [(page, name) for page in PAGES for name in make_docs.parts_of(ROOT / page)]
SLOW = {"memory by Mac", "recommendations", "recommendations in short"}  # plans for ten Macs


@pytest.mark.parametrize(("page", "name"), [
    pytest.param(page, name, marks=pytest.mark.slow if name in SLOW else ()) for page, name in PARTS
])  # fmt: skip
def test_generated_parts_are_fresh(page, name):
    """If this fails run `python scripts/make_docs.py`."""
    text = text_of(page)
    assert make_docs.renewed(text, only=name) == text


def test_generated_parts_are_for_people():
    """No placeholder of argparse is left, and a flag's default is its value."""
    assert [page for page in PAGES if "%(" in text_of(page)] == []
    assert re.search(r"^\| `--port PORT` \|.+\| 8000 \|$", text_of("docs/command-line.md"), re.MULTILINE)


def test_every_part_stands_in_one_document():
    assert sorted(name for _, name in PARTS) == sorted(make_docs.PARTS)


def test_public_names_are_in_the_reference():
    import qwen_image_mlx

    described = {"QwenImagePipeline", *make_docs.CLASSES, *make_docs.FUNCTIONS, *make_docs.ERRORS}
    assert described == set(qwen_image_mlx.__all__) - {"__version__"}


# Links and images -----------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found: dict[str, int] = {}
    for title in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def dead_links(page: Path) -> list[str]:
    """Relative links and anchors of a page that lead nowhere."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", LINKED)
def test_links_resolve(page):
    assert dead_links(ROOT / page) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A title: `code`, and more\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](there.md#a-title-code-and-more) [c](gone.md) [d](there.md#gone) [e](#gone)")
    assert dead_links(page) == ["gone.md", "there.md#gone", "#gone"]


SITE = [*PAGES[1:], *(path for path in docs_site.OUTSIDE if path.endswith(".md"))]


@pytest.mark.parametrize("page", SITE)
def test_links_resolve_on_the_site(page):
    """Every relative link of a page leads to a file of the site, as mkdocs sees it after the hook."""
    here = docs_site.site_path(page)
    assert here is not None
    on_site = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    on_site |= {place for path in docs_site.OUTSIDE if (place := docs_site.site_path(path))}
    text = re.sub(r"```.*?```|`[^`\n]*`", "", docs_site.moved(text_of(page), page), flags=re.DOTALL)
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match("[a-z]+:", link)]
    assert [
        t for t in targets if t and posixpath.normpath(f"{posixpath.dirname(here)}/{t}").lstrip("/") not in on_site
    ] == []


def test_links_move_with_their_page():
    text = "[a](../README.md#b) [c](faq.md) [d](../examples) [`e`](../examples/sweep.py) `[f](../README.md)` [g](https://h)"
    assert docs_site.moved(text, "docs/python.md") == (
        "[a](repository/README.md#b) [c](faq.md) [d](repository/examples/README.md) "
        "[`e`](repository/examples/sweep.py) `[f](../README.md)` [g](https://h)"
    )
    assert docs_site.moved("[a](../docs/faq.md#b) [c](../README.md)", "benchmarks/README.md") == (
        "[a](../../faq.md#b) [c](../README.md)"
    )


def test_images_are_there():
    places = [(page, place) for page in PAGES for place in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text_of(page))]
    assert len(places) == 5
    for page, place in places:
        Image.open((ROOT / page).parent / place).verify()


def test_the_site_has_every_page():
    listed = re.findall(r"^  - .+: (.+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(f"docs/{name}" for name in listed) == sorted(PAGES[1:])


# Words and figures ----------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", [*PAGES, "examples/README.md"])
def test_prose_has_the_words_of_the_glossary(page):
    assert [match[0] for match in re.finditer(UNWANTED, prose(page), re.IGNORECASE)] == []


def test_figures_of_the_memory_table_are_those_of_the_weights_map():
    def gigabytes(component: str, *parts: str) -> float:
        specs = expected_tensors(ROWS[component], FULL[component]).values()
        return 2 * sum(prod(s.shape) for s in specs if not parts or s.part in parts) / 1e9

    for figure in (
        f"| transformer | {gigabytes('transformer'):.1f} GB | {gigabytes('transformer', 'main'):.1f} GB",
        f"| text encoder, language part | {gigabytes('text_encoder'):.1f} GB",
        f"| autoencoder | {gigabytes('vae'):.2f} GB",
    ):
        assert figure in text_of("docs/memory.md")
