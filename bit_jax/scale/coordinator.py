"""JAX's coordination service in a process of its own, which outlives the host that started it by a while."""

import os
import socket
import subprocess
import sys
import time

from input_pipeline.errors import RequestError

LINGER = 2.0  # times the heartbeat timeout: hosts that look for a dead one need the service
LISTENING = "listening"


class Coordinator:
    """The service's process; it ends when the pipe to it closes, with this process at the latest.

    Raises:
        RequestError: it cannot listen on the port.
    """

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            answer = answers.readline().strip()
        if answer != LISTENING:
            self._process.communicate()  # it has ended
            raise RequestError(answer or f"the coordinator ended with exit code {self._process.returncode}")

    def shutdown(self) -> None:
        """Ends it at once."""
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.close()
        self._process.wait()


def start(address: str, hosts: int, *, heartbeat_timeout: int, shutdown_timeout: int, **_: object) -> Coordinator:
    """In place of JAX's `get_distributed_runtime_service`."""
    numbers = (hosts, heartbeat_timeout, shutdown_timeout)
    return Coordinator([sys.executable, "-m", "bit_jax.scale.coordinator", address, *map(str, numbers)])


def refusal(port: int) -> str:
    """Why nothing can listen on the port; empty where something can.

    gRPC would not notice: it lets several servers share a port, and hosts of two runs would meet.
    """
    both = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an ended service do not count
        if both:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("::" if both else "", port))
            probe.listen()
        except OSError as error:
            return (
                f"the coordinator cannot listen on port {port} ({os.strerror(error.errno or 0)}); give --coordinator "
                "another port"
            )
    return ""


def main() -> None:
    """The service's process."""
    address, hosts, heartbeat_timeout, shutdown_timeout = sys.argv[1:]
    why = refusal(int(address.rsplit(":", 1)[1]))
    if why:
        print(why, flush=True)
        sys.exit(2)
    from bit_jax.scale import jax_internals

    service = jax_internals.start_service(
        address, int(hosts), heartbeat_timeout=int(heartbeat_timeout), shutdown_timeout=int(shutdown_timeout)
    )
    print(LISTENING, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who waits for the first host's output need not wait for this
    if not sys.stdin.readline():  # its host died
        time.sleep(LINGER * int(shutdown_timeout))
    service.shutdown()


if __name__ == "__main__":
    main()
