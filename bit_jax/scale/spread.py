"""How a batch is spread over the devices: as the flags say, or as a run needs that goes on with other devices."""

import dataclasses
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh

from bit_jax.config import AUTO, Config
from bit_jax.scale import hosts, sharding
from input_pipeline.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mesh, and what each device gets of a batch.

    Attributes:
        mesh: all devices of all hosts.
        global_batch: number of rows of a batch, over all devices.
        microbatches: number of passes in which a device takes its rows.
        notes: sentences on what differs from the flags, because the run goes on with other devices than it began with.
    """

    mesh: Mesh
    global_batch: int
    microbatches: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, cfg: Config, kept: dict[str, Any] | None) -> "Spread":
        """Settles the spread over this process's devices and those of all its other hosts.

        A run that goes on keeps what decides its result. `--batch-per-device` made a global batch of the devices that
        it began with; that one stays, and the rows that a device takes in one pass stay at most as many as the flags
        ask for, because its memory has to hold them. In `--mesh`, the fsdp axis stays, because a device has to hold its
        part of the parameters, and the data axis takes what is left.

        Args:
            kept: the content of the work directory's config.json; None if no run has begun there.

        Raises:
            RequestError: the devices do not divide the batch, the mesh does not fit them, or the hosts have different
                numbers of devices.
        """
        data, scale, devices = cfg.data, cfg.scale, jax.device_count()
        _require_as_many_devices_each(Counter(device.process_index for device in jax.devices()))
        fsdp, notes = _fsdp(scale.mesh, devices, goes_on=kept is not None)
        mesh = sharding.make_mesh(fsdp=fsdp)
        begun = _begun(kept, data.batch_per_device)
        whole = data.global_batch if data.batch_per_device is None else begun
        if kept is not None and whole is not None and whole % devices:
            raise RequestError(
                f"the run's global batch of {whole} is not divisible by {devices} devices; go on with a number of "
                f"devices that divides it, such as {_divisor_below(whole, devices)}"
            )
        if data.batch_per_device is None or begun in (None, data.batch_per_device * devices):
            global_batch = sharding.global_batch_size(
                mesh,
                global_batch=data.global_batch,
                batch_per_device=data.batch_per_device,
                microbatches=scale.microbatches,
            )
            return cls(mesh, global_batch, scale.microbatches, notes)
        assert begun is not None
        rows = sharding.global_batch_size(mesh, global_batch=begun, batch_per_device=None) // devices
        passes = enough_passes(rows, scale.microbatches, at_most=data.batch_per_device / scale.microbatches)
        notes += (
            f"--batch-per-device {data.batch_per_device}: the run goes on with the global batch of {begun} that it "
            f"began with; that is {rows} rows a device (devices: {devices}), in passes of {rows // passes}",
        )
        return cls(mesh, begun, passes, notes)


def _require_as_many_devices_each(of_host: dict[int, int]) -> None:
    """Raises RequestError unless all hosts have the same number of devices: each reads as many rows as the others.

    Args:
        of_host: {index of a host: number of its devices}.
    """
    for host, count in sorted(of_host.items()):
        if count != of_host[0]:
            raise hosts.on_all_hosts(
                RequestError(
                    f"host {host} has {count} device(s) and host 0 has {of_host[0]}, but every host needs as many; "
                    "hide some by CUDA_VISIBLE_DEVICES, or leave that host out"
                )
            )


def _divisor_below(number: int, limit: int) -> int:
    """Returns the largest divisor of the number that is at most the limit."""
    return next(divisor for divisor in range(min(limit, number), 0, -1) if number % divisor == 0)


def enough_passes(rows: int, wanted: int, *, at_most: float) -> int:
    """Returns the number of passes, as near above `wanted` as there is one, that divides a device's rows into passes of
    not more than `at_most` rows; one row each if `wanted` is more than the rows."""
    return next((n for n in range(wanted, rows) if rows % n == 0 and rows / n <= at_most), rows)


def _begun(kept: dict[str, Any] | None, batch_per_device: int | None) -> int | None:
    """Returns the global batch of the run that goes on, if that run was given the same `--batch-per-device`; another
    one is refused as another configuration."""
    config = (kept or {}).get("config")
    same = isinstance(config, dict) and config.get("data.batch_per_device") == batch_per_device
    global_batch = (kept or {}).get("global_batch")
    return global_batch if same and isinstance(global_batch, int) and global_batch > 0 else None


def _fsdp(text: str, devices: int, *, goes_on: bool) -> tuple[int, tuple[str, ...]]:
    """Returns the size of the fsdp axis, and a sentence if `--mesh` is of another number of devices."""
    try:
        sizes = sharding.mesh_sizes(text) if text else {}
    except RequestError as error:
        raise RequestError(f"{error}, and is not {AUTO} either; write one of the two") from None
    try:
        return sharding.parse_mesh(text, devices), ()
    except RequestError:
        fsdp = sizes.get(sharding.FSDP, 1)
        if not goes_on or devices % fsdp:
            raise
    return fsdp, (
        f"--mesh {text} does not fit the present number of devices, {devices}; the run goes on with "
        f"{sharding.DATA}={devices // fsdp},{sharding.FSDP}={fsdp}",
    )
