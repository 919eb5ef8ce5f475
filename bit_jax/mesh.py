"""The device mesh and what lies where: batches split over all devices, parameters over the `fsdp` axis alone."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bit_jax.errors import RequestError

DATA, FSDP = "data", "fsdp"


def make_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh `data` x `fsdp` over the given devices, or over all of all hosts.

    Raises:
        RequestError: `fsdp` does not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise RequestError(f"fsdp={fsdp} does not divide {len(devices)} devices")
    return Mesh(np.array(devices).reshape(-1, fsdp), (DATA, FSDP))


def param_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """An array of parameters or momentum: its longest axis that `fsdp` divides is split over it, if there is one."""
    fsdp = mesh.shape[FSDP]
    divisible = [axis for axis, size in enumerate(shape) if fsdp > 1 and size and size % fsdp == 0]
    if not divisible:
        return NamedSharding(mesh, PartitionSpec())
    split = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(FSDP if axis == split else None for axis in range(split + 1))))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the mesh, in device order."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This host's rows -> global arrays, rows split over the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def global_batch_size(mesh: Mesh, *, global_batch: int, batch_per_device: int | None) -> int:
    """The global batch, checked against the mesh.

    Raises:
        RequestError: the devices do not divide it.
    """
    if batch_per_device is not None:
        return batch_per_device * mesh.size
    if global_batch % mesh.size:
        down = global_batch // mesh.size * mesh.size
        nearest = f"{down} or {down + mesh.size}" if down else f"{mesh.size}"
        raise RequestError(f"global batch {global_batch} is not divisible by {mesh.size} devices; use {nearest}")
    return global_batch
