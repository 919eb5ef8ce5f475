"""The private parts of JAX that this package uses: the service through which the hosts of a run find each other.

JAX has no public way to start that service in another process, or to store anything in it. No other file imports
`jax._src`. JAX 0.10.2, 0.11.2 and 0.12.0 have these parts; `tests/test_jax_internals.py` fails if a version has not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import distributed

_runtime: Any = distributed._jax  # type: ignore[attr-defined]


def start_service(address: str, hosts: int, *, heartbeat_timeout: int, shutdown_timeout: int) -> Any:
    """Starts the service, which listens on HOST:PORT in this process until its `shutdown` is called.

    Args:
        hosts: number of hosts.
        heartbeat_timeout, shutdown_timeout: timeouts in seconds.
    """
    return _runtime.get_distributed_runtime_service(
        address, hosts, heartbeat_timeout=heartbeat_timeout, shutdown_timeout=shutdown_timeout
    )


@contextlib.contextmanager
def service_started_by(start: Callable[..., Any]) -> Iterator[None]:
    """Makes `jax.distributed.initialize` start the service by `start` while the `with` block runs.

    Args:
        start: function of the address, the number of hosts, and keywords with the timeouts of `start_service` among
            them; it returns an object with a `shutdown` method.
    """
    original = _runtime.get_distributed_runtime_service
    _runtime.get_distributed_runtime_service = start
    try:
        yield
    finally:
        _runtime.get_distributed_runtime_service = original


def coordinator_address() -> str:
    """Returns HOST:PORT of the service, once `jax.distributed.initialize` has returned."""
    return distributed.global_state.coordinator_address or ""


def store() -> Any:
    """Returns the client of the service's key-value store, once `jax.distributed.initialize` has returned."""
    return distributed.global_state.client


def let_gloo_announce(address: str) -> None:
    """Makes Gloo, which JAX uses for collectives between CPUs, announce this address of this machine to other hosts."""
    _runtime.make_gloo_tcp_collectives = functools.partial(_runtime.make_gloo_tcp_collectives, hostname=address)
