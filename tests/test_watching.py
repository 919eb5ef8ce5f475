"""What is watched: numbers against direct computations in float64, losses that stand out, copies with a wrong bit."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HARDLY_OPTIMIZES, ROOT, SMALL

from bit_jax import config
from bit_jax.accounts.timeline import Timeline
from bit_jax.checkpoints.saving import Saving
from bit_jax.launch import free_port
from bit_jax.model import layers, resnetv2
from bit_jax.model.precision import choose
from bit_jax.scale import sharding
from bit_jax.training import finetuning, hyperrule, run, steps
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.loop import Begun, Loop
from bit_jax.training.metrics import read as entries
from bit_jax.training.optimizer import sgd
from bit_jax.training.program import make_steps
from bit_jax.training.target import Target
from bit_jax.training.watched import gradients_and_activations, make_watch_step, spikes_of
from bit_jax.watching import numbers, replicas, spikes
from bit_jax.watching.spikes import Spikes, Window
from input_pipeline import Loader, Views, open_source
from input_pipeline.errors import RunFailed

ROWS, SIDE, CLASSES = 8, 16, 5
MIXUP, SEED = 0.4, 4
SCHEDULE = Schedule(base_lr=0.1, warmup_steps=0, decay_steps=(50,), steps=100)


def small_model(dtype: Any = jnp.float64, **more: Any) -> resnetv2.ResNetV2:
    return resnetv2.ResNetV2((1,), 0.5, CLASSES, jnp.dtype(dtype), **more)


def params_of(dtype: Any = np.float64) -> Any:
    """Random parameters. Three channels' ReLU is dead: they are scaled by 0, and a negative number is added."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: small_model(dtype).init_params(0))
    params = jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(dtype), shapes)
    norm = params["block1"]["unit01"]["b"]["group_norm"]
    norm["gamma"] += 1
    norm["gamma"][:3], norm["beta"][:3] = 0, -1
    return params


def a_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "mask": np.ones(ROWS, bool),
        "index": np.arange(ROWS, dtype=np.int32),
    }


def norm_of(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


@dataclasses.dataclass(frozen=True)
class Watched:
    """The numbers of a step, and what they are of: parameters, gradient, update, and all outputs within the model."""

    found: dict[str, float]
    params: Any
    gradient: Any
    update: Any
    outputs: Any


@pytest.fixture(scope="module")
def watched():
    """A step with mixup, two microbatches and momentum, on two devices for data times two for parameters; and what
    JAX and NumPy say of the whole batch on one device."""

    def loss(params, images, targets):
        def kept(module, _):
            return isinstance(module, layers.GroupNormRelu | resnetv2.BottleneckUnit | resnetv2.RootBlock)

        variables = {"params": params}
        logits, sown = model.apply(variables, images, capture_intermediates=kept, mutable=["intermediates"])
        return -(targets * jax.nn.log_softmax(logits)).sum() / ROWS, sown["intermediates"]

    mesh = sharding.make_mesh(jax.devices()[:4], fsdp=2)
    with jax.enable_x64(True):
        model, params, optimizer = small_model(), params_of(), sgd(SCHEDULE, 0.9)
        shapes = jax.eval_shape(lambda: steps.init_state(params, optimizer))
        state = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), shapes)  # all counts, too
        momentum = jax.tree.map(lambda leaf: 0.01 * np.cos(leaf), params)
        trace = state.opt_state[0]._replace(trace=momentum)
        state = state.replace(params=params, opt_state=(trace, *state.opt_state[1:]))
        weight = steps.mixup_weight(SEED, jnp.int32(7), MIXUP)
        assert 0.1 < weight < 0.9, "mixing that changes little would prove little"
        images, targets = steps.prepare(jax.tree.map(jnp.asarray, a_batch()), CLASSES, jnp.dtype(jnp.float64), weight)

        watch = make_watch_step(
            small_model(gather=sharding.gather(mesh)), optimizer, mixup=MIXUP, seed=SEED, microbatches=2
        )
        found = jax.jit(watch)(on_mesh(mesh, state), sharding.shard_batch(a_batch(), mesh))
        gradient, outputs = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params, images, targets))
    update = jax.tree.map(lambda v, g: -0.1 * (0.9 * v + g), momentum, gradient)
    return Watched(jax.device_get(found), params, gradient, update, outputs)


def test_the_gradients_norm_is_that_of_the_whole_batch(watched):
    assert watched.found[numbers.GRADIENT] == pytest.approx(norm_of(watched.gradient), rel=1e-9)
    for part, inner in watched.gradient.items():
        assert watched.found[f"{numbers.GRADIENT}/{part}"] == pytest.approx(norm_of(inner), rel=1e-9)


def test_the_update_is_the_learning_rate_times_the_momentum(watched):
    assert watched.found[numbers.UPDATE] == pytest.approx(norm_of(watched.update) / norm_of(watched.params), rel=1e-9)
    for part, inner in watched.update.items():
        expected = norm_of(inner) / norm_of(watched.params[part])
        assert watched.found[f"{numbers.UPDATE}/{part}"] == pytest.approx(expected, rel=1e-9)


def test_activations_are_those_of_the_whole_batch(watched):
    unit = watched.outputs["block1"]["unit01"]
    norms = {
        "block1/unit01": [unit[part]["group_norm"] for part in "abc"],
        "group_norm": [watched.outputs["group_norm"]],
    }
    others = {"block1/unit01": [unit], "root_block": [watched.outputs["root_block"]]}
    found, largest = watched.found, []
    for name in (*norms, "root_block"):
        values = [inner["__call__"][0] for inner in norms.get(name, []) + others.get(name, [])]
        largest.append(max(np.abs(value).max() for value in values))
        assert found[f"{numbers.LARGEST}/{name}"] == pytest.approx(largest[-1], rel=1e-9)
    assert found[numbers.LARGEST] == pytest.approx(max(largest), rel=1e-9)
    dead = {}
    for name, modules in norms.items():
        dead[name] = np.concatenate([(inner["__call__"][0] == 0).all(axis=(0, 1, 2)) for inner in modules])
        assert found[f"{numbers.DEAD}/{name}"] == pytest.approx(dead[name].mean(), rel=1e-12)
    assert dead["block1/unit01"].sum() >= 3, "three were made dead by hand"
    assert found[numbers.DEAD] == pytest.approx(np.concatenate([*dead.values()]).mean(), rel=1e-12)
    assert f"{numbers.DEAD}/root_block" not in found, "it has no ReLU"


def test_with_additions_the_numbers_are_of_what_trains_and_of_the_step_that_is_taken(x64):
    """A part trains, with a clipped gradient, decay and an average: the norm is the one before clipping, the update is
    what the training step adds, and the parameters that stay are in neither."""
    additions = config.Additions(
        train="head", clip_norm=0.01, weight_decay=0.5, weight_decay_kind="decoupled", label_smoothing=0.1, ema=0.9
    )
    optimizer, params = sgd(SCHEDULE, 0.9, additions), params_of()
    state = jax.tree.map(jnp.asarray, steps.init_state(params, optimizer)).replace(step=jnp.int32(3))
    settings: Any = {"mixup": 0.0, "seed": SEED, "additions": additions}
    watch, train = (make(small_model(), optimizer, **settings) for make in (make_watch_step, steps.make_train_step))

    @jax.jit
    def measured(state, batch):
        images, targets = steps.prepare(batch, CLASSES, jnp.dtype(jnp.float64), None)
        _, gradient = steps.loss_and_gradients(small_model(), state.params, images, targets, additions=additions)
        return watch(state, batch), gradient, train(state, batch)

    found, gradient, (after, _) = jax.device_get(measured(state, a_batch()))
    update = jax.tree.map(np.subtract, after.params, params)
    assert norm_of(update["block1"]) == 0
    assert found[numbers.UPDATE] == pytest.approx(norm_of(update) / norm_of(params["head"]), rel=1e-9)
    assert found[numbers.UPDATE] == found[f"{numbers.UPDATE}/head"]
    assert found[numbers.GRADIENT] > 10 * additions.clip_norm, "clipping that changes little would prove little"
    assert found[numbers.GRADIENT] == pytest.approx(norm_of(gradient), rel=1e-9)
    of_parts = {name for name in found if name.startswith((numbers.GRADIENT, numbers.UPDATE))} - set(numbers.WHOLE)
    assert of_parts == {f"{numbers.GRADIENT}/head", f"{numbers.UPDATE}/head"}


def test_an_ordinary_call_computes_no_more_than_without_watching(monkeypatch):
    model = small_model(jnp.float32)
    images = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(lambda: model.init_params(0))

    def traced(**more: Any) -> str:
        jax.clear_caches()  # the number of a traced function within it is not the same twice
        return str(
            jax.make_jaxpr(lambda params, images: model.apply({"params": params}, images, **more))(params, images)
        )

    ordinary, asked = traced(), traced(mutable="intermediates")
    assert ordinary != asked
    for module in (layers, resnetv2):
        monkeypatch.setattr(module, "sow_largest", lambda *arguments: None)
    assert traced() == ordinary
    assert traced(mutable="intermediates") == ordinary


@pytest.mark.slow
def test_float16s_gradient_is_the_one_before_scaling():
    optimizer = sgd(SCHEDULE, 0.9)
    state = steps.init_state(params_of(np.float32), optimizer, scales_loss=True)
    watch = jax.jit(make_watch_step(small_model(jnp.float16), optimizer, mixup=0, seed=SEED))

    def found(scale: float) -> dict[str, float]:
        scaled = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(scale)))
        return numbers.finite(jax.device_get(watch(scaled, a_batch())))

    assert found(2.0**7) == pytest.approx(found(2.0**3), rel=0.02)
    overflowing = found(2.0**40)
    assert numbers.GRADIENT not in overflowing
    assert numbers.LARGEST in overflowing


def test_a_number_that_is_none_is_left_out():
    assert numbers.finite({"a": np.float32(2), "b": np.float32(np.inf), "c": np.float32(np.nan)}) == {"a": 2.0}


@pytest.mark.slow
def test_however_the_model_is_executed_its_activations_are_seen(x64):
    images, targets = steps.prepare(jax.tree.map(jnp.asarray, a_batch()), CLASSES, jnp.dtype(jnp.float64), None)
    given = params_of(), images, targets

    def measure(**execution: Any):
        model = small_model(**execution)
        return jax.jit(lambda *given: gradients_and_activations(model, *given, 1, None, config.NO_ADDITIONS))

    plain = jax.device_get(measure()(*given))
    for execution in ({"remat": "norm"}, {"remat": "unit"}, {"paced": True}, {"products": True}):
        assert jax.tree.structure(jax.eval_shape(measure(**execution), *given)) == jax.tree.structure(plain)
    other = jax.device_get(measure(remat="norm", paced=True)(*given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), plain, other)


@pytest.mark.slow
def test_the_steps_of_a_run_are_the_programs_that_they_were_without_watching(monkeypatch):
    cfg = dataclasses.replace(config.FLAGPERF, data=dataclasses.replace(config.FLAGPERF.data, crop=SIDE))
    recipe = hyperrule.recipe(cfg, train_examples=100, native_area=SIDE**2)
    target = Target(sharding.make_mesh(jax.devices()[:2]), choose("fp32"), remat="norm", microbatches=2)

    def lowered() -> list[str]:
        jax.clear_caches()
        made = make_steps(target, SMALL, recipe, momentum=0.9, seed=0, global_batch=ROWS)
        return [step().as_text() for step in (made.lower_train_step, made.lower_eval_step)]

    ordinary = lowered()
    for module in (layers, resnetv2):
        monkeypatch.setattr(module, "sow_largest", lambda *arguments: None)
    assert lowered() == ordinary


# Losses


def ordinary(count: int, seed: int = 0) -> np.ndarray:
    """Losses that fall from 2.3 to 0.1 with the noise of small batches, whose largest values are far from most."""
    rng = np.random.default_rng(seed)
    return 2.2 * np.exp(-np.arange(count) / 100) + 0.1 + rng.gamma(2.0, 0.03, count)


def found_in(losses: Any, window: Window | None = None) -> list[spikes.Spike]:
    window = window or Window(64)
    return [spike for step, loss in enumerate(losses, 1) if (spike := window.spike(step, float(loss))) is not None]


def test_a_loss_that_stands_out_is_a_spike_and_noise_is_none():
    losses = ordinary(1000)
    assert found_in(losses) == []
    losses[600] += 2.0
    (spike,) = found_in(losses)
    assert (spike.step, spike.loss) == (601, losses[600])
    assert spike.median == pytest.approx(np.median(losses[500:600]))
    deviations = np.abs(losses[500:600] - np.median(losses[500:600]))
    assert spike.spread == pytest.approx(1.4826 * np.median(deviations))


def test_one_spike_does_not_hide_the_next():
    losses = ordinary(1000)
    losses[[600, 601, 640]] += 5.0
    assert [spike.step for spike in found_in(losses)] == [601, 602, 641]


def test_losses_that_stay_high_are_ordinary_in_the_end():
    losses = ordinary(1000)
    losses[600:] += 5.0
    found = found_in(losses)
    assert found[0].step == 601
    assert found[-1].step <= 601 + spikes.WINDOW // 2
    for spike in found:  # with those that stand out themselves
        assert spike.median == pytest.approx(np.median(losses[spike.step - 101 : spike.step - 1]))


def test_the_first_losses_and_those_that_are_not_finite_are_none():
    assert found_in([0.1, 0.1, 9.0]) == []
    losses = ordinary(100)
    losses[50:60] = np.inf
    assert found_in(losses) == []


def test_a_mixed_batch_may_cost_what_mixing_costs():
    asked = []

    def mixed(step: int) -> float:
        asked.append(step)
        return spikes.mixing(0.5, 1000) if step == 801 else spikes.mixing(0.999, 1000)

    losses = ordinary(1000)
    losses[[700, 800]] += 3.0
    assert [spike.step for spike in found_in(losses, Window(64, mixed))] == [701]
    assert asked == [701, 801], "what mixing costs is drawn only where it matters"
    assert spikes.mixing(0.5, 10) == pytest.approx(np.log(2) + np.log(10) / 2)
    assert spikes.mixing(1.0, 10) == spikes.mixing(0.0, 10) == 0


def test_a_spike_is_said_once_in_a_while_and_its_examples_are_kept(tmp_path):
    source = open_source("digits", "train", None)
    loader = Loader(source, Views(36, 32, False, "pillow"), 16, seed=SEED)
    path, said = tmp_path / "spikes.jsonl", []
    path.write_text('{"step": 3')  # a start before was killed here
    watcher = Spikes(path, Window(64), lambda step: [source[i]["id"] for i in loader.examples(step - 1)], said.append)
    losses = ordinary(700)
    losses[[600, 610, 660]] += 3.0
    for step, loss in enumerate(losses, 1):
        watcher(step, loss)
    watcher.close()
    kept = spikes.read(path)
    assert [spike.step for spike in kept] == [601, 611, 661]
    assert [re.findall(r"the loss of step (\d+) is", sentence) for sentence in said] == [["601"], ["661"]]
    ((number, batch),) = loader.train(600, 601)
    assert number == 600
    assert kept[0].examples == tuple(source[int(index)]["id"] for index in batch["index"])
    with open(path, "a") as file:  # the step is taken again by a later start
        file.write(json.dumps(dataclasses.asdict(kept[0]) | {"loss": 9.0}) + '\n{"step": "x"}\n[1]\n')
    assert [spike.loss for spike in spikes.read(path)] == [9.0, kept[1].loss, kept[2].loss]
    assert spikes.read(tmp_path / "none") == []


def test_the_loop_gives_every_loss_to_be_compared(tmp_path):
    """The run has mixup, whose weight is drawn anew for the steps that are suspected."""
    source = open_source("digits", "train", None)
    loader = Loader(source, Views(36, 32, False, "pillow"), 256, seed=SEED)
    run_of: Any = SimpleNamespace(
        train=source,
        loader=lambda source: loader,
        recipe=SimpleNamespace(mixup=0.1),
        config=SimpleNamespace(run=config.RunConfig(tmp_path, seed=SEED, log_every=1000)),
        architecture=SimpleNamespace(num_classes=10),
        global_batch=256,
        workdir=SimpleNamespace(spikes=tmp_path / "spikes.jsonl"),
    )
    unused: Any = None
    log: Any = SimpleNamespace(advance=lambda step: None)
    account: Any = SimpleNamespace(step=0)
    with spikes_of(run_of, lambda sentence: None) as taking:
        loop = Loop(run_of, unused, unused, unused, Timeline(), log, account, spikes=taking)
        begun: deque[Begun] = deque()
        for step in range(1, 41):
            metrics = {"failed": False, "replaced": 0, "signal": 0, "loss": 9.0 if step == 40 else 1.0}
            begun.append(Begun(step, {}, {}, Future()))
            begun[-1].end.set_result((jax.tree.map(np.asarray, metrics), 0.0))
        loop.finish(begun, unused, 0, leave=0)
    (spike,) = spikes.read(tmp_path / "spikes.jsonl")
    assert (spike.step, spike.loss, spike.median) == (40, 9.0, 1.0)
    assert spike.examples == tuple(source[index]["id"] for index in loader.examples(39))


def test_a_spike_that_cannot_be_written_is_said_at_once_and_ends_nothing(tmp_path):
    """When there is a disk again, the next one is written."""
    path, said = tmp_path / "no" / "folder", []

    def note(sentence: str) -> None:
        said.append(sentence)
        path.parent.mkdir(exist_ok=True)

    watcher = Spikes(path, Window(64), lambda step: ["a"], note)
    for step, loss in enumerate([*ordinary(100), 9.0, *ordinary(60), 9.0], 1):
        watcher(step, loss)
    watcher.close()
    assert [re.findall(r"the loss of step (\d+) is|(cannot be kept)", sentence) for sentence in said] == [
        [("101", ""), ("", "cannot be kept")],
        [("162", "")],
    ]
    assert [spike.step for spike in spikes.read(path)] == [162]


# Copies


def with_a_flipped_bit(array: jax.Array, number: int, *, byte: int = 0) -> jax.Array:
    """The array whose copy on the device of that number has one other bit."""
    parts = []
    for shard in array.addressable_shards:
        own = np.array(shard.data)
        if shard.device.id == number:
            own.reshape(-1).view(np.uint8)[byte] ^= 4
        parts.append(jax.device_put(own, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def on_mesh(mesh: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding.param_sharding(mesh, leaf.shape)), tree)


def a_state(mesh: Any) -> Any:
    """Arrays of several shapes and types; with two devices for parameters, the first two are split."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4, 8)).astype(np.float32)
    return on_mesh(mesh, {"kernel": kernel, "bias": kernel[0, 0, 0], "odd": kernel[:, 0, 0, 0], "step": np.int32(7)})


@pytest.mark.parametrize(("devices", "fsdp", "number"), [(4, 1, 2), (8, 1, 5), (8, 2, 6)])
def test_the_device_with_a_wrong_bit_is_named(devices, fsdp, number):
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
    state = a_state(mesh)
    replicas.check(state, mesh, 3)
    for name in state:
        wrong = state | {name: with_a_flipped_bit(state[name], number)}
        said = rf"after step 3, device {number} \(cpu, number {number} on host 0\) holds other bits .* in {name}, "
        with pytest.raises(RunFailed, match=said) as failed:
            replicas.check(wrong, mesh, 3)
        assert getattr(failed.value, "on_all_hosts", False)


def test_of_two_devices_both_are_named():
    mesh = sharding.make_mesh(jax.devices()[:2])
    state = a_state(mesh)
    wrong = state | {name: with_a_flipped_bit(state[name], 1) for name in ("kernel", "odd")}
    with pytest.raises(RunFailed, match=r"device 0 .*, device 1 .* no majority .* in kernel and 1 more array,"):
        replicas.check(wrong, mesh, 3)


def test_one_copy_is_compared_with_none(monkeypatch):
    """On one device, or where every array is split over all."""
    monkeypatch.setattr(replicas, "checksums", lambda *arguments: pytest.fail("it was computed"))
    for mesh in (sharding.make_mesh(jax.devices()[:1]), sharding.make_mesh(jax.devices()[:2], fsdp=2)):
        state = a_state(mesh)
        replicas.check({"kernel": state["kernel"], "bias": state["bias"]}, mesh, 3)


def test_any_bit_of_any_type_and_any_order_changes_the_checksum(x64):
    mesh = sharding.make_mesh(jax.devices()[:2])
    types = (np.float64, np.float32, np.float16, jnp.bfloat16, np.int32, np.int8, np.uint64, np.bool_)
    arrays = [np.arange(12).reshape(3, 4).astype(kind) for kind in types]
    turned = [np.flip(array, axis=1) for array in arrays]

    def sums(values):
        return replicas.checksums([jax.device_put(value, sharding.replicated(mesh)) for value in values], mesh)[0, 0]

    first = sums(arrays)
    assert (sums(arrays) == first).all()
    assert (sums(turned) != first).all()
    for bit in (0, 7):
        changed = [array.copy() for array in arrays[:-1]]
        for array in changed:
            array.reshape(-1).view(np.uint8)[-1] ^= 1 << bit
        assert (sums([*changed, ~arrays[-1]]) != first).all()
    signs = [np.array(values, np.float32) for values in ([0.0, -0.0], [-0.0, 0.0])]
    assert sums(signs)[0] != sums(signs)[1]


def test_the_majority_is_of_the_copies_of_the_same_part():
    sums = np.zeros((4, 2, 2), np.uint32)
    sums[:, 1, 0] = 1  # the second part of a split array is not the first one
    assert replicas.disagreeing(sums, [True, False]) == ({}, True)
    sums[2, 1, 0] = 9
    assert replicas.disagreeing(sums, [True, False]) == ({(2, 1): [0]}, True)
    sums[0, 0, 1] = sums[3, 1, 1] = 5
    assert replicas.disagreeing(sums, [True, False]) == ({(0, 0): [1], (2, 1): [0], (3, 1): [1]}, True)
    sums[:2, 1, 0] = 7  # 7, 7, 9 and 1: nobody has more than half
    assert replicas.disagreeing(sums, [True, True])[1] is False


def test_nothing_is_saved_of_a_state_that_devices_hold_differently():
    mesh = sharding.make_mesh()
    params = a_state(mesh)
    state = steps.TrainState(on_mesh(mesh, np.int32(4)), params, ())
    done = []
    shared: Any = SimpleNamespace(newest=3, save=lambda state: done.append("save"), close=lambda: done.append("close"))
    saving = Saving(shared, every=1)
    saving.check = lambda state: replicas.check(state, mesh, int(state.step))
    wrong = state.replace(params=params | {"kernel": with_a_flipped_bit(params["kernel"], 3)})
    with pytest.raises(RunFailed, match=r"after step 4, device 3 .* in params/kernel, "):
        saving.save(4, wrong)
    assert done == ["close"], "the checkpoint before may still be written"
    done.clear()
    with pytest.raises(RunFailed):
        saving.finish(4, wrong)
    assert done == ["close"], "nor is it the last one"
    done.clear()
    saving.save(4, state)
    assert done == ["save"]


def digits(small_npz, workdir, **flags: Any) -> config.Config:
    return config.Config(
        config.ModelConfig(str(small_npz), precision="fp64"),
        config.DataConfig("digits", eval_split="test[:40]", resize_to=20, crop=16, global_batch=16, flip=False),
        config.OptimizerConfig(base_lr=0.05, mixup=0.3, warmup_steps=2, decay_steps=(4,), steps=6),
        config.RunConfig(workdir, log_every=1, **flags),
    )


@pytest.mark.slow
def test_a_run_ends_at_the_checkpoint_after_a_bit_flipped_and_continues_from_the_one_before(
    x64, small_npz, tmp_path, monkeypatch
):
    """And neither this nor being watched changes a bit of what it ends with."""
    compile_program, compiled = finetuning.compile_program, []

    def compile_once(made, **more):
        compiled.append(compiled[0] if compiled else compile_program(made, watched=True))
        return compiled[-1]

    def compile_with_a_fault(made, **more):
        program = compile_once(made, **more)

        def train_step(state, batch):
            state, metrics = program.train_step(state, batch)
            if int(state.step) == 3:
                head = state.params["head"]["conv2d"]
                head["kernel"] = with_a_flipped_bit(head["kernel"], 5, byte=3)
            return state, metrics

        return dataclasses.replace(program, train_step=train_step)

    monkeypatch.setattr(finetuning, "compile_program", compile_once)
    finetuning.finetune(run.Run.of(digits(small_npz, tmp_path / "undisturbed")))
    disturbed = digits(small_npz, tmp_path / "disturbed", checkpoint_every=2, watch_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "compile_program", compile_with_a_fault)
        with pytest.raises(RunFailed, match=r"after step 4, device 5 .* params/head/conv2d/kernel"):
            finetuning.finetune(run.Run.of(disturbed))
    result = finetuning.finetune(run.Run.of(disturbed))
    assert result["resumed_from_step"] == 2
    undisturbed, continued = (np.load(tmp_path / name / "final.npz") for name in ("undisturbed", "disturbed"))
    for key in undisturbed:
        np.testing.assert_array_equal(continued[key], undisturbed[key], err_msg=key)
    lines, _ = entries(tmp_path / "disturbed" / "metrics.jsonl")
    assert [line["step"] for line in lines if numbers.GRADIENT in line] == [3, 6]


HOST = """
import sys
import jax, numpy as np

from bit_jax.checkpoints.saving import Saving
from bit_jax.config import ScaleConfig
from bit_jax.scale import hosts, sharding
from bit_jax.watching import replicas
from input_pipeline.exits import exit_code

def main():
    port, host = sys.argv[1:]
    with hosts.joined(ScaleConfig(coordinator=f"127.0.0.1:{port}", hosts=2, host=int(host))):
        mesh = sharding.make_mesh()
        like = jax.ShapeDtypeStruct((3, 4), np.float32, sharding=sharding.replicated(mesh))
        right = np.arange(12, dtype=np.float32).reshape(3, 4)
        parts = [
            jax.device_put(right + (device.id == mesh.devices.flat[2].id), device) for device in jax.local_devices()
        ]
        array = jax.make_array_from_single_device_arrays((3, 4), like.sharding, parts)
        good = jax.make_array_from_callback((3, 4), like.sharding, lambda part: right[part])
        replicas.check({"good": good}, mesh, 4)
        print("good")
        replicas.check({"good": good, "wrong": array}, mesh, 6)

sys.exit(exit_code(main))
"""


@pytest.mark.slow
def test_all_hosts_name_the_device_of_one_of_them():
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": f"{HARDLY_OPTIMIZES} --xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(port), str(host)],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    for process in started:
        out, errors = process.communicate(timeout=600)
        assert (process.returncode, out.count("good\n")) == (1, 1), errors
        assert re.search(
            r"error: after step 6, device \d+ \(cpu, number 0 on host 1\) holds other bits .* in wrong, ", errors
        )
