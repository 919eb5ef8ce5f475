"""`--accept`: another model's epsilon is put into this project's side, said aloud, and hides nothing else."""

import importlib.util
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from command_line import parity
from rich.console import Console

import bit_jax
from bit_jax.training import steps
from input_pipeline.errors import RequestError
from parity.in_jax.tasks import JaxSide
from parity.in_torch import models, resnetv2
from parity.ladder import acceptance
from parity.ladder.ladder import Ladder
from parity.options import Options
from parity.report import saved
from parity.sides.side import Side

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

ROOT = Path(__file__).parent.parent
QUICK = ["--size", "24", "--rows", "4", "--batches", "1", "--disturbances", "1", "--precision", "fp64"]
ACCEPT = ["--accept", "standardization eps"]
SAID = "standardization eps 1e-08 instead of BiT's 1e-10, put into jax"
FOREIGN = {"torch_model": "foreign_bit:load_with_timms_eps"}


@pytest.fixture
def foreign(monkeypatch):
    """Lets the PyTorch side import tests/foreign_bit.py and examples/peers.py."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")


def test_both_own_models_compute_with_other_epsilons(x64, small_npz):
    images, constants = (
        np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)),
        {"standardize_eps": 1e-8, "norm_eps": 1e-6},
    )
    model, params = bit_jax.load(small_npz, dtype=jnp.float64)
    model = model.clone(**constants)

    @jax.jit
    def logits(params, images):
        standardized = steps.standardized(params, model.standardize_eps)
        before = model.clone(standardized=True)
        return model.apply({"params": params}, images), before.apply({"params": standardized}, images)

    reference = resnetv2.load(str(small_npz), **constants).double()
    with torch.no_grad():
        expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        bits = resnetv2.load(str(small_npz)).double()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    for computed in logits(params, jnp.asarray(images)):
        assert np.abs(computed - expected).max() < 1e-9
    assert np.abs(bits - expected).max() > 1e-7


def test_both_sides_pass_their_constants_on_to_the_model(small_npz):
    constants = {"norm_eps": 1e-6, "standardize_eps": 1e-8}
    assert models.build(Side("torch", **constants), str(small_npz)).constants == (1e-6, 1e-8)
    model, _ = JaxSide(Side("jax", **constants), "fp32", str(small_npz), lambda *_: None).model()
    assert (model.norm_eps, model.standardize_eps) == (1e-6, 1e-8)


def accepted(options, tmp_path, theirs, small_npz):
    """(sides, clauses, sentences) after the other side attested `theirs`, and the role that was asked."""
    ladder = Ladder(Options(weights=str(small_npz), **options), tmp_path, Console(quiet=True))
    asked = []
    clauses, same = acceptance.accept(ladder, lambda role: asked.append(role) or theirs)
    return ladder.sides, clauses, same, asked


@pytest.mark.parametrize(
    ("options", "role"),
    [
        (FOREIGN, "candidate"),
        (FOREIGN | {"reference": "jax", "candidate": "torch"}, "reference"),
        ({}, "reference"),
        ({"reference": "jax", "candidate": "jax:tuned"}, "reference"),
    ],
)
def test_the_value_goes_into_the_side_that_is_this_projects_own(options, role, tmp_path, small_npz):
    options = options | {"accept": ("standardization eps", "group norm eps")}
    theirs = {"standardization eps": 1e-8, "group norm eps": 1e-5}
    sides, clauses, same, asked = accepted(options, tmp_path, theirs, small_npz)
    other = "candidate" if role == "reference" else "reference"
    assert asked == [other]
    assert (sides[role].standardize_eps, sides[role].norm_eps) == (1e-8, None)
    assert (sides[other].standardize_eps, sides[other].norm_eps) == (None, None)
    assert clauses == [f"standardization eps 1e-08 instead of BiT's 1e-10, put into {sides[role]}"]
    assert same == ["group norm eps was to be accepted, but does not differ: it is 1e-05 on both sides"]


@pytest.mark.parametrize(
    ("options", "theirs", "said"),
    [
        (FOREIGN, {"standardization eps": "unknown"}, "has unknown there, and one number is needed"),
        (FOREIGN, {"standardization eps": [1e-10, 1e-8]}, "has [1e-10, 1e-08] there, and one number is needed"),
        (FOREIGN | {"candidate": "torch"}, {}, "are not; give jax or torch"),
        ({"candidate": f"onnx:{__file__}"}, {}, "no constant can be read from the file of onnx:"),
    ],
)
def test_what_cannot_be_put_in_is_refused(options, theirs, said, tmp_path, small_npz):
    with pytest.raises(RequestError) as refused:
        accepted(options | {"accept": ("standardization eps",)}, tmp_path, theirs, small_npz)
    assert said in str(refused.value)


def test_an_entry_that_is_no_constant_is_refused_by_name():
    known = "'standardization eps' and 'group norm eps' can"
    with pytest.raises(RequestError, match=f"--accept 'groups' cannot be put into this project's side; {known}"):
        Options(accept=("groups",))


@pytest.mark.slow
def test_the_rest_is_judged_and_every_page_says_what_was_accepted(small_npz, tmp_path, foreign):
    flags = ["--weights", small_npz, *QUICK, "--torch-model", "foreign_bit:load_with_timms_eps", *ACCEPT]
    forms = ["--json", tmp_path / "r.json", "--html", tmp_path / "r.html", "--junit", tmp_path / "r.xml"]
    done = parity("all", *flags, "--until", "gradients", "--run", tmp_path / "run", *forms)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert f"note accepted: {SAID}" in said
    assert f"gradients), with accepted differences: {SAID}" in said
    assert "mismatch" not in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["attestation"]["accepted"] == [SAID]
    assert {pair["candidate"]["standardization eps"] for pair in report["attestation"]["sides"].values()} == {1e-8}
    assert SAID.replace("'", "&#39;") in (tmp_path / "r.html").read_text()
    suites = ET.parse(tmp_path / "r.xml").getroot().findall("testsuite")
    assert [suite.find("properties/property").get("value") for suite in suites] == [SAID] * 5
    apart = [line["difference"] for rung in report["rungs"] for line in rung["lines"]]
    assert max(apart) < 1e-10


@pytest.mark.slow
def test_an_accepted_difference_hides_no_other(small_npz, tmp_path, foreign):
    model = "foreign_bit:load_with_timms_eps_and_a_pool_of_its_own"
    flags = ["--weights", small_npz, *QUICK, "--torch-model", model, *ACCEPT, "--run", tmp_path / "run"]
    done = parity("forward", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "FAILS at forward: root_block differs" in said
    assert f"with accepted differences: {SAID}" in said


@pytest.mark.slow
def test_a_model_with_several_epsilons_is_refused_on_the_command_line(small_npz, tmp_path, foreign):
    flags = ["--weights", small_npz, *QUICK, "--torch-model", "foreign_bit:load_with_several_eps", *ACCEPT]
    done = parity("forward", *flags, "--run", tmp_path / "run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "has [1e-10, 1e-08] there" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "factory", "weights"),
    [("timm", "timm_bit", "random:R50x1"), ("transformers", "hugging_face_bit", "random:R14x1")],
)
def test_timms_and_hugging_faces_own_models_differ_in_one_constant(package, factory, weights, tmp_path, foreign):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    flags = ["--weights", weights, *QUICK, "--torch-model", f"foreign_bit:{factory}"]
    plain = parity("forward", *flags, "--run", tmp_path / "plain")
    assert plain.returncode == 1, plain.stdout + plain.stderr
    mismatches = saved.load(tmp_path / "plain")["attestation"]["mismatches"]
    assert [sentence.partition(":")[0] for sentence in mismatches] == ["standardization eps"]
    done = parity("forward", *flags, *ACCEPT, "--run", tmp_path / "accepted")
    assert done.returncode == 0, done.stdout + done.stderr
