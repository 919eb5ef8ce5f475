"""The measurement of input pipelines, with every pipeline that is installed, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from input_pipeline.bench import ARMS
from parity.__main__ import PYTORCH_INPUT

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn by the generator of the benchmark's own images."""
    folder = tmp_path_factory.mktemp("photographs")
    drawn = run("benchmarks/photographs.py", folder, "--count", 12, "--classes", 2)
    assert drawn.returncode == 0, drawn.stderr
    assert "12 images" in drawn.stdout
    return folder


@pytest.mark.slow
def test_every_pipeline_is_measured_in_turn(folder, tmp_path):
    flags = ["--batch", 4, "--batches", 2, "--rounds", 2, "--json", tmp_path / "bench.json"]
    done = run("-m", "parity", "input", folder, *flags)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "bench.json").read_text())
    arms = ARMS | {"torch": PYTORCH_INPUT}
    assert list(saved["images_per_s"]) == list(arms)
    for name, arm in arms.items():
        assert len(saved["images_per_s"][name]) == 2
        assert min(saved["images_per_s"][name]) > 1
        assert arm.what in done.stdout
    assert saved["versions"]["torch"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", 100], "12 training images, fewer than --batch 100"),
        (["--rounds", 0], "at least 1"),
        (["--batch", 4, "--json", "/proc/b.json"], "/proc/b.json cannot be written"),
    ],
)
def test_wrong_requests(folder, flags, said):
    done = run("-m", "input_pipeline", "bench", folder, *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
