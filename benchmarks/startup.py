"""What importing the package and asking the command line for help cost, next to `python -c pass`.

    python benchmarks/startup.py [--rounds 10] [--json FILE]

Also fails if importing the package brings in MLX, torch or transformers. Takes half a minute.
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
MUST_NOT = HEAVY[:3]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=10, help="rounds the medians are taken of (10)")
    arguments = options.parse_args()
    loaded = imported_with(IMPORT)
    assert not set(loaded) & set(MUST_NOT), f"{IMPORT} loads {loaded}"

    seconds = take_turns({name: partial(run, *command) for name, command in COMMANDS.items()}, arguments.rounds)
    table = Table("Start-up", ["", "s", f"ratio to {BARE}"])
    table.rows += [(name, median(times), median_ratio(seconds, name, BARE)) for name, times in seconds.items()]
    table.print()
    print(f"\nof {', '.join(HEAVY)}, importing the package loads: {', '.join(loaded) or 'none'}")
    targets = Targets()
    targets.check(f"s, {HELP}", median(seconds[HELP]), 0.5)
    finish([table, targets], arguments.json)


def run(*command: str) -> float:
    """Seconds from start to end of a Python process."""
    return stopwatch(lambda: subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True))


def imported_with(statement: str) -> list[str]:
    """Those of `HEAVY` that a statement loads."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main()
