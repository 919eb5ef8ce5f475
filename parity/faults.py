"""Faults that ports of BiT really have, to be injected into one side: `selftest` requires each to be found.

A fault is a context manager that patches the very code that training runs. The frameworks are imported inside, so that
the process that compares stays free of both.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from bit_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done, and where it must be found.

    Attributes:
        name, what: for people.
        patch: applies it, within one of the side's processes.
        rung: the first that may not hold.
        line: how the name of the first line that differs begins.
        precision: in which it shows.
        framework: of the side that has it.
        attested: the entry of the attestation that must differ before anything is compared; empty: none does.
    """

    name: str
    what: str
    patch: Callable[[], contextlib.AbstractContextManager[Any]]
    rung: str
    line: str
    precision: str = "fp64"
    framework: str = "jax"
    attested: str = ""


@contextlib.contextmanager
def injected(name: str | None) -> Iterator[None]:
    """The fault of that name within the block; none for None."""
    if name is None:
        yield
        return
    if name not in FAULTS:
        raise RequestError(f"unknown fault {name!r}; there are {', '.join(FAULTS)}")
    with FAULTS[name].patch():
        yield


def _norm_eps() -> Any:
    return mock.patch("bit_jax.resnetv2.NORM_EPS", 1e-6)


def _torch_norm_eps() -> Any:
    return mock.patch("parity.torch_reference.NORM_EPS", 1e-6)


def _standardize_eps() -> Any:
    return mock.patch("bit_jax.resnetv2.STANDARDIZE_EPS", 1e-8)


def _groups() -> Any:
    return mock.patch("bit_jax.resnetv2.GROUPS", 16)


def _sample_variance() -> Any:
    import jax.numpy as jnp

    from bit_jax.resnetv2 import STANDARDIZE_EPS

    def standardize(kernel):
        centred = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
        return centred / jnp.sqrt(kernel.var(axis=(0, 1, 2), keepdims=True, ddof=1) + STANDARDIZE_EPS)

    return mock.patch("bit_jax.resnetv2.standardize", standardize)


def _pool_of_minus_infinity() -> Any:
    import flax.linen as nn

    pool: Any = nn.max_pool

    def padded(x, window, strides, padding):
        return pool(x[:, 1:-1, 1:-1], window, strides, ((1, 1), (1, 1)))

    return mock.patch("flax.linen.max_pool", padded)


def _stride_on_first() -> Any:
    from bit_jax import resnetv2

    whole = resnetv2.PreActivationConv
    stride = 1

    def swapped(features, size, *args, name, **settings):
        nonlocal stride
        if name == "a":
            stride = settings["stride"] = settings["project_stride"]
        elif name == "b":
            settings["stride"] = settings["stride"] // stride
        return whole(features, size, *args, name=name, **settings)

    return mock.patch("bit_jax.resnetv2.PreActivationConv", swapped)


def _projection_from_input() -> Any:
    """The shortcut projects the unit's input instead of its pre-activation."""
    import flax.linen as nn

    from bit_jax import resnetv2

    @contextlib.contextmanager
    def intercepted():
        unit_input = []

        def record(call, args, kwargs, context):
            if isinstance(context.module, resnetv2.BottleneckUnit):
                unit_input.append(args[0])
            if isinstance(context.module, resnetv2.Projection):
                args = (unit_input[-1],)
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            yield

    return intercepted()


def _height_and_width_swapped() -> Any:
    return _loading(lambda key, array: array.swapaxes(0, 1) if array.ndim == 4 else array)


def _inputs_and_outputs_swapped() -> Any:
    def square(shape):
        return len(shape) == 4 and shape[2] == shape[3]

    return _loading(lambda key, array: array.swapaxes(2, 3) if square(array.shape) else array)


def _norm_not_loaded() -> Any:
    def load(key, array):
        return array * 0 if key == "resnet/block3/unit01/b/group_norm/beta" else array

    return _loading(load)


def _loading(change: Callable[[str, Any], Any]) -> Any:
    import numpy as np

    from bit_jax import weights

    read = weights.read

    def changed(path, **settings):
        architecture, arrays = read(path, **settings)
        return architecture, ((key, np.ascontiguousarray(change(key, array))) for key, array in arrays)

    return mock.patch("bit_jax.weights.read", changed)


def _bgr() -> Any:
    import numpy as np
    from PIL import Image

    from input_pipeline.preprocess import decode

    def reversed_channels(image):
        return Image.fromarray(np.ascontiguousarray(np.asarray(decode(image))[..., ::-1]))

    return mock.patch("input_pipeline.loader.decode", reversed_channels)


def _no_half_pixel() -> Any:
    return _resizing(half_pixel=False)


def _no_antialias() -> Any:
    return _resizing(half_pixel=True)


def _resizing(*, half_pixel: bool) -> Any:
    """Bilinear from the four nearest pixels, as OpenCV and TensorFlow 2 (with half-pixel centres) or TensorFlow 1."""
    import numpy as np
    from PIL import Image

    def weights_along(size: int, side: int):
        offset = 0.5 if half_pixel else 0.0
        at = np.clip((np.arange(side) + offset) * size / side - offset, 0, size - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, size - 1), at - low

    def resize(image, side):
        pixels = np.asarray(image, np.float64)
        for axis in (0, 1):
            low, high, share = weights_along(pixels.shape[axis], side)
            share = share.reshape(-1, 1, 1) if axis == 0 else share.reshape(1, -1, 1)
            pixels = (1 - share) * pixels.take(low, axis) + share * pixels.take(high, axis)
        return Image.fromarray(np.round(pixels).astype(np.uint8))

    return mock.patch("input_pipeline.preprocess.resize", resize)


def _always_flip() -> Any:
    from input_pipeline.preprocess import Views

    draw = Views.draw
    return mock.patch.object(Views, "draw", lambda self, rng: (*draw(self, rng)[:2], True))


def _crop_off_by_one() -> Any:
    from input_pipeline.preprocess import Views

    draw = Views.draw

    def shifted(self, rng):
        top, left, mirrored = draw(self, rng)
        return max(top - 1, 0), left, mirrored

    return mock.patch.object(Views, "draw", shifted)


def _mixed_images_alone() -> Any:
    from bit_jax import steps

    mix = steps.mix_pairs
    return mock.patch("bit_jax.steps.mix_pairs", lambda rows, weight: mix(rows, weight) if rows.ndim == 4 else rows)


def _mixed_with_the_wrong_share() -> Any:
    from bit_jax import steps

    mix = steps.mix_pairs
    return mock.patch(
        "bit_jax.steps.mix_pairs", lambda rows, weight: mix(rows, 1 - weight if rows.ndim == 2 else weight)
    )


def _normalized_by_255() -> Any:
    return mock.patch("bit_jax.steps.normalize", lambda images, dtype: images.astype(dtype) / 255)


def _summed_loss() -> Any:
    from bit_jax import steps

    mean = steps.loss_and_gradients

    def summed(model, params, images, targets, microbatches=1):
        import jax

        return jax.tree.map(lambda leaf: leaf * images.shape[0], mean(model, params, images, targets, microbatches))

    return mock.patch("bit_jax.steps.loss_and_gradients", summed)


def _standardization_without_gradient() -> Any:
    """The statistics taken as constants: the forward pass is right."""
    import jax
    import jax.numpy as jnp

    from bit_jax.resnetv2 import STANDARDIZE_EPS

    def standardize(kernel):
        fixed = jax.lax.stop_gradient(kernel)
        centred = kernel - fixed.mean(axis=(0, 1, 2), keepdims=True)
        return centred / jnp.sqrt(fixed.var(axis=(0, 1, 2), keepdims=True) + STANDARDIZE_EPS)

    return mock.patch("bit_jax.resnetv2.standardize", standardize)


def _optimizer(**settings: Any) -> Any:
    import optax

    from bit_jax.optimizer import learning_rate

    decay = settings.pop("weight_decay", 0.0)
    shift = settings.pop("shift", 0)
    scale = settings.pop("momentum_scale", 1.0)

    def sgd(schedule, momentum):
        rate = learning_rate(schedule)
        chain = optax.sgd(lambda step: rate(step + shift), momentum=momentum * scale, **settings)
        if not decay:
            return chain

        def update(updates, state, params=None):
            import jax

            decayed = jax.tree.map(lambda g, p: g + decay * p, updates, params)
            return chain.update(decayed, state, params)

        return optax.GradientTransformation(chain.init, update)

    return mock.patch("bit_jax.optimizer.sgd", sgd)


def _nesterov() -> Any:
    return _optimizer(nesterov=True)


def _weight_decay() -> Any:
    return _optimizer(weight_decay=1e-4)


def _schedule_off_by_one() -> Any:
    return _optimizer(shift=1)


def _momentum() -> Any:
    return _optimizer(momentum_scale=0.99)


def _decay_a_step_early() -> Any:
    """A decay step counts when it is reached, not when it is passed."""
    import dataclasses

    from bit_jax import optimizer

    sgd = optimizer.sgd

    def early(schedule, momentum):
        decays = tuple(step - 1 for step in schedule.decay_steps)
        return sgd(dataclasses.replace(schedule, decay_steps=decays), momentum)

    return mock.patch("bit_jax.optimizer.sgd", early)


def _last_batch_dropped() -> Any:
    from input_pipeline.loader import Loader

    evaluation = Loader.evaluation

    def dropping(self):
        whole = len(self.source) // self.global_batch
        return (pair for pair in evaluation(self) if pair[0] < whole)

    return mock.patch.object(Loader, "evaluation", dropping)


def _an_image_turned() -> Any:
    """A few images of the split are read upside down, as where an EXIF tag is honoured on one side alone."""
    from PIL import Image

    from input_pipeline.preprocess import Views

    evaluation = Views.evaluation

    def turning(self, image):
        chosen = zlib.crc32(image.tobytes()) % 30 == 0  # by content: threads come in any order
        return evaluation(self, image.transpose(Image.Transpose.ROTATE_180) if chosen else image)

    return mock.patch.object(Views, "evaluation", turning)


def _narrow_products(bits: int) -> Any:
    """Operands of float32 products rounded to `bits` behind the point, as tensor cores do; float64 is left alone."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    convolve, dot = lax.conv_general_dilated, jnp.dot

    @jax.custom_jvp
    def narrow(x):
        if x.dtype != jnp.float32:
            return x
        raw = lax.bitcast_convert_type(x, jnp.uint32)
        half = jnp.uint32(1 << (22 - bits))
        return lax.bitcast_convert_type((raw + half) & ~(2 * half - jnp.uint32(1)), jnp.float32)

    narrow.defjvps(lambda tangent, _, x: tangent)

    @contextlib.contextmanager
    def patched():
        with (
            mock.patch.object(
                lax, "conv_general_dilated", lambda x, k, *a, **s: convolve(narrow(x), narrow(k), *a, **s)
            ),
            mock.patch.object(jnp, "dot", lambda a, b, **s: dot(narrow(a), narrow(b), **s)),
        ):
            yield

    return patched()


def _tf32() -> Any:
    return _narrow_products(10)


def _bfloat16() -> Any:
    return _narrow_products(7)


_LIST = [
    Fault("norm-eps", "GroupNorm eps 1e-6", _norm_eps, "forward", "block1/unit01", attested="group norm eps"),
    Fault(
        "torch-norm-eps",
        "GroupNorm eps 1e-6, in PyTorch",
        _torch_norm_eps,
        "forward",
        "block1/unit01",
        framework="torch",
        attested="group norm eps",
    ),
    Fault(
        "standardize-eps",
        "weight standardization eps 1e-8",
        _standardize_eps,
        "forward",
        "root_block",
        attested="standardization eps",
    ),
    Fault("groups", "16 groups instead of 32", _groups, "forward", "block1/unit01", attested="groups"),
    Fault("sample-variance", "sample instead of population variance", _sample_variance, "forward", "root_block"),
    Fault("pool-padding", "max-pool padded with -inf", _pool_of_minus_infinity, "forward", "root_block"),
    Fault("stride", "stride on the first 1x1 convolution", _stride_on_first, "forward", "block2/unit01"),
    Fault(
        "projection",
        "projection of the input, not the pre-activation",
        _projection_from_input,
        "forward",
        "block1/unit01",
    ),
    Fault(
        "swapped-hw",
        "kernels read with height and width swapped",
        _height_and_width_swapped,
        "weights",
        "resnet/root_block",
        attested="weights sha256",
    ),
    Fault(
        "swapped-io",
        "square kernels read with inputs and outputs swapped",
        _inputs_and_outputs_swapped,
        "weights",
        "resnet/block1/unit01",
        attested="weights sha256",
    ),
    Fault(
        "skipped-weight",
        "one beta silently not loaded",
        _norm_not_loaded,
        "weights",
        "resnet/block3/unit01/b/group_norm/beta",
        attested="weights sha256",
    ),
    Fault("bgr", "BGR instead of RGB", _bgr, "pixels", "evaluation: "),
    Fault("half-pixel", "resize without half-pixel centres", _no_half_pixel, "pixels", "evaluation: "),
    Fault("antialias", "resize without antialiasing", _no_antialias, "pixels", "evaluation: "),
    Fault("always-flip", "every training image mirrored", _always_flip, "pixels", "train, epoch"),
    Fault("crop", "training crop a row too high", _crop_off_by_one, "pixels", "train, epoch"),
    Fault("normalize", "pixels divided by 255", _normalized_by_255, "pixels", "evaluation: "),
    Fault("mixup-labels", "mixup on images but not labels", _mixed_images_alone, "loss", "targets/"),
    Fault("mixup-share", "labels mixed with the other share", _mixed_with_the_wrong_share, "loss", "targets/"),
    Fault("summed-loss", "loss summed instead of averaged", _summed_loss, "loss", "mean loss"),
    Fault(
        "detached",
        "standardization's statistics without gradient",
        _standardization_without_gradient,
        "gradients",
        "resnet/root_block",
    ),
    Fault("nesterov", "Nesterov momentum", _nesterov, "optimizer", "params/"),
    Fault("weight-decay", "weight decay 1e-4", _weight_decay, "optimizer", "params/"),
    Fault("momentum", "momentum 0.891 instead of 0.9", _momentum, "optimizer", "params/"),
    Fault("schedule", "learning-rate schedule off by one step", _schedule_off_by_one, "optimizer", "params/"),
    Fault("decay", "learning-rate decay a step early", _decay_a_step_early, "curve", "losses"),
    Fault(
        "last-batch",
        "evaluation drops the last partial batch",
        _last_batch_dropped,
        "accuracy",
        "candidate: every",
        "fp32",
    ),
    Fault("turned-image", "some images read upside down", _an_image_turned, "accuracy", "flipped predictions", "fp32"),
    Fault("tf32", "TF32 products in float32", _tf32, "forward", "root_block", "fp32", attested="convolution products"),
    Fault(
        "bfloat16",
        "bfloat16 products in float32",
        _bfloat16,
        "forward",
        "root_block",
        "fp32",
        attested="matrix products",
    ),
]
FAULTS = {fault.name: fault for fault in _LIST}
