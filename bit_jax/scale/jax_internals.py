"""The parts of JAX that this package uses although they are private: the service where the hosts of a run meet.

JAX has no public way to start that service elsewhere, or to store anything in it. No other file imports `jax._src`.
JAX 0.10.2, 0.11.2 and 0.12.0 have what is used here; `tests/test_jax_internals.py` fails where a version does not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import distributed

_runtime: Any = distributed._jax  # type: ignore[attr-defined]


def start_service(address: str, hosts: int, *, heartbeat_timeout: int, shutdown_timeout: int) -> Any:
    """The service, which listens on HOST:PORT in this process until its `shutdown` is called. Timeouts are seconds."""
    return _runtime.get_distributed_runtime_service(
        address, hosts, heartbeat_timeout=heartbeat_timeout, shutdown_timeout=shutdown_timeout
    )


@contextlib.contextmanager
def service_started_by(start: Callable[..., Any]) -> Iterator[None]:
    """Within, `jax.distributed.initialize` calls `start` for the service: with its address, the number of hosts, and
    the timeouts of `start_service` among other keywords. What `start` returns needs a `shutdown`."""
    original = _runtime.get_distributed_runtime_service
    _runtime.get_distributed_runtime_service = start
    try:
        yield
    finally:
        _runtime.get_distributed_runtime_service = original


def coordinator_address() -> str:
    """HOST:PORT of the service, once `jax.distributed.initialize` has returned."""
    return distributed.global_state.coordinator_address or ""


def store() -> Any:
    """The client of the keys and values in the service, once `jax.distributed.initialize` has returned."""
    return distributed.global_state.client


def let_gloo_announce(address: str) -> None:
    """Gloo, which is what JAX has for collectives between CPUs, tells the other hosts this address of this machine."""
    _runtime.make_gloo_tcp_collectives = functools.partial(_runtime.make_gloo_tcp_collectives, hostname=address)
