"""One training step and one evaluation step, as pure functions to be jitted."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from bit_jax.config import NO_ADDITIONS, Additions
from bit_jax.model.architecture import STANDARDIZED
from bit_jax.model.layers import param_dtype, standardize
from bit_jax.model.resnetv2 import GENERATOR, ResNetV2
from bit_jax.training.flagperf import Rank0Share
from bit_jax.training.optimizer import Averaged
from bit_jax.training.trained import overlaid, restricted, trained

TOP_K = (1, 5)
NO_EXAMPLE = -1  # the index of a row that only fills a batch; see `input_pipeline.Batch`


FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of PyTorch's GradScaler
LEAST_SCALE = 1.0  # of float16's loss: gradients that overflow without any scaling are no matter of precision


class LossScale(flax.struct.PyTreeNode):
    """The factor that float16's loss is multiplied by before it is differentiated, and gradients divided by afterwards.

    It follows PyTorch's GradScaler: a step whose gradients are not finite changes no parameter and halves the scale;
    2000 good steps in a row double it.

    Attributes:
        scale: the factor, float32 [].
        good_steps: number of good steps since the scale last changed, int32 [].
        skipped: number of steps that changed no parameter, int32 [].
    """

    scale: Any
    good_steps: Any
    skipped: Any


class TrainState(flax.struct.PyTreeNode):
    """All that training carries from step to step; order, augmentation and mixup follow from `step` and the seed.

    Attributes:
        step: number of steps that were taken, int32 [].
        params: the parameters.
        opt_state: the optimizer's state, of the parameters that train; it has their average, if one is kept.
        loss_scale: a `LossScale` in float16, otherwise None.
    """

    step: Any
    params: Any
    opt_state: Any
    loss_scale: Any = None


def init_state(params: Any, optimizer: optax.GradientTransformation, *, scales_loss: bool = False) -> TrainState:
    """Makes the state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    loss_scale = LossScale(jnp.float32(FIRST_SCALE), zero, zero) if scales_loss else None
    return TrainState(zero, params, optimizer.init(params), loss_scale)


def evaluated(state: TrainState) -> Any:
    """Returns the parameters that evaluation and final.npz show: where averages are kept, they replace what trains."""
    averages = [part.ema for part in state.opt_state if isinstance(part, Averaged)]
    return overlaid(state.params, averages[0]) if averages else state.params


def normalize(images: UInt8[Array, "batch height width 3"], dtype: jnp.dtype) -> Float[Array, "batch height width 3"]:
    """Returns the images with 0 to 255 mapped to -1 to 1."""
    return (images.astype(dtype) - 127.5) / 127.5


def model_input(batch: dict, dtype: jnp.dtype) -> Float[Array, "batch ..."]:
    """Returns what `apply_model` takes: the batch's images, normalized, or its features, [batch, channels]."""
    return batch["features"].astype(dtype) if "features" in batch else normalize(batch["image"], dtype)


def mixup_weight(seed: int, step: Int[Array, ""], alpha: float) -> Float[Array, ""]:
    """Draws the weight of each image itself in the step's mixtures from Beta(alpha, alpha): one for the whole batch, as
    in BiT's PyTorch code.

    It is drawn in float32 whatever the precision, so that all precisions mix alike.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), step)
    return jax.random.beta(key, alpha, alpha, dtype=jnp.float32)


def mix_pairs(rows: Float[Array, "batch ..."], weight: Float[Array, ""]) -> Float[Array, "batch ..."]:
    """Returns each row mixed with its neighbour: 0 with 1, 2 with 3 and so on.

    The loader's order is random, so a neighbour is as random a partner as any, and it lies on the same device however
    an even number of rows a device is spread.
    """
    weight = weight.astype(rows.dtype)
    pairs = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return (weight * pairs + (1 - weight) * pairs[:, ::-1]).reshape(rows.shape)


def prepare(
    batch: dict, num_classes: int, dtype: jnp.dtype, weight: Float[Array, ""] | None
) -> tuple[Float[Array, "batch ..."], Float[Array, "batch classes"]]:
    """Returns the model's input and target distributions for a batch of uint8 images and labels; both are mixed (see
    `mix_pairs`) unless `weight` is None. A batch of features is not mixed: mixed images have other features than the
    mixture of theirs."""
    images = model_input(batch, dtype)
    if images.ndim == 2 and weight is not None:
        raise ValueError("features cannot be mixed")
    targets = one_hot(batch["label"], num_classes, dtype)
    if weight is None:
        return images, targets
    return mix_pairs(images, weight), mix_pairs(targets, weight)


def one_hot(label: Int[Array, " batch"], num_classes: int, dtype: jnp.dtype) -> Float[Array, "batch classes"]:
    """Returns 1 at the label and 0 elsewhere. A label that is no class gives NaN everywhere, because zeros, which
    `jax.nn.one_hot` gives, would mean a loss of 0."""
    known = (label >= 0) & (label < num_classes)
    return jnp.where(known[:, None], jax.nn.one_hot(label, num_classes, dtype=dtype), jnp.nan)


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"], smoothing: float = 0.0
) -> Float[Array, " batch"]:
    """Returns the cross-entropy of each row, in nats. Of every target, the share `smoothing` is spread over all
    classes: (1 - smoothing) target + smoothing / classes."""
    if smoothing:
        targets = (1 - smoothing) * targets + smoothing / targets.shape[1]
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1)


def apply_model(model: ResNetV2, params: Any, images: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
    """Returns the logits of images [batch, height, width, 3] or of pooled features [batch, channels], for which the
    head's parameters are enough."""
    logits = model.apply({"params": params}, images, method="classify" if images.ndim == 2 else None)
    assert isinstance(logits, jax.Array)  # a tuple is for models with mutable variables
    return logits


def loss_and_gradients(
    model: ResNetV2,
    params: Any,
    images: Float[Array, "batch ..."],
    targets: Float[Array, "batch classes"],
    microbatches: int = 1,
    scale: Float[Array, ""] | None = None,
    additions: Additions = NO_ADDITIONS,
) -> tuple[Float[Array, ""], Any]:
    """Returns the batch's mean cross-entropy and its gradient by the parameters that train.

    Args:
        microbatches: number of passes one after the other, each over an equal share of every device's rows; a divisor
            of the batch.
        scale: factor of the loss while it is differentiated; loss and gradient are divided by it afterwards.
        additions: label smoothing, and which parameters train; the backward pass ends behind the last of them.
    """
    own = trained(params, additions.train)

    def loss_of(own, images, targets):
        return scaled_loss(apply_model(model, overlaid(params, own), images), targets, scale, additions)

    if scale is not None:
        scaled = _accumulated(loss_of, own, images, targets, microbatches)
        return jax.tree.map(lambda leaf: leaf / scale, scaled)
    return _accumulated(loss_of, own, images, targets, microbatches)


def scaled_loss(
    logits: Float[Array, "batch classes"],
    targets: Float[Array, "batch classes"],
    scale: Float[Array, ""] | None,
    additions: Additions,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy, with label smoothing, times the scale; what is differentiated."""
    loss = cross_entropy(logits, targets, additions.label_smoothing).mean()
    return loss if scale is None else loss * scale


def shares(rows: Float[Array, "batch ..."], microbatches: int) -> Float[Array, "microbatches share ..."]:
    """Returns the rows of each microbatch, every microbatches-th: a contiguous share would lie on few devices."""
    return rows.reshape(rows.shape[0] // microbatches, microbatches, *rows.shape[1:]).swapaxes(0, 1)


def _accumulated(
    loss_of: Callable[..., Any], params: Any, images: Array, targets: Array, microbatches: int
) -> tuple[Array, Any]:
    if microbatches == 1:
        return jax.value_and_grad(loss_of)(params, images, targets)

    def accumulate(sums, share):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(params, *share)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), targets.dtype), params))
    sums, _ = jax.lax.scan(accumulate, zeros, (shares(images, microbatches), shares(targets, microbatches)))
    return jax.tree.map(lambda total: total / microbatches, sums)


def update(
    state: TrainState,
    gradients: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    finite: Bool[Array, ""] | bool = True,
) -> TrainState:
    """Returns the next state. If `finite` is False, only its step changes, and not its parameters and momentum.

    Args:
        gradients: gradients of the parameters that train; the others stay as they are.
    """
    own = restricted(state.params, gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, own, finite=finite)
    params = overlaid(state.params, optax.apply_updates(own, updates))
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def update_if_finite(
    state: TrainState,
    loss: Float[Array, ""],
    gradients: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    stopped: Bool[Array, ""] | bool = False,
) -> TrainState:
    """Returns the next state, or the same one if `stopped` is True or the loss is not finite, so that it can be looked
    at. If the state has a `LossScale`, its rules decide instead of the loss."""
    if state.loss_scale is not None:
        return _update_by_scale(state, state.loss_scale, gradients, optimizer, stopped)
    finite = jnp.isfinite(loss) & ~jnp.asarray(stopped)

    def counted(new, old):
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.integer) else new

    return jax.tree.map(counted, update(state, gradients, optimizer, finite), state)


def _update_by_scale(
    state: TrainState,
    old: LossScale,
    gradients: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    stopped: Bool[Array, ""] | bool,
) -> TrainState:
    going_on = ~jnp.asarray(stopped)
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)]).all()
    good = jnp.where(finite, old.good_steps + 1, 0)
    grows = good == GROWTH_INTERVAL
    loss_scale = LossScale(
        scale=old.scale * jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5),
        good_steps=jnp.where(grows, 0, good),
        skipped=old.skipped + (~finite).astype(jnp.int32),
    )
    new = update(state, gradients, optimizer, finite & going_on).replace(loss_scale=loss_scale)
    # parameters and momentum are as before already; the scalars are counts and the scale
    return jax.tree.map(lambda new, old: new if new.ndim else jnp.where(going_on, new, old), new, state)


def _failed(loss: Float[Array, ""], scale: Float[Array, ""] | None) -> Bool[Array, ""]:
    """Whether training cannot go on: the loss is not finite, and that is no overflow which a smaller scale mends."""
    failed = ~jnp.isfinite(loss)
    return failed if scale is None else failed & ~(scale >= LEAST_SCALE)


def make_update_step(
    model: ResNetV2,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    microbatches: int = 1,
    additions: Additions = NO_ADDITIONS,
) -> Callable[..., tuple[TrainState, dict]]:
    """Makes the part of a training step that comes after the batch is prepared: (state, images, targets, stopped) ->
    (next state, metrics), where `stopped` is False unless given.

    The metrics are "loss", the mean cross-entropy of the batch, "failed", whether training cannot go on, and with a
    `LossScale` its "scale".
    """

    def update_step(
        state: TrainState,
        images: Float[Array, "batch ..."],
        targets: Float[Array, "batch classes"],
        stopped: Bool[Array, ""] | bool = False,
    ) -> tuple[TrainState, dict]:
        scale = None if state.loss_scale is None else state.loss_scale.scale
        loss, gradients = loss_and_gradients(model, state.params, images, targets, microbatches, scale, additions)
        metrics = {"loss": loss} if scale is None else {"loss": loss, "scale": scale}
        metrics |= {"failed": _failed(loss, scale) | stopped}
        return update_if_finite(state, loss, gradients, optimizer, stopped), metrics

    return update_step


def make_train_step(
    model: ResNetV2,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mixup: float,
    seed: int,
    microbatches: int = 1,
    additions: Additions = NO_ADDITIONS,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Makes a training step: (state, batch) -> (next state, metrics).

    The metrics are those of `make_update_step`; "replaced", the number of rows that show another example than the one
    in order, because that one is damaged; and "signal", the largest of the batch's, if it has any.

    A batch may have "stopped", a [] bool: whether the step before failed. Then this step changes nothing and fails too,
    so that a step can be begun before anybody has looked at the metrics of the one before it.
    """
    dtype = param_dtype(model.dtype)
    update_step = make_update_step(model, optimizer, microbatches=microbatches, additions=additions)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        weight = mixup_weight(seed, state.step, mixup) if mixup else None
        images, targets = prepare(batch, model.num_classes, dtype, weight)
        replaced = (batch["index"] < NO_EXAMPLE).sum(dtype=jnp.int32)
        state, metrics = update_step(state, images, targets, batch.get("stopped", False))
        return state, {"replaced": replaced} | _signal(batch) | metrics

    return train_step


def standardized(params: Any, eps: float | None = None) -> Any:
    """Returns the parameters that `make_eval_step` wants: convolutions' kernels standardized, once for all batches.

    Args:
        eps: the model's `standardize_eps`.
    """

    def of_leaf(path: tuple, leaf: Array) -> Array:
        whole = jax.tree_util.keystr(path, simple=True, separator="/")
        return standardize(leaf, eps) if STANDARDIZED in whole else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def make_eval_step(model: ResNetV2, share: Rank0Share | None = None) -> Callable[[Any, dict], dict]:
    """Makes an evaluation step: (parameters after `standardized` with the model's eps, batch) -> `evaluation_sums`, and
    the largest "signal" of the batch, if it has any.

    Args:
        share: the examples whose own sums `share_sums` adds; None: none are added.
    """
    dtype, model = param_dtype(model.dtype), model.clone(standardized=True)

    def eval_step(params: Any, batch: dict) -> dict:
        logits = apply_model(model, params, model_input(batch, dtype))
        of_share = {} if share is None else share_sums(logits, batch, share)
        return evaluation_sums(logits, batch) | of_share | _signal(batch)

    return eval_step


def _signal(batch: dict) -> dict:
    return {"signal": batch["signal"].max()} if "signal" in batch else {}


def evaluation_sums(logits: Float[Array, "batch classes"], batch: dict) -> dict:
    """Returns sums over the rows whose mask is True: loss, correct1, correct5 and seen, their number."""
    targets = one_hot(batch["label"], logits.shape[1], logits.dtype)
    losses = cross_entropy(logits, targets)
    rank = label_rank(logits, batch["label"])
    sums = {f"correct{k}": (batch["mask"] & (rank < k)).sum(dtype=jnp.int32) for k in TOP_K}
    return sums | {
        "loss": jnp.where(batch["mask"], losses, 0).sum(),
        "seen": batch["mask"].sum(dtype=jnp.int32),
    }


def share_sums(logits: Float[Array, "batch classes"], batch: dict, share: Rank0Share) -> dict:
    """Returns "rank0_correct" and "rank0_seen": how many examples of the share are predicted right, and are there."""
    of_share = batch["mask"] & share.holds(batch["index"])
    correct = of_share & (label_rank(logits, batch["label"]) < 1)
    return {"rank0_correct": correct.sum(dtype=jnp.int32), "rank0_seen": of_share.sum(dtype=jnp.int32)}


def label_rank(logits: Float[Array, "batch classes"], label: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Returns the number of classes that are placed ahead of the label: 0 where it is the prediction.

    Ties go to the lower class, as `argmax` does, so that equal logits (a head of zeros) are not counted as correct;
    a logit that is not finite and a label that is no class put the label last.
    """
    known = (label >= 0) & (label < logits.shape[1])
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    classes = jnp.arange(logits.shape[1], dtype=label.dtype)
    ahead: Bool[Array, "batch classes"] = (logits > own) | ((logits == own) & (classes < label[:, None]))
    finite = jnp.isfinite(logits).all(axis=1)
    return jnp.where(finite & known, ahead.sum(axis=1, dtype=jnp.int32), jnp.iinfo(jnp.int32).max)
