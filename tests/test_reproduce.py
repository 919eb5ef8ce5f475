"""Published figures: their records, the verdict on a measured one, and a measurement from command to verdict."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from rich.console import Console
from test_docs_commands import Parsed, parse  # noqa: F401 (a fixture)

from bit_jax import evaluate, reproduce, train
from bit_jax.model.architecture import Architecture
from bit_jax.predictions.summary import Share
from bit_jax.reproductions import asked, table
from bit_jax.reproductions.judge import judge
from bit_jax.reproductions.records import Figure, Source, Value
from bit_jax.reproductions.table import FIGURES
from bit_jax.reproductions.takes import forward_flops
from bit_jax.training import hyperrule
from input_pipeline.exits import exit_code
from parity.sides.inputs import random_arrays

TRAIN_EXAMPLES = {"imagenet2012": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "digits": 1438}
CLASSES = {"imagenet2012": 1000, "cifar10": 10, "cifar100": 100}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, arguments)])
    return exit_code(reproduce.main)


@pytest.mark.parametrize("figure", FIGURES.values(), ids=lambda figure: figure.name)
def test_a_record_is_well_formed(figure):
    source = figure.source
    assert source.address.startswith("https://") or (ROOT / source.address).is_file()
    assert source.title
    assert figure.reasons
    assert figure.data
    assert not figure.data.endswith(".")
    assert all(reason.endswith(".") and "{" not in reason for reason in figure.reasons)
    for value in figure.values:
        assert value.examples is not None or not value.is_accuracy
        assert value.printed or value.spread
        if value.is_accuracy and value.printed:
            low, high = value.rounded_from
            assert 0 < low < high < 1
        if value.spread and value.printed:
            assert value.spread[0] <= value.rounded_from[0] < value.rounded_from[1] <= value.spread[1]


@pytest.mark.parametrize("figure", FIGURES.values(), ids=lambda figure: figure.name)
def test_the_shown_command_is_taken_by_its_parser(figure, parse):  # noqa: F811
    for command in figure.commands(Path("data"), Path("runs")):
        with pytest.raises(Parsed):
            parse(command.removeprefix("python ").split())


def test_what_is_run_is_what_the_record_says():
    for figure in FIGURES.values():
        arguments = figure.arguments(Path("data"))
        if figure.how == "evaluation":
            request = evaluate.configuration(arguments)
            assert str(request.view.size or 48) in figure.what
            assert request.dataset in ("imagenet2012", "idx:data/fashion-mnist")
            assert request.split == ("validation" if request.dataset == "imagenet2012" else "test")
        else:
            cfg = train.configuration([*arguments, *figure.of_run(Path("runs"), figure.seeds[0])])
            examples = TRAIN_EXAMPLES[cfg.data.dataset]
            if cfg.data.examples_per_class is not None:
                examples = cfg.data.examples_per_class * (100 if cfg.data.dataset == "cifar100" else 10)
            decided = hyperrule.recipe(cfg, train_examples=examples, native_area=32 * 32)
            assert figure.name.startswith("flagperf") or decided.schedule.steps == figure.steps
            if figure.plan is not None:
                plan, devices = figure.plan, figure.plan.hosts * figure.plan.devices
                assert (plan.model, plan.precision) == (cfg.model.model, cfg.model.precision)
                assert plan.batch_per_device == (cfg.data.batch_per_device or cfg.data.global_batch / devices)
                assert plan.classes == CLASSES[cfg.data.dataset]


def test_flagperfs_accuracies_are_of_an_eighth_of_the_images():
    for name, correct in (("flagperf-1x8-bs16", 5262), ("flagperf-1x8-bs20", 5251)):
        value = FIGURES[name].values[0]
        assert float(value.printed) * 6250 == pytest.approx(correct, abs=1e-9)
        assert any(f"{correct:,}" in reason for reason in FIGURES[name].reasons)
        assert value.examples == 6250
        # of all 50,000 images it would be a whole number, too; of the neighbouring shares it is not
        assert abs(float(value.printed) * 6249 - round(float(value.printed) * 6249)) > 0.1


@pytest.mark.slow
def test_flagperfs_fp32_is_faster_than_float32_can_be():
    flops = forward_flops(Architecture.parse("R152x2", 1000), 480)
    assert flops == pytest.approx(table.R152X2_FLOPS, rel=1e-3)
    for rate, cards in ((228, 8), (243, 8), (29.8, 1), (470, 16)):
        assert table.tflops_a_card(rate, cards, flops) > 35 > 19.5


def figure_of(value, examples=10_000):
    return Figure("f", "what", (value,), Source("s", "https://s"), "evaluation", "--weights w", examples, "data")


def verdict(value, accuracy, *, examples=10_000, published_of=None, **more):
    figure = figure_of(dataclasses.replace(value, examples=published_of or examples), examples)
    [judged] = judge(figure, [{"acc1": {"value": accuracy}, "examples": examples} | more])
    return judged


def test_a_figure_agrees_up_to_the_end_of_the_interval():
    low, high = Share(8000, 10_000).interval
    assert (round(low, 4), round(high, 4)) == (0.7920, 0.8077)  # Wilson, by hand
    assert verdict(Value("acc1", "80.0"), 0.8).agrees
    # the last number of two digits whose rounding reaches into the interval, and the next one beyond it
    for printed, agrees in (("80.77", True), ("80.78", False), ("79.21", True), ("79.20", True), ("79.19", False)):
        edge = float(printed) / 100
        reaches = edge + 0.00005 >= low and edge - 0.00005 <= high
        assert reaches == agrees
        assert verdict(Value("acc1", printed), 0.8).agrees == agrees, printed
    assert verdict(Value("acc1", "80.8"), 0.8).agrees  # from 80.75, which lies in it
    assert verdict(Value("acc1", "82.0"), 0.8).verdict == "differs by 2.00 points"
    assert verdict(Value("acc1", "0.82", "share"), 0.8).verdict == "differs by 2.00 points"


def test_the_interval_is_that_of_the_published_number_of_examples():
    value = Value("acc1", "81.5")
    assert verdict(value, 0.8, examples=50_000).agrees is False
    of_a_share = verdict(value, 0.8, examples=50_000, published_of=6250)
    assert of_a_share.agrees is False
    assert of_a_share.interval == Share(5000, 6250).interval
    assert verdict(Value("acc1", "80.9"), 0.8, examples=50_000).agrees is False
    assert verdict(Value("acc1", "80.9"), 0.8, examples=50_000, published_of=6250).agrees


def test_a_figure_of_other_examples_is_not_judged():
    figure = figure_of(Value("acc1", "80.0", examples=50_000), 50_000)
    [judged] = judge(figure, [{"acc1": {"value": 0.8}, "examples": 500}])
    assert judged.agrees is None
    assert judged.verdict == "not judged: 500 examples were evaluated, not 50,000"


def test_the_images_apart_are_counted_where_the_digits_tell():
    exact = verdict(Value("acc1", "80.386"), 40_190 / 50_000, examples=50_000)
    assert exact.verdict == "agrees; at least 3 images otherwise"
    assert verdict(Value("acc1", "80.4"), 40_190 / 50_000, examples=50_000).verdict == "agrees"


def test_of_several_runs_the_median_lies_within_the_published_ones():
    value = Value("final_acc1", "82.4", examples=10_000, lowest="76.7", highest="85.4")

    def judged(*accuracies):
        runs = [{"final_acc1": accuracy, "eval_examples": 10_000} for accuracy in accuracies]
        return judge(figure_of(value), runs)[0]

    assert judged(0.7, 0.77, 0.8).agrees
    assert judged(0.7, 0.77, 0.8).middle == 0.77
    assert judged(0.1, 0.76651, 0.9).agrees  # it is printed as 76.7
    assert judged(0.1, 0.76649, 0.9).agrees is False
    assert judged(0.86, 0.875, 0.9).verdict == "differs by 2.05 points from the published runs, median of 3 runs"


def test_speeds_are_beside_each_other_and_not_judged():
    figure = dataclasses.replace(
        FIGURES["flagperf-1x8-bs16"], values=tuple(FIGURES["flagperf-1x8-bs16"].values[place] for place in (0, 4))
    )
    result = {"final_acc1": 0.85, "eval_examples": 50_000, "p_core": 456.0}
    accuracy, speed = judge(figure, [result])
    assert (speed.agrees, speed.verdict) == (None, "not judged: 2.00 times the published figure")
    assert accuracy.agrees
    # FlagPerf's own definitions, where the run has them
    result |= {"rank0_acc1": 0.8, "rank0_examples": 6250, "p_core_unsynchronized": 684.0}
    accuracy, speed = judge(figure, [result])
    assert speed.measured == (684.0,)
    assert (accuracy.measured, accuracy.agrees) == ((0.8,), False)


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = {
        ("timm-R50x1_224", "--data-dir", tmp_path / "d"): ["timm-R50x1_224 has no data here", "--manual-dir ARCHIVES"],
        ("authors-cifar10-R50x1-5", "--data-dir", tmp_path / "d"): ["is not prepared under", "prepare cifar10"],
        ("embedded-fashion-mnist",): ["needs --data-dir DATA", "zalandoresearch/fashion-mnist"],
        ("embedded-fashion-mnist", "--data-dir", tmp_path / "d"): ["has no data here", "DATA/fashion-mnist"],
        ("timm-R50x1",): ["near it: timm-R50x1_224"],
    }
    for arguments, said in cases.items():
        assert run(monkeypatch, *arguments) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert all(words in error for words in said), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "more", "flags"),
    [
        ("timm-R50x1_224", "--precision bf16 --batch-per-device 8 --mesh fsdp=2 --html p.html --data-dir x", []),
        ("timm-R50x1_224", "--dataset folder:x --split val", []),
        ("timm-R50x1_224", "--dataset imagenet_v2", ["--dataset"]),
        ("timm-R50x1_224", "--weights R50x1_160 --split train", ["--split", "--weights"]),
        ("timm-R50x1_224", "--classes occurring", ["--classes"]),
        ("timm-R50x1_224", "--size 225 --crop-pct 1", ["--crop-pct", "--size"]),
        ("authors-cifar10-R50x1", "--precision bf16 --microbatches 2 --eval-every 10 --deterministic", []),
        ("authors-cifar10-R50x1", "--steps 50 --model BiT-S-R50x1", ["--model", "--steps"]),
        ("authors-cifar10-R50x1", "--dataset cifar100 --eval-split train", ["--dataset", "--eval-split"]),
        ("authors-cifar10-R50x1", "--global-batch 64 --ema 0.9", ["--ema", "--global-batch"]),
        ("flagperf-1x8-bs16", "--flagperf-compat accuracy p_core", []),
        ("flagperf-1x8-bs16", "--flagperf-compat schedule", ["--flagperf-compat"]),
    ],
)
def test_flags_that_change_what_is_measured_are_found(name, more, flags):
    assert asked.changed(FIGURES[name], Path("data"), tuple(more.split())) == flags


def test_nothing_is_judged_where_flags_changed_what_was_measured():
    """Not even with the published number of examples; nor is a speed set against the published one."""
    accuracy, speed = Value("acc1", "80.0", examples=500), Value("p_core", "228", "images/s")
    figure = dataclasses.replace(figure_of(accuracy, 500), values=(accuracy, speed))
    run = {"acc1": {"value": 0.8}, "examples": 500, "p_core": 456.0}
    for judged in judge(figure, [run], ["--split", "--weights"]):
        assert (judged.agrees, judged.verdict) == (None, "not judged: --split and --weights changed what was measured")
    assert judge(figure, [run])[0].agrees


def test_what_is_not_measured_is_null():
    figure = figure_of(Value("acc1", "80.0", examples=500), 500)
    [judged] = judge(figure, [{"examples": 500}])
    content = judged.as_json()
    assert (content["measured"], content["median"], content["verdict"]) == ([], None, "not measured")
    json.dumps(content, allow_nan=False)
    shown = io.StringIO()
    reproduce.show(figure, [judged], Console(file=shown))
    assert "nan" not in shown.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("list -- --nonsense", "error: `list` measures nothing, so `-- --nonsense` belongs to a figure"),
        ("list --plan", "error: `list` measures nothing, so --plan belongs to a figure"),
        ("authors-cifar10-R50x1 --plan -- --steps 50", "`-- --steps 50` would change it"),
        ("authors-cifar10-R50x1 --plan -- --nonsense", "`-- --nonsense` would change it"),
        ("embedded-digits --plan -- --steps 50", "`-- --steps 50` would change it"),
        ("timm-R50x1_224 --plan -- --split validation[:10%]", "50,000 images, and --split behind `--` names others"),
        ("timm-R50x1_224 --plan -- --dataset imagenet_v2", "50,000 images, and --dataset behind"),
        ("embedded-digits -- --seed 7", "--seed and --workdir of each run are embedded-digits's own (seeds: 0)"),
        ("embedded-digits-5 -- --workdir x", "own (seeds: 0, 1, 2); leave them out behind `--`"),
        ("timm-R50x1_224 -- --nonsense", "python -m bit_jax.evaluate --help"),
        ("embedded-digits -- --nonsense", "python train.py --help"),
        ("timm-R50x1_224 --json f -- --json f", "--json and `-- --json` both name f"),
    ],
)
def test_wrong_words_behind_the_dashes(tmp_path, monkeypatch, capfd, arguments, said):
    """tyro ends the process; what it says names the command that the words belong to."""
    monkeypatch.chdir(tmp_path)
    try:
        code = run(monkeypatch, *arguments.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    shown = capfd.readouterr().err
    assert said in " ".join(shown.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_all_figures_are_listed(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "list", "--json", tmp_path / "new" / "l.json") == 0
    shown = capsys.readouterr().out
    listed = json.loads((tmp_path / "new" / "l.json").read_text())
    assert [each["name"] for each in listed] == list(FIGURES)
    assert all(name in shown for name in FIGURES)
    timm = next(each for each in listed if each["name"] == "timm-R50x1_224")
    assert timm["values"][0]["printed"] == "82.820"
    assert timm["commands"][0].startswith("python -m bit_jax.evaluate --weights R50x1_224 ")


@pytest.fixture
def measurable(tmp_path, monkeypatch):
    """A figure of random weights on a folder of 24 images, and their accuracy by `evaluate` alone."""
    names = ("ant", "bee", "cow", "dog")
    for number in range(24):
        path = tmp_path / "pets" / "test" / names[number % 4] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    np.savez(tmp_path / "w.npz", **random_arrays(Architecture((1, 1, 1, 1), 0.5, 4)))
    (tmp_path / "config.json").write_text(json.dumps({"class_names": names, "recipe": {"crop": 32}}))
    words = f"--weights {tmp_path}/w.npz --dataset folder:{{data_dir}}/pets --resize timm --size 32"
    alone = evaluate.evaluate(evaluate.configuration(words.format(data_dir=tmp_path).split()))
    value = Value("acc1", f"{100 * alone.summary.accuracy(1).value:.2f}", examples=24)
    source = Source("nowhere", "https://example.org")
    figure = Figure("pets", "random weights", (value,), source, "evaluation", words, 24, "here", reasons=("None.",))
    monkeypatch.setitem(FIGURES, "pets", figure)
    monkeypatch.chdir(tmp_path)
    return figure


def test_an_evaluation_from_the_command_to_the_verdict(measurable, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "pets", "--data-dir", tmp_path, "--json", tmp_path / "r.json") == 0
    shown = capsys.readouterr().out
    assert "agrees" in shown
    assert "python -m bit_jax.evaluate --weights" in shown
    kept = json.loads((tmp_path / "runs/reproduce/pets/reproduction.json").read_text())
    assert kept == json.loads((tmp_path / "r.json").read_text())
    [judged] = kept["judged"]
    assert judged["agrees"] is True
    assert judged["measured"] == [kept["runs"][0]["acc1"]["value"]]
    # the same with another published number, and with fewer examples
    other = "95.00" if float(measurable.values[0].printed) < 60 else "5.00"
    value = dataclasses.replace(measurable.values[0], printed=other)
    monkeypatch.setitem(FIGURES, "pets", dataclasses.replace(measurable, values=(value,)))
    assert run(monkeypatch, "pets", "--data-dir", tmp_path) == 1
    assert "differs by " in capsys.readouterr().out
    # what is not as published is not held against it, even where as many examples are evaluated
    assert run(monkeypatch, "pets", "--data-dir", tmp_path, "--", "--split", "test[:24]") == 0
    kept = json.loads((tmp_path / "runs/reproduce/pets/reproduction.json").read_text())
    assert kept["judged"][0]["examples"] == 24
    assert kept["judged"][0]["verdict"] == "not judged: --split changed what was measured"


def test_what_it_would_take(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "timm-R50x1_224", "--plan", "--json", tmp_path / "p.json") == 0
    planned = json.loads((tmp_path / "p.json").read_text())
    # 4.1 G multiply-adds, which timm's table of models has for R50 at 224x224
    assert planned["forward_flops"] == pytest.approx(8.2e9, rel=0.03)
    assert planned["weights_bytes"] == pytest.approx(25.55e6 * 4, rel=1e-3)
    assert planned["seconds_at_peak"] == pytest.approx(planned["forward_flops"] * 50_000 / 19.5e12)
    assert "at least 21 s" in capsys.readouterr().out
    assert run(monkeypatch, "timm-R50x1_224", "--plan", "--device", "abacus") == 2


@pytest.mark.slow
def test_training_three_seeds_and_judging_them_again(tmp_path):
    """The embedded model on five digits a class, by the command itself; the second time nothing is trained."""
    command = [sys.executable, "-m", "bit_jax.reproduce", "embedded-digits-5", "--workdir", str(tmp_path)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "PYTHONPATH": str(ROOT)}
    outcomes = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        kept = json.loads((tmp_path / "reproduction.json").read_text())
        assert done.returncode == (0 if kept["judged"][0]["agrees"] else 1), done.stderr
        outcomes.append((kept, done))
    (first, _), (again, done) = outcomes
    assert [run["seed"] for run in first["runs"]] == [0, 1, 2]
    assert first["runs"] == again["runs"]
    assert done.stderr.count("holds this run, finished") == 3
    assert first["judged"][0]["agrees"], first["judged"]
