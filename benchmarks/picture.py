"""Makes docs/images/parity_report.png: the first screen of a parity report, as chromium shows it.

Compares the embedded model in JAX and PyTorch (`python -m parity all`), or takes a saved run, and photographs the page:
the verdict, the rungs and the error by depth.
"""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from PIL import Image

from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.exits import exit_code
from input_pipeline.files import replacing, writable
from input_pipeline.flags import UserPath, require_positive

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = 64  # of the palette: lines, a few tints and the grey steps of text
LARGEST = 200_000  # bytes; README is read over slow lines, too


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: UserPath | None = None
    """Folder of a saved comparison, such as runs/parity/20261124-101500. None: compare now, which takes minutes."""
    out: UserPath = ROOT / "docs" / "images" / "parity_report.png"
    """File to write the picture to."""
    width: int = 1000
    """Width of the page in CSS pixels."""
    height: int = 1140
    """Height in CSS pixels of what is shown of the page, from its top."""
    scale: int = 2
    """Pixels of the picture for a CSS pixel."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    require_positive({f"--{name}": getattr(arguments, name) for name in ("width", "height", "scale")})
    writable(arguments.out)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RequestError(f"none of {', '.join(BROWSERS)} is installed, and one of them has to draw the page")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        run([sys.executable, "-m", "parity", "show", str(arguments.run or compared()), "--html", str(page)])
        photograph(browser, page, Path(folder), arguments)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


def compared() -> Path:
    """Compares the embedded model and returns the folder of the run. The page shows the command, so it has no flags."""
    runs = ROOT / "runs" / "parity"
    before = set(runs.glob("*"))
    run([sys.executable, "-m", "parity", "all"])
    return max(set(runs.glob("*")) - before, key=lambda folder: folder.stat().st_mtime)


def photograph(browser: str, page: Path, folder: Path, arguments: Arguments) -> None:
    """Writes a picture of the page's top, with a palette.

    Raises:
        RunFailed: the picture is larger than `LARGEST`, and nothing is written.
    """
    shot = folder / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'user'}"]
    flags += [f"--window-size={arguments.width},{arguments.height}", f"--force-device-scale-factor={arguments.scale}"]
    run([browser, *flags, f"--screenshot={shot}", page.as_uri()])
    picture = Image.open(shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small = folder / "small.png"
    picture.save(small, optimize=True)
    if small.stat().st_size > LARGEST:
        raise RunFailed(f"the picture has {small.stat().st_size:,} bytes; lower --height or --scale to {LARGEST:,}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out) as file:
        file.write(small.read_bytes())


def run(command: list[str]) -> None:
    """Runs a command in the repository, and shows what it prints only where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"{command[0]} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
