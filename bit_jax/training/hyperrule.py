"""BiT-HyperRule: resolution, mixup and schedule from the dataset alone (arXiv:1912.11370, section 3.3)."""

import dataclasses
from typing import Any, Literal

from bit_jax.config import Config

SMALL_IMAGE = 96 * 96  # pixels


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate by step: it rises linearly from 0 to `base_lr` over `warmup_steps`. In a staircase, it is then
    divided by ten for each of `decay_steps` that is below the step; a cosine falls to 0 at step `steps`, at which
    training ends. If `restart_every` is not None, a staircase begins anew, warm-up included, after each such number of
    steps."""

    base_lr: float
    warmup_steps: int
    decay_steps: tuple[int, ...]
    steps: int
    kind: Literal["staircase", "cosine"] = "staircase"
    restart_every: int | None = None

    def described(self) -> dict[str, Any]:
        """Returns the fields as JSON's types. A staircase's kind and a missing restart are left out, as in runs from
        before there were others."""
        fields = dataclasses.asdict(self) | {"decay_steps": list(self.decay_steps)}
        left_out = {"kind": "staircase", "restart_every": None}
        return {name: value for name, value in fields.items() if name not in left_out or value != left_out[name]}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run's hyper-parameters, all of them decided."""

    resize_to: int
    crop: int
    mixup: float
    schedule: Schedule

    def described(self) -> dict[str, Any]:
        """Returns the fields as config.json keeps them."""
        return dataclasses.asdict(self) | {"schedule": self.schedule.described()}


def needs_native_area(cfg: Config) -> bool:
    """Whether the resolution depends on the size of the images, because the configuration does not decide all of it."""
    return cfg.data.crop is None or cfg.data.resize_to is None


def recipe(cfg: Config, *, train_examples: int, native_area: int | None) -> Recipe:
    """Returns the configuration's values, and BiT-HyperRule's where the configuration has None.

    Args:
        train_examples: number of training examples after few-shot selection.
        native_area: pixels of a typical image before resizing; it may be None unless `needs_native_area`.
    """
    numbers = _schedule(train_examples)
    resize_to, crop = resolution(native_area or 0)
    mixup = 0.0 if train_examples < 20_000 else 0.1
    data, optimizer = cfg.data, cfg.optimizer
    if data.crop is not None and data.resize_to is None:
        resize_to = max(data.crop, round(data.crop * resize_to / crop))  # HyperRule's proportion
    steps = _or(optimizer.steps, numbers[-1])
    # a run shorter than the rule's keeps the rule's proportions
    scale = min(1.0, steps / numbers[-1])
    decay_steps = _or(optimizer.decay_steps, tuple(round(number * scale) for number in numbers[1:-1]))
    kind = cfg.additions.schedule
    schedule = Schedule(
        base_lr=optimizer.base_lr,
        warmup_steps=_or(optimizer.warmup_steps, round(numbers[0] * scale)),
        decay_steps=decay_steps if kind == "staircase" else (),
        steps=steps,
        kind=kind,
    )
    return Recipe(_or(data.resize_to, resize_to), _or(data.crop, crop), _or(optimizer.mixup, mixup), schedule)


def resolution(native_area: int) -> tuple[int, int]:
    """Returns (resize_to, crop), the sides of the squares in pixels, for images of `native_area` pixels."""
    return (160, 128) if native_area < SMALL_IMAGE else (512, 480)


def _schedule(train_examples: int) -> tuple[int, ...]:
    if train_examples < 20_000:
        return 100, 200, 300, 400, 500
    if train_examples < 500_000:
        return 500, 3000, 6000, 9000, 10_000
    return 500, 6000, 12_000, 18_000, 20_000


def _or(value, default):
    return default if value is None else value
