"""The verdict, the statistics, the probe and the naming, without starting a process."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import foreign_bit
import golden_inputs
import numpy as np
import pytest
import torch
from test_torch_reference import original_name

from bit_jax import probe
from input_pipeline.errors import RequestError
from parity import inputs, oracle, rungs, statistics, torch_names, torch_pipeline, torch_reference, torch_side
from parity.ladder import RungResult
from parity.options import Options
from parity.side import Side, parse_side
from parity.statistics import Paired

RNG = np.random.default_rng(0)


def noisy(array, size):
    return (array + size * RNG.standard_normal(array.shape)).astype(np.float32)


ORACLE = RNG.standard_normal((50, 40))


def calibrated(reference, candidate, disturbed=()):
    return oracle.calibrated("forward", "x", "fp32", [ORACLE], [reference], [candidate], [[d] for d in disturbed])


def test_gate_tells_rounding_from_a_wrong_epsilon():
    assert oracle.gate("forward", "x", ORACLE, ORACLE.copy()).verdict == "equal"
    assert oracle.gate("forward", "x", ORACLE, ORACLE * (1 + 1e-13)).verdict == "rounding"
    assert oracle.gate("forward", "x", ORACLE, ORACLE * (1 + 1e-7)).verdict == "bug"
    assert oracle.gate("forward", "x", ORACLE, np.where(ORACLE > 2, np.nan, ORACLE)).verdict == "bug"
    assert "shape" in oracle.gate("forward", "x", ORACLE, ORACLE.T).note


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
        return oracle.calibrated("gradients", "x", "fp32", [ORACLE] * 2, [small] * 2, [first, second], []).verdict

    flipped = noisy(ORACLE, 1e-3)
    assert judge(flipped, noisy(ORACLE, 1e-6)) == "rounding"
    assert judge(flipped, noisy(ORACLE, 1e-3)) == "bug"


@pytest.mark.parametrize(("bits", "name"), [(52, "float64"), (23, "float32"), (10, "tf32"), (7, "bfloat16")])
def test_probe_reads_the_format_off_the_product(bits, name):
    left, right = probe.operands()
    mantissa, exponent = np.frexp(left)
    rounded = np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)
    assert probe.multiplied_in(rounded @ right) == name


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


def test_rank_is_the_pipelines_own():
    logits = np.array([[1.0, 3.0, 3.0, 0.0], [np.nan, 1, 2, 3]])
    labels = np.array([2, 3])
    assert statistics.rank(logits, labels).tolist() == [1, 4]
    ranks = torch_pipeline.label_rank(torch.from_numpy(logits[:1]), torch.from_numpy(labels[:1]))
    assert ranks.tolist() == [1]


def test_sides_are_written_as_they_are_read():
    assert parse_side("jax:devices=8,fsdp=4,microbatches=2") == Side("jax", 8, 4, 2)
    assert parse_side("torch:devices=2,compile") == Side("torch", 2, compile=True)
    assert str(parse_side("jax:devices=8,fsdp=4")) == "jax:devices=8,fsdp=4"
    assert parse_side("jax:remat=norm,tuned") == Side("jax", remat="norm", tuned=True)
    assert parse_side("torch:compile,hugepages") == Side("torch", compile=True, hugepages=True)
    assert parse_side("torch:channels_last,compile") == Side("torch", compile=True, channels_last=True)
    for text in ("torch:compile,channels_last", "jax:microbatches=2,remat=unit"):
        assert str(parse_side(text)) == text
    assert parse_side("torch", model="a:b").model == "a:b"
    for wrong in (
        "tf",
        "torch:fsdp=2",
        "jax:device=2",
        "jax:devices=0",
        "jax:devices=4,fsdp=3",
        "jax:devices",
        "jax:compile",
    ):
        with pytest.raises(RequestError):
            parse_side(wrong)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "random.npz"
    inputs.random_weights(path, "R26x0.5", 10)
    return path


def arrays_of(path):
    with np.load(path) as loaded:
        return {key: loaded[key] for key in loaded.files}


def test_parameters_are_told_by_the_original_codes_names():
    for key in golden_inputs.weights(50, 1, 10, 0):
        ours = torch_reference.official(key)
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
    units = torch_names.units(model, keys)
    assert list(units)[:3] == ["root_block", "block1/unit01", "block1/unit02"]
    assert units["root_block"] is model.begin
    assert units["block2/unit02"] is model.middle[3]


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
    assert dataclasses.asdict(oracle.gate("forward", "x", ORACLE, ORACLE))["verdict"] == "equal"


@pytest.mark.parametrize(("ulps", "verdict"), [(3.0, "equal"), (500.0, "bug")])
def test_both_sides_in_a_narrower_format_are_not_taken_for_equal(monkeypatch, ulps, verdict):
    monkeypatch.setattr(rungs, "_judge", lambda *_, **__: RungResult("forward", []))
    ladder: Any = SimpleNamespace(options=Options(), pictures=lambda look=0: None, amplitude_in_ulp=ulps)
    result = rungs.forward(ladder)
    assert result.verdict == verdict
    assert ("products are narrower than fp32" in " ".join(result.findings)) == (verdict == "bug")


def test_a_unit_without_a_module_of_its_own_is_left_out_and_its_successor_keeps_its_own_input(file):
    model = foreign_bit.load(file)
    keys = torch_names.official_keys(model, arrays_of(file))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        whole = torch_side.record_units(model, keys, images, None)
        seen = {site: output for site, output in whole.items() if site != "block2/unit01"}
        marked = {site: output + 1 for site, output in seen.items()}
        forced = torch_side.record_units(model, keys, images, marked)
    free = model.middle[3](whole["block2/unit01"])
    own = model.middle[3](forced["block2/unit01"])
    assert not torch.equal(forced["block1/unit02"], whole["block1/unit02"])  # fed root_block's marked output
    assert torch.equal(forced["block2/unit02"], own)
    assert not torch.equal(own, free)
