"""Memory in pages of 2 MiB instead of 4 KiB, for programs that compute on the CPU.

XLA allocates all of a step's intermediate values anew for every step, and the kernel clears and maps them page by page:
a fifth of a CPU training step of R50x1. glibc asks for large pages where it is told to, before a process starts.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
GLIBC = (2, 35)  # the first that knows it
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NVIDIA = Path("/dev/nvidiactl")


def environment(current: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process is started with that shall have large pages."""
    others = [setting for setting in current.get(TUNABLES, "").split(":") if setting]
    return {TUNABLES: ":".join([*others, f"{SETTING}=1"])}


def would_help(current: Mapping[str, str] = os.environ) -> bool:
    """Whether the process computes on CPUs, the system gives large pages to those that ask, and this one did not."""
    on_cpu = current.get("JAX_PLATFORMS", "cpu" if not NVIDIA.exists() else "") == "cpu"
    library, version = platform.libc_ver()
    known = library == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= GLIBC
    on_request = MODE.exists() and "[madvise]" in MODE.read_text()
    return on_cpu and known and on_request and SETTING not in current.get(TUNABLES, "")


def restart() -> None:
    """Starts this very program again, as the same process, with large pages, where they help; else does nothing.

    For a program's first lines: what it did before is done twice.
    """
    if would_help():
        os.execve(sys.executable, sys.orig_argv, os.environ | environment())
