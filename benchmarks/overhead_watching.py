"""Measures what watching a run costs: `--watch-every`, and the comparison of devices' copies beside a checkpoint.

    python benchmarks/overhead_watching.py --json-path benchmarks/results/overhead_watching.json

The embedded model trains on digits in the real loop, in blocks of `--every` steps that are watched once or not at all,
in turns; which comes first alternates. Beside the time stands the processor's time, which other programs disturb less.
Then single steps and single measurements are timed in turns, which says what any interval costs.

The comparison is of the same state on `--devices` virtual devices of the CPU, in turns with saving it. Medians and
quartiles are over the rounds.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import tyro
from rich.table import Table

from bit_jax import config
from bit_jax.accounts.starts import Start
from bit_jax.accounts.timeline import Timeline
from bit_jax.checkpoints.shared import Checkpoints
from bit_jax.scale import sharding
from bit_jax.training.log import Log
from bit_jax.training.loop import Loop
from bit_jax.training.program import Program, compile_program
from bit_jax.training.run import Run
from bit_jax.training.steps import TrainState
from bit_jax.watching import replicas
from input_pipeline import terminal
from input_pipeline.files import parse_json, writable, write_json

WARM_UP = 5  # steps before the first block


def main(
    every: int = 50,
    rounds: int = 10,
    batch: int = 16,
    crop: int = 32,
    devices: int = 2,
    json_path: Path | None = None,
    compare_only: bool = False,
) -> None:
    """Measures and prints the table.

    Args:
        every: Number of steps in a block, of which one is watched in every other block.
        rounds: Number of blocks of each kind, and of comparisons and checkpoints.
        batch: Images in a step.
        crop: Side of the images in pixels.
        devices: Number of virtual devices whose copies are compared.
        json_path: JSON file to write the figures to. None: only print them.
        compare_only: Only compare copies on the devices that are here, and print the seconds as JSON.
    """
    if json_path is not None:
        writable(json_path)
    with tempfile.TemporaryDirectory() as folder:
        flags = dataclasses.replace(
            config.DIGITS,
            data=dataclasses.replace(config.DIGITS.data, resize_to=crop * 9 // 8, crop=crop, global_batch=batch),
            optimizer=dataclasses.replace(config.DIGITS.optimizer, steps=WARM_UP + 2 * rounds * every + 1),
            run=config.RunConfig(Path(folder), log_every=10**9, checkpoint_every=10**9),
        )
        if compare_only:
            write_json(Path("/dev/stdout"), compared(Run.of(flags), rounds))
            return
        measured = {"watching": watched(Run.of(flags), every, rounds)}
    measured["copies"] = _in_a_process(devices, rounds, batch)
    show(measured)
    if json_path is not None:
        settings = {"every": every, "rounds": rounds, "batch": batch, "crop": crop, "devices": devices}
        write_json(json_path, settings | measured)


def started(run: Run, *, watched: bool) -> tuple[Program, TrainState]:
    """Compiles the steps of a run, and makes the state that it starts from."""
    program = compile_program(run.steps(), watched=watched)
    return program, program.initial_state(run.initial_params(program.state_shape.params))


def watched(run: Run, every: int, rounds: int) -> dict[str, Any]:
    """Returns images/s of blocks with and without a watched step, what a block with one costs beside its neighbour, and
    the seconds of single steps and measurements."""
    program, state = started(run, watched=True)
    seconds: dict[str, list[float]] = {"plain": [], "watched": []}
    processor: dict[str, list[float]] = {"plain": [], "watched": []}
    shares: dict[str, list[float]] = {"plain": [], "watched": []}
    loader, done = run.loader(run.train), 0
    unused: Any = None
    never: Any = SimpleNamespace(wished=False, due=lambda *_: None, save=lambda *_: None)  # nothing is saved
    with Log(run.workdir.path, start=0, stop=10**6, global_batch=run.global_batch, quiet=True) as log:

        def block(name: str, count: int, state: TrainState, first: int) -> TrainState:
            """Takes steps in the real loop. The batches are made before the clock starts, as they are ahead of a
            device that is faster than a CPU."""
            number = first + count if name == "watched" else None  # the block's last step
            settings = dataclasses.replace(run.config.run, watch_every=number)
            one = dataclasses.replace(run, config=dataclasses.replace(run.config, run=settings))
            account = Start(None, Timeline(), hosts=1, devices=1, global_batch=run.global_batch)
            loop = Loop(one, program, unused, never, Timeline(), log, account)
            batches = iter(list(loader.train(first, first + count)))
            begun, used = time.perf_counter(), time.process_time()
            state, _ = loop.train_from(state, first, batches, None)
            jax.block_until_ready(state)
            seconds[name].append(time.perf_counter() - begun)
            processor[name].append(time.process_time() - used)
            shares[name].append(loop.timeline["watching"] / seconds[name][-1])
            return state

        state = block("plain", WARM_UP, state, done)
        state = block("watched", 1, state, WARM_UP)
        for values in (*seconds.values(), *processor.values(), *shares.values()):
            values.clear()
        done = WARM_UP + 1
        for number in range(rounds):
            for name in ("plain", "watched") if number % 2 else ("watched", "plain"):
                state = block(name, every, state, done)
                done += every
    return {
        "p_train": {
            name: spread([every * run.global_batch / value for value in values]) for name, values in seconds.items()
        },
        "share of a watched block": spread(shares["watched"]),
        "a watched block beside its neighbour": {"time": ratios(seconds), "processor": ratios(processor)},
    } | singly(run, program, state, done, rounds)


def singly(run: Run, program: Program, state: TrainState, step: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of steps and of measurements, in turns and each waited for, and how many steps a measurement
    takes."""
    assert program.watch_step is not None
    seconds: dict[str, list[float]] = {"plain": [], "watched": []}
    signal = sharding.shard_batch({"signal": np.zeros(run.global_batch, np.int32)}, run.mesh)
    stopped = {"stopped": jax.device_put(np.asarray(False), sharding.replicated(run.mesh))}
    for _, batch in list(run.loader(run.train).train(step, step + 2 * rounds)):
        begun = time.perf_counter()
        jax.block_until_ready(program.watch_step(state, batch | signal))
        watched = time.perf_counter()
        state, _ = jax.block_until_ready(program.train_step(state, batch | signal | stopped))
        seconds["watched"].append(watched - begun)
        seconds["plain"].append(time.perf_counter() - watched)
    named = {"seconds of a step": spread(seconds["plain"]), "seconds of watching": spread(seconds["watched"])}
    return named | {"steps that watching takes": ratios(seconds)}


def ratios(of: dict[str, list[float]]) -> dict[str, float]:
    """Returns how much more is watched than plain, pair by pair."""
    return spread([more / less for more, less in zip(of["watched"], of["plain"], strict=True)])


def compared(run: Run, rounds: int) -> dict[str, Any]:
    """Returns the seconds of comparing copies, of the first time, which compiles, and of saving a checkpoint."""
    _, state = started(run, watched=False)
    times: dict[str, list[float]] = {"compare": [], "save": []}
    begun = time.perf_counter()
    replicas.check(state, run.mesh, 0)
    first = time.perf_counter() - begun
    checkpoints = Checkpoints(run.workdir.path / "checkpoints", keep=2)
    for number in range(1, rounds + 1):
        state = state.replace(step=jax.device_put(state.step * 0 + number, sharding.replicated(run.mesh)))
        begun = time.perf_counter()
        replicas.check(state, run.mesh, number)
        checked = time.perf_counter()
        checkpoints.save(state)
        checkpoints.wait()
        times["compare"].append(checked - begun)
        times["save"].append(time.perf_counter() - checked)
    checkpoints.close()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {"bytes": size, "first": first} | {name: spread(values) for name, values in times.items()}


def _in_a_process(devices: int, rounds: int, batch: int) -> dict[str, Any]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, __file__, "--compare-only", "--rounds", rounds, "--batch", batch]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return parse_json(done.stdout, dict, "what the process printed", "") | {"devices": devices}


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median and the quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def show(measured: dict[str, Any]) -> None:
    """Prints medians, and quartiles in brackets."""
    of_steps, copies = measured["watching"], measured["copies"]
    table = Table("what", "median (quartiles)")

    def row(what: str, values: dict[str, float], form: str) -> None:
        table.add_row(what, f"{values['median']:{form}} ({values['low']:{form}} to {values['high']:{form}})")

    for name, values in of_steps["p_train"].items():
        row(f"p_train {name}, images/s", values, ".0f")
    beside = of_steps["a watched block beside its neighbour"]
    row("time of a watched block / its neighbour's", beside["time"], ".3f")
    row("share of its time that the loop counts as watching", of_steps["share of a watched block"], ".2%")
    row("processor's time of a watched block / its neighbour's", beside["processor"], ".3f")
    row("watching once, in steps", of_steps["steps that watching takes"], ".2f")
    row(f"comparing {copies['bytes'] / 1e6:.0f} MB on {copies['devices']} devices, s", copies["compare"], ".3f")
    row("saving them, s", copies["save"], ".3f")
    table.add_row("the first comparison, s", f"{copies['first']:.2f}")
    terminal.console(width=120).print(table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
