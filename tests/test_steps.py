"""Mixup, loss and counting, and one run on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bit_jax
from bit_jax.model import resnetv2
from bit_jax.scale import sharding as mesh
from bit_jax.training import steps
from bit_jax.training.evaluation import evaluate
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.optimizer import sgd
from input_pipeline.errors import RequestError


def test_neighbours_are_mixed():
    rows = jnp.array([[1.0], [3.0], [10.0], [20.0]])
    np.testing.assert_allclose(steps.mix_pairs(rows, jnp.float32(0.75)), [[1.5], [2.5], [12.5], [17.5]])


def test_mixing_images_and_targets_alike_keeps_the_mean():
    rows = jax.random.normal(jax.random.key(0), (6, 4, 4, 3))
    mixed = steps.mix_pairs(rows, jnp.float32(0.3))
    np.testing.assert_allclose(mixed.mean(axis=0), rows.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(steps.mix_pairs(rows, jnp.float32(1.0)), rows)


def test_mixup_weight_follows_from_seed_and_step_whatever_the_precision():
    weights = [float(steps.mixup_weight(3, jnp.int32(step), 0.1)) for step in range(200)]
    assert len(set(weights)) > 100
    assert all(0 <= weight <= 1 for weight in weights)
    assert np.mean([min(weight, 1 - weight) < 0.05 for weight in weights]) > 0.5  # Beta(0.1, 0.1) lives at the ends
    with jax.enable_x64(True):
        assert float(steps.mixup_weight(3, jnp.int32(7), 0.1)) == weights[7]
    assert float(steps.mixup_weight(4, jnp.int32(7), 0.1)) != weights[7]


def test_loss_with_mixed_targets_is_the_mixture_of_losses():
    logits = jax.random.normal(jax.random.key(0), (2, 5))
    targets = jax.nn.one_hot(jnp.array([1, 3]), 5)
    mixed = steps.cross_entropy(logits, 0.3 * targets + 0.7 * targets[::-1])
    expected = 0.3 * steps.cross_entropy(logits, targets) + 0.7 * steps.cross_entropy(logits, targets[::-1])
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)


def test_pixels():
    pixels = jnp.repeat(jnp.array([0, 255, 127, 128], jnp.uint8).reshape(1, 2, 2, 1), 3, axis=-1)
    np.testing.assert_allclose(
        steps.normalize(pixels, jnp.dtype(jnp.float32))[..., 0].ravel(), [-1, 1, -1 / 255, 1 / 255], rtol=1e-6
    )


def test_rank_counts_ties_as_argmax_does():
    logits = jnp.array([[0.0, 0, 0, 0], [0, 0, 0, 0], [1, 3, 2, 3], [1, 3, 2, 3], [1, 3, 2, 0]])
    labels = jnp.array([0, 2, 1, 3, 3])
    np.testing.assert_array_equal(steps.label_rank(logits, labels), [0, 2, 0, 1, 3])
    np.testing.assert_array_equal(steps.label_rank(logits, labels) == 0, logits.argmax(axis=1) == labels)


def test_a_label_that_is_no_class_is_never_in_favour():
    """Gathered out of range it would be first in rank, and as zeros instead of a one it would cost nothing."""
    logits = jnp.eye(3)
    ranks = steps.label_rank(logits, jnp.array([0, 3, 200]))
    assert ranks[0] == 0
    assert (ranks[1:] >= 3).all()
    assert (steps.label_rank(logits, jnp.array([-1, -3, 1])) >= jnp.array([3, 3, 1])).all()
    batch = {"label": jnp.array([0, 3, -1]), "mask": jnp.ones(3, bool), "image": jnp.zeros((3, 2, 2, 3), jnp.uint8)}
    sums = steps.evaluation_sums(logits, batch)
    assert (sums["correct1"], sums["correct5"], sums["seen"]) == (1, 1, 3)
    assert not np.isfinite(sums["loss"])
    _, targets = steps.prepare(batch, 3, jnp.dtype(jnp.float32), None)
    assert np.isnan(steps.cross_entropy(logits, targets)[1:]).all()


def test_random_numbers_follow_from_the_seed_alone():
    """JAX's default generator, which the environment may set, decides nothing."""
    weight, model = steps.mixup_weight(3, jnp.int32(7), 0.1), bit_jax.ResNetV2((1, 1, 1, 1), 0.5, 2)
    traced = str(jax.make_jaxpr(lambda: model.init_params(0))())
    with jax.default_prng_impl("rbg"):
        assert steps.mixup_weight(3, jnp.int32(7), 0.1) == weight
        assert str(jax.make_jaxpr(lambda: model.init_params(0))()) == traced
    assert "fry" in traced  # threefry


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_never_correct(broken):
    logits = jnp.array([[0.0, 5, 1], [0, 5, 1]]).at[0, 0].set(broken)
    assert steps.label_rank(logits, jnp.array([1, 1]))[0] >= 5
    assert steps.label_rank(logits, jnp.array([0, 1]))[0] >= 5


def fake_eval_step(params, batch):
    return {name: jnp.int32(value) for name, value in batch.items()} | {"loss": jnp.float32(batch["seen"])}


def test_accuracy_is_a_ratio_of_sums():
    batches = [{"seen": 8, "correct1": 2, "correct5": 6}, {"seen": 2, "correct1": 2, "correct5": 2}]
    accuracy = evaluate(fake_eval_step, None, batches, expected=10)
    assert (accuracy.acc1, accuracy.acc5, accuracy.loss, accuracy.examples) == (0.4, 0.8, 1.0, 10)


def test_an_incomplete_evaluation_is_no_result():
    with pytest.raises(RuntimeError, match="8 examples of a split of 10"):
        evaluate(fake_eval_step, None, [{"seen": 8, "correct1": 2, "correct5": 6}], expected=10)


@pytest.mark.parametrize(("rows_a_device", "moves"), [(2, False), (4, False), (1, True)])
def test_mixing_moves_nothing_between_devices_where_their_rows_are_even(rows_a_device, moves):
    devices = mesh.make_mesh()
    sharding = mesh.batch_sharding(devices)
    rows = jax.ShapeDtypeStruct((rows_a_device * devices.size, 8, 8, 3), jnp.float32, sharding=sharding)
    mix = jax.jit(steps.mix_pairs, out_shardings=sharding)
    program = mix.lower(rows, jax.ShapeDtypeStruct((), jnp.float32)).compile().as_text()
    collectives = ("all-gather", "all-to-all", "all-reduce", "collective-permute")
    assert any(name in program for name in collectives) == moves


@pytest.mark.slow
def test_micro_batches_give_the_whole_batchs_loss_and_gradient(x64, small_npz):
    model, params = bit_jax.load(small_npz, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (4, 16, 16, 3)))
    targets = jnp.asarray(rng.dirichlet(np.ones(10), 4))
    whole, shared = (
        jax.jit(lambda *given, passes=passes: steps.loss_and_gradients(model, *given, passes))(params, images, targets)
        for passes in (1, 2)
    )
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * (1 + float(jnp.abs(one).max())))


def test_parameters_are_split_along_the_last_axis_that_fsdp_divides():
    devices = mesh.make_mesh(fsdp=4)
    assert devices.shape == {"data": 2, "fsdp": 4}

    def split(*shape):
        return mesh.param_sharding(devices, shape).shard_shape(shape)

    assert split(3, 3, 32, 64) == (3, 3, 32, 16)
    assert split(1, 1, 64, 10) == (1, 1, 16, 10)
    assert split(7, 7, 3, 10) == (7, 7, 3, 10)  # nothing to divide: on every device
    assert mesh.batch_sharding(devices).shard_shape((16, 5)) == (2, 5)
    with pytest.raises(RequestError, match="fsdp=3 does not divide 8"):
        mesh.make_mesh(fsdp=3)


def test_a_loss_that_is_not_finite_changes_nothing():
    optimizer = sgd(Schedule(0.1, 0, (), 10), 0.9)
    state = steps.init_state({"kernel": jnp.ones(3, jnp.float32)}, optimizer)
    step = jax.jit(
        lambda state, loss: steps.update_if_finite(state, loss, {"kernel": loss * jnp.arange(3.0)}, optimizer)
    )
    moved = step(step(state, jnp.float32(1.0)), jnp.float32(1.0))
    assert int(moved.step) == 2
    np.testing.assert_allclose(moved.params["kernel"], 1 - 0.1 * 2.9 * np.arange(3), rtol=1e-6)
    for loss in (jnp.inf, jnp.nan):
        jax.tree.map(np.testing.assert_array_equal, step(moved, jnp.float32(loss)), moved)


@pytest.mark.parametrize("scales_loss", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_after_one_that_failed_changes_nothing_and_has_failed(scales_loss):
    """It was begun before anybody could look at the one before it."""
    model = resnetv2.ResNetV2((1, 1, 1, 1), 0.5, 3)
    optimizer = sgd(Schedule(0.1, 0, (), 10), 0.9)
    quickly = {"xla_backend_optimization_level": 0}
    train_step = jax.jit(steps.make_train_step(model, optimizer, mixup=0.0, seed=0), compiler_options=quickly)
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (2, 16, 16, 3), np.uint8), "label": np.array([0, 2]), "index": np.arange(2)}
    state = steps.init_state(model.init_params(0), optimizer, scales_loss=scales_loss)
    if scales_loss:  # so low that an overflow is none that a smaller one would mend
        state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(0.5)))
    moved, said = train_step(state, batch | {"stopped": np.bool_(False)})
    assert (int(moved.step), bool(said["failed"])) == (1, False)
    for given in (
        batch | {"stopped": said["failed"] | True},
        batch | {"label": np.array([0, 7]), "stopped": np.bool_(False)},
    ):
        after, said = train_step(moved, given)  # class 7 of 3 makes the loss NaN
        assert bool(said["failed"])
        if given["stopped"] or not scales_loss:
            jax.tree.map(np.testing.assert_array_equal, after, moved)


def test_float16s_loss_scale_follows_gradscalers_rules():
    """Half of a scale whose gradients overflow, with nothing else changed; double after 2,000 good steps in a row."""
    optimizer = sgd(Schedule(0.1, 0, (), 10), 0.9)
    params = {"kernel": jnp.ones(3, jnp.float32)}
    state = steps.init_state(params, optimizer, scales_loss=True)
    good, bad = ({"kernel": jnp.full(3, value, jnp.float32)} for value in (1.0, jnp.inf))
    step = jax.jit(lambda state, gradients: steps.update_if_finite(state, jnp.zeros(()), gradients, optimizer))

    once = step(state, good)
    assert (float(once.loss_scale.scale), int(once.loss_scale.good_steps)) == (2.0**16, 1)
    assert (np.asarray(once.params["kernel"]) < 1).all()
    skipped = step(once, bad)
    assert (float(skipped.loss_scale.scale), int(skipped.loss_scale.good_steps)) == (2.0**15, 0)
    assert (int(skipped.loss_scale.skipped), int(skipped.step)) == (1, 2)
    np.testing.assert_array_equal(skipped.params["kernel"], once.params["kernel"])
    momenta = [[leaf for leaf in jax.tree.leaves(at.opt_state) if leaf.dtype == jnp.float32] for at in (skipped, once)]
    np.testing.assert_array_equal(*momenta)
    nearly = skipped.replace(loss_scale=skipped.loss_scale.replace(good_steps=jnp.int32(1999)))
    grown = step(nearly, good)
    assert (float(grown.loss_scale.scale), int(grown.loss_scale.good_steps)) == (2.0**16, 0)
