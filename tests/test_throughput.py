"""`python -m parity throughput`: only what computes the right thing is timed, and only finished work."""

import contextlib
import json
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch.multiprocessing
import torch_devices
from browser import Shown
from command_line import parity
from PIL import Image
from rich.console import Console

from bit_jax.model import ops
from bit_jax.model.architecture import Architecture
from input_pipeline.errors import RequestError
from parity.in_jax.tasks import JaxSide
from parity.in_jax.timing import TimedJax
from parity.in_torch.devices import Devices
from parity.in_torch.timing import TimedTorch
from parity.in_torch.training_tasks import TrainingTorch
from parity.ladder import verdict
from parity.ladder.verdict import Look
from parity.sides import clock, flops
from parity.sides.side import Side
from parity.throughput import convolutions, measure
from parity.throughput import report as throughput_report
from parity.throughput.request import Throughput

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

QUICK = "--weights random:R14x0.5 --size 32 --rows 4 --seconds 0.2 --processes 2 --arms torch jax".split()


def run(*flags):
    return parity("throughput", *QUICK, *flags)


@pytest.fixture(scope="module")
def measured(compiled_once, tmp_path_factory):
    path = tmp_path_factory.mktemp("throughput") / "measured.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")  # the first process compiles
        done = run("--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


@pytest.mark.slow
def test_what_is_measured_and_said(measured):
    path, said = measured
    report = json.loads(path.read_text())
    assert set(report["arms"]) == {"torch", "jax"}
    for arm in report["arms"].values():
        assert len(arm["images_per_s_of_processes"]) == 2
        for rate, calls in zip(arm["images_per_s_of_processes"], arm["calls"], strict=True):
            assert rate == pytest.approx(4 / sorted(calls)[len(calls) // 2], rel=0.5)
        assert arm["products"] == {"matrix": "float32", "convolution": "float32"}
        assert arm["memory_gib"] > 0.1
        assert 0 < arm["mfu"] < 1
    assert report["arms"]["jax"]["compile_cold"] > report["arms"]["jax"]["compile_cached"] > 0
    assert set(report["ratios"]) == {"best against best", "default against default"}
    assert all(line["verdict"] == "rounding" for line in report["loss_check"].values())
    assert "best against best: jax is" in said
    assert not report["kept"]
    assert "was set: 'compile cold' may be" not in said


@pytest.mark.slow
def test_both_frameworks_train_in_float16_by_the_scaled_loss(tmp_path):
    path = tmp_path / "measured.json"
    done = run("--precision", "fp16", "--size", "16", "--processes", "1", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    for arm in report["arms"].values():
        assert arm["products"] == {"matrix": "float16", "convolution": "float16"}
    assert report["kept"] == ["JAX_COMPILATION_CACHE_DIR"]  # which the tests set
    assert "JAX_COMPILATION_CACHE_DIR was set: 'compile cold' may be of programs" in done.stdout
    assert all(line["verdict"] == "rounding" for line in report["loss_check"].values())


@pytest.mark.slow
def test_a_whole_loop_has_flagperfs_rates_and_a_page(tmp_path):
    folder = tmp_path / "drawn"
    for name in ("one", "two"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.jpg")
    saved, page = tmp_path / "loop.json", tmp_path / "loop.html"
    flags = ["--work", "loop", "--folder", folder, "--steps", "3", "--processes", "1", "--json", saved, "--html", page]
    done = run(*flags, "--arms", "torch", "torch:devices=2", "jax:tuned,hugepages")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(saved.read_text())
    for arm in report["arms"].values():
        (core,), (train,), (whole,) = (arm[name] for name in ("p_core", "p_train", "p_whole"))
        assert core >= train > whole > 0
        assert arm["images_per_s"] == train
        assert arm["input_share"][0] == pytest.approx(1 - train / core)
        assert len(arm["calls"][0]) == 3
    assert report["arms"]["torch:devices=2"]["memory_of"] == "2 processes"
    figures = ("", "with evaluation, ", "evaluation alone, ")
    assert set(report["ratios"]) == {f"{of}best against best" for of in figures}  # on one device
    assert "evaluation alone, best against best: jax:tuned,hugepages is" in done.stdout
    shown = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", shown), "the page fetches something"
    assert shown.count("<svg") == 3
    for said in ("jax:tuned,hugepages", "p_whole", "Every call", "waits for input", "matrix products"):
        assert said in shown


@pytest.mark.slow
def test_page_shows_its_plots_in_a_browser(measured, tmp_path):
    page = tmp_path / "page.html"
    throughput_report.write_page(json.loads(measured[0].read_text()), page)
    shown = Shown(page, tmp_path, height=1600)
    assert shown.count(0x73, 0xA3, 0xD9) > 1000, "JAX's bars"
    assert shown.count(0xDA, 0x74, 0x9D) > 1000, "PyTorch's bars"
    for said in ("best against best", "Every call", "matrix products"):
        assert said in shown.text


def test_a_loop_whose_folder_has_more_classes_than_the_model_is_refused(small_npz, tmp_path, capsys):
    for number in range(11):
        (tmp_path / "train" / f"{number:02d}").mkdir(parents=True)
        for copy in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / f"{number:02d}" / f"{copy}.jpg")
    asked = Throughput(str(small_npz), work="loop", folder=tmp_path, rows=4, arms=("torch",))
    with pytest.raises(RequestError, match="has 11 classes, more than the 10 of --weights"):
        measure.run(asked)


@pytest.mark.slow
def test_slower_than_before_is_told(measured, capsys):
    now = json.loads(measured[0].read_text())
    before = json.loads(measured[0].read_text())
    before["arms"]["jax"]["images_per_s_of_processes"] = [1000 * rate for rate in (1, 2)]
    assert throughput_report.slower(now, now, Console()) == []
    assert throughput_report.slower(now, before, Console()) == ["jax"]
    with pytest.raises(RequestError, match="measured other work: --size 32"):
        measure.run(Throughput("random:R14x0.5", size=64, compare=measured[0]))


@pytest.mark.slow
def test_a_wrong_arm_is_not_timed(tmp_path, capsys):
    path = tmp_path / "report.json"
    quick = {"weights": "random:R14x0.5", "size": 32, "rows": 4, "loss_check_rows": 2, "seconds": 0.2, "processes": 1}
    asked = Throughput(work="forward", arms=("torch", "jax"), fault="sample-variance", json=path, **quick)
    assert not measure.run(asked)
    assert "jax was not timed: its loss is wrong" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert set(report["arms"]) == {"torch"}
    assert report["loss_check"]["jax"]["verdict"] == "bug"
    assert not report["ratios"]


@pytest.mark.slow
def test_a_wrong_arm_that_is_timed_anyway_is_called_wrong_everywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verdict, "LOOKS", 1)  # the test before this one takes all
    path, page = tmp_path / "report.json", tmp_path / "page.html"
    quick = {"weights": "random:R14x0.5", "size": 32, "rows": 4, "seconds": 0.2, "processes": 1, "time_anyway": True}
    given = {"arms": ("torch", "jax"), "fault": "sample-variance", "json": path, "html": page}
    asked = Throughput(**given, **quick)
    assert not measure.run(asked)
    shown, progress = capsys.readouterr()
    assert "jax is WRONG, and timed all the same" in progress
    assert "jax was timed, but not rightly: its loss is wrong" in shown
    assert shown.count("jax (WRONG)") == 2  # in both tables
    report = json.loads(path.read_text())
    assert set(report["arms"]) == {"torch", "jax"}
    assert not report["ratios"]
    assert page.read_text().count("jax (WRONG)") >= 4  # in the tables and on the axes of two plots
    throughput_report.slower(report, report, Console())
    assert "jax (WRONG): 1.00 times" in capsys.readouterr().out


@pytest.mark.slow
def test_an_arm_that_fails_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    monkeypatch.setenv("CXX", "false")  # torch.compile's
    done = run("--work", "forward", "--arms", "torch", "torch:compile", "--processes", "1", "--json", path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "torch:compile failed: torch:compile in fp32, task loss: " in done.stdout
    report = json.loads(path.read_text())
    assert set(report["arms"]) == {"torch"}
    assert set(report["failed"]) == {"torch:compile"}


def test_calls_are_timed_to_their_end_and_the_first_ones_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(number):
        now[0] += 5.0 if number == 0 else 1.0

    times = clock.timed(call, 3.5)
    assert times == {"calls": [1.0] * 4, "first": 4.0}
    assert now[0] == 5.0 + clock.WARM_UP + 4.0


def test_the_first_call_of_a_turn_is_not_timed():
    """Another process had the device before."""
    numbers = []
    assert len(clock.again(numbers.append, 0.0)) == clock.LEAST == len(numbers) - 1


@pytest.mark.parametrize(("rate", "side"), [(1e12, 2048), (1e9, 512)])
def test_the_peak_rate_is_that_of_large_matrices_unless_they_would_take_minutes(monkeypatch, rate, side):
    now, sides = [0.0], []
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def product(left, right):
        def multiply():
            now[0] += 2 * len(left) * len(right) ** 2 / rate

        sides.append(len(left))
        return multiply

    assert clock.ceiling(product, "cpu", 1.0) == pytest.approx(rate)
    assert sides[-1] == side
    assert now[0] < 3


@pytest.mark.parametrize(("name", "height", "width"), [("R14x0.5", 32, 32), ("R50x1", 97, 131)])
def test_operations_are_those_of_the_models_own_convolutions(name, height, width):
    architecture = Architecture.parse(name, 10)
    model = architecture.model()
    image = jax.ShapeDtypeStruct((1, height, width, 3), "float32")
    params = jax.eval_shape(lambda: model.init_params(0))

    def counted(jaxpr):
        total = 0.0
        for equation in jaxpr.eqns:
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    total += counted(inner.jaxpr)
            if equation.primitive.name == "conv_general_dilated":
                kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
                total += 2.0 * kernel[0] * kernel[1] * kernel[2] * kernel[3] * out[1] * out[2]
            if equation.primitive.name == "dot_general":
                left, right = (operand.aval.shape for operand in equation.invars)
                total += 2.0 * left[-1] * right[-1]
        return total

    jaxpr = jax.make_jaxpr(lambda params, image: model.apply({"params": params}, image))(params, image)
    assert flops.forward(architecture, height, width) == counted(jaxpr.jaxpr)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "3"], "--rows 3 must be a multiple of 2: torch needs even rows a device"),
        (["--arms", "torch", "torch:devices=4"], "--rows 4 must be a multiple of 8: torch:devices=4 needs"),
        (["--loss-check-rows", "0"], "--loss-check-rows 0 must be a multiple of 2"),
        (["--seconds", "0"], "--seconds 0.0 must be greater than 0"),
        (["--arms", "jax"], "--arms needs one of PyTorch"),
        (["--arms", "torch", "jax:compile"], "side 'jax:compile' is neither"),
        (["--work", "loop"], "--work loop needs --folder"),
        (["--compare", "nowhere.json"], "--compare nowhere.json does not exist"),
    ],
)
def test_wrong_requests(flags, said):
    done = run(*flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


BATCHES = range(3)


@pytest.mark.slow
def test_pytorch_on_two_devices_takes_the_steps_of_one_if_it_averages(small_npz, tmp_path):
    rng, batches = np.random.default_rng(0), tmp_path / "batches.npz"
    images = {f"images/{number}": rng.normal(size=(4, 32, 32, 3)) for number in BATCHES}
    np.savez(batches, **images, **{f"targets/{number}": rng.dirichlet(np.ones(10), 4) for number in BATCHES})
    one = TrainingTorch(Side("torch"), "fp64", str(small_npz), lambda *_: None, rank=0, meeting=tmp_path)
    _, expected = one.curve(str(batches), len(BATCHES), clock.SCHEDULE, clock.MOMENTUM)
    given = (str(small_npz), str(batches), len(BATCHES), tmp_path)
    torch.multiprocessing.spawn(torch_devices.take_steps, given, nprocs=2)
    for averaging in (True, False):
        found = np.load(tmp_path / f"{averaging}.npz")
        apart = max(float(np.abs(found[name] - array).max()) for name, array in expected.items())
        assert (apart < 1e-12) == averaging, apart


def test_the_convolutions_of_r50():
    """There are as many as in torchvision's ResNet-50: 53, of 16 units with one 3x3 each, and four projections."""
    found = list(flops.convolutions(Architecture((3, 4, 6, 3), 1, 1000), 224, 224))
    assert len(found) == 53
    assert sum(each.size == 3 for each in found) == 16
    assert found[0] == flops.Convolution(7, 3, 64, 2, (224, 224), (112, 112))
    assert flops.Convolution(3, 128, 128, 2, (56, 56), (28, 28)) in found
    assert flops.Convolution(1, 1024, 2048, 2, (14, 14), (7, 7)) in found
    assert found[-1] == flops.Convolution(1, 512, 2048, 1, (7, 7), (7, 7))


@pytest.mark.parametrize("which", convolutions.PASSES)
@pytest.mark.parametrize(
    "one", [flops.Convolution(3, 4, 6, 2, (9, 11), (5, 6)), flops.Convolution(1, 3, 5, 1, (4, 4), (4, 4))]
)
def test_both_frameworks_time_the_same_pass_of_a_convolution(one, which, tmp_path):
    work = {"convolution": list(one), "rows": 2, "which": which, "sets": 2, "repeat": 1, "seconds": 0}
    torch_side = TimedTorch(Side("torch", channels_last=True), "fp32", "", lambda *_: None, rank=0, meeting=tmp_path)
    jax_side = TimedJax(Side("jax", tuned=True), "fp32", "", lambda *_: None)
    (torch_found, _), (jax_found, _) = torch_side.convolution_time(**work), jax_side.convolution_time(**work)
    assert jax_found["rms"] == pytest.approx(torch_found["rms"], rel=1e-5)
    x, kernel, gradient = (array.astype(np.float64) for array in clock.convolution_arrays(one, 2, 2))

    def convolve(x, kernel):
        return ops.convolve(x, kernel, one.stride, jax.lax.Precision.HIGHEST, products=False)

    passes = {
        "forward": lambda: convolve(x[0], kernel),
        "by input": lambda: jax.vjp(convolve, x[0], kernel)[1](gradient[0])[0],
        "by kernel": lambda: jax.vjp(convolve, x[0], kernel)[1](gradient[0])[1],
    }
    with jax.enable_x64(True):
        assert jax_found["rms"] == pytest.approx(np.sqrt(np.square(passes[which]()).mean()), rel=1e-5)


@pytest.mark.slow
def test_convolutions_are_compared_worst_first(tmp_path):
    path = tmp_path / "convolutions.json"
    quick = "--weights random:R14x0.5 --size 32 --rows 2 --sets 1 --repeat 1 --rounds 1 --seconds 0.001".split()
    done = parity("convolutions", *quick, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["convolutions"]
    assert sum(row["count"] for row in rows if row["pass"] == "forward") == 17
    assert (
        len([row for row in rows if row["pass"] == "by input"])
        == len([row for row in rows if row["pass"] == "forward"]) - 1
    )
    lost = [row["count"] * (row["jax"] - row["torch"]) for row in rows]
    assert lost == sorted(lost, reverse=True)
    assert "times as fast" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "0"], "--rows 0 must be greater than 0"),
        (["--torch", "jax"], "--torch jax is not of that framework"),
        (["--torch", "torch:devices=2"], "--torch torch:devices=2 has 2 devices; a convolution is timed on one"),
        (["--jax", "jax:quick"], "side 'jax:quick' is neither"),
    ],
)
def test_wrong_requests_for_convolutions(flags, said):
    done = parity("convolutions", *flags)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_fewer_devices_than_an_arm_names_are_refused(tmp_path):
    with pytest.raises(RequestError, match="jax:devices=16 needs 16 devices, and JAX finds 8; take fewer"):
        JaxSide(Side("jax", 16), "fp32", "unread.npz", lambda *_: None)
    with (
        mock.patch("torch.cuda.device_count", return_value=1),
        pytest.raises(RequestError, match="torch:devices=2 needs 2 GPUs, and PyTorch finds 1; take fewer"),
    ):
        Devices.join(2, 0, tmp_path / "meeting", gpu=True)


def test_every_arm_starts_once_a_turn():
    assert [list(measure._in_turn("abc", turn)) for turn in range(2)] == [["a", "b", "c"], ["b", "c", "a"]]


def test_an_arm_in_doubt_is_looked_at_again_beside_one_that_is_not():
    asked = []

    def look(number, arms, _):
        asked.append(arms)
        errors = {"torch": 1e-7, "jax": 1e-5 if number == 0 else 1e-7, "jax:tuned": 1e-3}
        return {arm: Look(np.full(2, 1e-7), np.full(2, errors[arm]), np.full(2, 1e-7), 1e-6) for arm in arms}

    bench: Any = SimpleNamespace(sides=dict.fromkeys(("torch", "jax", "jax:tuned")), failed={}, _look=look)
    bench._float64, bench.options = contextlib.nullcontext(), Throughput()
    lines = measure._Bench.loss_check(bench, Console(quiet=True))
    assert [lines[arm].verdict for arm in bench.sides] == ["rounding", "rounding", "bug"]
    assert asked == [["torch", "jax", "jax:tuned"], ["jax", "jax:tuned", "torch"], *2 * [["jax:tuned", "torch"]]]
