"""`python -m parity determinism`: the same work in several processes, bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import parity

from parity.ladder.determinism import compare
from parity.sides.worker import Arrays

pytestmark = pytest.mark.usefixtures("hardly_optimized")

QUICK = ["--processes", "2", "--size", "32", "--rows", "4", "--steps", "2"]


def saved(path: Path, arrays: dict[str, Any]) -> Arrays:
    np.savez(path, **arrays)
    return Arrays(path)


def test_bits_are_compared_and_the_first_that_differs_is_named(tmp_path):
    zeros, nans = np.zeros(3, np.float32), np.full(3, np.nan, np.float32)
    units = {"root_block": zeros, "block1/unit01": nans, "logits": np.ones(3, np.float32)}
    first = saved(tmp_path / "first.npz", units)
    same = compare("forward", "process 2", first, saved(tmp_path / "same.npz", units))
    assert (same.differing, same.first_error) == ([], None)
    assert str(same) == "forward, process 2: the same bits in 3 arrays"

    other = saved(tmp_path / "other.npz", units | {"root_block": -zeros, "logits": np.full(3, 1.5, np.float32)})
    assert compare("forward", "process 2", first, other).differing == ["root_block", "logits"]

    keys = [f"0/resnet/{key}" for key in ("root_block/k", "block1/unit01/a/k", "block4/unit03/c/k", "head/conv2d/k")]
    first = saved(tmp_path / "gradients.npz", {key: np.ones(2) for key in keys})
    other = saved(tmp_path / "others.npz", {key: np.ones(2) + (key not in keys[2:]) for key in keys})
    found = compare("gradients", "process 2", first, other)
    assert found.differing == [keys[1], keys[0]]  # on the way back
    assert found.first_error == 1.0
    other = saved(tmp_path / "nan.npz", {key: np.full(2, np.nan) for key in keys})
    assert compare("gradients", "process 2", first, other).first_error is None
    assert str(compare("gradients", "process 2", first, other)).endswith("conv2d/k, which is not finite")


@pytest.mark.slow
def test_one_program_gives_the_same_bits_in_every_process(small_npz, tmp_path):
    side = ["--weights", small_npz, "--side", "jax:tuned,deterministic", *QUICK]
    done = parity("determinism", *side, "--json", tmp_path / "same.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "THE SAME BITS: jax:tuned,deterministic in fp32, in 2 processes, and twice in the first" in done.stdout
    report = json.loads((tmp_path / "same.json").read_text())
    assert report["same"]
    assert [(each["task"], each["run"]) for each in report["repetitions"]] == [
        (task, run) for task in ("forward", "gradients", "curve") for run in ("process 1 again", "process 2")
    ]
    assert all(each["arrays"] >= 6 for each in report["repetitions"])


@pytest.mark.slow
def test_a_unit_that_never_repeats_is_named(small_npz, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    side = ["--weights", small_npz, "--side", "torch", "--torch-model", "foreign_bit:load_that_never_repeats", *QUICK]
    done = parity("determinism", *side, "--json", tmp_path / "differs.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERS: torch in fp32" in done.stdout
    repetitions = json.loads((tmp_path / "differs.json").read_text())["repetitions"]
    assert [each["differing"][0] for each in repetitions if each["task"] == "forward"] == ["block3/unit01"] * 2
    assert all(each["differing"] for each in repetitions)
    assert {each["operation"] for each in repetitions if each["task"] == "forward"} == {"block3/unit01/addition"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes", "1"], "--processes 1 must be at least 2"),
        (["--side", "jax:deterministic=2"], "side 'jax:deterministic=2' is neither"),
        (["--rows", "3"], "must be even"),
        (["--steps", "0"], "--steps 0 must be greater than 0"),
        (["--json", "/proc/no/such.json"], "/proc/no"),
    ],
)
def test_wrong_requests(flags, said):
    done = parity("determinism", *flags)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
