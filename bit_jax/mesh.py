"""The device mesh and what lies where: parameters on every device, batches split over the `data` axis."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bit_jax.errors import RequestError

DATA = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A one-dimensional mesh over the given devices, or over all of all hosts."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the mesh, in device order."""
    return NamedSharding(mesh, PartitionSpec(DATA))


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
