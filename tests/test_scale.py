"""Every mesh, micro-batching and rematerialization computes the same run: float64, several steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bit_jax import config
from bit_jax.formats import weights
from bit_jax.scale import sharding
from bit_jax.training import steps
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.optimizer import sgd
from bit_jax.training.program import abstract_state, lower_step
from bit_jax.training.run import Run
from input_pipeline.errors import RequestError
from parity.in_jax.training_tasks import TrainingJax
from parity.sides.side import parse_side

ROWS, SIDE, STEPS = 32, 16, 3


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8),
            "label": rng.integers(0, 10, ROWS).astype(np.int32),
            "index": np.arange(ROWS, dtype=np.int32),
        }


def run(small_npz, *, devices=1, fsdp=1, microbatches=1, remat="none", paced=False):
    """Parameters, momentum and losses after a few steps."""
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
    architecture, arrays = weights.read(small_npz)
    model = architecture.model(jnp.float64).clone(remat=remat, gather=sharding.gather(mesh), paced=paced)
    optimizer = sgd(Schedule(0.05, 1, (2,), STEPS), 0.9)
    like = abstract_state(architecture, jnp.dtype(jnp.float64), optimizer, mesh)
    params = weights.unflatten({key: jnp.asarray(array, jnp.float64) for key, array in arrays})
    state = jax.device_put(steps.init_state(params, optimizer), jax.tree.map(lambda leaf: leaf.sharding, like))
    taken = steps.make_train_step(model, optimizer, mixup=0.3, seed=1, microbatches=microbatches)
    step = jax.jit(taken, compiler_options={"xla_backend_optimization_level": 0})  # it runs three times
    losses = []
    for batch in batches():
        state, said = step(state, sharding.shard_batch(batch, mesh))
        losses.append(float(said["loss"]))
    if fsdp > 1:  # the state stays where it belongs
        kept = jax.tree.map(
            lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), state, like
        )
        assert all(jax.tree.leaves(kept))
        kernel = state.params["block4"]["unit01"]["b"]["standardized_conv2d"]["kernel"]
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // fsdp}
    return jax.tree.map(np.asarray, (state.params, state.opt_state)), losses


def test_a_comparison_judges_the_very_program_that_is_trained(small_npz, tmp_path):
    """`parity --candidate jax:tuned,devices=8,fsdp=4,remat=norm` against train.py with the same flags."""
    cfg = dataclasses.replace(
        config.DIGITS,
        model=config.ModelConfig(str(small_npz), precision="bf16"),
        scale=config.ScaleConfig(mesh="data=2,fsdp=4", remat="norm"),
        run=config.RunConfig(tmp_path / "run"),
    )
    made = Run.of(cfg).steps()
    rows, side, classes = cfg.data.global_batch, cfg.data.crop, 10
    shapes = {"images": (rows, side, side, 3), "targets": (rows, classes)}
    split = sharding.batch_sharding(made.target.mesh)
    like = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for shape in shapes.values()]
    trained = lower_step(made.update_step, made.state, *like)
    side_of_parity = TrainingJax(parse_side("jax:tuned,devices=8,fsdp=4,remat=norm"), "bf16", small_npz, print)
    schedule = dataclasses.asdict(Run.of(cfg).recipe.schedule)
    judged = side_of_parity.training(schedule, cfg.optimizer.momentum).lower(*like)
    assert side_of_parity.target.compiler_options == made.target.compiler_options
    # StableHLO without the places in the source that it comes from
    assert judged.as_text() == trained.as_text()
    assert "all_gather" not in trained.as_text()  # the partitioner makes them; what it is told is in the text
    assert trained.as_text().count("sharding_constraint") + trained.as_text().count("@Sharding") > 2 * 14


@pytest.fixture(scope="module")
def alone(small_npz):
    with jax.enable_x64(True):
        return run(small_npz)


@pytest.mark.parametrize(
    "how",
    [
        {"devices": 4, "fsdp": 2, "microbatches": 2, "remat": "norm"},
        pytest.param({"devices": 8, "microbatches": 4, "paced": True}, marks=pytest.mark.slow),
        pytest.param({"devices": 8, "fsdp": 8, "remat": "unit", "paced": True}, marks=pytest.mark.slow),
        pytest.param({"microbatches": 2, "remat": "norm", "paced": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_however_it_is_spread_the_run_is_the_same(x64, small_npz, alone, how):
    (trees, losses), (expected, expected_losses) = run(small_npz, **how), alone
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    for one, other in zip(jax.tree.leaves(trees), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * (1 + np.abs(other).max()))


def test_a_meshs_flag():
    assert [sharding.parse_mesh(text, 8) for text in ("", "data=8", "fsdp=8", "data=2,fsdp=4", "fsdp=2")] == [
        1,
        1,
        8,
        4,
        2,
    ]
    for wrong, said in (
        ("data=4", "data=4 has 4 places, but there are 8 devices"),
        ("fsdp=3", "fsdp=3 has 6 places"),
        ("fsdp=16", "fsdp=16 has 16 places"),
        ("model=2", "not of the form"),
        ("fsdp=2,", "not of the form"),
        ("fsdp=0", "not of the form"),
    ):
        with pytest.raises(RequestError, match=said):
            sharding.parse_mesh(wrong, 8)
    with pytest.raises(RequestError, match="--microbatches 4 does not divide the 2 rows of a device"):
        sharding.global_batch_size(sharding.make_mesh(), global_batch=16, batch_per_device=None, microbatches=4)
