"""A run that goes on with other devices keeps its global batch, its fsdp axis and what a device has to hold."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from bit_jax import config
from bit_jax.config import identity
from bit_jax.scale.spread import Spread, enough_passes
from bit_jax.training.run import Run
from input_pipeline.errors import RequestError


def configured(tmp_path, **changes):
    scale = config.ScaleConfig(**{name: changes.pop(name) for name in ("mesh", "microbatches") if name in changes})
    data = dataclasses.replace(config.DIGITS.data, **changes)
    return dataclasses.replace(config.DIGITS, data=data, scale=scale, run=config.RunConfig(tmp_path / "run"))


def begun(cfg, global_batch):
    return {"config": identity(cfg), "global_batch": global_batch}


@pytest.mark.parametrize(
    ("batch_per_device", "microbatches", "rows", "passes"),
    [
        (4, 1, 4, 1),  # as many devices as it began with
        (4, 1, 8, 2),  # half as many
        (4, 2, 8, 4),  # two rows a pass were asked for
        (4, 1, 6, 2),
        (6, 1, 9, 3),  # two passes of 4.5 there are not
        (4, 1, 7, 7),  # a prime number of rows
        (4, 4, 2, 2),  # twice as many devices: fewer rows than passes
        (4, 2, 2, 2),
    ],
)
def test_the_global_batch_stays_and_a_pass_holds_no_more_rows(tmp_path, batch_per_device, microbatches, rows, passes):
    cfg = configured(tmp_path, batch_per_device=batch_per_device, microbatches=microbatches)
    spread = Spread.of(cfg, begun(cfg, rows * 8))
    assert (spread.global_batch, spread.microbatches) == (rows * 8, passes)
    assert rows / spread.microbatches <= max(batch_per_device / microbatches, 1)
    changed = rows != batch_per_device
    assert len(spread.notes) == changed
    assert (
        not changed
        or f"the global batch of {rows * 8} that it began with; that is {rows} rows a device" in spread.notes[0]
    )


def test_as_many_passes_as_memory_needs():
    for rows in range(1, 40):
        for wanted in range(1, 9):
            for at_most in range(1, 9):
                passes = enough_passes(rows, wanted, at_most=at_most)
                assert rows % passes == 0
                assert rows / passes <= at_most
                fewer = range(wanted, passes) if wanted <= rows else ()
                assert not [n for n in fewer if rows % n == 0 and rows / n <= at_most]


def test_a_run_that_begins_computes_its_batch_as_the_flags_say(tmp_path):
    cfg = configured(tmp_path, batch_per_device=4)
    assert Spread.of(cfg, None) == Spread.of(cfg, begun(cfg, 32)) == Spread(Spread.of(cfg, None).mesh, 32, 1)
    other = configured(tmp_path, batch_per_device=2)  # is refused later as another configuration
    assert Spread.of(cfg, begun(other, 64)).global_batch == 32
    whole = configured(tmp_path, global_batch=16)
    assert Spread.of(whole, begun(whole, 24)).global_batch == 16


def test_devices_that_do_not_divide_the_batch_are_refused(tmp_path):
    """A run that has begun keeps its batch, so another batch is no remedy there."""
    cfg, whole = configured(tmp_path, batch_per_device=4), configured(tmp_path, global_batch=36)
    for going_on in (cfg, whole):
        with pytest.raises(RequestError, match=r"global batch of 36 is not divisible by 8 devices; .*such as 6$"):
            Spread.of(going_on, begun(going_on, 36))
    with pytest.raises(RequestError, match="global batch 36 is not divisible by 8 devices; use 32 or 40"):
        Spread.of(whole, None)


def test_hosts_with_different_numbers_of_devices_are_refused(tmp_path, monkeypatch):
    """Each host reads as many rows as the others."""
    devices = [SimpleNamespace(process_index=host) for host in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(RequestError, match=r"host 1 has 1 device\(s\) and host 0 has 2") as refused:
        Spread.of(configured(tmp_path, global_batch=12), None)
    assert refused.value.on_all_hosts


@pytest.mark.parametrize(
    ("mesh", "expected"), [("data=4,fsdp=4", (2, 4)), ("data=4", (8, 1)), ("fsdp=2", (4, 2)), ("data=1,fsdp=8", (1, 8))]
)
def test_the_fsdp_axis_stays_and_the_data_axis_takes_the_rest(tmp_path, mesh, expected):
    cfg = configured(tmp_path, mesh=mesh, global_batch=32)
    spread = Spread.of(cfg, begun(cfg, 32))
    assert tuple(spread.mesh.shape.values()) == expected
    typed = mesh in ("fsdp=2", "data=1,fsdp=8")
    assert (spread.notes == ()) == typed
    if not typed:
        assert f"--mesh {mesh} does not fit the present number of devices, 8" in spread.notes[0]
        with pytest.raises(RequestError, match="places, but there are 8 devices"):
            Spread.of(cfg, None)


def test_an_fsdp_axis_that_does_not_divide_the_devices_is_refused(tmp_path):
    cfg = configured(tmp_path, mesh="data=1,fsdp=16")
    with pytest.raises(RequestError, match="16 places, but there are 8 devices"):
        Spread.of(cfg, begun(cfg, 64))


def test_a_misspelt_mesh_is_told_both_forms(tmp_path):
    with pytest.raises(RequestError, match="--mesh 'autos' is not of the form data=N,fsdp=M, and is not auto either"):
        Spread.of(configured(tmp_path, mesh="autos"), None)


def test_the_run_is_made_of_it(small_npz, tmp_path):
    cfg = configured(tmp_path, batch_per_device=2, global_batch=512, resize_to=36, crop=32)
    cfg = dataclasses.replace(cfg, model=config.ModelConfig(str(small_npz)))
    first = Run.of(cfg)
    assert (first.global_batch, first.target.microbatches) == (2 * jax.device_count(), 1)
    first.workdir.path.mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(first.workdir.content | {"global_batch": 48}))
    again = Run.of(cfg)
    assert (again.global_batch, again.target.microbatches) == (48, 3)
    assert "the global batch of 48" in again.notes[0]
    again.workdir.check()  # and config.json is the same run's
