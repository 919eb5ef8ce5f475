"""Hosts that are slow or freeze are named, rightly, also by one that thaws when the others have ended."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from bit_jax.launch import free_port
from bit_jax.scale.watch import Comparison, Sign


def compared(*whiles: list[Sign]) -> list[list[str]]:
    """What is said after each while of 30 s, given what each host said at its end; the first has nothing before it."""
    comparison = Comparison(0.0)
    return [comparison.of(signs, 30.0 * (number + 1)) for number, signs in enumerate(whiles)]


def hosts(step: int, *waited: float, worked: tuple[float, ...] = ()) -> list[Sign]:
    works = worked or (0.0,) * len(waited)
    return [Sign(step, "steps", seconds, work) for seconds, work in zip(waited, works, strict=True)]


def test_the_host_whose_input_the_others_wait_for_is_named_and_named_again_when_it_keeps_up():
    said = compared(
        hosts(0, 0, 0, 0, 0),
        hosts(60, 0.6, 0.6, 12, 0.6),
        hosts(120, 1.2, 1.2, 24, 1.2),
        hosts(180, 1.8, 1.8, 24.6, 1.8),
    )
    slow = "host 2 of 4 is slow: in a step, of 0.5 s, its devices wait 0.2 s for its input, "
    slow += "those of the median host 0.01 s"
    assert said == [[], [slow], [], ["host 2 of 4 keeps up with the others again"]]


def test_the_host_with_a_slow_device_is_named():
    work = (1e-3, 1e-3, 1.6e-3)
    (_, said) = compared(hosts(0, 0, 0, 0, worked=work), hosts(60, 0, 0, 0, worked=work))
    assert len(said) == 1
    assert said[0].startswith("host 2 of 3 is slow")
    assert said[0].endswith("its slowest device takes 1.6 ms for what the median host's does in 1 ms")


@pytest.mark.parametrize(
    "later",
    [
        hosts(60, 0.5, 0.1, 0.2),  # of 0.5 s a step, nobody waits for 0.01 s
        hosts(60, 9, 10, 12),  # input is slow everywhere, which another sentence says
        hosts(60, 0, 0, 0, worked=(1e-3, 1.1e-3, 1.4e-3)),
        hosts(0, 0, 0, 30),  # no step, as where they compile or evaluate
    ],
)
def test_hosts_that_keep_up_are_not_named(later):
    assert compared(hosts(0, 0, 0, 0), later) == [[], []]


def test_a_sign_of_life_of_another_version_is_understood():
    assert Sign.parsed('{"beat": 7, "step": 3, "colour": "red"}') == (7, Sign(step=3))


WAITS = """
import os, sys, time
from bit_jax.config import ScaleConfig
from bit_jax.scale import hosts, watch
from bit_jax.scale.watch import Sign
from input_pipeline.exits import exit_code

watch.BEAT = 0.1
address, host, timeout = sys.argv[1:]

def main():
    with hosts.joined(ScaleConfig(coordinator=address, hosts=3, host=int(host), host_timeout=int(timeout))):
        hosts.observe(lambda: Sign(41, "saving"), lambda sentence: os.write(1, b"told: " + sentence.encode() + b"\\n"))
        print("joined", flush=True)
        time.sleep(3600)

sys.exit(exit_code(main))
"""


@pytest.fixture
def three():
    """(host timeout) -> three hosts that have found each other and do nothing but watch each other."""
    processes = []

    def join(timeout: int):
        command = [sys.executable, "-c", WAITS, f"127.0.0.1:{free_port()}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        for host in range(3):
            processes.append(subprocess.Popen([*command, str(host), str(timeout)], cwd=ROOT, **pipes))
        for process in processes:
            assert process.stdout.readline() == "joined\n"
        time.sleep(0.5)  # some signs of life
        return processes

    yield join
    for process in processes:
        process.kill()
        process.communicate()


def ended(process) -> tuple[int, list[str]]:
    said, _ = process.communicate(timeout=600)
    return process.returncode, said.splitlines()


def test_a_frozen_host_is_named_with_its_place_and_says_itself_that_it_froze(three):
    frozen, *others = reversed(three(8))
    os.kill(frozen.pid, signal.SIGSTOP)
    for process in others:
        code, said = ended(process)
        sentence = (
            "host 2 is not heard any more: nothing for 8 s, since step 41 (saving); it died, froze, or is cut off"
        )
        assert code == 1
        assert [line for line in said if line.startswith(f"told: {sentence}")]
        assert [line for line in said if line.startswith("error:") and sentence in line], said
    os.kill(frozen.pid, signal.SIGCONT)
    code, said = ended(frozen)
    assert code == 1
    assert [line for line in said if "error: host 2 of 3: this host stood still for" in line], said
    assert not [line for line in said if "not heard" in line], said


def test_a_host_that_stands_still_for_less_than_the_timeout_goes_on_and_blames_nobody(three):
    processes = three(60)
    os.kill(processes[0].pid, signal.SIGSTOP)
    time.sleep(2)  # twenty beats
    os.kill(processes[0].pid, signal.SIGCONT)
    time.sleep(1)
    assert [process.poll() for process in processes] == [None, None, None]
