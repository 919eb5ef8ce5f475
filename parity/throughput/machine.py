"""Describes the machine that figures are measured on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """Returns the hardware and the versions that figures depend on, in JSON's types, without importing a framework."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "gpus": _gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "torch": importlib.metadata.version("torch"),
    }


def _gpus() -> list[str]:
    """Returns the names of NVIDIA's GPUs, from the driver's own tool."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # there is no driver
        return []


def _processor() -> str:
    """Returns the processor's name, from Linux where it says so."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
