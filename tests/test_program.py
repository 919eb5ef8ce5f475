"""The compiled program where the state lies otherwise than JAX would have it, as it does on GPUs."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from bit_jax.checkpoints.shared import Checkpoints
from bit_jax.config import FLAGPERF
from bit_jax.formats import weights
from bit_jax.model.precision import PRECISIONS, choose
from bit_jax.scale import sharding
from bit_jax.training import hyperrule
from bit_jax.training.program import compile_program, make_steps
from bit_jax.training.steps import TrainState
from bit_jax.training.target import Target

ROWS, SIDE = 4, 16
OUTPUTS_FIRST = (3, 0, 1, 2)


@pytest.fixture
def outputs_first(monkeypatch):
    """Kernels lie with the output channels outermost, whatever the compiler prefers."""

    def chosen(tree):
        def one(leaf):
            return Format(Layout(OUTPUTS_FIRST if leaf.ndim == 4 else tuple(range(leaf.ndim))), leaf.sharding)

        return jax.tree.map(one, tree)

    def choose():
        monkeypatch.setattr(sharding, "any_layout", chosen)

    return choose


def program_of(architecture, mesh):
    cfg = dataclasses.replace(FLAGPERF, data=dataclasses.replace(FLAGPERF.data, crop=SIDE))
    recipe = hyperrule.recipe(cfg, train_examples=100, native_area=SIDE**2)
    target = Target(mesh, choose("fp64"))
    return compile_program(make_steps(target, architecture, recipe, momentum=0.9, seed=0, global_batch=ROWS))


def batch_on(mesh, seed):
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8),
        "label": rng.integers(0, 10, ROWS).astype(np.int32),
        "mask": np.ones(ROWS, bool),
        "index": np.arange(ROWS, dtype=np.int32),
        "signal": np.zeros(ROWS, np.int32),
    }
    return sharding.shard_batch(batch, mesh)


def started(program, path):
    """Step 0 with the parameters of the file."""
    shapes = weights.flatten(program.state_shape.params)
    _, arrays = weights.read(path)
    return program.initial_state(weights.unflatten({key: sharding.place(array, shapes[key]) for key, array in arrays}))


def kernel_of(params):
    return params["block4"]["unit01"]["b"]["standardized_conv2d"]["kernel"]


@pytest.mark.slow
def test_the_run_is_the_same_however_kernels_lie(x64, small_npz, outputs_first, tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:2], fsdp=2)
    architecture, _ = weights.read(small_npz)
    plain = program_of(architecture, mesh)
    outputs_first()
    other = program_of(architecture, mesh)
    states = [started(program, small_npz) for program in (plain, other)]
    for step in range(4):
        if step == 2:  # it ends and continues here
            checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
            checkpoints.save(states[1])
            checkpoints.wait()
            before = jax.tree.map(np.array, states[1])
            states[1] = checkpoints.restore(2, other.state_shape)
            checkpoints.close()
            jax.tree.map(np.testing.assert_array_equal, states[1], before)
        batch = batch_on(mesh, step) | {"stopped": jax.device_put(False, sharding.replicated(mesh))}
        states = [program.train_step(state, batch)[0] for program, state in zip((plain, other), states, strict=True)]
    assert kernel_of(states[0].params).format.layout.major_to_minor == (0, 1, 2, 3)
    assert kernel_of(states[1].params).format.layout.major_to_minor == OUTPUTS_FIRST
    for one, expected in zip(jax.tree.leaves(states[1]), jax.tree.leaves(states[0]), strict=True):
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-10 * (1 + np.abs(expected).max()))
    sums = [
        program.eval_step(program.for_evaluation(state.params), batch_on(mesh, 9))
        for program, state in zip((plain, other), states, strict=True)
    ]
    assert {name: value.item() for name, value in sums[1].items()} == pytest.approx(
        {name: value.item() for name, value in sums[0].items()}, rel=1e-10
    )


def compiled_since(caplog) -> int:
    """The number of programs that JAX's log says it has compiled since it was last asked."""
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return sum(message.startswith("Compiling ") for message in messages)


def test_arrays_are_placed_and_saved_without_a_program_for_every_shape(caplog, tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:4], fsdp=2)
    arrays = {str(size): np.random.default_rng(size).normal(size=(size, 3, 4)) for size in range(1, 9)}
    as_is, turned = (Layout(order, ()) for order in ((0, 1, 2), (2, 0, 1)))

    def like(layout):
        form = Format(layout, sharding.param_sharding(mesh, (1, 3, 4)))
        return {key: jax.ShapeDtypeStruct(array.shape, np.float32, sharding=form) for key, array in arrays.items()}

    with jax.log_compiles():
        placed = {key: sharding.place(array, like(as_is)[key]) for key, array in arrays.items()}
        same = sharding.in_layouts(placed, like(as_is))
        assert all(same[key] is placed[key] for key in arrays)
        step = sharding.place(np.array(3), jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh)))
        state = TrainState(step, placed, opt_state=())
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.save(state)
        checkpoints.wait()
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.format), state)
        restored = checkpoints.restore(3, abstract)
        checkpoints.close()
        assert compiled_since(caplog) == 0
        moved = sharding.in_layouts(restored.params | {"1": placed["1"]}, like(turned) | {"1": like(as_is)["1"]})
        assert compiled_since(caplog) == 1
        for _ in range(2):  # as each array of final.npz, where parameters are split over hosts
            sharding._gathering(mesh)(placed["3"])
        assert compiled_since(caplog) == 1
    assert moved["1"] is placed["1"]
    for key, array in arrays.items():
        assert moved[key].format == like(as_is if key == "1" else turned)[key].format
        np.testing.assert_array_equal(moved[key], array.astype(np.float32))


def test_deterministic_changes_nothing_on_cpus():
    target = Target(sharding.make_mesh(), PRECISIONS["fp32"])
    assert dataclasses.replace(target, deterministic=True).compiler_options == target.compiler_options
