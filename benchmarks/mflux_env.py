"""Makes an environment for mflux 0.24.0 outside the repository, with just what its Qwen-Image modules import.

    python benchmarks/mflux_env.py [--path FOLDER]

mflux's own requirements would bring torch, on Linux with CUDA's libraries; its transformer and VAE need neither. The
other scripts use the environment if it is there, and say so if it is not. Half a minute, 0.4 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MFLUX = "mflux==0.24.0"
MLX = "mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4"
NEEDS = ("numpy", "tqdm", "huggingface_hub", "platformdirs", "pillow", "transformers==5.23.0", "toml")
FOLDER = Path(tempfile.gettempdir()) / "qwen-image-mlx-mflux"
_COMPLETE = "mflux-is-installed"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--path", type=Path, metavar="FOLDER", default=FOLDER, help="where to: %(default)s")
    folder = options.parse_args().path
    if not (folder / _COMPLETE).is_file():
        make(folder)
    print(_python(folder))


def make(folder: Path) -> None:
    """Makes the environment; refuses a folder that holds something else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        sys.exit(f"{folder} is neither empty nor a virtual environment")
    venv.create(folder, with_pip=True)
    install = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, MLX, *NEEDS], check=True)
    subprocess.run([*install, "--no-deps", MFLUX], check=True)
    subprocess.run([str(_python(folder)), "-c", "import mflux_worker"], check=True, cwd=Path(__file__).parent)
    (folder / _COMPLETE).touch()


def add_option(options: argparse.ArgumentParser) -> None:
    """Where the environment is."""
    options.add_argument("--mflux", type=Path, metavar="FOLDER", default=FOLDER, help="its environment: %(default)s")


def mflux_python(folder: Path) -> Path | None:
    """The interpreter of mflux's environment; None, and a word on stderr, where there is none."""
    if (folder / _COMPLETE).is_file():
        return _python(folder)
    print(f"no {MFLUX} in {folder}: its rows are missing; benchmarks/mflux_env.py installs it", file=sys.stderr)
    return None


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


if __name__ == "__main__":
    main()
