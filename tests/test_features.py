"""What the logits are computed from: the same values as in the forward pass, under every way of executing it."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import SMALL
from flax.errors import ScopeParamShapeError

import bit_jax
from bit_jax.formats import weights
from bit_jax.formats.weights import WeightsError
from bit_jax.model import layers, resnetv2
from bit_jax.model.architecture import HEAD_BIAS, HEAD_KERNEL, Architecture
from bit_jax.model.images import WANTED
from input_pipeline.errors import RequestError
from parity.sides.inputs import random_arrays

STAGES = ["root_block", "block1", "block2", "block3", "block4"]


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, 40, 33, 3))


# compiling takes most of these tests' time
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quickly, static_argnames="model")
def features_of(model, params, images):
    return model.apply({"params": params}, images, method="features")


@pytest.fixture
def float64(x64, small_npz):
    return bit_jax.load(small_npz, dtype=jnp.float64)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), found, expected)


def test_features_are_the_values_of_the_forward_pass(float64, images):
    """Flax's own recording of the forward pass is the reference; the head is applied by hand."""
    model, params = float64

    def recorded(module, name):
        return name == "__call__" and isinstance(module, (resnetv2.RootBlock, resnetv2.Stage))

    @quickly
    def forward(params, images):
        return model.apply({"params": params}, images, capture_intermediates=recorded, mutable=["intermediates"])

    logits, kept = forward(params, jnp.asarray(images))
    features = features_of(model, params, jnp.asarray(images))
    assert set(features) == {*STAGES, "last_activation", "pooled"}
    for stage in STAGES:
        expected = kept["intermediates"][stage]["__call__"][0]
        expected = expected if stage == "root_block" else expected[0]
        np.testing.assert_allclose(features[stage], expected, rtol=0, atol=1e-11, err_msg=stage)
    norm, head = params["group_norm"], params["head"]["conv2d"]
    active = layers.group_norm_relu(features["block4"], norm["gamma"], norm["beta"])
    np.testing.assert_allclose(features["last_activation"], active, rtol=0, atol=1e-12)
    np.testing.assert_allclose(features["pooled"], np.asarray(active).mean(axis=(1, 2)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(features["pooled"] @ head["kernel"][0, 0] + head["bias"], logits, rtol=0, atol=1e-10)


def test_shapes_are_those_that_the_docstring_gives(small_npz, images):
    model, params = bit_jax.load(small_npz, dtype=jnp.bfloat16)
    features = jax.eval_shape(features_of, model, params, jnp.asarray(images, jnp.float32))
    sides = {"root_block": 4, "block1": 4, "block2": 8, "block3": 16, "block4": 32, "last_activation": 32}
    for name, stride in sides.items():
        assert features[name].shape[:3] == (2, -(-40 // stride), -(-33 // stride)), name
        assert features[name].dtype == jnp.bfloat16
    assert [features[stage].shape[3] for stage in STAGES] == [32, 128, 256, 512, 1024]
    assert (features["pooled"].shape, features["pooled"].dtype) == ((2, 1024), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "unit"}, {"paced": True}, {"products": True}], ids=str)
def test_however_it_is_executed_the_features_are_the_same(float64, images, change):
    model, params = float64
    images = jnp.asarray(images)
    assert_close(features_of(model.clone(**change), params, images), features_of(model, params, images))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["norm", "unit"])
def test_whatever_is_computed_again_the_gradient_of_features_is_the_same(float64, images, remat):
    plain, params = float64

    def of(model):
        def total(params):
            features = model.apply({"params": params}, jnp.asarray(images), method="features")
            return (features["pooled"] ** 2).sum() + features["block2"].sum()

        return quickly(jax.grad(total))(params)

    assert_close(of(plain.clone(remat=remat)), of(plain))


def test_a_model_without_a_head_returns_the_pooled_features(float64, small_npz, tmp_path, images):
    model, params = bit_jax.load(small_npz, num_classes=0, dtype=jnp.float64)
    assert "head" not in params
    pooled = quickly(model.apply)({"params": params}, jnp.asarray(images))
    expected = features_of(*float64, jnp.asarray(images))["pooled"]
    assert_close(pooled, expected)
    # where no head is applied, a tree without one serves a model that has one
    assert_close(features_of(float64[0], params, jnp.asarray(images))["pooled"], expected)
    shapes = jax.eval_shape(lambda: model.init_params(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)

    bit_jax.save(tmp_path / "body.npz", params)
    again, kept = bit_jax.load(tmp_path / "body.npz", num_classes=0, dtype=jnp.float64)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_a_file_without_a_head_is_not_taken_for_a_whole_one(small_npz, tmp_path):
    body = {key: array for key, array in np.load(small_npz).items() if "/head/" not in key}
    np.savez(tmp_path / "body.npz", **body)
    with pytest.raises(WeightsError, match=r"without a head; give .* or num_classes=0 for its features") as caught:
        bit_jax.load(tmp_path / "body.npz")
    assert set(caught.value.missing) == {HEAD_KERNEL, HEAD_BIAS}
    model, params = bit_jax.load(tmp_path / "body.npz", num_classes=3)
    assert (model.num_classes, params["head"]["conv2d"]["kernel"].shape) == (3, (1, 1, 1024, 3))
    np.savez(tmp_path / "half.npz", **body, **{HEAD_BIAS: np.zeros(10, np.float32)})  # half a head is damage
    for number in (None, 0, 3):
        with pytest.raises(WeightsError, match=HEAD_KERNEL):
            bit_jax.load(tmp_path / "half.npz", num_classes=number)


def test_an_architecture_without_a_head_has_no_head_in_its_layout():
    architecture = Architecture(SMALL.units, SMALL.width, 0)
    assert str(architecture) == "R14x0.5 without a head"
    assert set(random_arrays(SMALL)) - set(architecture.layout) == {HEAD_KERNEL, HEAD_BIAS}
    shapes = jax.eval_shape(architecture.model().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert {key: leaf.shape for key, leaf in weights.flatten(shapes).items()} == architecture.layout


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "astype('float32') - 127.5) / 127.5"),
        (np.zeros((2, 3, 8, 8), np.float32), "transpose(0, 2, 3, 1)"),
        (np.zeros((8, 8, 3), np.float32), "images[None]"),
        (np.zeros((2, 8, 8, 1), np.float32), "repeat(3, axis=-1)"),
    ],
    ids=["uint8", "NCHW", "no batch axis", "one channel"],
)
def test_images_that_the_model_cannot_mean_have_no_features(small_npz, monkeypatch, wrong, remedy):
    """The tests' own checks of shapes are off here, as they are for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, params = bit_jax.load(small_npz, num_classes=0)
    for apply in (features_of, lambda model, *given: model.apply({"params": given[0]}, given[1])):
        with pytest.raises(RequestError) as caught:
            apply(model, params, wrong)
        assert WANTED in str(caught.value)
        assert remedy in str(caught.value)


def test_a_parameter_of_another_shape_is_named(small_npz):
    model, params = bit_jax.load(small_npz)
    params["block2"]["unit01"]["b"]["group_norm"]["beta"] = jnp.zeros(3)
    said = r'"beta" in "/block2/unit01/b/group_norm", .* shape \(64,\), but .* has shape \(3,\)'
    with pytest.raises(ScopeParamShapeError, match=said):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 32, 32, 3)))
