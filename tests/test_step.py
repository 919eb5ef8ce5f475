"""`python -m parity step`: a real run whose update begins to round at step 120, found from what the run recorded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import parity
from conftest import COMPILES_FAST, DIGITS, ROOT
from rich.console import Console

from parity.ladder import step
from parity.report import saved

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

# from update 120 on, parameters are rounded to bfloat16, as if the device had begun to keep them so
ROUNDS_FROM_120 = """
import sys
import jax, jax.numpy as jnp
from bit_jax import train
from bit_jax.training import steps
from input_pipeline.exits import exit_code
right = steps.update_if_finite
def rounding(state, *arguments, **more):
    new = right(state, *arguments, **more)
    narrow = lambda leaf: jnp.where(state.step >= 120, leaf.astype(jnp.bfloat16).astype(leaf.dtype), leaf)
    return new.replace(params=jax.tree.map(narrow, new.params))
steps.update_if_finite = rounding
sys.exit(exit_code(train.main))
"""
QUICK = ["--candidate", "jax", "--rows", "4"]  # the code at hand is judged on four rows
EVERY = ["--checkpoint-every", "40", "--keep-checkpoints", "9", "--mixup", "0.1"]


def train(*command: object) -> subprocess.CompletedProcess:
    """Trains for many steps, for which it is worth optimizing the program more than the tests' others."""
    environment = os.environ | {"XLA_FLAGS": COMPILES_FAST}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def drifting(small_npz, tmp_path_factory):
    """The folder of a run of 202 steps with the fault."""
    folder = tmp_path_factory.mktemp("drifting") / "run"
    flags = ["--model", small_npz, "--steps", 202, *EVERY, "--workdir", folder]
    done = train("-c", ROUNDS_FROM_120, *DIGITS.split(), *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def undisturbed(drifting, tmp_path_factory):
    """The folder of the same run as it was after 120 steps, before the fault."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(drifting, folder, ignore=shutil.ignore_patterns("160", "200", "202", "final.npz", "result.json"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 120))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_first_checkpoint_that_is_not_followed_is_found(drifting, tmp_path):
    before = contents(drifting)
    flags = ["--first", "--steps", "4", *QUICK, "--json", tmp_path / "r.json", "--run", tmp_path / "run"]
    done = parity("step", "--workdir", drifting, *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    for start in (0, 40, 80):
        assert f"steps {start + 1} to {start + 4} follow from the state before them: losses take at most" in said
    assert "steps 121 to 124 do NOT follow from the state before them" in said
    assert "the first loss beyond its limit is that of step 122: recorded" in said  # the first after a wrong update
    assert "the code at hand, repeats these steps as float64 does: it does not reproduce what the run recorded" in said
    assert "the code at hand computes step 121 right" in said
    assert (
        "FAILS: what the run recorded does not follow from checkpoint 120, and the code at hand computes step" in said
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == saved.load(tmp_path / "run")
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    assert list(rungs) == ["record", "finite", "forward", "loss", "gradients", "optimizer"]
    assert [name for name, rung in rungs.items() if rung["verdict"] == "bug"] == ["record"]
    beyond = [line["name"] for line in rungs["record"]["lines"] if line["verdict"] == "bug"]
    assert beyond[0] == "loss of step 122"  # a later one's limit may be wide: small disturbances can grow within steps
    used = {line["name"]: float(line["used"]) for line in rungs["record"]["lines"]}
    assert used["loss of step 122"] > 20
    assert contents(drifting) == before  # it is only read
    shown = parity("show", tmp_path / "run")
    assert shown.returncode == 1
    assert "\nFAILS: what the run recorded does not follow from checkpoint 120" in shown.stdout
    assert "steps 121 to 124 do NOT follow" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_without_a_fault_has_none(undisturbed, tmp_path):
    done = parity("step", "--workdir", undisturbed, "--first", "--steps", "4", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    conclusion = "follows from its checkpoints, in 3 stretches of steps between step 1 and step 84"
    assert conclusion in " ".join(done.stdout.split())
    report = saved.load(tmp_path / "run")
    assert [line["verdict"] for line in report["rungs"][0]["lines"]] == ["rounding"] * 12


@pytest.mark.slow
def test_a_next_checkpoint_shows_the_fault_array_by_array(drifting):
    """The window of steps 201 and 202 ends in a checkpoint, of which every parameter is rounded."""
    run = step.RecordedRun.of(drifting)
    source, state = run.source(), run.state(200)
    with step.Examiner(step.Step(drifting, step=201, candidate="jax"), run, Console(quiet=True)).ladder(
        state, source
    ) as ladder:
        judged = step.Replay(ladder, run, source, step.window(run, 200, 20), state).judge(run.state(202))
    beyond = {line.name.removeprefix("after step 202: ") for line in judged.lines if line.verdict == "bug"}
    assert "loss of step 201" not in beyond  # it depends on no update of the window
    assert {f"params/{key}" for key in state.params} <= beyond
    assert f"of {2 * len(state.params)} arrays of the state after step 202 are beyond theirs" in judged.sentence


@pytest.mark.slow
def test_a_fault_of_the_code_at_hand_is_found_at_a_step_between_checkpoints(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    changed(run, **{"model.precision": "fp64"})  # the fault shows in float64, which saves two processes
    request = step.Step(run, step=122, rows=4, candidate="jax", fault="nesterov")
    found = step.examine(request, Console(quiet=True))
    assert not found.holds
    repeats = "there is no checkpoint of step 121: float64 repeats the steps from checkpoint 120 to it"
    assert any(sentence.startswith(repeats) for sentence in found.answers)
    verdicts = {result.name: result.verdict for result in found.results}
    assert [name for name, verdict in verdicts.items() if verdict == "bug"] == ["optimizer"]
    assert found.conclusion == "FAILS: the code at hand computes step 122 wrong"


@pytest.mark.slow
def test_a_step_whose_loss_was_not_finite_leads_to_the_step_that_left_the_range(small_npz, tmp_path):
    run = tmp_path / "run"
    flags = ["--model", small_npz, "--steps", "6", "--base-lr", "1e30", "--checkpoint-every", "2", "--workdir", run]
    done = train("-m", "bit_jax.train", *DIGITS.split(), *flags)
    assert done.returncode == 1, done.stderr
    (left,) = run.glob("failed_step*.npz")
    number = int(left.name.removeprefix("failed_step").split(".")[0])
    flags = ["--workdir", run, "--step", number, *QUICK]
    done = parity("step", *flags, "--run", tmp_path / "report")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"so step {number - 1}, which made it, is judged in place of step {number}" in said
    assert "in fp32, torch is not finite from" in said
    assert "float64 is finite: the numbers of this step leave the range of fp32" in said
    assert f"HOLDS: the code at hand computes step {number - 1} right" in said
    assert "in fp32 it is not finite on either side" in said
    rungs = [rung["name"] for rung in saved.load(tmp_path / "report")["rungs"]]
    assert rungs[-5:] == ["finite", "forward", "loss", "gradients", "optimizer"]

    arrays = dict(np.load(left))
    arrays["image"][3] = 0
    np.savez(left, **arrays)
    run_ = step.RecordedRun.of(run)
    examiner = step.Examiner(step.Step(run, step=number), run_, Console(quiet=True))
    failed = run_.failed_batch(number)
    assert failed is not None
    examiner._compare_batches(run_.source(), number, failed)
    assert "differs from the dataset's in 1 rows, the first 3" in examiner.answers[0]
    assert examiner.record.verdict == "bug"
    with examiner.ladder(run_.state(2), run_.source(), failed) as ladder:  # no process is started
        assert np.load(ladder.pictures())["image"][0, 3].max() == 0
        assert np.load(ladder.pictures(1))["image"][0, 3].max() > 0  # a further look is at the dataset's next batch


@pytest.fixture
def workdir(tmp_path):
    """A folder with a config.json as a run of digits leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    schedule = {"base_lr": 0.01, "warmup_steps": 2, "decay_steps": [60], "steps": 200}
    optimizer = {"base_lr": 0.01, "momentum": 0.9, "mixup": 0.1, "warmup_steps": 2, "decay_steps": [60], "steps": 200}
    data = {"dataset": "digits", "train_split": "train", "examples_per_class": None, "resize": "pillow", "flip": True}
    config = {"model.model": "gone.npz", "model.init": "checkpoint", "model.precision": "fp32", "run.seed": 0}
    config |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    config |= {f"data.{name}": value for name, value in data.items()}
    recipe = {"resize_to": 36, "crop": 32, "mixup": 0.1, "schedule": schedule}
    content = {"config": config, "recipe": recipe, "global_batch": 16, "class_names": list("0123456789")}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def changed(workdir: Path, **changes: object) -> None:
    content = json.loads((workdir / "config.json").read_text())
    for name, value in changes.items():
        within = content["config"] if "." in name else content
        within[name] = value
    (workdir / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("flags", "changes", "said"),
    [
        (["--step", "3"], {}, "holds no state before step 3; its checkpoints are of steps: none"),
        (["--step", "201"], {}, "--step 201 is beyond the run's last step, 200"),
        (["--step", "0"], {}, "--step 0 must be greater than 0"),
        (["--first"], {}, "holds no checkpoint yet"),
        ([], {}, "give either --step N"),
        (["--first", "--step", "3"], {}, "give either --step N"),
        (["--step", "3", "--rows", "3"], {}, "--rows 3 must be even"),
        (["--step", "3", "--json", "/proc/no/such.json"], {}, "/proc/no"),
        (["--step", "3"], {"optimizer.weight_decay": 0.1}, "trained with optimizer.weight_decay 0.1"),
        (["--step", "3"], {"model.precision": "fp8"}, "was trained in fp8"),
        (["--step", "3"], {"global_batch": 15}, "has batches of 15 rows"),
        (["--step", "3"], {"recipe": {}}, "config.json is damaged ('schedule' is missing)"),
        (["--step", "3", "--workdir", "/nowhere"], {}, "/nowhere holds no config.json"),
    ],
)
def test_wrong_requests(workdir, tmp_path, flags, changes, said):
    changed(workdir, **changes)
    done = parity("step", "--workdir", workdir, *flags, "--run", tmp_path / "report")
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_what_cannot_be_judged_is_refused_and_nothing_is_moved(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    changed(run, **{"model.model": str(tmp_path / "gone.npz")})  # not needed: the checkpoints say which model it is
    report = ["--run", tmp_path / "report"]

    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (50, 100)))
    done = parity("step", "--workdir", run, "--first", "--steps", "5", *report)
    assert done.returncode == 2
    assert "recorded nothing within 5 steps after a checkpoint; give --steps 10" in " ".join(done.stderr.split())

    changed(run, class_names=list("abc"))
    done = parity("step", "--workdir", run, "--step", "41", *report)
    assert done.returncode == 2
    assert "has other classes than the run was trained with (10 and 3)" in " ".join(done.stderr.split())

    written = next(path for path in sorted((run / "checkpoints" / "40").rglob("*")) if path.name == "_METADATA")
    written.write_bytes(written.read_bytes() + b" ")
    before = contents(run)
    done = parity("step", "--workdir", run, "--step", "41", *report)
    assert done.returncode == 2
    assert "_METADATA is not as written" in " ".join(done.stderr.split())
    assert contents(run) == before
