"""How many hosts a run can go on with: as many as there are, as long as their devices divide its global batch."""

import dataclasses
import re

from bit_jax.supervision import command as commands
from bit_jax.supervision.records import RunFolder


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a run's number of devices has to divide, or be divided by.

    Attributes:
        global_batch: rows of a batch, which the number of devices divides; None if it is not known.
        microbatches: a divisor of the rows of each device.
        fsdp: a divisor of the number of devices.
        devices: devices of each host; None if that is not known, and then the hosts alone have to divide the batch.
    """

    global_batch: int | None = None
    microbatches: int = 1
    fsdp: int = 1
    devices: int | None = None

    @classmethod
    def of(cls, command: list[str], devices: int | None) -> "Sizes":
        """Reads them from the command's flags, from config.json and from what starts.jsonl says of the last start.

        Args:
            devices: devices of each host, if that is known.
        """
        if not commands.trains(command):
            return cls()
        folder = RunFolder(commands.flag(command, "--workdir"))
        content, record = folder.config() or {}, folder.last_start()
        if devices is None and record is not None and record.hosts and record.devices:
            devices = record.devices // record.hosts
        batch = content.get("global_batch")
        config = content.get("config")
        # with --batch-per-device, the run itself takes as many passes as it needs
        passes = isinstance(config, dict) and config.get("data.batch_per_device") is None
        fsdp = re.search(r"fsdp=([1-9]\d*)", commands.flag(command, "--mesh") or "")
        return cls(
            global_batch=batch if isinstance(batch, int) else None,
            microbatches=commands.number(command, "--microbatches", 1) if passes else 1,
            fsdp=int(fsdp[1]) if fsdp else 1,
            devices=devices,
        )

    def largest(self, available: int, at_least: int) -> int | None:
        """Returns the largest number of hosts from `at_least` to `available` that the run can go on with, if any."""
        return next((hosts for hosts in range(available, at_least - 1, -1) if self.fit(hosts)), None)

    def fit(self, hosts: int) -> bool:
        """Whether the run can go on with so many hosts."""
        if self.global_batch is None:
            return True
        devices = hosts * (self.devices or 1)
        if self.global_batch % devices:
            return False
        if self.devices is None:
            return True
        return devices % self.fsdp == 0 and self.global_batch // devices % self.microbatches == 0
