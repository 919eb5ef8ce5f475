"""The name of a BiT, such as `R50x1`, stands for its units and its width; with the classes they decide every array.

This file imports no framework, because a comparison's PyTorch side asks for it too.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal

from input_pipeline.errors import RequestError

if TYPE_CHECKING:
    from bit_jax.model.resnetv2 import ResNetV2

Remat = Literal["none", "norm", "unit"]  # how much the backward pass computes again; see `execution.rematerialized`

GROUPS = 32  # of GroupNorm
STANDARDIZE_EPS = 1e-10  # BiT; timm's and Hugging Face's is 1e-8, which float64 tells apart
STAGES = 4
# bottleneck units in each stage, by depth: the number of layers in He et al., arXiv:1512.03385, table 1
UNITS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NAME = r"R(\d+)x(\d+(?:\.\d+)?)"

PREFIX = "resnet/"  # every key of an official file begins so
STANDARDIZED = "standardized_conv2d"  # the checkpoint's name of every convolution but the head
ROOT_KERNEL = f"resnet/root_block/{STANDARDIZED}/kernel"
HEAD_KERNEL = "resnet/head/conv2d/kernel"
HEAD_BIAS = "resnet/head/conv2d/bias"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A ResNetV2 as BiT has it.

    Attributes:
        units: bottleneck units in each of the four stages.
        width: channels as a multiple of ResNet's 64.
        num_classes: size of the head; 0: there is none, and the model returns the pooled features.
        standardize_eps: what is added to a kernel's variance when it is standardized. The weights were trained with
            it, so it comes and goes with them.
    """

    units: tuple[int, ...]
    width: float
    num_classes: int
    standardize_eps: float = STANDARDIZE_EPS

    @classmethod
    def of(cls, model: ResNetV2) -> Architecture:
        """Returns the architecture that a Flax model has; `architecture.model()` is its inverse."""
        eps = STANDARDIZE_EPS if model.standardize_eps is None else model.standardize_eps
        return cls(tuple(model.units), model.width, model.num_classes, eps)

    @classmethod
    def parse(cls, name: str, num_classes: int) -> Architecture:
        """The architecture of a name such as `R50x1`, `R152x4` or `R14x0.5`.

        Raises:
            RequestError: the name is of another form, the depth unknown, or the channels do not divide into 32 groups.
        """
        match = re.fullmatch(NAME, name)
        if match is None or int(match[1]) not in UNITS:
            raise RequestError(f"unknown architecture {name!r}; write R<depth>x<width> with a depth of {sorted(UNITS)}")
        width = float(match[2])
        if width <= 0 or 64 * width % GROUPS:
            raise RequestError(
                f"width {match[2]} gives {64 * width:g} root channels; GroupNorm needs a multiple of {GROUPS}"
            )
        return cls(UNITS[int(match[1])], width, num_classes)

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether the text has the form R<depth>x<width>, as no file or published model's name has."""
        return re.fullmatch(NAME, text) is not None

    @property
    def name(self) -> str:
        """`R50x1` for a known depth, `R(3,4,5,3)x1` for any other number of units."""
        depth = next((depth for depth, known in UNITS.items() if known == self.units), None)
        return f"R{depth or '(' + ','.join(map(str, self.units)) + ')'}x{self.width:g}"

    def __str__(self) -> str:
        return f"{self.name} with {self.num_classes:,} classes" if self.num_classes else f"{self.name} without a head"

    @property
    def note(self) -> str | None:
        """A sentence for the user where the model computes otherwise than BiT; None where it does not."""
        if self.standardize_eps == STANDARDIZE_EPS:
            return None
        return (
            f"these weights' kernels are standardized with {self.standardize_eps:g} added to the variance, as they "
            f"were trained, and not with BiT's {STANDARDIZE_EPS:g}"
        )

    def model(self, dtype: Any = None, precision: Any = None) -> ResNetV2:
        """The Flax model, without parameters.

        Args:
            dtype: of convolutions and the activations between them; float32 unless given.
            precision: of products, a `jax.lax.Precision`; HIGHEST unless given.
        """
        import jax

        from bit_jax.model.resnetv2 import ResNetV2

        return ResNetV2(
            self.units,
            self.width,
            self.num_classes,
            dtype=jax.numpy.dtype("float32" if dtype is None else dtype),
            precision=jax.lax.Precision.HIGHEST if precision is None else precision,
            # None leaves BiT's own to the layer, where parity puts in a wrong one to see whether that is noticed
            standardize_eps=None if self.standardize_eps == STANDARDIZE_EPS else self.standardize_eps,
        )

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Every key of the official file and the shape of its array, kernels as HWIO; without a head's where there is
        none."""
        root = round(64 * self.width)
        shapes: dict[str, tuple[int, ...]] = {ROOT_KERNEL: (7, 7, 3, root)}

        def norm(key: str, channels: int) -> None:
            shapes[f"{key}/gamma"] = shapes[f"{key}/beta"] = (channels,)

        cin = root
        for stage, units in enumerate(self.units, start=1):
            mid = root * 2 ** (stage - 1)
            for unit in range(1, units + 1):
                key = f"resnet/block{stage}/unit{unit:02d}"
                for part, size, fan_in, fan_out in (("a", 1, cin, mid), ("b", 3, mid, mid), ("c", 1, mid, 4 * mid)):
                    norm(f"{key}/{part}/group_norm", fan_in)
                    shapes[f"{key}/{part}/{STANDARDIZED}/kernel"] = (size, size, fan_in, fan_out)
                if unit == 1:
                    shapes[f"{key}/a/proj/{STANDARDIZED}/kernel"] = (1, 1, cin, 4 * mid)
                cin = 4 * mid
        norm("resnet/group_norm", cin)
        if self.num_classes:
            shapes[HEAD_KERNEL] = (1, 1, cin, self.num_classes)
            shapes[HEAD_BIAS] = (self.num_classes,)
        return shapes

    @property
    def channels(self) -> int:
        """Number of values that are pooled for the head."""
        return round(64 * self.width) * 2 ** (STAGES - 1) * 4


class HeadAlone(Architecture):
    """The head of a BiT, which takes pooled features; its Flax model is the whole one, given `features` of a batch."""

    def __str__(self) -> str:
        return f"the head of {super().__str__()}"

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """The head's keys of the official file and the shapes of their arrays."""
        return {key: shape for key, shape in super().layout.items() if key in (HEAD_KERNEL, HEAD_BIAS)}
