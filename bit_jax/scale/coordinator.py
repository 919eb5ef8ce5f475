"""JAX's coordination service in a process of its own, which lives a while longer than the host that started it."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil

from input_pipeline import exits
from input_pipeline.errors import RequestError

LINGER = 2.0  # multiple of the shutdown timeout: the other hosts need the service to notice which host died
GONE = 2.0  # seconds without a connected host after which none is left; gRPC may just be connecting one anew
LISTENING = "listening"


class Coordinator:
    """The process of the service; it ends when the pipe to it closes, at the latest with this process.

    Raises:
        RequestError: the service cannot listen on the port.
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
            self._process.communicate()  # the process has ended
            raise RequestError(answer or f"the coordinator ended with exit code {self._process.returncode}")

    def shutdown(self) -> None:
        """Ends the service at once."""
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.close()
        self._process.wait()


def start(address: str, hosts: int, *, heartbeat_timeout: int, shutdown_timeout: int, **_: object) -> Coordinator:
    """Starts the service in a process of its own; it replaces JAX's `get_distributed_runtime_service`."""
    numbers = (hosts, heartbeat_timeout, shutdown_timeout)
    return Coordinator([sys.executable, "-m", "bit_jax.scale.coordinator", address, *map(str, numbers)])


def refusal(port: int) -> str:
    """Returns why nobody can listen on the port, or an empty string if it is free.

    gRPC would not notice, because it lets several servers share a port; hosts of two runs would then meet.
    """
    both = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections of a service that has ended
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


def linger(port: int, seconds: float) -> None:
    """Returns once no host has been connected for a while, so that the next start can have the port; at the latest
    after so many seconds, because the connection of a machine that is cut off stays."""
    now = connected = time.monotonic()
    until = now + seconds
    while now < until and now - connected < GONE:
        time.sleep(GONE / 10)
        now = time.monotonic()
        if any_connected(port):
            connected = now


def any_connected(port: int) -> bool:
    """Whether anybody is connected to this process's port."""
    connections = psutil.Process().net_connections("tcp")
    return any(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in connections)


def main() -> None:
    """Runs the service until the host that started it ends it or dies."""
    for number in exits.ASKING:  # a signal to all processes of a job is for the hosts, which save and need the service
        signal.signal(number, signal.SIG_IGN)
    address, hosts, heartbeat_timeout, shutdown_timeout = sys.argv[1:]
    port = int(address.rsplit(":", 1)[1])
    why = refusal(port)
    if why:
        print(why, flush=True)
        sys.exit(2)
    from bit_jax.scale import jax_internals

    service = jax_internals.start_service(
        address, int(hosts), heartbeat_timeout=int(heartbeat_timeout), shutdown_timeout=int(shutdown_timeout)
    )
    print(LISTENING, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a reader of the first host's output must not wait for this process
    if not sys.stdin.readline():  # its host died
        linger(port, LINGER * int(shutdown_timeout))
    service.shutdown()


if __name__ == "__main__":
    main()
