"""What may be added to BiT's recipe: every formula against PyTorch's own, and what a run with all of it leaves."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from command_line import parity
from conftest import DIGITS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import bit_jax
from bit_jax import config
from bit_jax.checkpoints import shared
from bit_jax.config import NO_ADDITIONS, Additions
from bit_jax.formats import weights
from bit_jax.model.architecture import HEAD_BIAS, HEAD_KERNEL, Architecture
from bit_jax.training import steps, trained
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.optimizer import clipped, learning_rate, sgd
from bit_jax.training.run import Run
from input_pipeline import Loader, Views, inception, open_source
from input_pipeline.errors import RequestError
from parity import faults
from parity.bundles import against, record
from parity.faults.additions import ADDED
from parity.in_torch.schedule import learning_rate as twin_rate
from parity.in_torch.updates import Updates, freeze
from parity.ladder import selftest
from parity.ladder.ladder import Ladder
from parity.ladder.selftest import ADDED_RUNGS, climb, first_bug, inject, options_for
from parity.options import Options
from parity.sides.recorded import RecordedRun

SHAPES = {"block4/unit01/a/kernel": (3, 4), "block4/unit01/a/gamma": (4,), "head/kernel": (4, 2), "head/bias": (2,)}
COSINE = Schedule(0.1, 3, (), 10, "cosine")


class Twin(torch.nn.Module):
    """Parameters of those shapes, which are those of the checkpoint here."""

    def __init__(self, arrays):
        super().__init__()
        self.held = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(array)) for array in arrays.values()])

    @property
    def keys(self):
        return {f"held.{number}": f"resnet/{key}" for number, key in enumerate(SHAPES)}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "added",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decay_kind": "decoupled"},
        {"clip_norm": 1.0},
        {"clip_norm": 100.0},
        {"ema": 0.7},
        {"train": "head"},
        ADDED | {"weight_decay_kind": "coupled"},
        ADDED,
    ],
    ids=str,
)
def test_updates_are_those_of_pytorch(x64, added):
    """Five steps in float64, with torch.optim.SGD, get_total_norm, clip_grads_with_norm_ and AveragedModel."""
    flat = drawn(0)
    model, optimizer = Twin(flat), sgd(COSINE, 0.9, Additions(**added))
    freeze(model, model.keys, added.get("train"))
    updates = Updates(model, model.keys, 0.9, added)
    params = weights.unflatten({key: jnp.asarray(array) for key, array in flat.items()})
    state = steps.init_state(params, optimizer)
    for number in range(5):
        gradients = drawn(1 + number)
        own = trained.trained(weights.unflatten(gradients), added.get("train"))
        state = steps.update(state, jax.tree.map(jnp.asarray, own), optimizer)
        for parameter, gradient in zip(model.held, gradients.values(), strict=True):
            parameter.grad = torch.from_numpy(gradient) if parameter.requires_grad else None
        updates.step(twin_rate(COSINE.described(), number))
    theirs = {key: param.detach().numpy() for key, param in zip(SHAPES, model.held, strict=True)}
    ours = weights.flatten(state.params)
    for key in SHAPES:
        np.testing.assert_allclose(ours[f"resnet/{key}"], theirs[key], rtol=1e-12)
    shown = weights.flatten(steps.evaluated(state))
    means = {model.keys[name]: mean.detach().numpy() for name, mean in updates.averages().items()}
    for key in SHAPES:
        np.testing.assert_allclose(shown[f"resnet/{key}"], means.get(f"resnet/{key}", theirs[key]), rtol=1e-12)
    assert bool(means) == ("ema" in added)


def test_the_first_update_is_what_the_page_says(x64):
    """Written out by hand, without either framework's optimizer; the momentum is zero before it."""
    p, g, lr = np.array([3.0, -4.0]), np.array([6.0, 8.0]), 0.5
    params = {"kernel": jnp.asarray(p), "bias": jnp.asarray(p)}
    gradients = {"kernel": jnp.asarray(g), "bias": jnp.zeros(2)}
    for added, kernel in (
        ({}, p - lr * g),
        ({"weight_decay": 0.1}, p - lr * (g + 0.1 * p)),
        ({"weight_decay": 0.1, "weight_decay_kind": "decoupled"}, p - lr * g - lr * 0.1 * p),
        ({"clip_norm": 5.0}, p - lr * g * 5 / (10 + 1e-6)),
        ({"clip_norm": 5.0, "weight_decay": 0.1}, p - lr * (g * 5 / (10 + 1e-6) + 0.1 * p)),
    ):
        optimizer = sgd(Schedule(lr, 0, (), 9), 0.9, Additions(**added))
        state = steps.update(steps.init_state(params, optimizer), gradients, optimizer)
        np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-14)
        np.testing.assert_array_equal(state.params["bias"], p)  # neither biases nor GroupNorm's parameters decay


def test_the_norm_is_that_of_all_arrays(x64):
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    np.testing.assert_allclose(clipped(gradients, 1.0)["b"], [[4 / (5 + 1e-6)]], rtol=1e-15)
    jax.tree.map(np.testing.assert_array_equal, clipped(gradients, 5.1), gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_smoothing_is_that_of_pytorch(x64, smoothing):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((6, 7)), rng.dirichlet(np.ones(7), 6)
    theirs = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)
    ours = steps.cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    np.testing.assert_allclose(ours, theirs(torch.from_numpy(logits), torch.from_numpy(targets)), rtol=1e-12)


def test_the_cosine_is_optaxs_and_pytorchs(x64):
    reference = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)
    parameter = torch.nn.Parameter(torch.zeros(1))
    annealed = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(annealed, 10 - 3)
    for step in range(13):
        rate = float(learning_rate(COSINE)(step))
        np.testing.assert_allclose([twin_rate(COSINE.described(), step), reference(step)], rate, rtol=1e-12, atol=1e-17)
        if 3 <= step <= 10:
            assert annealed.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9, abs=1e-17)
            annealed.step()
            scheduler.step()


def test_a_cosine_replaces_the_staircase_of_a_preset():
    cfg = dataclasses.replace(config.DIGITS, additions=Additions(schedule="cosine"))
    schedule = bit_jax.training.hyperrule.recipe(cfg, train_examples=100, native_area=64).schedule
    assert schedule == Schedule(0.01, 20, (), 200, "cosine")
    assert schedule.described()["kind"] == "cosine"
    assert "kind" not in dataclasses.replace(schedule, kind="staircase").described()


def test_a_run_says_that_a_cosine_drops_the_decay_steps(tmp_path):
    cfg = dataclasses.replace(config.DIGITS, run=config.RunConfig(tmp_path / "run"))
    said = "--schedule cosine: --decay-steps 120 160 do not matter"
    assert said in Run.of(dataclasses.replace(cfg, additions=Additions(schedule="cosine"))).notes
    assert said not in Run.of(cfg).notes


def test_a_step_that_changes_nothing_changes_no_average():
    optimizer = sgd(Schedule(0.1, 0, (), 10), 0.9, Additions(ema=0.5))
    state = steps.init_state({"kernel": jnp.ones(3, jnp.float32)}, optimizer)
    step = jax.jit(
        lambda state, loss: steps.update_if_finite(state, loss, {"kernel": loss * jnp.arange(3.0)}, optimizer)
    )
    moved = step(state, jnp.float32(1.0))
    average = 1 - 0.1 * np.arange(3) / 2
    np.testing.assert_allclose(steps.evaluated(moved)["kernel"], average, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, step(moved, jnp.float32(jnp.nan)), moved)
    # a step that float16 skips moves no average towards the parameters either
    scaled = steps.init_state(state.params, optimizer, scales_loss=True).replace(opt_state=moved.opt_state)
    bad = {"kernel": jnp.full(3, jnp.inf, jnp.float32)}
    skipped = steps.update_if_finite(scaled, jnp.zeros(()), bad, optimizer)
    np.testing.assert_array_equal(steps.evaluated(skipped)["kernel"], steps.evaluated(moved)["kernel"])


LAYOUT = Architecture.parse("R26x1", 10).layout


@pytest.mark.parametrize(
    ("pattern", "first", "count"),
    [
        ("head", "head/conv2d/kernel", 2),
        ("block4|head", "block4/unit01/a/group_norm/gamma", 21),
        ("block[34]", "block3/unit01/a/group_norm/gamma", 38),
        ("block4/unit02", "block4/unit02/a/group_norm/gamma", 9),
        ("a/group_norm", "block1/unit01/a/group_norm/gamma", 16),
        ("conv2d", "head/conv2d/kernel", 2),
        ("(?i)HEAD", "head/conv2d/kernel", 2),
        ("head$", "head/conv2d/kernel", 2),
        ("block4|^conv2d", "block4/unit01/a/group_norm/gamma", 21),
        ("head|^gamma", "block1/unit01/a/group_norm/gamma", 27),
        ("head(?=/conv2d)|head/conv2d/bias", "head/conv2d/bias", 1),
        ("(?<!a/)group_norm", "block1/unit01/a/group_norm/gamma", 50),
        (".*", "root_block/standardized_conv2d/kernel", len(LAYOUT)),
    ],
)
def test_a_pattern_matches_whole_parts_of_paths_in_both_frameworks(pattern, first, count):
    chosen = [key for key in LAYOUT if trained.trains(key, pattern)]
    assert len(chosen) == count
    assert f"resnet/{first}" in chosen
    assert chosen == [key for key in LAYOUT if trained.trains(key.removeprefix("resnet/"), pattern)]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1)) for _ in LAYOUT])
    freeze(model, {str(number): key for number, key in enumerate(LAYOUT)}, pattern)
    assert [key for key, param in zip(LAYOUT, model, strict=True) if param.requires_grad] == chosen


def test_a_pattern_that_matches_nothing_is_refused_with_examples():
    for pattern in ("heads", "block", "unit0", "block9", "", "head(?=/conv2d)"):
        said = rf"'{re.escape(pattern)}' matches no parameter; .*block\d/unit.*'block4\|head'"
        with pytest.raises(RequestError, match=said):
            trained.require(LAYOUT, pattern)
    with pytest.raises(RequestError, match="paths such as head/conv2d/kernel, head/conv2d/bias, as in"):
        trained.require([HEAD_KERNEL, HEAD_BIAS], "block4")


@pytest.mark.parametrize("pattern", ["group_norm", "block4", "head/conv2d/bias"])
def test_a_part_without_the_head_is_refused(pattern, tmp_path):
    asked = dataclasses.replace(
        config.DIGITS, run=config.RunConfig(tmp_path / "run"), additions=Additions(train=pattern)
    )
    with pytest.raises(RequestError, match=rf"'{pattern}' trains nothing below the new head, .* '{pattern}\|head'"):
        Run.of(asked)


@pytest.mark.slow
def test_below_a_new_head_nothing_moves_until_the_head_does(x64):
    model = Architecture.parse("R14x0.5", 3).model(jnp.float64)
    params, additions = model.init_params(0), Additions(train="group_norm|head")
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)))
    targets = jax.nn.one_hot(jnp.arange(2), 3, dtype=jnp.float64)

    @jax.jit(static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
    def gradients(params, train):
        return steps.loss_and_gradients(model, params, images, targets, additions=Additions(train=train))[1]

    for leaf in jax.tree.leaves(gradients(params, "group_norm")):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    optimizer = sgd(Schedule(0.1, 0, (), 9), 0.0, additions)
    state = steps.init_state(params, optimizer)
    for _ in range(2):
        state = steps.update(state, gradients(state.params, additions.train), optimizer)
    before, after = weights.flatten(params), weights.flatten(state.params)
    for key in before:
        assert (before[key] != after[key]).any() == trained.trains(key, additions.train), key


def test_parity_refuses_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(RequestError, match="--train 'heads' matches no parameter"):
        Ladder(dataclasses.replace(selftest.SMALL, additions=Additions(train="heads")), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weight_decay": -0.1}, "--weight-decay -0.1 must be a number from 0"),
        ({"weight_decay": math.nan}, "--weight-decay nan"),
        ({"weight_decay_kind": "decoupled"}, "--weight-decay-kind decoupled changes nothing without --weight-decay"),
        ({"clip_norm": 0.0}, "--clip-norm 0.0 must be a finite number above 0"),
        ({"clip_norm": math.inf}, "--clip-norm inf must be a finite number above 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0 must be at least 0 and below 1"),
        ({"ema": 1.0}, "--ema 1.0 must be between 0 and 1"),
        ({"train": "(head"}, "no regular expression: missing"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong, said):
    with pytest.raises(RequestError) as error:
        Additions(**wrong)
    assert said in str(error.value)


def test_what_is_off_is_no_part_of_a_runs_identity():
    """Runs from before there were additions are continued."""
    plain = config.identity(config.DIGITS)
    assert not [name for name in plain if "addition" in name]
    other = config.identity(dataclasses.replace(config.DIGITS, additions=Additions(ema=0.9, train="head")))
    assert other == plain | {"additions.ema": 0.9, "additions.train": "head"}


def test_without_additions_a_state_has_the_parts_that_it_always_had():
    """So checkpoints from before there were additions are read."""
    params = {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    plain, added = (
        steps.init_state(params, sgd(Schedule(0.1, 0, (), 10), 0.9, additions))
        for additions in (NO_ADDITIONS, Additions(ema=0.9, train="head/kernel"))
    )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain)]
    momentum = [".opt_state[0].trace['head']['bias']", ".opt_state[0].trace['head']['kernel']", ".opt_state[1].count"]
    assert names == [".step", ".params['head']['bias']", ".params['head']['kernel']", *momentum]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(added.opt_state)]
    assert names == ["[0].trace['head']['kernel']", "[1].count", "[2].ema['head']['kernel']"]


def convolutions(jaxpr):
    """Numbers of convolutions and matrix products, those of called functions included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name in ("conv_general_dilated", "dot_general")
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            count += convolutions(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else 0
    return count


def test_the_backward_pass_ends_where_nothing_below_trains():
    model = bit_jax.ResNetV2((1, 1, 1, 1), 0.5, 3)
    params = jax.eval_shape(lambda: model.init_params(0))
    batch = jnp.zeros((2, 32, 32, 3)), jnp.ones((2, 3)) / 3

    def count(train, function=steps.loss_and_gradients):
        made = jax.make_jaxpr(lambda params: function(model, params, *batch, additions=Additions(train=train)))
        return convolutions(made(params).jaxpr)

    forward = convolutions(jax.make_jaxpr(lambda params: steps.apply_model(model, params, batch[0]))(params).jaxpr)
    assert forward == 18  # 17 convolutions and the head
    assert count("head") == forward + 1  # the gradient by the head's kernel, and by nothing else
    assert count(None) == 3 * forward - 1  # none by the images
    assert count("root_block") == 2 * forward  # by the input of all others, and by its own kernel
    assert count("head") < count("block4|head") < count(None)


# the crop


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_box_lies_in_the_image(height, width, seed):
    box = inception.draw_box(np.random.default_rng(seed), height, width)
    assert 0 < box.height <= height - box.top
    assert 0 < box.width <= width - box.left
    assert min(box.top, box.left) >= 0


def test_areas_and_ratios_are_drawn_as_torchvision_says():
    rng = np.random.default_rng(0)
    boxes = [inception.draw_box(rng, 1000, 1000) for _ in range(4000)]
    area = np.array([box.height * box.width for box in boxes]) / 1e6
    ratio = np.log([box.width / box.height for box in boxes])
    assert 0.079 < area.min() < 0.09
    # large areas of extreme ratios do not fit a square and are drawn again, so small ones are more frequent
    wanted, turned = rng.uniform(0.08, 1, 10**5), np.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3), 10**5))
    fitting = wanted[np.maximum(wanted * turned, wanted / turned) <= 1]
    assert abs(np.median(area) - np.median(fitting)) < 0.02
    assert abs(area.std() - fitting.std()) < 0.01
    assert abs(ratio).max() <= math.log(4 / 3) + 0.01
    assert abs(np.mean(ratio)) < 0.01
    assert abs(np.mean([box.mirrored for box in boxes]) - 0.5) < 0.03
    corners = np.array([box.top / max(1000 - box.height, 1) for box in boxes])
    assert abs(corners.mean() - 0.5) < 0.02


def test_an_image_of_no_possible_ratio_shows_its_middle():
    assert inception.draw_box(np.random.default_rng(0), 10, 1000)[:4] == (0, 493, 10, 13)
    assert inception.draw_box(np.random.default_rng(0), 1000, 9)[:4] == (494, 0, 12, 9)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 96), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_inceptions_views_are_pillows_bit_for_bit(height, width, side, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    views = Views(side, side, flip=True, crop_style="inception")
    box = views.draw_box(np.random.default_rng(seed), height, width)
    whole = Image.fromarray(pixels).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    expected = np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR))
    seen = views.train(pixels, np.random.default_rng(seed))
    np.testing.assert_array_equal(seen, expected[:, ::-1] if box.mirrored else expected)


def test_a_batch_of_inceptions_crops_follows_from_its_number_alone():
    views = Views(8, 16, flip=False, crop_style="inception")  # the first number does not matter
    loader = Loader(open_source("digits", "train"), views, 8, seed=3)
    ahead, again = (dict(loader.train(start, 4))[3]["image"] for start in (0, 3))
    np.testing.assert_array_equal(ahead, again)
    plain = dict(dataclasses.replace(loader, views=Views(20, 16, flip=False)).train(3, 4))[3]["image"]
    assert (plain != again).any()


# comparisons


@pytest.fixture(scope="module")
def compared(tmp_path_factory, compiled_once, hardly_optimized):
    options = dataclasses.replace(options_for(faults.FAULTS["ema-shares"]), size="16")
    with Ladder(options, tmp_path_factory.mktemp("ladder"), Console(quiet=True)) as ladder:
        yield ladder


@pytest.mark.slow
def test_with_every_addition_both_sides_compute_the_same(compared):
    assert compared.options.additions == Additions(**ADDED)
    assert climb(compared, ADDED_RUNGS) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, fault in faults.FAULTS.items() if fault.additions == ADDED])
def test_a_fault_in_an_addition_is_found(compared, name):
    failed, found = inject(compared, faults.FAULTS[name])
    assert failed is not None, "no rung failed"
    assert found, f"{failed.name}: {first_bug(failed)}; {failed.findings}"


@pytest.mark.slow
def test_a_bundle_carries_the_additions(tmp_path, compiled_once, hardly_optimized):
    options = dataclasses.replace(selftest.SMALL, precision="fp64", size="16", additions=Additions(**ADDED))
    bundle = tmp_path / "reference.bundle"
    assert record.record(options, record.Record(bundle, until="optimizer"), Console(quiet=True))
    reader, opened, _ = against.Against(bundle).opened()
    assert (reader.manifest["version"], opened.additions) == (2, options.additions)
    with against.RecordedLadder(reader, opened, tmp_path / "files", Console(quiet=True)) as ladder:
        assert climb(ladder, ["pixels", "optimizer"]) is None
        _, found = inject(ladder, faults.FAULTS["swapped-box"])
        assert found


def test_an_exported_file_has_no_training(tmp_path):
    options = Options(candidate=f"onnx:{tmp_path / 'model.onnx'}", additions=Additions(label_smoothing=0.1))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(RequestError, match="--label-smoothing is training's"):
        Ladder(options, tmp_path)


# runs


def flags_of(added):
    return [text for name, value in added.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def train(*flags, workdir: Path, devices=1):
    several = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": several}
    command = [sys.executable, "train.py", *DIGITS.split(), *map(str, flags), "--workdir", workdir]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(small_npz, tmp_path_factory, compiled_once):
    """The folder of a run of six steps with every addition, and what it printed."""
    folder = tmp_path_factory.mktemp("added") / "run"
    kept = ["--steps", 6, "--checkpoint-every", 2, "--keep-checkpoints", 9, "--model", small_npz, "--mixup", 0.1]
    done = train(*kept, *flags_of(ADDED), workdir=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.mark.slow
def test_a_run_leaves_its_average_and_moves_nothing_frozen(run, small_npz):
    folder, said = run
    assert "--train block4|head: " in said
    assert "parameters train, in 12 of 45 arrays" in said.replace("\n", " ")
    final, state = dict(weights.read(folder / "final.npz")[1]), shared.read(folder / "checkpoints", 6)
    (average,) = [weights.flatten(part["ema"]) for part in state["opt_state"] if part and "ema" in part]
    (momentum,) = [weights.flatten(part["trace"]) for part in state["opt_state"] if part and "trace" in part]
    params, before = weights.flatten(state["params"]), dict(weights.read(small_npz, num_classes=10)[1])
    own = {key for key in params if trained.trains(key, ADDED["train"])}
    assert momentum.keys() == average.keys() == own
    for key, array in final.items():
        np.testing.assert_array_equal(array, average[key] if key in own else before[key])
        assert (params[key] != array).any() == (key in own), key
    result = json.loads((folder / "result.json").read_text())
    assert result["weights"] == "moving average with decay 0.9, in final.npz and in the accuracies"
    kept = json.loads((folder / "config.json").read_text())
    assert {name.removeprefix("additions.") for name in kept["config"] if "additions" in name} == ADDED.keys()
    assert kept["recipe"]["schedule"]["kind"] == "cosine"


@pytest.mark.slow
def test_a_run_is_refused_with_other_additions_and_continued_with_the_same(run, small_npz, tmp_path):
    folder, _ = run
    kept = ["--steps", 6, "--checkpoint-every", 2, "--keep-checkpoints", 9, "--model", small_npz, "--mixup", 0.1]
    done = train(*kept, *flags_of(ADDED | {"ema": 0.8}), workdir=folder)
    assert done.returncode == 2
    assert "additions.ema: 0.9 there, 0.8 here" in " ".join(done.stderr.split())
    whole = (folder / "final.npz").read_bytes()
    for left in ("final.npz", "result.json"):
        (folder / left).unlink()
    for name in ("4", "6"):
        subprocess.run(["rm", "-r", folder / "checkpoints" / name], check=True)
    done = train(*kept, *flags_of(ADDED), workdir=folder)
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stderr
    assert (folder / "final.npz").read_bytes() == whole


@pytest.mark.slow
def test_split_over_devices_a_run_is_the_same(run, small_npz, tmp_path):
    """The norm is that of the whole gradient, and the average lies as the parameters do."""
    kept = ["--steps", 6, "--model", small_npz, "--mixup", 0.1, "--mesh", "data=2,fsdp=2", "--microbatches", 2]
    done = train(*kept, *flags_of(ADDED), workdir=tmp_path / "run", devices=4)
    assert done.returncode == 0, done.stderr
    alone, split = (dict(weights.read(folder / "final.npz")[1]) for folder in (run[0], tmp_path / "run"))
    for key, array in alone.items():
        np.testing.assert_allclose(split[key], array, rtol=0, atol=1e-6 * (1 + np.abs(array).max()))


@pytest.mark.slow
def test_parity_replays_a_run_with_its_additions(run, small_npz):
    recorded = RecordedRun.of(run[0])
    assert recorded.additions == Additions(**ADDED)
    state = recorded.state(4)
    assert state.momentum.keys() == state.ema.keys() < state.params.keys()
    flags = ["--workdir", run[0], "--step", 3, "--rows", 4, "--candidate", "jax", "--run", run[0].parent / "step"]
    done = parity("step", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "the code at hand computes step 3 right" in said
    assert "follows from its checkpoint" in said
