"""BiT-HyperRule and its schedule, number by number."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bit_jax import config
from bit_jax.training.hyperrule import Schedule, recipe
from bit_jax.training.optimizer import learning_rate, sgd
from input_pipeline.errors import RequestError

HYPERRULE = dataclasses.replace(config.HYPERRULE, run=config.RunConfig(workdir=Path("unused")))


@pytest.mark.parametrize(
    ("examples", "area", "numbers", "mixup", "resize", "crop"),
    [
        (19_999, 32 * 32, (100, (200, 300, 400), 500), 0.0, 160, 128),
        (20_000, 32 * 32, (500, (3000, 6000, 9000), 10_000), 0.1, 160, 128),
        (499_999, 95 * 97, (500, (3000, 6000, 9000), 10_000), 0.1, 160, 128),
        (500_000, 96 * 96, (500, (6000, 12_000, 18_000), 20_000), 0.1, 512, 480),
        (1_281_167, 500 * 375, (500, (6000, 12_000, 18_000), 20_000), 0.1, 512, 480),
    ],
)
def test_rule(examples, area, numbers, mixup, resize, crop):
    rule = recipe(HYPERRULE, train_examples=examples, native_area=area)
    schedule = rule.schedule
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.steps) == numbers
    assert (schedule.base_lr, rule.mixup, rule.resize_to, rule.crop) == (0.003, mixup, resize, crop)


def test_flags_win_and_a_shorter_run_keeps_the_proportions():
    cfg = dataclasses.replace(
        HYPERRULE,
        data=dataclasses.replace(HYPERRULE.data, crop=64),
        optimizer=config.OptimizerConfig(base_lr=0.01, mixup=0.2, steps=50, warmup_steps=3),
    )
    rule = recipe(cfg, train_examples=100, native_area=64)
    assert rule.schedule == Schedule(0.01, 3, (20, 30, 40), 50)
    assert (rule.mixup, rule.resize_to, rule.crop) == (0.2, 80, 64)


def reference_rate(step: int, base: float, numbers: tuple[int, ...]) -> float:
    """The published rule, spelled out: warm-up to the first number, a tenth for each later number already passed."""
    if step < numbers[0]:
        return base * step / numbers[0]
    for number in numbers[1:]:
        if number < step:
            base /= 10
    return base


def test_learning_rate_at_every_step(x64):
    numbers = (100, 200, 300, 400, 500)
    rate = jax.jit(learning_rate(Schedule(0.003, 100, (200, 300, 400), 500)))
    for step in range(500):
        np.testing.assert_allclose(rate(step), reference_rate(step, 0.003, numbers), rtol=1e-14)


def test_flagperf_decays_at_10000_and_trains_on():
    rule = recipe(
        dataclasses.replace(config.FLAGPERF, run=HYPERRULE.run), train_examples=1_281_167, native_area=500 * 375
    )
    rate = learning_rate(rule.schedule)
    assert (rule.schedule.steps, rule.mixup) == (40_000, 0.1)
    for step in (0, 1, 499, 500, 3000, 3001, 6001, 9001, 10_000, 10_001, 39_999):
        expected = reference_rate(step, 0.003, (500, 3000, 6000, 9000, 10_000))
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)


def test_no_warmup():
    assert learning_rate(Schedule(0.5, 0, (), 10))(0) == 0.5


def test_sgd_is_pytorchs_momentum(x64):
    """v = 0.9 v + g, p -= lr v, with the learning rate of the step; Nesterov or a damped v would differ at once."""
    schedule = Schedule(0.1, 2, (3,), 6)
    optimizer = sgd(schedule, 0.9)
    gradients = np.random.default_rng(0).standard_normal((6, 5))
    p = jnp.ones(5)
    state, expected, v = optimizer.init(p), np.ones(5), np.zeros(5)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(jnp.asarray(gradient), state, p)
        p = optax.apply_updates(p, updates)
        v = 0.9 * v + gradient
        expected = expected - reference_rate(step, 0.1, (2, 3)) * v
        np.testing.assert_allclose(p, expected, rtol=1e-14)


@pytest.mark.parametrize(
    "change",
    [
        {"data": dataclasses.replace(config.HYPERRULE.data, global_batch=0)},
        {"data": dataclasses.replace(config.HYPERRULE.data, examples_per_class=-1)},
        {"optimizer": config.OptimizerConfig(momentum=1.0)},
        {"optimizer": config.OptimizerConfig(mixup=-0.1)},
        {"optimizer": config.OptimizerConfig(warmup_steps=-1)},
    ],
)
def test_impossible_numbers(change):
    with pytest.raises(RequestError, match=r"--\w"):
        dataclasses.replace(HYPERRULE, **change)
