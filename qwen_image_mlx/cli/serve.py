"""qwen-image-mlx serve: a warm model over HTTP."""

from __future__ import annotations

import argparse
import logging
import re
import signal
from importlib.util import find_spec
from typing import Any

from ..errors import GPUError, RequestError
from ..runtime.ranks import alone, joined, leads
from ..variants import DEFAULT_EDIT_MODEL, DEFAULT_LAYERED_MODEL, DEFAULT_MODEL, full_name
from .flags import add_options
from .signals import ENDS, GaveUp

logger: logging.Logger = logging.getLogger(__name__)

SHARES = True  # all ranks run it
PATIENCE = 60.0  # seconds for the running job, of which one step is finished, and for connections

_MODELS = {
    "generate": ("model", DEFAULT_MODEL),
    "edit": ("edit_model", DEFAULT_EDIT_MODEL),
    "decompose": ("layered_model", DEFAULT_LAYERED_MODEL),
}
_LIBRARIES = ("fastapi", "uvicorn", "python_multipart")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "serve",
        help="serve models over HTTP, with a page for the browser",
        description="Keep models warm and serve them over HTTP: a page for the browser at /, an API with jobs, and "
        "OpenAI's images API. The address is printed on stdout. Ctrl-C or SIGTERM cancels the running job and ends "
        "the server. It ends by itself, with exit code 1, when the GPU no longer works for its process.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; any non-loopback address needs a token "
        "(default: %(default)s)")  # fmt: skip
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    add_options(parser, "serve")
    add("--model", "-m", help=f"model for generating: a directory or a Hugging Face id (default: {DEFAULT_MODEL})")
    add("--edit-model", metavar="MODEL", help=f"model for editing (default: {DEFAULT_EDIT_MODEL})")
    add("--layered-model", metavar="MODEL", help=f"model for decomposing (default: {DEFAULT_LAYERED_MODEL})")
    add("--controlnet", action="append", default=[], metavar="REF", help="let requests use this ControlNet: a file, a "
        "folder, owner/repo or owner/repo:file; they name it by the last part; repeat for more")  # fmt: skip
    add("--token-file", metavar="FILE", help="require the token in this file: Authorization: Bearer TOKEN")
    add("--allow-origin", action="append", default=[], metavar="O", help="let pages of a web origin use the "
        "server, such as https://example.org; repeat for more")  # fmt: skip
    add("--allow-host", action="append", default=[], metavar="NAME", help="let clients reach the server by an "
        "additional name, such as host.docker.internal from Docker; repeat for more")  # fmt: skip
    add("--alias", action="append", default=[], metavar="NAME=TASK", help="give the model of a task (generate or edit) "
        "an additional name in OpenAI's API; repeat for more (gpt-image-1, dall-e-3 and others are known)")  # fmt: skip
    add("--idle-unload", default="10m", metavar="T", help="release a model that was not used for this long: 90s, 10m, "
        "1h, or never (default: %(default)s)")  # fmt: skip
    add("--job-limit", default="1h", metavar="T", help="cancel a job that takes longer (default: %(default)s)")
    add("--grace", default="1m", metavar="T", help="keep the job of a request whose connection was cut for this "
        "long; an equal request finds it, else it is cancelled (default: %(default)s)")  # fmt: skip
    add("--queue", type=int, default=16, metavar="N", help="maximum number of waiting jobs (default: %(default)s)")
    add(
        "--max-pixels", type=int, default=1 << 22, metavar="N", help="maximum pixels of an image (default: %(default)s)"
    )
    add("--max-steps", type=int, default=100, metavar="N", help="maximum denoising steps (default: %(default)s)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Serves until a signal ends it."""
    from ..server.listen import allowed_host, is_loopback, listen, own_hosts, read_token
    from ..settings import find_config, load_settings
    from .console import messages

    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise RequestError(f"serving needs {', '.join(missing)} as well: pip install {packages}")
    if not 0 <= arguments.port <= 65535:
        raise RequestError(f"--port is {arguments.port}, but must be from 0 to 65535")
    for name, low in (("queue", 1), ("max_pixels", 1024), ("max_steps", 1)):
        if getattr(arguments, name) < low:
            flag = f"--{name.replace('_', '-')}"
            raise RequestError(f"{flag} is {getattr(arguments, name)}, but must be at least {low}")
    for origin in arguments.allow_origin:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise RequestError(f"--allow-origin is {origin!r}, but must be like https://example.org, without a path")
    listens = leads()
    token = None if arguments.token_file is None or not listens else read_token(arguments.token_file)
    if listens and token is None and not is_loopback(arguments.host):
        raise RequestError(f"--host is {arguments.host}, which other machines can reach: give a --token-file as well")
    settings = load_settings(find_config(arguments.config), arguments.profile)
    configured = {task: settings.of_command(task, getattr(arguments, flag)) for task, (flag, _) in _MODELS.items()}
    setup = {
        "profile": settings.profile,
        "offers": {task: _offer(arguments, task, configured[task]) for task in _MODELS},
        "defaults": configured,
        "memory": arguments.memory or settings["memory"],
        "idle_seconds": _seconds("--idle-unload", arguments.idle_unload),
        "is_own_host": own_hosts(arguments.host, [allowed_host(name) for name in arguments.allow_host]),
        "controlnets": _controlnets(arguments.controlnet),
        "aliases": _aliases(arguments.alias),
        "token": token,
        "origins": arguments.allow_origin,
        "queue": arguments.queue,
        "grace": _seconds("--grace", arguments.grace) or float("inf"),
        "job_seconds": _seconds("--job-limit", arguments.job_limit) or float("inf"),
    }
    for task, offer in setup["offers"].items():
        _check_local(task, offer["model"])
    from ..server.service import Setup, follow  # here, after what is cheap to check
    from ..server.tasks import Limits

    limits = Limits(arguments.max_pixels, arguments.max_steps)
    if not listens:
        with messages():
            follow(Setup(**setup, limits=limits))
        alone()  # rank 0 has ended
        return
    with listen(arguments.host, arguments.port) as listener:
        from ..server.run import serve

        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        with messages():
            try:
                ended_by = serve(Setup(**setup, limits=limits), listener, lambda: print(address, flush=True))
            except GPUError as error:
                raise GaveUp(f"the server ends and must be started again: {error}") from error
        if ended_by is not None and (ended_by == signal.SIGINT or joined()):  # joined: a rank was lost meanwhile
            raise ENDS[ended_by]


def _offer(arguments: argparse.Namespace, task: str, configured: dict[str, Any]) -> dict[str, Any]:
    """The options for opening the model of a task; flags override the config."""
    flag, usual = _MODELS[task]
    return {
        "model": full_name(getattr(arguments, flag) or configured.get("model") or usual),
        "quantize": arguments.quantize or configured.get("quantize"),
        "parallel": arguments.parallel or configured.get("parallel") or "auto",
        "loras": configured.get("loras", []),
    }


def _controlnets(given: list[str]) -> dict[str, str]:
    """The references of ControlNets by the names that requests use: their last parts, without an ending."""
    found: dict[str, str] = {}
    for reference in given:
        name = re.split(r"[/:]", reference.rstrip("/"))[-1].removesuffix(".safetensors")
        if name in found:
            raise RequestError(f"--controlnet has two of the name {name!r}: rename one")
        found[name] = reference
    return found


def _check_local(task: str, model: str) -> None:
    """Raises QwenImageError if a folder on this machine is not a model, or not one for the task."""
    from ..pipeline.pipeline import QwenImagePipeline
    from ..weights.snapshot import HubSnapshot

    if HubSnapshot(model).is_local:
        QwenImagePipeline.from_pretrained(model, offline=True).check_task(task)


def _aliases(given: list[str]) -> dict[str, list[str]]:
    """The additional names of each task's model."""
    aliases: dict[str, list[str]] = {}
    for text in given:
        name, _, task = text.rpartition("=")
        if not name.strip() or task not in ("generate", "edit"):
            raise RequestError(f"--alias is {text!r:.100}, but must be like my-model=generate or my-model=edit")
        aliases.setdefault(name.strip(), []).append(task)
    return aliases


def _seconds(flag: str, text: str) -> float | None:
    """Seconds of a duration such as 90s, 10m or 1h; None for "never"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    if text.strip().lower() == "never":
        return None
    if not match or not float(match[1]):
        raise RequestError(f"{flag} is {text!r}, but must be like 90s, 10m or 1h, or never")
    return float(match[1]) * _SECONDS[match[2]]
