"""How long the command line takes to answer --help, and what importing the package costs.

python benchmarks/startup.py [--rounds 10]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from common import print_table, take_turns, verdict

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import qwen_image_mlx": ["-c", "import qwen_image_mlx"],
    "generate --help": ["-m", "qwen_image_mlx", "generate", "--help"],
}
HEAVY = ("mlx", "numpy", "PIL", "tokenizers", "huggingface_hub", "torch", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    runs = {
        name: lambda command=command: subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        for name, command in COMMANDS.items()
    }
    times = take_turns(runs, arguments.rounds)
    base = times["python -c pass"]
    print_table("Start-up", ("", "s", "ratio"), [(name, t, t / base) for name, t in times.items()])
    loaded = subprocess.run(
        [sys.executable, "-c", f"import qwen_image_mlx, sys; print([m for m in {HEAVY} if m in sys.modules])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    print(f"\nheavy modules that importing the package brings in: {loaded}")
    print_table("Targets", ("", "seconds", "at most", ""), [verdict("--help", times["generate --help"], 0.5)])


if __name__ == "__main__":
    main()
