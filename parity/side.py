"""What is compared with what: a framework and how it runs there, as the command line writes it."""

import dataclasses
import os
import re
from typing import Any

from bit_jax.errors import RequestError

COUNTS = ("devices", "fsdp", "microbatches")


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        framework: jax or torch.
        devices: JAX: how many; on a CPU they are virtual.
        fsdp: JAX: over how many of them parameters are split.
        microbatches: JAX: passes that a training step's batch is taken in.
        model: torch: `package.module:factory` in place of the reference.
        state_dict: torch: file that the model's parameters are then loaded from.
    """

    framework: str
    devices: int = 1
    fsdp: int = 1
    microbatches: int = 1
    model: str | None = None
    state_dict: str | None = None

    def __str__(self) -> str:
        counts = [f"{name}={getattr(self, name)}" for name in COUNTS if getattr(self, name) != 1]
        name = self.framework + (":" + ",".join(counts) if counts else "")
        return name + (f" ({self.model})" if self.model else "")

    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def environment(self, precision: str) -> dict[str, str]:
        """Of its process. float64, the gate, runs on the CPU whatever else there is."""
        variables = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
        if self.framework == "jax":
            # the other framework needs its share of the GPU's memory
            variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            flags = os.environ.get("XLA_FLAGS", "")
            variables |= {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={self.devices}".strip()}
            variables |= {"JAX_PLATFORMS": "cpu"} if precision == "fp64" else {}
        return variables


def parse_side(text: str, *, model: str | None = None, state_dict: str | None = None) -> Side:
    """`torch`, `jax`, or `jax:devices=8,fsdp=4,microbatches=2`.

    Raises:
        RequestError: it is of another form, or the counts do not fit each other.
    """
    framework, _, rest = text.partition(":")
    settings = rest.split(",") if rest else []
    wrong = [setting for setting in settings if not re.fullmatch(rf"({'|'.join(COUNTS)})=[1-9]\d*", setting)]
    if framework not in ("jax", "torch") or wrong or (framework == "torch" and settings):
        raise RequestError(f"side {text!r} is neither torch nor jax[:devices=N,fsdp=N,microbatches=N]")
    counts: dict[str, Any] = {name: int(count) for name, count in (setting.split("=") for setting in settings)}
    side = Side(framework, **counts)
    if side.devices % side.fsdp:
        raise RequestError(f"side {text!r}: fsdp={side.fsdp} does not divide devices={side.devices}")
    return dataclasses.replace(side, model=model, state_dict=state_dict) if framework == "torch" else side
