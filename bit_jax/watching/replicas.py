"""Silent corruption: arrays that several devices hold alike are compared, bit by bit, by a checksum of each copy.

Every device computes the same update of its own copy from the same sum of gradients, so all copies stay equal as long
as all memories and processors work. One wrong bit would otherwise spread through the sums of gradients unseen.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Shaped, UInt32

from bit_jax.scale import hosts, sharding
from bit_jax.scale.sharding import DATA, FSDP
from input_pipeline.errors import RunFailed

NAMED = 8  # devices that the message names
MIX = 0x9E3779B9  # 2^32 / the golden ratio: neighbouring positions get numbers that are far apart


def check(state: Any, mesh: Mesh, step: int) -> None:
    """Compares the copies of every array of which devices of the mesh hold several. All hosts have to make this call.

    Args:
        state: a tree of arrays, each lying as `sharding.param_sharding` says.
        step: number of steps that led to it, for the message.

    Raises:
        RunFailed: copies differ; the message names the devices whose copies are in the minority, or all of them where
            there is no majority, and the first array. Every host raises it.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if mesh.size > 1 and (mesh.shape[DATA] > 1 or leaf.sharding.is_fully_replicated)
    }
    if not named:
        return
    sums = checksums(tuple(named.values()), mesh)
    split = [not leaf.sharding.is_fully_replicated for leaf in named.values()]
    wrong, known = disagreeing(sums, split)
    if wrong:
        raise hosts.on_all_hosts(RunFailed(_sentence(wrong, known, list(named), mesh, step)))


def checksums(arrays: Sequence[Array], mesh: Mesh) -> UInt32[np.ndarray, "data fsdp arrays"]:
    """Returns the checksum of each device's own copy, or own part, of each array, on every host."""
    specs = tuple(array.sharding.spec for array in arrays)  # pyright: ignore[reportAttributeAccessIssue]
    return sharding.fetch(_of_own_copies(mesh, specs)(tuple(arrays)))


@functools.lru_cache(maxsize=2)
def _of_own_copies(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """Returns the compiled function of the arrays. Within `shard_map` an array is what one device holds: the compiler
    does not know there that the devices' copies are meant to be equal, and so cannot take one for all."""

    def own(arrays: tuple[Array, ...]) -> Array:
        return jnp.stack([_checksum(array) for array in arrays])[None, None]

    of_devices = PartitionSpec(DATA, FSDP, None)
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=of_devices, check_vma=False)
    return jax.jit(mapped)


@jax.jit
def _checksum(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Returns the sum, modulo 2^32, of every 32-bit word mixed with its position.

    For a given position the mixing is one to one, so a change of a single word always shows; any other change shows but
    for one in 2^32. The mixing is the finalizer of MurmurHash3.
    """
    words = _words(array)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = words + place * jnp.uint32(MIX)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns the bits of an array as words; a 64-bit number gives two, along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    if size < 4:
        return lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    return lax.bitcast_convert_type(array, jnp.uint32)


def disagreeing(
    sums: UInt32[np.ndarray, "data fsdp arrays"], split: Sequence[bool]
) -> tuple[dict[tuple[int, int], list[int]], bool]:
    """Returns {place in the mesh: arrays, by number} of the copies that differ from most others, and whether there is
    such a majority; without it, all copies of the array are in.

    Args:
        split: whether each array is split over `fsdp`, so that only devices with the same place there hold copies.
    """
    places = np.array(list(np.ndindex(sums.shape[:2]))).reshape(*sums.shape[:2], 2)
    wrong: dict[tuple[int, int], list[int]] = {}
    known = True
    for array, of_parts in enumerate(split):
        groups = 1 if not of_parts else sums.shape[1]
        copies = sums[..., array].reshape(-1, groups)
        for values, holders in zip(copies.T, places.reshape(-1, groups, 2).swapaxes(0, 1), strict=True):
            if (values == values[0]).all():
                continue
            most, count = Counter(values.tolist()).most_common(1)[0]
            majority = 2 * count > len(values)
            known &= majority
            for value, (data, fsdp) in zip(values.tolist(), holders.tolist(), strict=True):
                if value != most or not majority:
                    wrong.setdefault((data, fsdp), []).append(array)
    return dict(sorted(wrong.items())), known


def _sentence(wrong: dict[tuple[int, int], list[int]], known: bool, names: Sequence[str], mesh: Mesh, step: int) -> str:
    devices = [_described(mesh.devices[place], mesh) for place in wrong]
    arrays = sorted({array for arrays in wrong.values() for array in arrays})
    more = len(arrays) - 1
    which = names[arrays[0]] + (f" and {more} more array{'s' * (more > 1)}" if more else "")
    shown = ", ".join(devices[:NAMED]) + (f" and {len(devices) - NAMED} more" if len(devices) > NAMED else "")
    who = (
        f"{shown} {'holds' if len(devices) == 1 else 'hold'} other bits than most devices"
        if known
        else f"{shown} hold different bits, and no majority says which are right,"
    )
    return (
        f"after step {step}, {who} in {which}, which all should hold alike; a memory or a processor is at fault. "
        "Nothing of this state is saved: run without that device, and the same command continues from the last "
        "checkpoint"
    )


def _described(device: Any, mesh: Mesh) -> str:
    """Names a device by JAX's number of it, its kind, and its place among its host's; every host says the same."""
    of_its_host = sorted(other.id for other in mesh.devices.flat if other.process_index == device.process_index)
    number = of_its_host.index(device.id)
    return f"device {device.id} ({device.device_kind}, number {number} on host {device.process_index})"
