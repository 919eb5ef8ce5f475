"""Training as a linear probe: the head alone has a state, and a batch is the features that the body makes of images.

The functions are those of `predict --features` and of train.py with `--dataset features:DIRECTORY`.
"""

from collections.abc import Callable
from typing import Any

import jax

from bit_jax.model.resnetv2 import ResNetV2
from bit_jax.predictions import rows
from parity.sides.side import HEAD


class Probe:
    """A model of which only the head trains.

    Attributes:
        head: the parameters that train.
    """

    def __init__(self, model: ResNetV2, params: Any, jit: Callable[[Callable], Callable]):
        """jit: compiles a function as the side does."""
        self.head = {HEAD: params[HEAD]}
        self._body = {name: tree for name, tree in params.items() if name != HEAD}
        self._features = jit(lambda params, images: rows.pooled(model, params, images))

    def features(self, images: jax.Array) -> jax.Array:
        """Returns the features of images that are as the model takes them, [batch, channels]."""
        return self._features(self._body, images)

    def whole(self, head: Any) -> Any:
        """Returns the parameters of the whole model with this head."""
        return self._body | head
