"""What is published: the sdist holds what the wheel is built of, the wheel what its commands need, neither the tests.

The wheel is installed into an environment of its own, which sees the dependencies of this one but not this repository.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("bit_jax", "input_pipeline", "parity")
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "site", "shared")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
LOADS = """
import bit_jax, jax.numpy as jnp
from bit_jax.published.locate import EMBEDDED_FILE
model, params = bit_jax.load(EMBEDDED_FILE)
print(bit_jax.__file__, model.apply({"params": params}, jnp.zeros((1, 32, 32, 3))).shape, sep="\\n")
"""


class Built(NamedTuple):
    source: Path  # a copy of the repository
    sdist: Path
    wheel: Path


class Installed(NamedTuple):
    bin: Path
    folder: Path  # empty at first, and the working directory of every command

    def run(self, command: str, *arguments: object) -> subprocess.CompletedProcess:
        environment = elsewhere() | {"JAX_COMPILATION_CACHE_DIR": str(self.folder.with_name("xla"))}
        words = [self.bin / command, *map(str, arguments)]
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)


def elsewhere() -> dict[str, str]:
    """The environment of processes that must not see this repository: pip would take it for the installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def build(kind: str, source: Path, into: Path) -> None:
    """Builds with the setuptools that is installed here, so that nothing is downloaded."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", into]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "absent from the `packages` configuration" not in done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of the repository, and the wheel that is built from the sdist alone."""
    folder = tmp_path_factory.mktemp("built")
    source = shutil.copytree(ROOT, folder / "source", ignore=LEFT_BEHIND)
    build("sdist", source, folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)
    (wheel,) = folder.glob("*.whl")
    return Built(source, sdist, wheel)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built.wheel]
    subprocess.run(install, check=True, capture_output=True, env=elsewhere())
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    # a path in a .pth file is searched last, and .pth files that lie there, such as an editable install's, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return Installed(python.parent, folder / "empty")


def files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix() for name in PACKAGES for path in (root / name).rglob("*") if path.is_file()
    }


def test_the_wheel_holds_all_of_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - information == files(built.source)
    assert {f"{name}/py.typed" for name in PACKAGES} < names
    assert {Path(name).suffix for name in names} >= {".txt", ".j2", ".npz"}
    assert any(name.endswith("licenses/LICENSE") for name in information)
    assert built.wheel.stat().st_size < 9e6


def test_the_sdist_holds_no_tests(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    assert names > files(built.source) | {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "docs/weights.md"}
    assert built.sdist.stat().st_size < 9e6


def test_an_installed_wheel_loads_and_predicts(installed):
    done = installed.run("python", "-c", LOADS)
    assert done.returncode == 0, done.stderr
    place, shape = done.stdout.splitlines()
    assert Path(place).is_relative_to(installed.bin.parent)
    assert shape == "(1, 10)"

    image = installed.folder.with_name("image.png")
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(image)
    done = installed.run("bit-jax-predict", "--weights", "embedded", image)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ +[0-9.]+% ", done.stdout, re.MULTILINE)) == 5


@pytest.mark.parametrize("command", ["python -m bit_jax.train", "bit-jax-train"])
def test_an_installed_wheel_trains(installed, command):
    program, *module = command.split()
    steps = "--steps 2 --warmup-steps 1 --decay-steps 1 --global-batch 16 --resize-to 20 --crop 16"
    done = installed.run(program, *module, "digits", "--workdir", program, *steps.split())
    assert done.returncode == 0, done.stderr
    assert (installed.folder / program / "final.npz").exists()
    shutil.rmtree(installed.folder / program)


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_command_starts(installed, command):
    done = installed.run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        "bit-jax-train digits --model nowhere.npz --workdir run",
        "bit-jax-predict --weights nowhere.npz image.png",
        "bit-jax-evaluate --weights nowhere.npz --dataset digits",
        "bit-jax-zoo fetch nowhere",
        "bit-jax-launch --hosts 2",
        "bit-jax-plan --model nowhere",
        "bit-jax-profile nowhere",
        "bit-jax-report nowhere",
        "bit-jax-reproduce nowhere",
        "bit-jax-input check digitz --data-dir nowhere",
        "bit-jax-parity show nowhere",
    ],
)
def test_a_wrong_wrongends_with_exit_code_2(installed, wrong):
    done = installed.run(*wrong.split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
