"""`--mesh auto` splits parameters over as few devices as their memory allows, and says why."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from bit_jax import config
from bit_jax.config import RunConfig, ScaleConfig
from bit_jax.training import fitting
from bit_jax.training.run import Run
from input_pipeline.errors import RequestError

GIB = fitting.GIB
NEEDED = {1: 40 * GIB, 2: 25 * GIB, 4: None, 8: 15 * GIB}  # {fsdp: what a step takes of a device}


@pytest.fixture
def auto(monkeypatch, tmp_path):
    """(bytes of each of the eight devices, what a step takes with each fsdp) -> the run that --mesh auto makes."""

    def run(limit: int, needed: dict[int, int | None] = NEEDED) -> Run:
        monkeypatch.setattr(fitting, "need", lambda steps: needed[steps.target.mesh.shape["fsdp"]])
        monkeypatch.setattr(fitting, "least_memory", lambda: limit)
        return Run.of(smallest(tmp_path, "auto"))

    return run


def smallest(tmp_path, mesh: str) -> config.Config:
    data = dataclasses.replace(config.DIGITS.data, resize_to=36, crop=32, global_batch=16)
    return dataclasses.replace(config.DIGITS, data=data, run=RunConfig(tmp_path / "run"), scale=ScaleConfig(mesh=mesh))


def test_devices_that_hold_all_parameters_are_data_parallel(auto):
    run = auto(40 * GIB, {1: 40 * GIB})
    assert dict(run.mesh.shape) == {"data": 8, "fsdp": 1}
    assert run.notes[0] == (
        "--mesh auto: data=8,fsdp=1, because a step takes 40 GiB of the 40 GiB that XLA has of each device"
    )


@pytest.mark.parametrize(("limit", "fsdp"), [(39, 2), (25, 2), (24, 8)])
def test_the_smallest_split_that_fits_is_taken(auto, limit, fsdp):
    """A program that XLA can only fit by repeating instructions does not fit."""
    run = auto(limit * GIB)
    assert dict(run.mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert "with fsdp=1 it would take 40 GiB" in run.notes[0]
    assert ("with fsdp=4 it would take more than that" in run.notes[0]) == (fsdp == 8)


def test_where_nothing_fits_the_sentence_says_what_each_would_take(auto):
    with pytest.raises(RequestError, match=r"no mesh of 8 devices fits: .*fsdp=1 it .*fsdp=8 it .* --remat norm"):
        auto(14 * GIB)


def test_devices_without_a_limit_of_their_own_are_data_parallel(auto):
    run = auto(0, {})
    assert dict(run.mesh.shape) == {"data": 8, "fsdp": 1}
    assert "no limit of their own" in run.notes[0]


def test_instructions_that_the_compiler_repeats_are_noticed():
    lines = (
        "ENTRY %main (a: f32[2]) -> f32[2] {",
        "  %a = f32[2]{0} parameter(0)",
        "  ROOT %a.remat = f32[2]{0} negate(%a)",
        "}",
    )
    program = "\n".join(lines)
    for text, wanted in ((program, None), (program.replace("a.remat", "b"), 7)):
        executable = SimpleNamespace(
            as_text=lambda text=text: text,
            memory_analysis=lambda: SimpleNamespace(peak_memory_in_bytes=7),
        )
        lowered = SimpleNamespace(compile=lambda executable=executable, **_: executable)
        steps: Any = SimpleNamespace(
            lower_train_step=lambda lowered=lowered: lowered, target=SimpleNamespace(compiler_options={})
        )
        assert fitting.need(steps) == wanted


def test_a_compiler_without_memory_means_that_the_step_does_not_fit():
    def steps(sentence) -> Any:
        def compile_step(**_):
            raise jax.errors.JaxRuntimeError(sentence)

        lowered = SimpleNamespace(compile=compile_step)
        return SimpleNamespace(lower_train_step=lambda: lowered, target=SimpleNamespace(compiler_options={}))

    assert fitting.need(steps("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitting.need(steps("INTERNAL: no such algorithm"))


def test_a_step_fits_if_it_does_on_every_host(auto, monkeypatch):
    """A host whose compiler chooses other algorithms may need more."""

    def exchange(what, text):
        return [text, {"memory": text, "a step with fsdp=1": "null"}.get(what, str(39 * GIB))]

    monkeypatch.setattr(fitting.hosts, "exchange", exchange)
    run = auto(39 * GIB, {1: 20 * GIB, 2: 10 * GIB})
    assert run.notes[0] == (
        "--mesh auto: data=4,fsdp=2, because a step takes 39 GiB of the 39 GiB that XLA has of each device; with "
        "fsdp=1 it would take more than that"
    )


@pytest.mark.slow
def test_split_parameters_take_less_of_a_device(tmp_path):
    whole, split = (fitting.need(Run.of(smallest(tmp_path, mesh)).steps()) for mesh in ("fsdp=1", "fsdp=8"))
    assert whole is not None
    assert split is not None
    assert split < whole
