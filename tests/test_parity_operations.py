"""Inside a unit: every operation is observed and isolated in each framework, and a faulty one is named."""

import contextlib
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import parity
from conftest import SMALL
from rich.console import Console

from bit_jax.model.architecture import Architecture
from parity import faults
from parity.__main__ import compare
from parity.ladder import reproducer, rungs, selftest
from parity.ladder.attestation import attest
from parity.ladder.divergence import name_operation, sites_behind, wrong_part
from parity.ladder.ladder import Ladder, RungResult
from parity.report import saved
from parity.sides.inputs import picture_batches, random_arrays
from parity.sides.operations import LAST_SITE, operations

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

FAULTS = [name for name, fault in faults.FAULTS.items() if fault.operation]
UNIT = "block2/unit01"


@pytest.fixture(scope="module")
def ladders(tmp_path_factory):
    """Comparisons by precision; each is started when it is first needed. One stage has a unit without a projection."""
    started: dict[str, Ladder] = {}
    weights = tmp_path_factory.mktemp("weights") / "small.npz"
    np.savez(weights, **random_arrays(Architecture((2, 1, 1, 1), 0.5, 10)))
    with contextlib.ExitStack() as stack:

        def ladder(precision):
            if precision not in started:
                options = dataclasses.replace(selftest.SMALL, precision=precision, weights=str(weights), size="24")
                made = Ladder(options, tmp_path_factory.mktemp(precision), Console(quiet=True))
                started[precision] = stack.enter_context(made)
                stack.enter_context(made.forgetting())
            return started[precision]

        yield ladder


@pytest.fixture(scope="module")
def torch_sides(small_npz, tmp_path_factory):
    """{name: the PyTorch side in float64 of the reference, and of a BiT by other hands}, and a mixed batch."""
    from parity.in_torch.tasks import TorchSide
    from parity.sides.side import parse_side

    folder = tmp_path_factory.mktemp("torch")
    made = {}
    for name, model in (("reference", None), ("foreign", "foreign_bit:load")):
        side = parse_side("torch", model=model)
        made[name] = TorchSide(side, "fp64", str(small_npz), lambda *_: None, rank=0, meeting=folder / name)
    picture_batches(4, 32, 32, SMALL.num_classes, range(1)).save(folder / "pictures.npz")
    _, mixed = made["reference"].mix(str(folder / "pictures.npz"))
    np.savez(folder / "mixed.npz", **mixed)
    return made, folder / "mixed.npz"


@pytest.mark.parametrize("site", ["root_block", UNIT, LAST_SITE])
def test_fed_operations_make_the_recorded_values_and_gradients(torch_sides, tmp_path, site):
    """This holds in the reference, and in a model with other modules, which has no modules for ReLUs."""
    sides, mixed = torch_sides
    ops = operations(site, random_arrays(SMALL))
    _, recorded = sides["reference"].operations(mixed, site)
    np.savez(tmp_path / "recorded.npz", **recorded)
    _, results = sides["reference"].operations(mixed, site, tmp_path / "recorded.npz")
    _, foreign = sides["foreign"].operations(mixed, site, tmp_path / "recorded.npz")
    wanted = {f"{op.name}, by {parameter}" for op in ops.values() for parameter in op.parameters}
    wanted |= {f"{op.name}, {what}" for op in ops.values() for what in ("value", "by input")}
    wanted -= {f"{op.name}, by input" for op in ops.values() if "input" not in op.inputs}
    wanted -= {"root_block/standardized_conv2d, by input"}  # the gradient by the images
    assert wanted <= set(results)
    assert set(foreign) == set(results)
    for name, array in results.items():
        np.testing.assert_allclose(foreign[name], array, rtol=0, atol=1e-12 * np.abs(array).max(), err_msg=name)
        if name.endswith(", value") and not re.search("group_norm", name):
            np.testing.assert_array_equal(array, recorded[name], err_msg=name)
    by_input = {name.removesuffix(", by input") for name in results if name.endswith("conv2d, by input")}
    for conv in by_input - {f"{UNIT}/a/{inner}standardized_conv2d" for inner in ("", "proj/")}:
        before = ops[conv].inputs["input"]
        recorded_gradient, own = recorded[f"{before}, gradient"], results[f"{conv}, by input"]
        clear = (recorded_gradient != 0) & (own != 0)  # but where a ReLU is near zero
        ratio = own[clear] / recorded_gradient[clear]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9, err_msg=conv)  # recorded gradients are scaled


def test_the_part_of_a_norm_that_is_wrong_is_told_from_its_results():
    rng = np.random.default_rng(0)
    x, gamma, beta = rng.normal(1, 2, (2, 5, 5, 64)), rng.uniform(0.5, 1.5, 64), rng.normal(size=64)

    def norm(eps, shift=0.0):
        grouped = x.reshape(2, 25, 32, 2)
        deviation = np.sqrt(grouped.var((1, 3), keepdims=True) + eps)
        normalized = (grouped - grouped.mean((1, 3), keepdims=True)) / deviation
        return np.maximum(normalized.reshape(x.shape) * gamma + beta * (1 + shift), 0)

    assert wrong_part(x, gamma, beta, [norm(1e-5), norm(1e-6)]) == "statistics"
    assert wrong_part(x, gamma, beta, [norm(1e-5), norm(1e-5, 1e-4)]) == "normalization"
    assert wrong_part(x[..., :32], gamma[:32], beta[:32], [norm(1e-5)[..., :32]] * 2) == ""


def test_a_gradient_may_be_wrong_by_its_own_site_or_by_the_one_behind_it():
    def sites(key):
        return sites_behind(f"resnet/{key}", SMALL)

    assert sites("root_block/standardized_conv2d/kernel") == ["root_block", "block1/unit01"]
    assert sites("block4/unit01/c/standardized_conv2d/kernel") == ["block4/unit01", LAST_SITE]
    assert sites("group_norm/gamma") == sites("head/conv2d/bias") == [LAST_SITE]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_to_the_operation_and_the_direction(ladders, name):
    fault = faults.FAULTS[name]
    ladder = ladders(fault.precision)
    ladder.fault = name
    try:
        result = rungs.RUNGS[fault.rung](ladder)
    finally:
        ladder.fault = None
    assert result.verdict == "bug"
    named = result.details["operations"]["wrong"]
    assert named[:1] == [fault.operation], result.findings
    # and nothing else: the other operations were isolated from it
    assert {re.sub("(/statistics|/normalization)?, .*", "", wrong) for wrong in [*named, fault.operation]} == {
        re.sub("(/statistics|/normalization)?, .*", "", fault.operation)
    }
    assert any(finding.startswith(f"{fault.operation}, errs by itself") for finding in result.findings)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_no_operation_of_a_right_pair_is_named(ladders, precision):
    """The sites are a unit with a projection, one without, and both ends."""
    for site in ("root_block", "block1/unit02", UNIT, LAST_SITE):
        result = RungResult("forward", [])
        name_operation(ladders(precision), result, [site], precision)
        assert result.details["operations"]["wrong"] == []
        assert result.findings[0].startswith(f"no operation of {site} errs by itself")


@pytest.mark.slow
def test_a_foreign_models_fault_is_named_and_shown_in_every_report(small_npz, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    flags = ["--weights", small_npz, "--size", "32", "--rows", "4", "--precision", "fp64", "--run", tmp_path / "run"]
    done = parity("forward", *flags, "--torch-model", "foreign_bit:load_with_timms_eps")
    assert done.returncode == 1, done.stderr
    operation = "root_block/standardized_conv2d/standardization"
    assert f"{operation}, value, errs by itself" in " ".join(done.stdout.split())
    report = saved.load(tmp_path / "run")
    assert report["rungs"][0]["details"]["operations"]["wrong"][0] == f"{operation}, value"
    assert "root_block/pool" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search(rf"<td>{operation}</td>\s*<td class=\"n bug\">", page)


def test_without_a_reference_to_ask_the_operation_is_not_looked_for():
    class Recorded:
        roles = ("candidate",)

    result = RungResult("forward", [])
    name_operation(Recorded(), result, [UNIT], "fp64")
    assert "is not in the record; compare with the reference" in result.findings[0]
    assert result.details == {}


ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("parity", "bit_jax", "input_pipeline", "flax", "optax")))  # no import finds them
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def reproduced_alone(fault, folder, scratch):
    """Runs the reproducer's two scripts, and reads what they say."""
    limit = {"fp64": 1e-9, "fp32": 1e-5}[fault.precision]
    for framework in ("jax", "torch"):
        command = [sys.executable, "-I", "-c", ALONE, folder / f"{framework}_side.py"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert fault.operation in done.stdout
        program, public = (float(found) for found in re.findall(r"differs.* by (\S+)", done.stdout))
        assert (program > limit) == (framework == fault.framework), done.stdout
        assert public <= limit
    with np.load(folder / "inputs.npz") as arrays:
        assert max(array.size for array in arrays.values()) <= 128  # a norm keeps some channels in each group
    assert "stablehlo" in (folder / "jax_program.mlir").read_text()
    assert fault.operation in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flipped-gradient", "torch-shifted-gradient", "bfloat16-head"])
def test_a_reproducer_shows_the_faulty_side_without_this_project(ladders, name, tmp_path):
    fault, folder = faults.FAULTS[name], tmp_path / "reproducer"
    ladder = ladders(fault.precision)
    ladder.fault = name
    try:
        attestation = attest(ladder, rungs=[fault.rung])
        result = rungs.RUNGS[fault.rung](ladder)
        reproducer.leave(ladder, result, folder, attestation)
    finally:
        ladder.fault = None
    assert str(folder) in result.findings[-1]
    reproduced_alone(fault, folder, tmp_path)


@pytest.mark.slow
def test_a_comparison_that_fails_leaves_the_reproducer_that_it_was_asked_for(tmp_path):
    """Here of an update, which is no operation of the model."""
    fault, folder = faults.FAULTS["weight-decay"], tmp_path / "reproducer"
    options = dataclasses.replace(selftest.SMALL, precision="fp64", fault=fault.name, run=tmp_path / "run")
    assert not compare(dataclasses.replace(options, reproducer=folder), [fault.rung])
    reproduced_alone(fault, folder, tmp_path)
    assert any(str(folder) in finding for finding in saved.load(tmp_path / "run")["rungs"][-1]["findings"])


def test_a_reproducers_folder_that_cannot_be_had_is_refused_at_the_start(small_npz, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file", "file/below"):
        flags = ["--weights", small_npz, "--run", tmp_path / "run", "--reproducer", tmp_path / name]
        done = parity("forward", *flags)
        assert done.returncode == 2, done.stdout + done.stderr
        assert str(tmp_path / name) in " ".join(done.stderr.split()).replace("\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
