"""Runs a command as several hosts: `python -m bit_jax.launch --hosts 2 -- train.py digits ...`.

On this machine, it serves to try out and test what otherwise takes several machines, and to run several processes on
one; with --on, the hosts are other machines. Every process is given --coordinator, --hosts and --host after the
command's own flags. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 go to all of them.

With --restarts, the command is started again when a host dies, hangs or is cut off, and a training run continues from
its last checkpoint on the hosts that are left.
"""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys

import tyro

from bit_jax.supervision import command as commands
from bit_jax.supervision.command import free_port
from bit_jax.supervision.machines import Machine
from bit_jax.supervision.supervisor import Wanted, supervise
from input_pipeline import exits
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.flags import require_positive

HOST_TIMEOUT = 60  # seconds; the default of the commands' --host-timeout
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10"


@dataclasses.dataclass(frozen=True)
class Launch:
    """Runs the command behind -- as several hosts."""

    hosts: int | None = None
    """Number of processes to start, each of which acts as one host. None: one on each machine of --on, or 2.
    With fewer hosts than machines, the other machines are spare ones."""
    devices: int | None = None
    """Number of devices of each process: virtual ones on a CPU, otherwise the next GPUs of its machine.
    None: every process sees all GPUs."""
    port: int | None = None
    """Port that the first process listens on; each start again takes the next one. None: a free one."""
    on: tuple[str, ...] = ()
    """Machines to run the hosts on, one on each, such as a b or user@a user@b.
    They need this folder, this Python and the work directory at the same paths as here, as on a shared disk.
    Without it, all hosts run on this machine."""
    rsh: str = SSH
    """Command that runs another on a machine: its words stand before the machine's name."""
    restarts: int = 0
    """Number of times to start again, in all, after a host has died, hung or been cut off; 0 starts once.
    Progress between does not add to it. A wrong request (exit code 2) is not started again,
    and a fault that returns after the same step, such as a loss that is not finite, once."""
    min_hosts: int | None = None
    """Number of hosts with which a run that has begun may go on while machines do not answer.
    Those are asked again at the next start. None: all hosts."""
    back_off: float = 5.0
    """Seconds before the command is started again. They double each time, up to --back-off-limit,
    until a start gets further than all before."""
    back_off_limit: float = 300.0
    """Largest number of seconds before the command is started again."""
    grace: float = 90.0
    """Seconds after the first failure in which the other hosts end by themselves; what is left is killed then,
    because it is frozen. The command's --host-timeout has to be shorter."""
    silence: float = 120.0
    """Seconds without a sign of life after which a training process is killed, because it is stopped,
    or hangs in a call that holds Python's lock. Training gives a sign each second; commands that give none,
    and those of --command-starts-hosts, are not killed. 0: none is."""
    command_starts_hosts: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run the command once, as it is, because it starts all hosts itself, like srun or mpirun."""

    def check(self, command: list[str]) -> None:
        """Raises RequestError if a number is out of its range, or two flags or a flag and the command do not go
        together."""
        if not command:
            raise RequestError(
                "nothing to run; write the command behind --: python -m bit_jax.launch -- train.py digits"
            )
        numbers = {"--hosts": self.hosts, "--devices": self.devices, "--port": self.port, "--min-hosts": self.min_hosts}
        require_positive(numbers | {"--back-off": self.back_off, "--grace": self.grace})
        if self.restarts < 0:
            raise RequestError(f"--restarts {self.restarts} must not be negative")
        if not self.silence >= 0:
            raise RequestError(f"--silence {self.silence} must not be negative; 0 kills no process for it")
        if self.back_off_limit < self.back_off:
            raise RequestError(f"--back-off-limit {self.back_off_limit} is below --back-off {self.back_off}")
        if self.on and self.number > len(self.on):
            raise RequestError(f"--hosts {self.number} is more than the {len(self.on)} machines of --on, one host each")
        if len({name.rpartition("@")[2] for name in self.on}) < len(self.on):
            raise RequestError(
                f"--on {' '.join(self.on)} names a machine twice, and one host runs on each; use --devices"
            )
        if self.min_hosts is not None and self.min_hosts > self.number:
            raise RequestError(f"--min-hosts {self.min_hosts} is more than --hosts {self.number}")
        if self.command_starts_hosts and (self.on or self.hosts or self.min_hosts or self.port):
            raise RequestError(
                "--command-starts-hosts runs one command, which has its own machines; leave out --on, --hosts, "
                "--min-hosts and --port"
            )
        timeout = commands.number(command, "--host-timeout", HOST_TIMEOUT)
        if self.supervises and self.grace <= timeout:
            raise RequestError(
                f"--grace {self.grace:g} is not above the {timeout} s of --host-timeout, in which hosts end by "
                f"themselves when one is lost; write --grace {timeout + 30}"
            )

    @property
    def supervises(self) -> bool:
        """Whether the command may be started again or elsewhere."""
        return bool(self.restarts or self.on or self.command_starts_hosts)

    @property
    def number(self) -> int:
        """Number of hosts."""
        return 1 if self.command_starts_hosts else self.hosts or len(self.on) or 2


def main() -> int:
    own, command = _split(sys.argv[1:])
    flags = tyro.cli(Launch, description=__doc__, args=own)
    flags.check(command)
    if not flags.supervises:
        return run(command, flags.number, flags.devices, flags.port or free_port())
    rsh = tuple(shlex.split(flags.rsh))
    return supervise(
        Wanted(
            command=command,
            machines=tuple(Machine(name, rsh) for name in flags.on) or (Machine(),) * flags.number,
            hosts=flags.number,
            min_hosts=flags.min_hosts or flags.number,
            devices=flags.devices,
            port=flags.port,
            restarts=flags.restarts,
            back_off=flags.back_off,
            back_off_limit=flags.back_off_limit,
            grace=flags.grace,
            silence=flags.silence,
            as_it_is=flags.command_starts_hosts,
        )
    )


def run(command: list[str], hosts: int, devices: int | None, port: int) -> int:
    """Runs the processes and returns the first exit code of any that is not 0, or 0 if there is none."""
    processes: list[subprocess.Popen] = []
    asked: list[int] = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        for process in processes:
            process.send_signal(number)  # nothing happens if it has ended

    for number in exits.ASKING:  # before the first process, because each one that runs has to be sent what comes
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, forward)
    for host in range(hosts):
        processes.append(
            subprocess.Popen(
                commands.of_host(command, f"127.0.0.1:{port}", hosts, host),
                env=os.environ | (commands.environment(host, devices) if devices is not None else {}),
                process_group=0,  # otherwise a terminal's Ctrl-C reaches them twice, which means "end at once"
            )
        )
        for number in asked:  # what came before it was there; it has nothing to save yet
            processes[-1].send_signal(number)
    codes = [process.wait() for process in processes]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


if __name__ == "__main__":
    sys.exit(exit_code(main))
