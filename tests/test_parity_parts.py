"""The verdict, the statistics, the probe and the naming, without starting a process."""

import dataclasses
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import foreign_bit
import golden_inputs
import numpy as np
import pytest
import torch
from PIL import Image
from test_torch_reference import original_name
from torch import nn

from bit_jax.formats.described import described
from bit_jax.model import probe
from bit_jax.model.class_names import imagenet1k
from bit_jax.model.precision import PRECISIONS
from bit_jax.training.steps import FIRST_SCALE
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.examples import DamagedImage, relabelled
from input_pipeline.files import writable
from input_pipeline.image_file import read_image_file
from parity.in_jax.training_tasks import TrainingJax
from parity.in_torch import models, pipeline, resnetv2, units
from parity.in_torch import names as torch_names
from parity.in_torch import precision as torch_precision
from parity.in_torch.training_tasks import TrainingTorch
from parity.ladder import ladder, question, rungs, statistics, verdict
from parity.ladder.ladder import RungResult
from parity.ladder.reference import Live
from parity.ladder.statistics import Paired
from parity.options import Options
from parity.report import saved
from parity.report.terminal import show
from parity.sides import classes, images, inputs
from parity.sides.side import Side, parse_side
from parity.throughput import report as throughput_report
from parity.throughput.request import Throughput

RNG = np.random.default_rng(0)


def noisy(array, size):
    return (array + size * RNG.standard_normal(array.shape)).astype(np.float32)


ORACLE = RNG.standard_normal((50, 40))


def calibrated(reference, candidate, disturbed=()):
    look = verdict.look([ORACLE], [reference], [candidate], [[d] for d in disturbed])
    return verdict.calibrated("forward", "x", "fp32", [look])


def test_float64_tells_rounding_from_a_wrong_epsilon():
    assert verdict.in_float64("forward", "x", ORACLE, ORACLE.copy()).verdict == "equal"
    assert verdict.in_float64("forward", "x", ORACLE, ORACLE * (1 + 1e-13)).verdict == "rounding"
    assert verdict.in_float64("forward", "x", ORACLE, ORACLE * (1 + 1e-7)).verdict == "bug"
    assert verdict.in_float64("forward", "x", ORACLE, np.where(ORACLE > 2, np.nan, ORACLE)).verdict == "bug"
    assert "shape" in verdict.in_float64("forward", "x", ORACLE, ORACLE.T).note


def test_calibrated_accepts_equal_errors_and_refuses_the_larger_on_either_side():
    small, large = noisy(ORACLE, 1e-6), noisy(ORACLE, 1e-5)
    assert calibrated(small, noisy(ORACLE, 2e-6)).verdict == "rounding"
    assert calibrated(small, small).verdict == "equal"
    for reference, candidate, who in ((small, large, "candidate"), (large, small, "reference")):
        line = calibrated(reference, candidate)
        assert line.verdict == "bug"
        assert f"the {who}'s " in line.note


def test_calibrated_allows_what_disturbances_explain():
    small, large = noisy(ORACLE, 1e-6), noisy(ORACLE, 1e-5)
    line = calibrated(small, large, [noisy(ORACLE, 1e-5)])
    assert line.verdict == "rounding"
    assert line.used == pytest.approx(0.5, abs=0.2)  # of twice the disturbance's
    assert line.limit == pytest.approx(2e-5, rel=0.1)


def test_calibrated_notices_few_wrong_values_and_not_a_number():
    small, wrong = noisy(ORACLE, 1e-6), noisy(ORACLE, 1e-6)
    wrong.flat[:5] += 3e-5  # in 2,000
    line = calibrated(small, wrong)
    assert line.verdict == "bug"
    assert "99.9% error" in line.note
    wrong.flat[0] = np.nan
    assert calibrated(small, wrong).verdict == "bug"
    assert calibrated(wrong, small).verdict == "bug"


def test_the_best_batch_counts_so_that_a_relu_that_opens_late_is_no_bug():
    def judge(first, second):
        small = noisy(ORACLE, 1e-6)
        look = verdict.look([ORACLE] * 2, [small] * 2, [first, second], [])
        return verdict.calibrated("gradients", "x", "fp32", [look]).verdict

    flipped = noisy(ORACLE, 1e-3)
    assert judge(flipped, noisy(ORACLE, 1e-6)) == "rounding"
    assert judge(flipped, noisy(ORACLE, 1e-3)) == "bug"


@pytest.mark.parametrize(("bits", "name"), [(52, "float64"), (23, "float32"), (10, "tf32"), (7, "bfloat16")])
def test_probe_reads_the_format_off_the_product(bits, name):
    left, right = probe.operands()
    mantissa, exponent = np.frexp(left)
    rounded = np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)
    assert probe.multiplied_in(rounded @ right) == name


def test_probe_tells_float16_from_tf32_by_the_products_type():
    left, right = (operand.astype(np.float16) for operand in probe.operands())
    assert probe.multiplied_in(left @ right) == "float16"


def test_mcnemar_is_the_exact_binomial_test():
    # 2 of 12 disputed: 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12
    assert Paired(30, 10, 2, 8).mcnemar() == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert Paired(30, 0, 0, 20).mcnemar() == 1.0


def test_interval_is_tangos():
    # the 21 children of Fagerland et al., Statistics in Medicine 33 (2014), before and after transplantation
    assert Paired(1, 7, 1, 12).interval() == pytest.approx((-0.517, -0.026), abs=5e-4)
    low, high = Paired(36, 2, 12, 0).interval()
    assert (-high, -low) == pytest.approx(Paired(36, 12, 2, 0).interval())
    assert Paired(0, 5, 0, 0).interval()[0] == -1


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    shares = [0.8, 0.03, 0.05, 0.12]  # both, reference only, candidate only, neither
    covered = 0
    for _ in range(400):
        low, high = Paired(*(int(count) for count in rng.multinomial(500, shares))).interval()
        covered += low <= shares[2] - shares[1] <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_equivalence_needs_enough_images():
    assert Paired(42000, 10, 5, 7985).equivalence(0.001) == "shown"
    few = Paired(300, 0, 0, 60)
    assert few.equivalence(0.001) == "not shown"
    assert Paired(30000, 2000, 500, 17500).equivalence(0.001) == "refuted"
    chance = Paired(990, 6, 0, 4)  # six disputed images, all one way: once in 32 times for right sides
    assert chance.interval(0.90)[1] < -0.001
    assert chance.equivalence(0.001) == "not shown"
    enough = few.examples_needed(0.001)
    assert Paired(enough, 0, 0, 0).equivalence(0.001) == "shown"
    assert Paired(enough // 2, 0, 0, 0).equivalence(0.001) == "not shown"


def test_flips_are_held_against_the_measured_error():
    reference = np.zeros((200, 3))
    reference[:, 0] = 1.0
    reference[0, 1] = 1.0 - 1e-5  # a near tie, flipped by noise
    candidate = reference + np.random.default_rng(0).uniform(-1e-5, 1e-5, reference.shape)
    candidate[0, 1] = candidate[0, 0] + 1e-6
    candidate[7] = candidate[7, ::-1]  # another image altogether
    error, flips = statistics.flips(reference, candidate)
    assert error < 1e-4
    assert [(flip["row"], flip["expected"]) for flip in flips] == [(0, True), (7, False)]


def test_images_that_rounding_moves_more_than_most_are_expected_to_flip():
    """bfloat16's errors on as many images as ImageNet validates with, one of which is another image altogether."""
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 2, (50_000, 10))
    candidate = reference + 0.01 * np.exp(rng.normal(0, 0.7, (50_000, 1))) * rng.standard_normal(reference.shape)
    _, flips = statistics.flips(reference, candidate)
    assert len(flips) > 100
    assert all(flip["expected"] for flip in flips)
    candidate[7] = candidate[7, ::-1]
    _, flips = statistics.flips(reference, candidate)
    assert [flip["row"] for flip in flips if not flip["expected"]] == [7]


def test_rank_is_the_pipelines_own():
    logits = np.array([[1.0, 3.0, 3.0, 0.0], [np.nan, 1, 2, 3]])
    labels = np.array([2, 3])
    assert statistics.rank(logits, labels).tolist() == [1, statistics.LAST]
    ranks = pipeline.label_rank(torch.from_numpy(logits[:1]), torch.from_numpy(labels[:1]))
    assert ranks.tolist() == [1]


def test_sides_are_written_as_they_are_read():
    assert parse_side("jax:devices=8,fsdp=4,microbatches=2") == Side("jax", 8, 4, 2)
    assert parse_side("torch:devices=2,compile") == Side("torch", 2, compile=True)
    assert str(parse_side("jax:devices=8,fsdp=4")) == "jax:devices=8,fsdp=4"
    assert parse_side("jax:remat=norm,tuned") == Side("jax", remat="norm", tuned=True)
    assert parse_side("jax").environment("fp64")["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in parse_side("jax:device64").environment("fp64")
    assert parse_side("torch:compile,hugepages") == Side("torch", compile=True, hugepages=True)
    assert parse_side("torch:channels_last,compile") == Side("torch", compile=True, channels_last=True)
    assert parse_side("torch:compile_units") == Side("torch", compile_units=True)
    assert parse_side("torch:cuda_graphs,compile") == Side("torch", compile=True, cuda_graphs=True)
    assert parse_side("jax:tuned,deterministic") == Side("jax", tuned=True, deterministic=True)
    for text in ("torch:compile,channels_last", "jax:microbatches=2,remat=unit", "jax:tuned,code=."):
        assert str(side := parse_side(text)) == text
        assert Side(**side.fields()) == dataclasses.replace(side, code=None)
    assert parse_side("torch", model="a:b").model == "a:b"
    for wrong in (
        "tf",
        "torch:fsdp=2",
        "jax:device=2",
        "jax:devices=0",
        "jax:devices=4,fsdp=3",
        "jax:devices",
        "jax:compile",
        "torch:compile,compile_units",
        "torch:cuda_graphs",
        "jax:code=/nowhere",
    ):
        with pytest.raises(RequestError):
            parse_side(wrong)
    with pytest.raises(RequestError, match="which units a:b has is not known; write compile, not"):
        parse_side("torch:compile_units", model="a:b")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "random.npz"
    inputs.random_weights(path, "R26x0.5", 10)
    return path


def arrays_of(path):
    with np.load(path) as loaded:
        return {key: loaded[key] for key in loaded.files}


@pytest.mark.parametrize(("graphs", "mode"), [("", None), (",cuda_graphs", "reduce-overhead")])
def test_a_side_compiles_the_model_or_each_of_its_units(graphs, mode, file, tmp_path, monkeypatch):
    compiled: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compiled.append((module, how)))
    with torch._dynamo.config.patch(recompile_limit=8):
        for place, switch in enumerate(("compile", "compile_units")):
            side = parse_side(f"torch:{switch}{graphs}")
            worker = TrainingTorch(side, "fp64", str(file), lambda *_: None, rank=0, meeting=tmp_path / str(place))
            worker._replica(None)  # on the CPU, as always in float64
        assert torch._dynamo.config.recompile_limit > 8, "PyTorch would give up on the ninth kind of unit"
    (whole, how), *units_of = compiled
    assert (type(whole), how) == (resnetv2.ResNetV2, {"mode": mode})
    assert [type(module) for module, _ in units_of] == [resnetv2.RootBlock] + 8 * [resnetv2.Unit]
    assert all(how == {"mode": mode, "dynamic": False} for _, how in units_of)


def test_cuda_graphs_are_refused_without_a_gpu(file, tmp_path):
    side = parse_side("torch:compile,cuda_graphs")
    with pytest.raises(RequestError, match="needs an NVIDIA GPU, and PyTorch finds none here; leave out cuda_graphs"):
        TrainingTorch(side, "fp32", str(file), lambda *_: None, rank=0, meeting=tmp_path)


def test_parameters_are_told_by_the_original_codes_names():
    for key in golden_inputs.weights(50, 1, 10, 0):
        ours = resnetv2.official(key)
        assert torch_names.by_name(ours) == key
        assert torch_names.by_name(original_name(ours)) == key


def test_parameters_are_told_by_timms_names():
    assert torch_names.by_name("stem.conv.weight") == "resnet/root_block/standardized_conv2d/kernel"
    unit = "resnet/block2/unit01"
    for name, key in {
        "stages.1.blocks.0.downsample.conv.weight": f"{unit}/a/proj/standardized_conv2d/kernel",
        "stages.1.blocks.0.norm3.bias": f"{unit}/c/group_norm/beta",
        "stages.1.blocks.0.conv2.weight": f"{unit}/b/standardized_conv2d/kernel",
        "head.fc.weight": "resnet/head/conv2d/kernel",
        "norm.weight": "resnet/group_norm/gamma",
    }.items():
        assert torch_names.by_name(name) == key


def test_parameters_of_other_names_are_told_by_their_contents_and_units_by_their_parameters(file):
    model, arrays = foreign_bit.load(file), arrays_of(file)
    keys = torch_names.official_keys(model, arrays)
    assert keys["middle.3.third.weight"] == "resnet/block2/unit02/c/standardized_conv2d/kernel"
    assert keys["classifier.weight"] == "resnet/head/conv2d/kernel"
    assert sorted(keys.values()) == sorted(arrays)
    modules = units.units(model, keys)
    assert list(modules)[:3] == ["root_block", "block1/unit01", "block1/unit02"]
    assert modules["root_block"] is model.begin
    assert modules["block2/unit02"] is model.middle[3]


def test_a_model_with_other_weights_is_refused_by_the_names_that_do_not_pair_up(file):
    model = foreign_bit.load(file)
    with torch.no_grad():
        model.middle[0].first.weight.mul_(2)
    with pytest.raises(RequestError, match=r"middle\.0\.first\.weight.*block1/unit01/a/standardized_conv2d/kernel"):
        torch_names.official_keys(model, arrays_of(file))
    model.official_keys = {"end.weight": "resnet/group_norm/gamma"}
    assert "resnet/group_norm/gamma" in torch_names.official_keys(foreign_bit.load(file), arrays_of(file)).values()


def test_disturbances_are_of_the_size_asked_for_and_reproducible():
    factors = inputs.disturbance("a", (1000,), (3, 0), 1e-3)
    assert np.abs(factors - 1).max() == pytest.approx(1e-3, rel=0.05)
    assert np.array_equal(factors, inputs.disturbance("a", (1000,), (3, 0), 1e-3))
    assert not np.array_equal(factors, inputs.disturbance("a", (1000,), (4, 0), 1e-3))


def test_pictures_show_every_fault_of_channels_and_sides():
    image = inputs.pictures(1, 40, 50, 0)[0].astype(float)
    for changed in (image[..., ::-1], image[:, ::-1], image[::-1]):
        assert np.abs(changed - image).mean() > 10


def test_line_is_plain_data():
    assert dataclasses.asdict(verdict.in_float64("forward", "x", ORACLE, ORACLE))["verdict"] == "equal"


@pytest.mark.parametrize(("ulps", "verdict"), [(3.0, "equal"), (500.0, "bug")])
def test_both_sides_in_a_narrower_format_are_not_taken_for_equal(monkeypatch, ulps, verdict):
    monkeypatch.setattr(rungs.Question, "judge", lambda *_, **__: RungResult("forward", []))
    ladder: Any = SimpleNamespace(options=Options(), pictures=lambda look=0: None, amplitude_in_ulp=ulps)
    result = rungs.forward(ladder)
    assert result.verdict == verdict
    assert ("products are narrower than fp32" in " ".join(result.findings)) == (verdict == "bug")


def test_every_precision_of_a_comparison_is_known_to_both_sides():
    for precision in get_args(get_type_hints(Options)["precision"]):
        assert precision in ladder.ULP
        assert str(torch_precision.PRECISIONS[precision].dtype) == f"torch.{PRECISIONS[precision].dtype}"
        assert torch_precision.PRECISIONS[precision].scales_loss == PRECISIONS[precision].scales_loss
    assert torch_precision.FIRST_SCALE == FIRST_SCALE
    offered = set(get_args(get_type_hints(Options)["precision"])) - {"fp64"}
    assert set(get_args(get_type_hints(Throughput)["precision"])) == offered


def test_in_float16_a_side_that_multiplies_in_another_format_fails_by_name(monkeypatch):
    """bfloat16 errs only 8 times more than float16, which errors alone hardly tell."""
    monkeypatch.setattr(rungs.Question, "judge", lambda *_, **__: RungResult("forward", []))
    products = {"reference": ["float16", "float16"], "candidate": ["float16", "bfloat16"]}
    options = Options(precision="fp16")
    answers: Any = SimpleNamespace(options=options, pictures=lambda look=0: None, amplitude_in_ulp=1.0)
    answers.ask = lambda role, precision, task: SimpleNamespace(info=products[role])
    answers.reference = Live(answers)
    result = rungs.forward(answers)
    assert [(line.name, line.verdict) for line in result.lines] == [("convolution products", "bug")]
    assert "the candidate multiplies in bfloat16" in result.findings[0]
    products["candidate"][1] = "float16"
    assert rungs.forward(answers).verdict == "equal"


@pytest.mark.parametrize(
    ("reference", "candidate", "scales", "verdict"),
    [
        (1e9, 1e9, (2.0**16, 2.0**16), "equal"),
        (3e4, 3e4, (2.0**14, 2.0**14), "equal"),
        (1e9, 3e4, (2.0**16, 2.0**14), "rounding"),
        (1e9, 10.0, (2.0**16, 2.0**3), "bug"),
        (10.0, 1e9, (2.0**3, 2.0**16), "bug"),
        (0.0, 1e9, (1.0, 2.0**16), "bug"),
    ],
)
def test_gradients_that_overflow_on_one_side_alone_are_told(reference, candidate, scales, verdict):
    """Each side's gradients overflow at scales above a number of its own."""
    limits = {"reference": reference, "candidate": candidate}
    discarded = []

    def ask(role, precision, task, *, scale):
        assert (precision, task) == ("fp16", "gradients")
        info = {"overflows": int(scale > limits[role])}
        return SimpleNamespace(info=info, discard=lambda: discarded.append((role, scale)))

    answers: Any = SimpleNamespace(options=Options(precision="fp16"), ask=ask)
    answers.reference = Live(answers)
    asked = question.Question(answers, "gradients", "gradients", lambda look: {}, differentiates=True)
    found = asked.loss_scales(0)
    assert tuple(found.values()) == scales
    assert all(scale > found[role] for role, scale in discarded)
    line = question.scale_line("gradients", "fp16", found)
    assert line.verdict == verdict
    assert ("finite up to a loss scale" in line.note) == (min(scales) < FIRST_SCALE)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_step_whose_gradient_overflows_in_float16_is_skipped(framework, small_npz, tmp_path):
    rng, mixed = np.random.default_rng(0), tmp_path / "mixed.npz"
    images, targets = rng.normal(size=(2, 32, 32, 3)), rng.dirichlet(np.ones(10), 2)
    np.savez(mixed, **{"images/0": images, "targets/0": targets})
    given: Any = {"mixed": str(mixed), "count": 1, "momentum": 0.9}
    given["schedule"] = {"base_lr": 0.1, "warmup_steps": 0, "decay_steps": [], "steps": 10}
    asked = Side(framework), "fp16", str(small_npz), lambda *_: None
    side: Any = TrainingJax(*asked) if framework == "jax" else TrainingTorch(*asked, rank=0, meeting=tmp_path)
    before = arrays_of(small_npz)
    kernel = "resnet/block4/unit01/b/standardized_conv2d/kernel"
    for scale, overflows in ((2.0**10, 0), (2.0**60, 1)):
        info, saved = side.curve(**given, scale=scale)
        assert info == {"overflows": overflows}
        assert np.array_equal(saved[f"params/{kernel}"], before[kernel]) == bool(overflows)
    info, gradients = side.gradients(str(mixed), 1, scale=2.0**60)
    assert info == {"overflows": 1}
    assert not all(np.isfinite(array).all() for array in gradients.values())


def test_a_unit_without_a_module_of_its_own_is_left_out_and_its_successor_keeps_its_own_input(file):
    model = foreign_bit.load(file)
    keys = torch_names.official_keys(model, arrays_of(file))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        whole = units.record(model, keys, images, None)
        seen = {site: output for site, output in whole.items() if site != "block2/unit01"}
        marked = {site: output + 1 for site, output in seen.items()}
        forced = units.record(model, keys, images, marked)
    free = model.middle[3](whole["block2/unit01"])
    own = model.middle[3](forced["block2/unit01"])
    assert not torch.equal(forced["block1/unit02"], whole["block1/unit02"])  # fed root_block's marked output
    assert torch.equal(forced["block2/unit02"], own)
    assert not torch.equal(own, free)


def looks_at(rng, values, draws, *, lines, fault=1.0, flips=0.0):
    """How often one look, and all looks together, call a line wrong: errors drawn for two sides and disturbances."""

    def errors(scale, flips):
        drawn = scale * np.abs(rng.standard_normal((lines, values))) * np.where(rng.random((lines, 1)) < flips, 1e3, 1)
        return np.stack([np.sqrt((drawn**2).mean(axis=1)), np.quantile(drawn, verdict.HIGH, axis=1)], axis=1)

    looks, beyond = [], []
    for number in range(verdict.LOOKS):
        count = max(draws, verdict.LEAST_DRAWS if number else 1)
        disturbed = [errors(verdict.MULTIPLE, verdict.MULTIPLE * flips) for _ in range(count)]
        looks.append((errors(1.0, flips), errors(fault, flips), np.max(disturbed, axis=0)))
        judged = verdict.errors_and_limits(*(np.stack(part) for part in zip(*looks, strict=True)))
        beyond.append(np.any([(error > limit).any(axis=1) for error, limit in judged.values()], axis=0))
    return beyond[0].mean(), np.all(beyond, axis=0).mean()


@pytest.mark.parametrize(("values", "flips"), [(1, 0.0), (2, 0.0), (10, 0.0), (10, 0.03)])
def test_right_sides_are_not_called_wrong_for_want_of_disturbances(values, flips):
    once, always = looks_at(np.random.default_rng(7), values, 1, lines=40_000, flips=flips)
    assert (once > 1e-3) == (values < 10 or flips > 0)  # what one look, with one disturbance, would have called a bug
    assert always < 1e-4


@pytest.mark.parametrize(
    ("values", "fault", "flips", "found"),
    [(1, 1000, 0.0, 0.95), (10, 30, 0.0, 0.99), (1000, 10, 0.0, 1.0), (100, 100, 0.03, 0.6)],
)
def test_what_errs_by_so_much_is_found_at_every_look(values, fault, flips, found):
    _, always = looks_at(np.random.default_rng(8), values, 3, lines=2000, fault=fault, flips=flips)
    assert always >= found


def seen(candidate, explained=1e-6, reference=1e-6):
    return verdict.Look(*(np.full(2, error) for error in (reference, candidate, explained)), 1e-6)


def judged(name, looks):
    return verdict.calibrated("loss", name, "fp32", looks)


def test_a_line_fails_only_if_every_look_finds_it_wrong():
    asked = []

    def again(number, names):
        asked.append(names)
        # the disturbances of one look meet a ReLU that flips: they excuse nothing in the others
        return {name: seen(1e-6) if name == "unlucky" else seen(1e-4, 1.0 if number == 2 else 1e-6) for name in names}

    first = {"good": seen(1e-6), "unlucky": seen(1e-5), "wrong": seen(1e-4), "infinite": seen(np.nan)}
    lines = {line.name: line for line in verdict.look_again(first, again, judged)}
    assert [lines[name].verdict for name in first] == ["rounding", "rounding", "bug", "bug"]
    assert asked == [["unlucky", "wrong"], ["wrong"], ["wrong"]]
    assert lines["wrong"].looks == verdict.LOOKS
    assert "at 1 of 2 looks" in lines["unlucky"].note
    assert lines["good"].looks == lines["infinite"].looks == 1


def test_what_nothing_was_measured_for_is_not_looked_at_again():
    wrong = verdict.look([ORACLE], [noisy(ORACLE, 1e-6)], [noisy(ORACLE, 1e-3)], [])
    lines = verdict.look_again({"x": wrong}, lambda *_: pytest.fail("looked again"), judged)
    assert [line.verdict for line in lines] == ["bug"]


class Named:
    """A dataset that has as much as the matching of its classes needs."""

    def __init__(self, *class_names, labels=(0, 1)):
        self.name, self.class_names, self.labels = "pets/test", class_names, np.array(labels, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": np.zeros((4, 4), np.uint8), "label": int(self.labels[index]), "id": str(index)}


def write_config(folder, **content):
    (folder / "config.json").write_text(json.dumps(content))
    return folder / "w.npz"


def test_labels_are_matched_by_the_names_beside_the_weights(tmp_path):
    weights = write_config(tmp_path, class_names=["a", "b", "caf\u00e9"], recipe={"crop": 48})
    source = Named("a", "cafe\u0301")  # the same word as macOS spells it
    matching = classes.matching(source, "w.npz", weights, 3, arbitrary=False)
    assert matching.class_names is not None
    assert relabelled(source, matching.class_names, "the head").labels.tolist() == [0, 2]
    assert described(weights).crop == 48
    with pytest.raises(RequestError, match=r"1 classes that the head of w\.npz has not: dog"):
        classes.matching(Named("a", "dog"), "w.npz", weights, 3, arbitrary=False)


def test_labels_of_imagenet_are_matched_by_wordnet_id(tmp_path):
    nowhere, ids = tmp_path / "w.npz", list(imagenet1k())
    assert classes.matching(Named(ids[7], ids[3]), "w", nowhere, 1000, arbitrary=False).class_names == ids
    with pytest.raises(RequestError, match="classes that ImageNet's head of w has not: n99999999"):
        classes.matching(Named(ids[7], "n99999999"), "w", nowhere, 1000, arbitrary=False)


def test_labels_without_names_count_only_where_the_numbers_of_classes_agree(tmp_path):
    nowhere = tmp_path / "w.npz"
    equal = classes.matching(Named("x", "y"), "w", nowhere, 2, arbitrary=False)
    assert equal.class_names is None
    assert "by position" in equal.how
    with pytest.raises(RequestError, match=r"pets/test has 2 classes \(x, y\), the head of w has 3 without names"):
        classes.matching(Named("x", "y"), "w", nowhere, 3, arbitrary=False)
    assert classes.matching(Named("x", "y"), "random", nowhere, 3, arbitrary=True).class_names is None


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "\x80",
        "[" * 9000,
        '{"class_names": 7}',
        '{"class_names": [1]}',
        '{"recipe": 3}',
        '{"recipe": {"crop": "x"}}',
    ],
)
def test_a_damaged_config_beside_the_weights_ends_in_a_sentence(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=r"config\.json is damaged"):
        described(tmp_path / "w.npz")


def test_a_label_that_is_no_class_is_last_everywhere():
    logits, labels = np.eye(3), np.array([0, -1, 3])
    ranks = statistics.rank(logits, labels)
    assert ranks[0] == 0
    assert (ranks[1:] >= 5).all(), "with three classes the last is among the first five"
    assert pipeline.label_rank(torch.from_numpy(logits), torch.from_numpy(labels)).tolist() == ranks.tolist()


def test_training_batches_need_labels():
    with pytest.raises(RequestError, match="without a label"):
        inputs.dataset_batches(Named("a", "b", labels=(0, -1)), 1, 2, 8, 8, 0)


def state_of(model):
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": prefixed(state, "module."), "optim": {"state": {0: {"momentum": torch.ones(2)}}}},
        lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: {"net": {"state_dict": prefixed(state, "_orig_mod.module.")}},
        lambda state: {name if number % 2 else f"module.{name}": t for number, (name, t) in enumerate(state.items())},
        lambda state: {"state_dict": prefixed(state, "model.module.")},
        lambda state: {"model": state, "ema": dict(state)},
    ],
)
def test_checkpoints_are_unwrapped_by_what_they_hold(wrap, file, tmp_path):
    model = resnetv2.load(str(file))
    wanted = state_of(model)
    torch.save(wrap(wanted), tmp_path / "c.pt")
    models.fill(model, tmp_path / "c.pt")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_model_says_what_it_has_and_lacks(file, tmp_path):
    model = resnetv2.load(str(file))
    state = state_of(model)
    for name in list(state)[:6]:
        del state[name]
    torch.save({"model": prefixed(state, "module.") | {"module.extra": torch.ones(1)}}, tmp_path / "c.pt")
    with pytest.raises(RequestError) as refused:
        models.fill(model, tmp_path / "c.pt")
    assert "missing 6 (" in str(refused.value)
    assert "unexpected 1 (extra)" in str(refused.value)
    state = state_of(model)
    torch.save({"model": state, "ema": {name: tensor + 1 for name, tensor in state.items()}}, tmp_path / "two.pt")
    with pytest.raises(RequestError, match="2 state dicts of this model that differ"):
        models.fill(model, tmp_path / "two.pt")


def npz(**arrays):
    written = io.BytesIO()
    np.savez(written, **arrays)
    return written.getvalue()


class Foreign:
    """What a pickle of somebody's whole model begins with."""


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: torch.save({"a": torch.ones(1)}, path), "no state dict of this model: it is a dict with 1 (a)"),
        (lambda path: torch.save([1, 2], path), "no state dict of this model: it is a list"),
        (lambda path: torch.save(Foreign(), path), "holds the Python object test_parity_parts.Foreign"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      "), "is a safetensors file"),
        (lambda path: path.write_bytes(b"<html>"), "is no PyTorch checkpoint"),
        (lambda path: path.write_bytes(npz(a=np.ones(1))), "is an .npz file"),
        (lambda path: path.mkdir(), "cannot be read (Is a directory)"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_is(write, said, file, tmp_path):
    write(tmp_path / "c.pt")
    with pytest.raises(RequestError) as refused:
        models.fill(resnetv2.load(str(file)), tmp_path / "c.pt")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


LOGITS = torch.ones(2, 3)


@pytest.mark.parametrize("output", [LOGITS, SimpleNamespace(logits=LOGITS), {"logits": LOGITS}, (LOGITS, None)])
def test_logits_are_taken_from_what_models_return(output):
    assert models.logits_of(output) is LOGITS


@pytest.mark.parametrize("output", [None, {"features": LOGITS}, (), SimpleNamespace(logits=None), (None, LOGITS)])
def test_what_has_no_logits_is_refused(output):
    with pytest.raises(RequestError, match="in which there are no logits"):
        models.logits_of(output)


def test_a_models_logits_must_be_a_row_an_image_and_a_column_a_class():
    images = torch.zeros(2, 3, 8, 8)
    shaped = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    models.check(shaped, "m:f", images, 4)
    with pytest.raises(RequestError, match=r"shape \[2, 4\] for images \[2, 3, 8, 8\]; \[2, 5\] is wanted"):
        models.check(shaped, "m:f", images, 5)
    with pytest.raises(RequestError, match=r"--torch-model m:f fails on images \[2, 3, 8, 8\]: RuntimeError"):
        models.check(torch.nn.Linear(3, 3), "m:f", images, 4)


def test_pytorchs_images_are_files_of_the_known_formats(tmp_path):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "EPS")
    with pytest.raises(DamagedImage):
        images.decode(encoded.getvalue())
    with pytest.raises(RequestError, match="example 3 of pets is not a readable image"):
        images.rgb({"image": b"nothing", "label": 0, "id": "3"}, "pets")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(RequestError, match="only regular files are read"):
        read_image_file(tmp_path / "pipe.jpg")


def test_a_run_folder_has_one_owner_and_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with saved.owned(None) as first, saved.owned(None) as second:
        assert first != second
    assert not Path("runs").exists()
    with saved.owned(Path("a/b")), pytest.raises(RequestError, match="in use by process"), saved.owned(Path("a/b")):
        pytest.fail("two own it")
    assert not Path("a").exists()
    with saved.owned(Path("a/b")) as folder:
        (folder / "report.json").write_text("{}")
    assert [path.name for path in Path("a/b").iterdir()] == ["report.json"]
    with pytest.raises(RequestError, match="holds a saved run"), saved.owned(Path("a/b")):
        pass
    Path("file").write_text("")
    with pytest.raises(RequestError, match="not a directory"), saved.owned(Path("file")):
        pass


def test_where_nothing_can_be_written_is_known_at_the_start(tmp_path):
    writable(tmp_path / "new" / "r.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RequestError, match="is a directory"):
        writable(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 9000])
def test_a_damaged_report_ends_in_a_sentence(text, tmp_path):
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=r"report\.json is damaged"):
        saved.load(tmp_path)
    with pytest.raises(RequestError, match=r"report\.json is damaged"):
        throughput_report.load(tmp_path / "report.json")


def test_names_are_shown_as_they_are_and_control_characters_escaped():
    """A side's name may hold a module's; an array's, a file's."""
    line = dataclasses.asdict(verdict.Line("pixels", "evaluation: x[/red]\x1b[2J.jpg", "fp64", "bug", 1.0, 1e-9))
    rung = {"name": "pixels", "verdict": "bug", "arrays": 1, "seconds": 0.0, "details": {}, "lines": [line]}
    sides = {"reference": "torch (m[bold]:f)", "candidate": "jax"}
    report = {
        "sides": sides,
        "precision": "fp32",
        "architecture": "R14x0.5",
        "command": "python -m parity all",
        "holds": False,
        "failed": "pixels",
    }
    report |= {"attestation": {"mismatches": ["a[/]b"]}, "rungs": [rung | {"findings": ["of [/red]"]}]}
    written = io.StringIO()
    console = terminal.console()
    console.file = written
    show(report, console)
    shown = written.getvalue()
    for said in ("torch (m[bold]:f)", "a[/]b", "of [/red]", r"evaluation: x[/red]\x1b[2J.jpg differs"):
        assert said in shown
    assert "\x1b" not in shown
