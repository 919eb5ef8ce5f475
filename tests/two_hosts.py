"""Two hosts in one process, and states of which each has a part: for tests of what hosts write and read together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from bit_jax.checkpoints import pieces
from bit_jax.scale import hosts, sharding
from bit_jax.training.steps import TrainState

SPLIT, DATA = 8, 1  # sizes of `fsdp`: all parameters split over both hosts, or each host has all of them


def state_on(fsdp: int, step: int = 3) -> TrainState:
    """A state whose values follow from the step, with a -0.0 and with an array that eight devices do not divide."""
    rng = np.random.default_rng(step)
    kernel, momentum, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 16), (6, 16), (3,)))
    bias[0] = -0.0
    state = TrainState(np.int32(step), {"kernel": kernel, "bias": bias}, ({"kernel": momentum}, ()))
    mesh = sharding.make_mesh(fsdp=fsdp)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding.param_sharding(mesh, leaf.shape)), state)


def shape_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.format), state)


class TwoHosts:
    """Two threads that are host 0 with the first four devices and host 1 with the others."""

    def __init__(self):
        self._barrier = threading.Barrier(2, timeout=600)
        self._told: dict[Any, dict[int, Any]] = {}
        self._thread = threading.local()

    def exchange(self, what: Any, given: Any) -> list:
        thread = self._thread
        thread.calls += 1  # the same number on both hosts, which make the same calls
        self._told.setdefault((what, thread.calls), {})[thread.host] = given
        self._barrier.wait()
        told = self._told[what, thread.calls]
        return [told[0], told[1]]

    def given_by(self, host: int, array: np.ndarray) -> np.ndarray:
        return self.exchange("array", array.copy())[host]

    def install(self, monkeypatch) -> None:
        """Has the functions of `hosts` speak of the two threads."""
        monkeypatch.setattr(hosts, "exchange", self.exchange)
        monkeypatch.setattr(hosts, "given_by", self.given_by)
        monkeypatch.setattr(hosts, "position", lambda: (self._thread.host, 2))
        monkeypatch.setattr(pieces, "host_of", lambda device: device.id // 4)

    def both(self, work) -> list:
        """Does work(host) as both hosts at once."""

        def as_host(host: int) -> Any:
            self._thread.host, self._thread.calls = host, 0
            return work(host)

        self._told.clear()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_host, range(2)))


def the_same(restored: list[Any], wanted: TrainState) -> None:
    """Each host has every bit that its devices need."""
    for host, state in enumerate(restored):
        for key, leaf in pieces.keyed(state).items():
            expected = pieces.keyed(wanted)[key]
            assert leaf.sharding == expected.sharding
            for shard, other in zip(leaf.addressable_shards, expected.addressable_shards, strict=True):
                if pieces.host_of(shard.device) == host:
                    assert np.asarray(shard.data).tobytes() == np.asarray(other.data).tobytes(), (host, key)
