"""The command that is run as several hosts: what each host is started with, and what its flags say."""

import os
import socket
import sys


def of_host(command: list[str], coordinator: str, hosts: int, host: int) -> list[str]:
    """Returns the command line of one host: the command with --coordinator, --hosts and --host behind its own flags."""
    return [*runnable(command), *f"--coordinator {coordinator} --hosts {hosts} --host {host}".split()]


def runnable(command: list[str]) -> list[str]:
    """Returns the command with this Python before a script or before Python's own flags, such as -m."""
    return [*([sys.executable] if command[0].endswith(".py") or command[0].startswith("-") else []), *command]


def environment(place: int, devices: int) -> dict[str, str]:
    """Returns the variables with which a host sees `devices` devices: virtual ones on a CPU, or as many GPUs.

    Args:
        place: number of hosts on the same machine that come before this one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    gpus = range(place * devices, (place + 1) * devices)
    return {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
    }


def free_port() -> int:
    """Returns a TCP port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def trains(command: list[str]) -> bool:
    """Whether the command is train.py's, whose flags this package knows."""
    return any(os.path.basename(word) in ("train.py", "bit_jax.train", "bit-jax-train") for word in command)


def flag(command: list[str], name: str) -> str | None:
    """Returns the value of a flag, which stands behind it or after a =; the last one counts. None: it is not there.

    Args:
        name: the flag, such as --host-timeout; the command may write it as --host_timeout, too.
    """
    value = None
    for word, following in zip(command, [*command[1:], None], strict=True):
        written, equals, given = word.partition("=")
        if written.replace("_", "-") == name:
            value = given if equals else following
    return value


def number(command: list[str], name: str, default: int) -> int:
    """Returns the value of a flag as a whole number; the default where the command itself will refuse it."""
    text = flag(command, name) or ""
    return int(text) if text.isdecimal() else default
