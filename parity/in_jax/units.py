"""The outputs of BiT's units in the JAX model; the counterpart of `in_torch/units.py`."""

from typing import Any

import flax.linen as nn
import jax

from bit_jax.model import resnetv2
from bit_jax.training import steps


def record(
    model: resnetv2.ResNetV2, params: Any, images: jax.Array, teacher: dict[str, jax.Array] | None
) -> dict[str, jax.Array]:
    """Returns {site: output} of every unit and `logits`. A site is the unit's name in the checkpoint: root_block,
    block1/unit01 and so on.

    Args:
        model: the model, without rematerialization.
        params: parameters of the model.
        images: images, [batch, height, width, 3].
        teacher: {site: output} of another implementation, or None. Each unit then computes on what the teacher's unit
            before it returned, so that errors of earlier units do not reach it.
    """
    outputs: dict[str, jax.Array] = {}
    last = f"block{len(model.units)}/unit{model.units[-1]:02d}"

    def record_output(call, args, kwargs, context):
        if not isinstance(context.module, (resnetv2.RootBlock, resnetv2.BottleneckUnit)):
            return call(*args, **kwargs)
        site = "/".join(context.module.path)
        before = next(reversed(outputs), None)
        if teacher is not None and before in teacher:  # a model of another make may lack a module for a unit
            args = (teacher[before],)
        outputs[site] = call(*args, **kwargs)
        # the head computes on what the teacher's last unit returned
        return teacher[site] if teacher is not None and site == last and site in teacher else outputs[site]

    with nn.intercept_methods(record_output):
        logits = steps.apply_model(model, params, images)
    return outputs | {"logits": logits}
