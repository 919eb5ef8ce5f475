"""How long this process has lived."""

import os
import time
from pathlib import Path

import psutil


def age() -> float:
    """Returns the seconds since this process began, before its imports, to a hundredth on Linux.

    psutil's `create_time` adds the time since the machine's start to the time of that start, which Linux gives in whole
    seconds, so that it is up to a second off.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    except OSError:
        return time.time() - psutil.Process().create_time()
    ticks = int(fields[19])  # `starttime`, the 22nd field of all; proc_pid_stat(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
