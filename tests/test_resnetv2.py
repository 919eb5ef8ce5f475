"""The model against what the original PyTorch code computes in float64, and against float64 in float32."""

import functools
from pathlib import Path

import golden_inputs
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from conftest import AS_USERS
from jax import lax

import bit_jax
from bit_jax.formats import weights
from bit_jax.model import layers, ops, resnetv2
from bit_jax.model.architecture import Architecture
from bit_jax.training import steps
from input_pipeline.errors import RequestError

GOLDEN = np.load(Path(__file__).parent / "data" / "bit_pytorch_float64.npz")
# The same mathematics in float64 differs by rounding only, seen at 1e-13; a wrong epsilon moves a logit by 1e-6.
TOLERANCE = 1e-9
LABELS = np.array([3, 141, 592, 653])


def load(tmp_path, depth, classes, seed, dtype):
    path = tmp_path / "golden.npz"
    np.savez(path, **golden_inputs.weights(depth, 1, classes, seed))
    return bit_jax.load(path, dtype=dtype)


as_users = functools.partial(jax.jit, compiler_options=AS_USERS)


@functools.partial(as_users, static_argnames="model")  # compiled once for all tests
def applied(model, params, images):
    return model.apply({"params": params}, images)


def logits_of(model, params, images):
    return np.asarray(applied(model, params, jnp.asarray(images, layers.param_dtype(model.dtype))))


@pytest.fixture(scope="module")
def r50x1(tmp_path_factory):
    with jax.enable_x64(True):
        return load(tmp_path_factory.mktemp("r50x1"), 50, 1000, 11, jnp.float64)


@pytest.mark.parametrize(("size", "which"), [pytest.param("128x128", 0, marks=pytest.mark.slow), ("97x131", 1)])
def test_r50x1_logits(x64, r50x1, size, which):
    logits = logits_of(*r50x1, golden_inputs.images(11)[which])
    np.testing.assert_allclose(logits, GOLDEN[f"R50x1-1000-{size}"], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_r101x1_logits_with_21843_classes(x64, tmp_path):
    model, params = load(tmp_path, 101, 21843, 13, jnp.float64)
    for images, size in zip(golden_inputs.images(13), ("128x128", "97x131"), strict=False):
        logits = logits_of(model, params, images)
        assert logits.shape == (2, 21843)
        np.testing.assert_allclose(logits[:, :1000], GOLDEN[f"R101x1-21843-{size}"], rtol=0, atol=TOLERANCE)


def torch_name(key: str) -> str:
    """The original PyTorch code's name of a parameter."""
    parts = key.removeprefix("resnet/").split("/")
    if parts[0] == "root_block":
        return "root.conv.weight"
    if parts[0] == "group_norm":
        return f"head.gn.{'weight' if parts[1] == 'gamma' else 'bias'}"
    if parts[0] == "head":
        return f"head.conv.{'weight' if parts[2] == 'kernel' else 'bias'}"
    number = "abc".index(parts[2]) + 1
    name = {"gamma": f"gn{number}.weight", "beta": f"gn{number}.bias", "kernel": f"conv{number}.weight"}[parts[-1]]
    return f"body.{parts[0]}.{parts[1]}.{'downsample.weight' if parts[3] == 'proj' else name}"


def test_r50x1_gradients(x64, r50x1):
    model, params = r50x1
    images = jnp.asarray(golden_inputs.images(11)[2], jnp.float64)
    targets = jax.nn.one_hot(LABELS, 1000, dtype=jnp.float64)

    def loss_of(params):
        return steps.cross_entropy(model.apply({"params": params}, images), targets).mean()

    loss, gradients = as_users(jax.value_and_grad(loss_of))(params)
    np.testing.assert_allclose(loss, GOLDEN["grad/loss"], rtol=TOLERANCE)
    flat = {torch_name(key): np.asarray(array) for key, array in weights.flatten(gradients).items()}
    assert {f"grad/{name}" for name in flat} | {"grad/loss"} == {key for key in GOLDEN.files if key.startswith("grad/")}
    for name, gradient in flat.items():
        norm, total = GOLDEN[f"grad/{name}"]
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=TOLERANCE, err_msg=name)
        # a sum cancels: its rounding is relative to the norm
        np.testing.assert_allclose(gradient.sum(), total, rtol=0, atol=TOLERANCE * max(norm, 1), err_msg=name)


def sample_variance(kernel, eps=None):
    centred = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
    count = int(np.prod(kernel.shape[:3]))
    return centred / jnp.sqrt((centred**2).sum(axis=(0, 1, 2), keepdims=True) / (count - 1) + 1e-10)


def furthest_from_golden(model, params):
    """The largest difference from the golden logits, of the model as it is now patched."""
    images = jnp.asarray(golden_inputs.images(11)[1])
    logits = as_users(lambda params, images: model.apply({"params": params}, images))(params, images)
    return np.abs(logits - GOLDEN["R50x1-1000-97x131"]).max()


@pytest.mark.parametrize(
    ("fault", "replacement"),
    [
        ("STANDARDIZE_EPS", 1e-8),
        pytest.param("NORM_EPS", 1e-6, marks=pytest.mark.slow),
        pytest.param("standardize", sample_variance, marks=pytest.mark.slow),
        pytest.param("GROUPS", 16, marks=pytest.mark.slow),
    ],
)
def test_golden_logits_notice_a_wrong_constant(x64, r50x1, monkeypatch, fault, replacement):
    monkeypatch.setattr(layers, fault, replacement)
    assert furthest_from_golden(*r50x1) > 100 * TOLERANCE


@pytest.mark.slow
def test_golden_logits_notice_a_pool_padded_with_minus_infinity(x64, r50x1, monkeypatch):
    pool, outside = resnetv2.max_pool, ((0, 0), (1, 1), (1, 1), (0, 0))
    monkeypatch.setattr(
        resnetv2, "max_pool", lambda x: pool(jnp.pad(x[:, 1:-1, 1:-1], outside, constant_values=-jnp.inf))
    )
    assert furthest_from_golden(*r50x1) > 1e-4


def test_float32_errs_no_more_than_its_rounding_explains(r50x1, tmp_path):
    """float64 is the oracle: it also says what relative perturbations of float32's size in weights and image do.

    A forward pass rounds after every one of its 50 layers, not once; the bound allows for the square root of that many
    independent roundings, times two.
    """
    image = golden_inputs.images(11)[0]
    with jax.enable_x64(True):
        model, params = r50x1
        exact = logits_of(model, params, image)
        rng = np.random.default_rng(0)

        def perturbed(leaf):
            leaf = np.asarray(leaf, np.float64)
            return jnp.asarray(leaf * (1 + np.finfo(np.float32).eps * rng.uniform(-1, 1, leaf.shape)))

        moved = logits_of(model, jax.tree.map(perturbed, params), perturbed(image))
    single = logits_of(*load(tmp_path, 50, 1000, 11, jnp.float32), image)
    assert single.dtype == np.float32

    def rmse(logits):
        return np.sqrt(np.mean((logits - exact) ** 2))

    assert 0 < rmse(single) < 2 * np.sqrt(50) * rmse(moved)


def test_bfloat16_multiplies_narrow_and_keeps_parameters_and_logits_wide(small_npz):
    model, params = bit_jax.load(small_npz, dtype=jnp.bfloat16)
    image = jnp.asarray(golden_inputs.images(1)[2])
    apply = jax.jit(model.apply)
    assert apply({"params": params}, image).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    convolutions = [
        line for line in apply.lower({"params": params}, image).as_text().splitlines() if "convolution" in line
    ]
    assert convolutions
    assert all("bf16" in line for line in convolutions)


@pytest.mark.parametrize("size", [(10, 13), (9, 8)])
def test_the_pool_and_its_gradient_are_pytorchs_where_values_are_equal_too(x64, size):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, *size, 5)).astype(np.float64)  # most windows hold their maximum more than once
    pooled, gradient = jax.vjp(resnetv2.max_pool, jnp.asarray(x))
    given = rng.standard_normal(pooled.shape)

    reference = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    expected = torch.nn.functional.max_pool2d(reference, 3, 2)
    expected.backward(torch.from_numpy(given).permute(0, 3, 1, 2))
    assert reference.grad is not None
    np.testing.assert_array_equal(pooled, expected.detach().permute(0, 2, 3, 1))
    np.testing.assert_array_equal(gradient(jnp.asarray(given))[0], reference.grad.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("normalized", "parameters"),
    [(layers.group_norm_relu, (np.linspace(0.5, 1.5, 64), np.linspace(-1, 1, 64))), (layers.standardize, ())],
    ids=["group norm", "standardization"],
)
def test_statistics_keep_their_digits_where_the_mean_is_large(x64, normalized, parameters):
    """One pass over x: without the sample's mean taken off first, float32 would keep no digit of the variance here."""
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 64)) + 3000.0

    def in_dtype(dtype, x):
        return np.asarray(normalized(*(jnp.asarray(each, dtype) for each in (x, *parameters))))

    exact, single = in_dtype(jnp.float64, x), in_dtype(jnp.float32, x)
    of_rounded = in_dtype(jnp.float64, x.astype(np.float32))
    assert np.abs(single - exact).max() < 4 * np.abs(of_rounded - exact).max()


@pytest.fixture(scope="module")
def small(small_npz):
    """The smallest model in float64, its parameters, an image of odd sides, and the model's logits of it."""
    with jax.enable_x64(True):
        model, params = bit_jax.load(small_npz, dtype=jnp.float64)
        image = golden_inputs.images(11)[1]
        return model, params, image, quick_logits(model, params, image)


def quick_logits(model, params, images):
    quickly = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(model.apply, compiler_options=quickly)({"params": params}, images))


def test_products_compute_the_same(x64, small):
    model, params, image, expected = small
    assert np.abs(quick_logits(model.clone(products=True), params, image) - expected).max() < TOLERANCE


def test_kernels_standardized_before_compute_the_same(x64, small):
    model, params, image, expected = small
    before = model.clone(standardized=True)
    assert np.abs(quick_logits(before, jax.jit(steps.standardized)(params), image) - expected).max() < TOLERANCE
    assert np.abs(quick_logits(before, params, image) - expected).max() > 0.01


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"), [(1, 1, 5, 4), (1, 2, 5, 4), (3, 1, 3, 2), (3, 2, 4, 5), (3, 2, 5, 7)]
)
def test_a_convolution_written_as_a_product_has_its_value_and_gradients(x64, size, stride, height, width):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, height, width, 40)), rng.standard_normal((size, size, 40, 24))

    def convolved(products):
        return jax.vjp(lambda *given: ops.convolve(*given, stride, lax.Precision.HIGHEST, products=products), x, kernel)

    (expected, of_expected), (found, of_found) = convolved(False), convolved(True)
    given = rng.standard_normal(expected.shape)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(of_found)(given))
    for one, other in zip((found, *of_found(given)), (expected, *of_expected(given)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 65), (8, 8)])
def test_any_image_size(small_npz, height, width):
    model, params = bit_jax.load(small_npz)
    logits = quick_logits(model, params, jnp.zeros((2, height, width, 3)))
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "remedy"),
    [
        ((2, 32, 32, 3), "uint8", "127.5"),
        ((2, 32, 32, 3), "int32", "127.5"),
        ((2, 3, 32, 32), "float32", "transpose(0, 2, 3, 1)"),
        ((2, 3, 32, 32), "uint8", "transpose(0, 2, 3, 1)"),
        ((2, 32, 32, 1), "float32", "repeat(3, axis=-1)"),
        ((2, 32, 32, 4), "float32", "images[..., :3]"),
        ((32, 32, 3), "float32", "images[None]"),
        ((3, 32, 32), "float32", "images[None]"),
        ((32, 32), "float32", "bring them into that shape"),
        ((2, 32, 32, 5), "float32", "bring them into that shape"),
        ((2, 0, 32, 3), "float32", "bring them into that shape"),
        ((), "float32", "bring them into that shape"),
    ],
)
def test_images_that_the_model_does_not_take(small_npz, monkeypatch, shape, dtype, remedy):
    """The model runs as users run it, without the tests' own checks of shapes, and under `jax.jit`, where values cannot
    be seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, params = bit_jax.load(small_npz)
    for apply in (jax.jit(model.apply), model.apply):
        with pytest.raises(RequestError) as caught:
            apply({"params": params}, np.zeros(shape, dtype))
        sentence = str(caught.value)
        assert f"{dtype} {list(shape)}" in sentence
        assert "[batch, height, width, 3] in [-1, 1]" in sentence
        assert sentence.endswith(remedy) or remedy == "127.5"
        assert remedy in sentence


@pytest.mark.parametrize("images", [[[0.0]], torch.zeros(1, 32, 32, 3), None])
def test_images_that_are_no_array(images):
    with pytest.raises(RequestError, match="not an array"):
        resnetv2.check_images(images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checking_images_adds_nothing_to_the_program(small_npz, monkeypatch, dtype):
    model, params = bit_jax.load(small_npz)
    images = jnp.zeros((3, 32, 40, 3), dtype)

    def program():
        return jax.jit(lambda params, images: model.apply({"params": params}, images)).lower(params, images).as_text()

    checked = program()
    monkeypatch.setattr(resnetv2, "check_images", lambda images: None)
    assert program() == checked


def test_architecture_names():
    assert Architecture.parse("R152x4", 10) == Architecture((3, 8, 36, 3), 4, 10)
    assert str(Architecture((1, 1, 1, 1), 0.5, 1000)) == "R14x0.5 with 1,000 classes"
    assert Architecture((1, 2, 3, 1), 1.0, 10).name == "R(1,2,3,1)x1"
    for wrong in ("R51x1", "50x1", "R50x0.3", "R50x0"):
        with pytest.raises(RequestError):
            Architecture.parse(wrong, 10)
