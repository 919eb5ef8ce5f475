"""The device mesh and the sharding of arrays: batches over all devices, parameters over the `fsdp` axis only."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from input_pipeline.errors import RequestError

DATA, FSDP = "data", "fsdp"


def parse_mesh(text: str, devices: int) -> int:
    """Returns the size of the `fsdp` axis in `--mesh`: 8 for `data=2,fsdp=8` or `fsdp=8`, 1 without fsdp.

    Raises:
        RequestError: the text has another form, or the mesh's size is not the number of devices.
    """
    if not text:
        return 1
    sizes = mesh_sizes(text)
    fsdp = sizes.get(FSDP, 1)
    places = sizes.get(DATA, max(devices // fsdp, 1)) * fsdp
    if places != devices:
        raise RequestError(f"--mesh {text} has {places} places, but there are {devices} devices")
    return fsdp


def mesh_sizes(text: str) -> dict[str, int]:
    """Returns {axis: size} of those that `--mesh` names.

    Raises:
        RequestError: the text has another form than data=N,fsdp=M.
    """
    sizes = {name: int(size) for name, size in re.findall(rf"({DATA}|{FSDP})=([1-9]\d*)", text)}
    if ",".join(f"{name}={size}" for name, size in sizes.items()) != text:
        raise RequestError(f"--mesh {text!r} is not of the form data=N,fsdp=M")
    return sizes


def make_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """Makes a mesh `data` x `fsdp` over the given devices, by default over all devices of all hosts.

    Raises:
        RequestError: `fsdp` does not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise RequestError(f"fsdp={fsdp} does not divide {len(devices)} devices")
    return Mesh(np.array(devices).reshape(-1, fsdp), (DATA, FSDP))


def param_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding of a parameter or momentum: its last axis that `fsdp` divides, if any, is split over `fsdp`.

    A kernel's last axis is its output channels. Each is standardized by itself, so no statistics cross devices.
    """
    fsdp = mesh.shape[FSDP]
    divisible = [axis for axis, size in enumerate(shape) if fsdp > 1 and size and size % fsdp == 0]
    if not divisible:
        return replicated(mesh)
    split = divisible[-1]
    return NamedSharding(mesh, PartitionSpec(*(FSDP if axis == split else None for axis in range(split + 1))))


def any_layout(tree: Any) -> Any:
    """Returns each array's sharding, with a layout that the compiler chooses.

    On GPUs it chooses the output channels outermost for kernels, which is what cuDNN reads. Otherwise XLA would copy
    the kernels for the convolutions and back for the state, 3 to 5 % more memory traffic in a step of R152x2.
    """
    return jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), tree)


def laid_out(like: Any, formats: Any) -> Any:
    """Returns the same shapes, dtypes and shardings with the layouts of `formats`."""

    def with_layout(leaf: jax.ShapeDtypeStruct, form: Format) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=Format(form.layout, leaf.sharding))

    return jax.tree.map(with_layout, like, formats)


def formats(like: Any) -> Any:
    """Returns sharding and layout of each array, for JAX's `out_shardings`."""
    return jax.tree.map(lambda leaf: leaf.format, like)


def gather(mesh: Mesh) -> Callable[[Array], Array] | None:
    """Returns a function that turns a kernel, sharded like parameters, into a whole one on every device, for
    `resnetv2.Numerics`; None if nothing is sharded.

    The sharding is constrained before and after the cast to the computation's type, so that devices exchange the
    narrow type. The gradient is constrained to be sharded, so that XLA reduces it over `fsdp` by a reduce-scatter and
    then each part over `data`; otherwise it would reduce whole gradients over all devices.
    """
    if mesh.shape[FSDP] == 1:
        return None

    @jax.custom_vjp
    def whole(kernel: Array) -> Array:
        split = jax.lax.with_sharding_constraint(kernel, param_sharding(mesh, kernel.shape))
        return jax.lax.with_sharding_constraint(split, replicated(mesh))

    def forward(kernel: Array) -> tuple[Array, None]:
        return whole(kernel), None

    def backward(_: None, gradient: Array) -> tuple[Array]:
        return (jax.lax.with_sharding_constraint(gradient, param_sharding(mesh, gradient.shape)),)

    whole.defvjp(forward, backward)
    return whole


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: rows are split over all devices, in device order."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Turns this host's rows into global arrays whose rows are split over the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def own_rows(rows: Array) -> np.ndarray:
    """Returns the rows of a batch that are on this host's devices."""
    return np.concatenate([np.asarray(shard.data) for shard in rows.addressable_shards])


def place(array: np.ndarray, like: jax.ShapeDtypeStruct | Array) -> Array:
    """Places an array on the devices with the sharding and dtype of `like`, in JAX's own layout; each device gets only
    its part. CPUs may read it where it lies, so it must not be written to any more."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda part: np.asarray(array[part], like.dtype))


def in_layouts(tree: Any, like: Any) -> Any:
    """Returns the arrays in the layouts of `like`; one program moves all that lie otherwise, if any do, for which both
    are in memory at once.

    Given a layout, JAX's `device_put` compiles a program for every shape, even where arrays lie as they should.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(formats(like))
    others = [number for number, leaf in enumerate(leaves) if leaf.format.layout != wanted[number].layout]
    if others:
        move = jax.jit(lambda arrays: arrays, out_shardings=[wanted[number] for number in others])
        for number, moved in zip(others, move([leaves[number] for number in others]), strict=True):
            leaves[number] = moved
    return jax.tree.unflatten(structure, leaves)


def fetch(array: Array | np.ndarray) -> np.ndarray:
    """Returns the whole array on this host; if it is sharded over hosts, every host has to make this call."""
    if isinstance(array, np.ndarray):
        return array
    if not array.is_fully_addressable and not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding)
        array = _gathering(array.sharding.mesh)(array)
    return np.asarray(array)


@functools.lru_cache(maxsize=2)
def _gathering(mesh: Mesh) -> Callable[[Array], Array]:
    """Returns a function that gives an array whole to every device; a program is compiled once for every shape."""
    return jax.jit(lambda array: array, out_shardings=replicated(mesh))


def global_batch_size(mesh: Mesh, *, global_batch: int, batch_per_device: int | None, microbatches: int = 1) -> int:
    """Returns the global batch, checked against the mesh.

    Raises:
        RequestError: the devices do not divide the batch, or `microbatches` does not divide the rows of a device.
    """
    if batch_per_device is not None:
        global_batch = batch_per_device * mesh.size
    if global_batch % mesh.size:
        down = global_batch // mesh.size * mesh.size
        nearest = f"{down} or {down + mesh.size}" if down else f"{mesh.size}"
        raise RequestError(f"global batch {global_batch} is not divisible by {mesh.size} devices; use {nearest}")
    if global_batch // mesh.size % microbatches:
        raise RequestError(
            f"--microbatches {microbatches} does not divide the {global_batch // mesh.size} rows of a device"
        )
    return global_batch
