"""Runs a command as several hosts on this machine: `python -m bit_jax.launch --hosts 2 -- train.py digits ...`.

It serves to try out and test what otherwise takes several machines, and to run several processes on one. Every process
is given --coordinator, --hosts and --host after the command's own flags. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 go to all
of them.
"""

import os
import signal
import socket
import subprocess
import sys

import tyro

from input_pipeline import exits
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code


def main() -> int:
    own, command = _split(sys.argv[1:])

    def launch(hosts: int = 2, devices: int | None = None, port: int | None = None) -> int:
        """Runs the command behind -- as several hosts.

        Args:
            hosts: Number of processes to start, each of which acts as one host.
            devices: Number of devices of each process: virtual ones on a CPU, otherwise the next GPUs of this machine.
                None: every process sees all GPUs.
            port: Port that the first process listens on. None: a free one.
        """
        if hosts < 1 or (devices is not None and devices < 1):
            raise RequestError(f"--hosts {hosts} and --devices {devices} must be at least 1")
        if not command:
            raise RequestError(
                "nothing to run; write the command behind --: python -m bit_jax.launch -- train.py digits"
            )
        return run(command, hosts, devices, port or free_port())

    return tyro.cli(launch, description=__doc__, args=own)


def run(command: list[str], hosts: int, devices: int | None, port: int) -> int:
    """Runs the processes and returns the first exit code of any that is not 0, or 0 if there is none."""
    processes = [
        subprocess.Popen(
            [
                *([sys.executable] if command[0].endswith(".py") or command[0].startswith("-") else []),
                *command,
                *f"--coordinator 127.0.0.1:{port} --hosts {hosts} --host {host}".split(),
            ],
            env=os.environ | (_environment(host, devices) if devices is not None else {}),
            process_group=0,  # otherwise a terminal's Ctrl-C reaches them twice, which means "end at once"
        )
        for host in range(hosts)
    ]

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in exits.ASKING:
        signal.signal(number, forward)
    codes = [process.wait() for process in processes]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _environment(host: int, devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    gpus = range(host * devices, (host + 1) * devices)
    return {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


if __name__ == "__main__":
    sys.exit(exit_code(main))
