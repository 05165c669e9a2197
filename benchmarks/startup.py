"""What importing the package and asking the command line for help cost, next to `python -c pass`.

    python benchmarks/startup.py [--rounds 10] [--json FILE]

Also fails if either brings in MLX, torch, transformers or numpy. Takes seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from statistics import median

from common import Table, Targets, finish, median_ratio, parser, stopwatch, take_turns

BARE = "python -c pass"
IMPORT = "import qwen_image_mlx"
HELP = "python -m qwen_image_mlx generate --help"
COMMANDS = {
    BARE: ("-c", "pass"),
    IMPORT: ("-c", IMPORT),
    HELP: ("-m", "qwen_image_mlx", "generate", "--help"),
}
HEAVY = ("mlx", "torch", "transformers", "numpy", "PIL", "huggingface_hub", "tokenizers")
MUST_NOT = HEAVY[:4]
SHOW_HELP = """
import runpy, sys
sys.argv = ["qwen_image_mlx", "generate", "--help"]
try:
    runpy.run_module("qwen_image_mlx", run_name="__main__")
except SystemExit:
    pass
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=10, help="rounds the medians are taken of (10)")
    arguments = options.parse_args()
    loaded = {name: imported_with(code) for name, code in ((IMPORT, IMPORT), (HELP, SHOW_HELP))}
    for name, modules in loaded.items():
        assert not set(modules) & set(MUST_NOT), f"{name} loads {modules}"

    seconds = take_turns({name: partial(run, *command) for name, command in COMMANDS.items()}, arguments.rounds)
    table = Table("Start-up", ["", "s", f"ratio to {BARE}"])
    table.rows += [(name, median(times), median_ratio(seconds, name, BARE)) for name, times in seconds.items()]
    table.print()
    print(f"\nOf {', '.join(HEAVY)}")
    for name, modules in loaded.items():
        print(f"- {name} loads {', '.join(modules) or 'none'}")
    targets = Targets()
    targets.check(f"s, {HELP}", median(seconds[HELP]), 0.5)
    finish([table, targets], arguments.json)


def run(*command: str) -> float:
    """Seconds from start to end of a Python process."""
    return stopwatch(lambda: subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True))


def imported_with(statement: str) -> list[str]:
    """Those of `HEAVY` that a statement loads."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
