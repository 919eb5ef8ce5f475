"""Faults that ports of BiT really have; each is found at its rung and its array."""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from parity.faults.registry import fault


@fault("GroupNorm eps 1e-6", "forward", "block1/unit01", attested="group norm eps")
def norm_eps() -> Any:
    return mock.patch("bit_jax.model.layers.NORM_EPS", 1e-6)


@fault("GroupNorm eps 1e-6, in PyTorch", "forward", "block1/unit01", framework="torch", attested="group norm eps")
def torch_norm_eps() -> Any:
    return mock.patch("parity.in_torch.resnetv2.NORM_EPS", 1e-6)


@fault("weight standardization eps 1e-8", "forward", "root_block", attested="standardization eps")
def standardize_eps() -> Any:
    return mock.patch("bit_jax.model.layers.STANDARDIZE_EPS", 1e-8)


@fault("16 groups instead of 32", "forward", "block1/unit01", attested="groups")
def groups() -> Any:
    return mock.patch("bit_jax.model.layers.GROUPS", 16)


@fault("sample instead of population variance", "forward", "root_block")
def sample_variance() -> Any:
    import jax.numpy as jnp

    from bit_jax.model.layers import STANDARDIZE_EPS

    def standardize(kernel, eps=None):
        centred = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
        return centred / jnp.sqrt(kernel.var(axis=(0, 1, 2), keepdims=True, ddof=1) + (eps or STANDARDIZE_EPS))

    return mock.patch("bit_jax.model.layers.standardize", standardize)


@fault("max-pool padded with -inf", "forward", "root_block")
def pool_padding() -> Any:
    import jax.numpy as jnp

    from bit_jax.model import resnetv2

    pool, outside = resnetv2.max_pool, ((0, 0), (1, 1), (1, 1), (0, 0))

    def padded(x):
        return pool(jnp.pad(x[:, 1:-1, 1:-1], outside, constant_values=-jnp.inf))

    return mock.patch("bit_jax.model.resnetv2.max_pool", padded)


@fault("stride on the first 1x1 convolution", "forward", "block2/unit01")
def stride() -> Any:
    from bit_jax.model import resnetv2

    convolution = resnetv2.PreActivationConv
    stride = 1

    def swapped(features, size, *args, name, **settings):
        nonlocal stride
        if name == "a":
            stride = settings["stride"] = settings["project_stride"]
        elif name == "b":
            settings["stride"] = settings["stride"] // stride
        return convolution(features, size, *args, name=name, **settings)

    return mock.patch("bit_jax.model.resnetv2.PreActivationConv", swapped)


@fault("projection of the input, not the pre-activation", "forward", "block1/unit01")
def projection() -> Any:
    """The shortcut projects the unit's input instead of its pre-activation."""
    import flax.linen as nn

    from bit_jax.model import resnetv2

    @contextlib.contextmanager
    def intercepted():
        unit_input = []

        def replace_input(call, args, kwargs, context):
            if isinstance(context.module, resnetv2.BottleneckUnit):
                unit_input.append(args[0])
            if isinstance(context.module, resnetv2.Projection):
                args = (unit_input[-1],)
            return call(*args, **kwargs)

        with nn.intercept_methods(replace_input):
            yield

    return intercepted()


@fault("kernels read with height and width swapped", "weights", "resnet/root_block", attested="weights sha256")
def swapped_hw() -> Any:
    return _loading(lambda key, array: array.swapaxes(0, 1) if array.ndim == 4 else array)


@fault(
    "square kernels read with inputs and outputs swapped", "weights", "resnet/block1/unit01", attested="weights sha256"
)
def swapped_io() -> Any:
    def square(shape):
        return len(shape) == 4 and shape[2] == shape[3]

    return _loading(lambda key, array: array.swapaxes(2, 3) if square(array.shape) else array)


@fault("one beta silently not loaded", "weights", "resnet/block3/unit01/b/group_norm/beta", attested="weights sha256")
def skipped_weight() -> Any:
    def load(key, array):
        return array * 0 if key == "resnet/block3/unit01/b/group_norm/beta" else array

    return _loading(load)


def _loading(change: Callable[[str, Any], Any]) -> Any:
    """Reads weight files with every array replaced by change(key, array)."""
    import numpy as np

    from bit_jax.formats import weights

    read = weights.read

    def changed(path, **settings):
        architecture, arrays = read(path, **settings)
        return architecture, ((key, np.ascontiguousarray(change(key, array))) for key, array in arrays)

    return mock.patch("bit_jax.formats.weights.read", changed)


@fault("BGR instead of RGB", "pixels", "evaluation: ")
def bgr() -> Any:
    from input_pipeline.preprocess import Views

    pixels = Views.pixels
    return mock.patch.object(Views, "pixels", lambda self, image: pixels(self, image)[..., ::-1])


@fault("resize without half-pixel centres", "pixels", "evaluation: ")
def half_pixel() -> Any:
    return _resizing(half_pixel=False)


@fault("resize without antialiasing", "pixels", "evaluation: ")
def antialias() -> Any:
    return _resizing(half_pixel=True)


def _resizing(*, half_pixel: bool) -> Any:
    """Resizes bilinearly from the four nearest pixels: with half-pixel centres as OpenCV and TensorFlow 2 do, without
    as TensorFlow 1 does."""
    import numpy as np

    def weights_along(size: int, side: int):
        offset = 0.5 if half_pixel else 0.0
        place = np.clip((np.arange(side) + offset) * size / side - offset, 0, size - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, size - 1), place - low

    def resample(pixels, side, window, method, into):
        pixels = np.asarray(pixels, np.float64)
        for axis in (0, 1):
            low, high, share = weights_along(pixels.shape[axis], side)
            share = share.reshape(-1, 1, 1) if axis == 0 else share.reshape(1, -1, 1)
            pixels = (1 - share) * pixels.take(low, axis) + share * pixels.take(high, axis)
        top, left, size, mirrored = window
        view = np.round(pixels).astype(np.uint8)[top : top + size, left : left + size]
        into[...] = view[:, ::-1] if mirrored else view

    return mock.patch("input_pipeline.preprocess.resample", resample)


@fault("every training image mirrored", "pixels", "train, epoch")
def always_flip() -> Any:
    from input_pipeline.preprocess import Views

    draw = Views.draw
    return mock.patch.object(Views, "draw", lambda self, rng: draw(self, rng)._replace(mirrored=True))


@fault("training crop a row too high", "pixels", "train, epoch")
def crop() -> Any:
    from input_pipeline.preprocess import Views

    draw = Views.draw

    def shifted(self, rng):
        window = draw(self, rng)
        return window._replace(top=max(window.top - 1, 0))

    return mock.patch.object(Views, "draw", shifted)


@fault("mixup on images but not labels", "loss", "targets/")
def mixup_labels() -> Any:
    from bit_jax.training import steps

    mix = steps.mix_pairs
    return mock.patch(
        "bit_jax.training.steps.mix_pairs", lambda rows, weight: mix(rows, weight) if rows.ndim == 4 else rows
    )


@fault("labels mixed with the other share", "loss", "targets/")
def mixup_share() -> Any:
    from bit_jax.training import steps

    mix = steps.mix_pairs
    return mock.patch(
        "bit_jax.training.steps.mix_pairs", lambda rows, weight: mix(rows, 1 - weight if rows.ndim == 2 else weight)
    )


@fault("pixels divided by 255", "pixels", "evaluation: ")
def normalize() -> Any:
    return mock.patch("bit_jax.training.steps.normalize", lambda images, dtype: images.astype(dtype) / 255)


@fault("loss summed instead of averaged", "loss", "mean loss")
def summed_loss() -> Any:
    from bit_jax.training import steps

    mean = steps.loss_and_gradients

    def summed(model, params, images, *rest, **more):
        import jax

        return jax.tree.map(lambda leaf: leaf * images.shape[0], mean(model, params, images, *rest, **more))

    return mock.patch("bit_jax.training.steps.loss_and_gradients", summed)


@fault("standardization's statistics without gradient", "gradients", "resnet/root_block")
def detached() -> Any:
    """The gradient takes the statistics for constants; the forward pass is right."""
    import jax
    import jax.numpy as jnp

    from bit_jax.model.layers import STANDARDIZE_EPS

    def standardize(kernel, eps=None):
        fixed = jax.lax.stop_gradient(kernel)
        centred = kernel - fixed.mean(axis=(0, 1, 2), keepdims=True)
        return centred / jnp.sqrt(fixed.var(axis=(0, 1, 2), keepdims=True) + (eps or STANDARDIZE_EPS))

    return mock.patch("bit_jax.model.layers.standardize", standardize)


def _optimizer(**settings: Any) -> Any:
    """Replaces the optimizer by SGD with other settings: `weight_decay`, `shift` of the schedule in steps,
    `momentum_scale`, and settings of `optax.sgd`."""
    import optax

    from bit_jax.training.optimizer import learning_rate

    decay = settings.pop("weight_decay", 0.0)
    shift = settings.pop("shift", 0)
    scale = settings.pop("momentum_scale", 1.0)

    def sgd(schedule, momentum, additions=None):
        rate = learning_rate(schedule)
        chain = optax.sgd(lambda step: rate(step + shift), momentum=momentum * scale, **settings)
        if not decay:
            return optax.with_extra_args_support(chain)

        def update(updates, state, params=None, **_):
            import jax

            decayed = jax.tree.map(lambda g, p: g + decay * p, updates, params)
            return chain.update(decayed, state, params)

        return optax.GradientTransformationExtraArgs(chain.init, update)

    return mock.patch("bit_jax.training.optimizer.sgd", sgd)


@fault("Nesterov momentum", "optimizer", "params/")
def nesterov() -> Any:
    return _optimizer(nesterov=True)


@fault("weight decay 1e-4", "optimizer", "params/")
def weight_decay() -> Any:
    return _optimizer(weight_decay=1e-4)


@fault("learning-rate schedule off by one step", "optimizer", "params/")
def schedule() -> Any:
    return _optimizer(shift=1)


@fault("momentum 0.891 instead of 0.9", "optimizer", "params/")
def momentum() -> Any:
    return _optimizer(momentum_scale=0.99)


@fault("learning-rate decay a step early", "curve", "losses")
def decay() -> Any:
    """A decay step counts when it is reached, not when it is passed."""
    import dataclasses

    from bit_jax.training import optimizer

    sgd = optimizer.sgd

    def early(schedule, *rest):
        decays = tuple(step - 1 for step in schedule.decay_steps)
        return sgd(dataclasses.replace(schedule, decay_steps=decays), *rest)

    return mock.patch("bit_jax.training.optimizer.sgd", early)


@fault("evaluation drops the last partial batch", "accuracy", "candidate: every", precision="fp32")
def last_batch() -> Any:
    from input_pipeline.loader import Loader

    evaluation = Loader.evaluation

    def dropping(self):
        full_batches = len(self.source) // self.global_batch
        return ((number, batch) for number, batch in evaluation(self) if number < full_batches)

    return mock.patch.object(Loader, "evaluation", dropping)


@fault("some images read upside down", "accuracy", "flipped predictions", precision="fp32")
def turned_image() -> Any:
    """A few images of the split are read upside down, as if one side alone ignored an EXIF tag."""
    from input_pipeline.preprocess import Views

    pixels = Views.pixels

    def turned(self, image):
        decoded = pixels(self, image)
        # choose by content, because threads read images in any order
        chosen = zlib.crc32(decoded[..., 0].tobytes()) % 30 == 0
        return decoded[::-1, ::-1] if chosen else decoded

    return mock.patch.object(Views, "pixels", turned)


def rounded(x: Any, bits: int) -> Any:
    """Rounds float32 and float16 numbers to `bits` bits behind the point, as tensor cores do, and no other dtypes."""
    import jax.numpy as jnp
    from jax import lax

    if x.dtype == jnp.float16:
        return lax.reduce_precision(x, exponent_bits=5, mantissa_bits=bits)
    if x.dtype != jnp.float32:
        return x
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32(1 << (22 - bits))
    return lax.bitcast_convert_type((raw + half) & ~(2 * half - jnp.uint32(1)), jnp.float32)


@contextlib.contextmanager
def _narrow_products(bits: int) -> Iterator[None]:
    """Rounds both operands of every product to `bits` bits behind the point."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    convolve, dot = lax.conv_general_dilated, jnp.dot
    narrow = jax.custom_jvp(lambda x: rounded(x, bits))
    narrow.defjvps(lambda tangent, _, x: tangent)

    def narrow_convolve(image, kernel, *more, **settings):
        return convolve(narrow(image), narrow(kernel), *more, **settings)

    def narrow_dot(left, right, **settings):
        return dot(narrow(left), narrow(right), **settings)

    with (
        mock.patch.object(lax, "conv_general_dilated", narrow_convolve),
        mock.patch.object(jnp, "dot", narrow_dot),
    ):
        yield


@fault("TF32 products in float32", "forward", "root_block", precision="fp32", attested="convolution products")
def tf32() -> Any:
    return _narrow_products(10)


@fault("bfloat16 products in float32", "forward", "root_block", precision="fp32", attested="matrix products")
def bfloat16() -> Any:
    return _narrow_products(7)


@fault("TF32 products in float32, in the backward pass alone", "gradients", "resnet/", precision="fp32")
def tf32_backward() -> Any:
    import jax
    from jax import lax

    convolve = lax.conv_general_dilated
    narrow = jax.custom_vjp(lambda y: y)
    narrow.defvjp(lambda y: (y, None), lambda _, cotangent: (rounded(cotangent, 10),))

    def narrowed(image, kernel, *more, **settings):
        return narrow(convolve(image, kernel, *more, **settings))

    return mock.patch.object(lax, "conv_general_dilated", narrowed)


@fault("bfloat16 products in float16", "forward", "matrix products", precision="fp16", attested="matrix products")
def bfloat16_in_float16() -> Any:
    return _narrow_products(7)


def _scaling(change: Callable[[Any], Any]) -> Any:
    """Multiplies the loss by change(scale) instead of its scale, and divides the gradients by the same number."""
    from bit_jax.training import steps

    right = steps.loss_and_gradients

    def changed(model, params, images, targets, microbatches=1, scale=None, *rest, **more):
        return right(
            model, params, images, targets, microbatches, None if scale is None else change(scale), *rest, **more
        )

    return mock.patch("bit_jax.training.steps.loss_and_gradients", changed)


@fault("the loss divided by its scale in float16", "gradients", "resnet/", precision="fp16")
def inverse_scale() -> Any:
    """Small gradients vanish; the others are right."""
    return _scaling(lambda scale: 1 / scale)


@fault("the loss scaled twice in float16", "gradients", "loss scale", precision="fp16")
def squared_scale() -> Any:
    """Gradients overflow at scales at which those of the other side are finite."""
    return _scaling(lambda scale: scale * scale)


@fault("gradients not divided by the loss scale in float16", "gradients", "resnet/", precision="fp16")
def undivided() -> Any:
    from bit_jax.training import steps

    right = steps.loss_and_gradients

    def multiplied(model, params, images, targets, microbatches=1, scale=None, *rest, **more):
        import jax

        loss, gradients = right(model, params, images, targets, microbatches, scale, *rest, **more)
        return loss, gradients if scale is None else jax.tree.map(lambda leaf: leaf * scale, gradients)

    return mock.patch("bit_jax.training.steps.loss_and_gradients", multiplied)
