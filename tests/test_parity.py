"""The comparison with its real parts: both frameworks in processes of their own, the command line, saved runs."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import unittest.mock
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import psutil
import pytest
from browser import Shown
from command_line import parity
from conftest import SMALL
from PIL import Image
from rich.console import Console

from input_pipeline.errors import RequestError, RunFailed
from parity import faults
from parity.ladder import selftest
from parity.ladder.ladder import Ladder
from parity.ladder.selftest import climb, first_bug, inject
from parity.options import Options
from parity.report import saved
from parity.sides.inputs import random_arrays

ROOT = Path(__file__).parent.parent
QUICK = ["--size", "32", "--rows", "4", "--batches", "2", "--disturbances", "3", "--steps", "6", "--warmup-steps", "2"]
QUICK += ["--decay-steps", "4", "--limit", "50"]
pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")


@pytest.fixture
def foreign(monkeypatch):
    """Lets the PyTorch side import tests/foreign_bit.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(scope="module")
def whole_run(small_npz, tmp_path_factory):
    """`all`, with every form of report."""
    folder = tmp_path_factory.mktemp("all")
    forms = ["--json", folder / "r.json", "--html", folder / "r.html", "--junit", folder / "r.xml"]
    command = [sys.executable, "-m", "parity", "all", "--weights", small_npz, *QUICK, "--run", folder / "run", *forms]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True), folder


@pytest.mark.slow
def test_all_holds_and_says_so_in_every_form(whole_run):
    done, folder = whole_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HOLDS: jax and torch compute the same" in done.stdout
    report = json.loads((folder / "r.json").read_text())
    assert report == json.loads((folder / "run" / "report.json").read_text())
    assert [rung["name"] for rung in report["rungs"]] == [
        *("weights", "pixels", "forward", "loss", "gradients", "optimizer", "curve", "accuracy")
    ]
    lines = {(line["name"], line["precision"]) for rung in report["rungs"] for line in rung["lines"]}
    for key in random_arrays(SMALL):
        assert {(key, "fp64"), (key, "fp32")} <= lines  # as a weight and as a gradient
    sites = ["root_block", *(f"block{stage}/unit01" for stage in range(1, 5)), "logits"]
    forward = [line["name"] for line in report["rungs"][2]["lines"] if line["precision"] == "fp64"]
    assert forward == sites
    cases = ET.parse(folder / "r.xml").getroot().iter("testcase")
    assert sum(1 for _ in cases) == sum(len(rung["lines"]) for rung in report["rungs"])
    logits = np.load(folder / "run" / "logits.npz")
    assert logits["reference"].shape == logits["candidate"].shape == (50, 10)


@pytest.mark.slow
def test_attestation_says_what_is_in_force(whole_run):
    report = saved.load(whole_run[1] / "run")
    assert report["attestation"]["mismatches"] == []
    for precision, kind in (("fp64", "float64"), ("fp32", "float32")):
        for entries in report["attestation"]["sides"][precision].values():
            assert entries["matrix products"] == entries["convolution products"] == kind
            assert entries["group norm eps"] == 1e-5
    torch, jax = report["attestation"]["sides"]["fp32"].values()
    assert torch["weights sha256"] == jax["weights sha256"]
    assert "torch" in torch["versions"]
    assert "jax" in jax["versions"]


@pytest.mark.slow
def test_show_prints_a_saved_run_and_judges_it_at_another_margin(whole_run, tmp_path):
    done, folder = whole_run
    again = parity("show", folder / "run", "--html", tmp_path / "again.html")
    assert again.returncode == 0
    table = done.stdout.split("HOLDS")[0].strip()
    assert table in again.stdout
    assert (tmp_path / "again.html").read_text() == (folder / "r.html").read_text()
    wider = parity("show", folder / "run", "--margin", "20")
    assert "equivalence within 20 points is shown" in wider.stdout


@pytest.mark.slow
def test_diff_finds_what_changed_between_two_runs(whole_run, tmp_path):
    run = whole_run[1] / "run"
    assert "nothing changed" in parity("diff", run, run).stdout
    changed = saved.load(run)
    changed["attestation"]["sides"]["fp32"]["candidate"]["versions"]["jax"] = "9.9"
    line = changed["rungs"][2]["lines"][3]
    line["verdict"], line["difference"] = "bug", 1e-3
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text(json.dumps(changed))
    logits = dict(np.load(run / "logits.npz"))
    logits["candidate"][7] = logits["candidate"][7, ::-1]
    np.savez(other / "logits.npz", **logits)
    worse = parity("diff", run, other)
    assert worse.returncode == 1
    assert "9.9" in worse.stdout
    assert f"forward {line['name']} fp64" in worse.stdout
    assert "1 predictions flipped, 1 by more than twice" in worse.stdout
    assert parity("diff", other, run).returncode == 1  # the predictions differ all the same
    shown = parity("show", other, "--margin", "0.1", "--html", tmp_path / "flips.html")
    assert shown.returncode == 1
    page = (tmp_path / "flips.html").read_text()
    assert page.count("data:image/png;base64,") == 1  # the flipped image itself
    assert re.search(r"7, label \w+: \w+ became \w+;", page)
    assert "unexplained" in page
    assert "FAILS at accuracy" in page


@pytest.mark.slow
def test_page_shows_its_plots_in_a_browser(whole_run, tmp_path):
    shown = Shown(whole_run[1] / "r.html", tmp_path, height=2600)
    assert shown.count(0x1B, 0x5E, 0x20) > 200, "the verdict's green"
    assert shown.count(0xC2, 0x18, 0x5B) > 200, "the reference's curves"
    assert shown.count(0x15, 0x65, 0xC0) > 200, "the candidate's curves and the gradients' points"
    assert shown.count(0xB7, 0x1C, 0x1C) < 50, "something is marked as wrong"
    assert shown.bands_without_ink() == 0, "plots and tables follow each other down the page"
    for said in ("Error by depth", "Gradients", "Training curve", "Accuracy on digits", "Attestation", "root_block"):
        assert said in shown.text
    assert shown.text.count("<svg") == 3


@pytest.fixture(scope="module")
def ladders(tmp_path_factory):
    """What shows in float64 is looked for in float64 alone, which saves half the time; `parity selftest` runs both."""
    folders = {precision: tmp_path_factory.mktemp(precision) for precision in ("fp64", "fp32")}
    with contextlib.ExitStack() as stack:
        yield {
            precision: stack.enter_context(
                Ladder(dataclasses.replace(selftest.SMALL, precision=precision), folder, Console(quiet=True))
            )
            for precision, folder in folders.items()
        }


@pytest.fixture
def faulty(ladders):
    return ladders["fp64"]


# one a rung up to the loss, and those of accuracy, whose lines are in the precision asked for; test_bundles.py finds
# the others through a record of the same reference, and test_parity_operations.py those of one operation
ONE_A_RUNG = ("swapped-hw", "bgr", "stride", "mixup-labels")
SLOW = ("detached", "last-batch", "turned-image")


@pytest.mark.parametrize("name", [*ONE_A_RUNG, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_fault_is_found_at_the_right_rung_and_place(ladders, name):
    fault = faults.FAULTS[name]
    failed, found = inject(ladders[fault.precision], fault)
    assert failed is not None, "no rung failed"
    assert found, f"{failed.name}: {first_bug(failed)}; {failed.findings}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_without_a_fault_the_same_ladder_holds(ladders, precision):
    assert climb(ladders[precision]) is None


def test_a_fault_says_whether_the_unit_itself_is_wrong(faulty):
    failed, _ = inject(faulty, faults.FAULTS["stride"])
    assert failed is not None
    assert "fed the reference's input it still differs" in failed.findings[0]
    assert failed.details["divergence"]["teacher_forced"] == ["block2/unit01", "block3/unit01", "block4/unit01"]


@pytest.mark.slow
def test_one_version_of_the_code_against_another(small_npz, tmp_path):
    """The other adds a thousandth to what max-pool returns."""
    other = tmp_path / "other"
    for package in ("bit_jax", "input_pipeline", "parity"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    ops = other / "bit_jax" / "model" / "ops.py"
    right, wrong = "return _max_of_three(_max_of_three(x, 2), 1)", "return _max_of_three(_max_of_three(x, 2), 1) + 1e-3"
    assert right in ops.read_text()
    ops.write_text(ops.read_text().replace(right, wrong))
    flags = ["--reference", "jax", "--weights", small_npz, *QUICK, "--precision", "fp64"]
    same = parity("forward", *flags, "--candidate", f"jax:code={ROOT}")
    assert same.returncode == 0, same.stdout + same.stderr
    found = parity("forward", *flags, "--candidate", f"jax:code={other}", "--run", tmp_path / "run")
    assert found.returncode == 1, found.stdout + found.stderr
    lines = saved.load(tmp_path / "run")["rungs"][0]["lines"]
    assert next(line["name"] for line in lines if line["verdict"] == "bug") == "root_block"


@pytest.mark.slow
def test_one_jax_configuration_against_another(small_npz, tmp_path):
    """4 virtual devices, parameters split over 2, in two passes, normalization recomputed, against one device."""
    candidate = "jax:devices=4,fsdp=2,microbatches=2,remat=norm,tuned"
    sides = ["--reference", "jax", "--candidate", candidate]
    flags = ["--weights", small_npz, *QUICK, "--rows", "8", "--precision", "fp64", "--run", tmp_path / "run"]
    done = parity("curve", *sides, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    report = saved.load(tmp_path / "run")
    assert report["sides"]["candidate"] == candidate
    assert {line["verdict"] for line in report["rungs"][0]["lines"]} <= {"equal", "rounding"}
    assert report["attestation"]["sides"]["fp64"]["candidate"]["topology"]["devices"] == 4


@pytest.mark.slow
def test_another_pytorch_model_with_timms_eps_is_caught_and_explained(small_npz, tmp_path, foreign):
    flags = ["--weights", small_npz, *QUICK, "--precision", "fp64", "--torch-model"]
    good = parity("gradients", *flags, "foreign_bit:load", "--run", tmp_path / "good")
    assert good.returncode == 0, good.stdout + good.stderr
    bad = parity("all", *flags, "foreign_bit:load_with_timms_eps", "--run", tmp_path / "bad")
    assert bad.returncode == 1
    said = " ".join(bad.stdout.split())
    assert "mismatch standardization eps: 1e-08 on the reference, 1e-10 on the candidate" in said
    assert said.index("standardization eps") < said.index("FAILS at forward: root_block")


def test_a_state_dict_takes_the_place_of_the_files_weights(small_npz, tmp_path):
    import torch

    from parity.in_torch import resnetv2

    state = resnetv2.load(str(small_npz)).state_dict()
    state["block2.unit01.b.group_norm.gamma"] *= 1.01
    torch.save(state, tmp_path / "other.pt")
    flags = ["--weights", small_npz, "--torch-weights", tmp_path / "other.pt", "--run", tmp_path / "run"]
    done = parity("weights", *flags, "--precision", "fp64")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "block2/unit01/b/group_norm/gamma" in done.stdout
    assert "do not hold the same weights" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["weights", "--weights", "nowhere.npz"], "does not exist"),
        (["weights", "--candidate", "jax:devices=3"], "--rows 8 is not divisible"),
        (["weights", "--size", "64x"], "--size 64x is neither"),
        (["weights", "--rows", "3"], "must be even"),
        (["weights", "--precision", "fp64", "--torch-model", "parity:nothing"], "--torch-model parity:nothing"),
        pytest.param(
            ["weights", "--torch-model", "foreign_bit:load_something_else"], "do not pair up", marks=pytest.mark.slow
        ),
        pytest.param(
            ["weights", "--torch-model", "foreign_bit:load_without_logits"],
            "a dict with features, in which there are no",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["weights", "--torch-model", "foreign_bit:load_with_probabilities_first"],
            "[2, 10] is wanted",
            marks=pytest.mark.slow,
        ),
        (["weights", "--html", "gs://bucket/r.html"], "is a URL"),
        (["weights", "--weights", "random:R51x1"], "unknown architecture"),
        (["accuracy", "--dataset", "digits", "--eval-split", "train2"], "no split"),
        (["pixels", "--images", "missing.png"], "missing.png"),
        (["show", "nowhere"], "cannot be read"),
        (["selftest", "--faults", "gremlins"], "unknown fault 'gremlins'"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, said, tmp_path, foreign):
    run = ["--run", tmp_path / "run"] if arguments[0] not in ("show", "selftest") else []
    done = parity(*arguments, *run)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 or "For full helptext" in done.stderr  # tyro's own refusals are in a box
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_models_output_object_gives_its_logits_to_every_task(small_npz, tmp_path, foreign):
    flags = ["--weights", small_npz, *QUICK, "--precision", "fp64", "--torch-model"]
    done = parity("gradients", *flags, "foreign_bit:load_with_an_output_object", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr


def test_accuracy_counts_classes_by_their_names(small_npz, tmp_path):
    """Head b, a, c; the dataset has a and c: by position every label would be another class's."""
    weights_folder, dataset = tmp_path / "weights", tmp_path / "data"
    weights_folder.mkdir()
    names = ["b", "a", "c", *"defghij"]
    (weights_folder / "config.json").write_text(json.dumps({"class_names": names, "recipe": {"crop": 24}}))
    (weights_folder / "w.npz").symlink_to(small_npz)
    for name in ("a", "c"):
        (dataset / "test" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(dataset / "test" / name / f"{number}.png")
    flags = ["--weights", weights_folder / "w.npz", "--size", "32", "--rows", "2", "--precision", "fp64"]
    flags += ["--dataset", f"folder:{dataset}"]
    done = parity("accuracy", *flags, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    report = saved.load(tmp_path / "run")
    assert np.load(tmp_path / "run" / "logits.npz")["labels"].tolist() == [1, 1, 2, 2]
    assert "by name" in report["attestation"]["classes"]["test"]
    assert report["rungs"][0]["details"]["size"] == 24
    (dataset / "test" / "z").mkdir()
    Image.new("RGB", (8, 8)).save(dataset / "test" / "z" / "0.png")
    with unittest.mock.patch("parity.ladder.ladder.Worker") as started:
        refused = parity("accuracy", *flags, "--run", tmp_path / "refused")
    assert refused.returncode == 2
    assert "has 1 classes that the head of" in refused.stderr
    assert not started.called
    assert not (tmp_path / "refused").exists()


def test_a_folder_that_another_comparison_writes_is_refused_at_the_start(tmp_path):
    with saved.owned(tmp_path / "run"):
        done = parity("weights", "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "in use by process" in done.stderr


@pytest.mark.parametrize("side", ["jax", pytest.param("torch:devices=2", marks=pytest.mark.slow)])
def test_workers_are_gone_when_the_near_end_is_killed_in_a_task(side, small_npz, tmp_path):
    near = subprocess.Popen(
        [sys.executable, "-c", KILLED, side, small_npz, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert near.stdout is not None
    workers = [psutil.Process(int(process)) for process in near.stdout.readline().split()]
    assert len(workers) == (2 if "torch" in side else 1)
    assert "computing" in near.stdout.readline()
    near.kill()
    near.wait()
    near.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=300)  # the task takes an hour
    assert not alive


KILLED = """
import sys, threading, time
from pathlib import Path
import numpy as np
from parity.sides.side import parse_side
from parity.sides.worker import Worker

side, weights, folder = sys.argv[1:]
batches = Path(folder, "batches.npz")
np.savez(batches, **{"images/0": np.zeros((4, 32, 32, 3)), "targets/0": np.full((4, 10), 0.1)})
worker = Worker(parse_side(side), "fp32", Path(weights), Path(folder, "worker"))
print(*(process.pid for process in (worker._process, *worker._others)), flush=True)
asked = {"save_as": "x", "progress": lambda *_: None, "mixed": batches, "count": 1}
worker.ask("forward_time", seconds=0.1, **asked)
print("computing", flush=True)
worker.ask("train_time", seconds=3600, **asked)
"""


@pytest.mark.slow
def test_show_ends_quietly_when_nobody_reads_on(whole_run):
    shown = subprocess.Popen(
        [sys.executable, "-m", "parity", "show", whole_run[1] / "run"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert shown.stdout is not None
    shown.stdout.close()
    assert shown.communicate()[1] == b""


@pytest.mark.slow
def test_a_saved_run_is_not_overwritten(whole_run):
    done = parity("weights", "--run", whole_run[1] / "run")
    assert done.returncode == 2
    assert "holds a saved run" in done.stderr


def test_a_side_that_dies_ends_the_comparison_with_its_last_words(small_npz, tmp_path):
    options = Options(weights=str(small_npz))
    with Ladder(options, tmp_path, Console(quiet=True)) as ladder:
        worker = ladder._worker("candidate", "fp64")
        worker._process.kill()
        with pytest.raises(RunFailed, match=r"jax in fp64, task weights: died with exit code -9"):
            ladder.ask("candidate", "fp64", "weights")


def test_fail_fast_ends_a_rung_at_its_first_bug(faulty):
    faulty.options = dataclasses.replace(faulty.options, fail_fast=True)
    failed, _ = inject(faulty, faults.FAULTS["stride"])
    faulty.options = dataclasses.replace(faulty.options, fail_fast=False)
    assert failed is not None
    assert [line.name for line in failed.lines] == ["root_block", "block1/unit01", "block2/unit01"]


@pytest.mark.parametrize(("side", "other"), [("jax", "torch"), ("torch", "jax")])
def test_each_side_is_free_of_the_other_framework(side, other):
    """And of Numba, which is imported when the first image is resized."""
    look = f"import sys, parity.in_{side}.timing; sys.exit(bool({ {other, 'numba'} } & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT).returncode == 0


def test_an_unknown_fault_is_refused():
    with pytest.raises(RequestError), faults.injected("gremlins"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kind", "least"), [("bf16", "bfloat16", 1e-4), ("fp16", "float16", 1e-5)])
def test_narrow_formats_are_judged_against_float64_too(small_npz, tmp_path, precision, kind, least):
    flags = ["--weights", small_npz, *QUICK, "--precision", precision, "--run", tmp_path / "run"]
    done = parity("forward", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    report = saved.load(tmp_path / "run")
    errors = [line["candidate_error"] for line in report["rungs"][0]["lines"] if line["precision"] == precision]
    assert min(errors) > least  # float32 would err by 1e-7
    for entries in report["attestation"]["sides"][precision].values():
        assert entries["matrix products"] == entries["convolution products"] == kind
