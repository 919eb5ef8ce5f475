"""JAX's coordination service in a process of its own, which outlives the host that started it by a while."""

import subprocess
import sys
import time
from typing import Any

LINGER = 2.0  # times the heartbeat timeout: hosts that look for a dead one need the service


class Coordinator:
    """The service's process; it ends when the pipe to it closes, with this process at the latest."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # who waits for this host's output need not wait for it
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def shutdown(self) -> None:
        """Ends it at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"end\n")
        self._process.stdin.close()
        self._process.wait()


def start(address: str, hosts: int, *, heartbeat_timeout: int, shutdown_timeout: int, **_: object) -> Coordinator:
    """In place of JAX's `get_distributed_runtime_service`."""
    numbers = (hosts, heartbeat_timeout, shutdown_timeout)
    return Coordinator([sys.executable, "-m", "bit_jax.coordinator", address, *map(str, numbers)])


def main() -> None:
    from jax._src import lib

    jax: Any = lib._jax  # type: ignore[attr-defined]  (JAX offers no public way to it)
    address, hosts, heartbeat_timeout, shutdown_timeout = sys.argv[1:]
    service = jax.get_distributed_runtime_service(
        address, int(hosts), heartbeat_timeout=int(heartbeat_timeout), shutdown_timeout=int(shutdown_timeout)
    )
    if not sys.stdin.readline():  # its host died
        time.sleep(LINGER * int(shutdown_timeout))
    service.shutdown()


if __name__ == "__main__":
    main()
