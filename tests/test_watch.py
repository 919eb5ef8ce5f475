"""Hosts that are slow or freeze are named, rightly, also by one that thaws when the others have ended."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import pytest
from conftest import ROOT

from bit_jax.launch import free_port
from bit_jax.scale import same_work
from bit_jax.scale.watch import TO_READ, Comparison, Sign, Watch


def compared(*whiles: list[Sign], seconds: float = 30.0) -> list[list[str]]:
    """What is said after each while, given what each host said at its end. All of them have taken a step before."""
    comparison = Comparison()
    count = len(whiles[0])
    assert comparison.of(hosts(1, *[0.0] * count), 0.0) == []
    return [comparison.of(signs, seconds * number) for number, signs in enumerate(whiles, 1)]


def hosts(step: int, *waited: float, worked: tuple[float, ...] = ()) -> list[Sign]:
    works = worked or (0.0,) * len(waited)
    return [Sign(step, "steps", seconds, work) for seconds, work in zip(waited, works, strict=True)]


def test_the_host_whose_input_the_others_wait_for_is_named_and_named_again_when_it_keeps_up():
    said = compared(
        hosts(2, 0, 0, 0, 0),
        hosts(62, 0.6, 0.6, 12, 0.6),
        hosts(122, 1.2, 1.2, 24, 1.2),
        hosts(182, 1.8, 1.8, 24.6, 1.8),
    )
    slow = "host 2 of 4 is slow: of the 0.5 s from one step to the next, its devices wait 0.2 s for its input, "
    slow += "those of the median host 0.01 s"
    assert said == [[], [slow], [], ["host 2 of 4 keeps up with the others again"]]


def test_the_host_with_a_slow_device_is_named():
    work = (1e-3, 1e-3, 1.6e-3)
    _, said = compared(hosts(2, 0, 0, 0, worked=work), hosts(62, 0, 0, 0, worked=work))
    assert said == [
        "host 2 of 3 is slow: its slowest device takes 1.6 ms for what the median host's does in 1 ms",
    ]


@pytest.mark.parametrize(
    "later",
    [
        hosts(62, 0.5, 0.1, 0.2),  # of 0.5 s a step, nobody waits for 0.01 s
        hosts(62, 9, 10, 12),  # input is slow everywhere, which another sentence says
        hosts(62, 0, 0, 0, worked=(1e-3, 1.1e-3, 1.4e-3)),
        hosts(2, 0, 0, 30),  # no step, as where they compile or evaluate
    ],
)
def test_hosts_that_keep_up_are_not_named(later):
    assert compared(hosts(2, 0, 0, 0), later) == [[], []]


def test_hosts_are_compared_over_so_many_steps_that_one_more_or_less_does_not_matter():
    """All wait for 4 s in each of their steps of 10 s; host 1 speaks a moment after a wait, and host 0 before one."""
    once, twice = hosts(4, 4, 12, 4), hosts(14, 44, 52, 44)
    assert compared(hosts(2, 0, 0, 0), once, twice) == [[], [], []]
    assert len(compared(hosts(2, 0, 0, 0), once, hosts(14, 44, 80, 44))[2]) == 1


def test_what_comes_before_the_first_step_of_this_start_does_not_count():
    """A run continues from step 1000. Its first steps wait for the first batch, host 1's for 4 s."""
    comparison = Comparison()
    moments = [hosts(0, 0, 0), hosts(1000, 0, 0), hosts(1001, 0, 0), hosts(1061, 0, 4.2), hosts(1121, 0, 4.5)]
    moments[2][1] = Sign(1000, "reading", 0.0)  # host 1 last spoke before it had its batch
    assert [comparison.of(signs, 30.0 * number) for number, signs in enumerate(moments)] == [[]] * 5
    assert len(comparison.of(hosts(1181, 0, 12), 150.0)) == 1


def test_a_device_is_slow_only_if_it_is_twice_in_a_row(monkeypatch):
    times = iter([9, 1, 3, 9, 2, 5])  # of two devices, in three measurements
    monkeypatch.setattr(same_work, "_seconds", lambda device: next(times))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda: ["one", "other"])
    work, seconds = same_work.SameWork(), []
    for _ in range(3):
        work.measure()
        seconds.append(work.seconds)
    assert seconds == [0, 3, 5]


def test_the_work_is_measured_on_a_device():
    assert 0 < same_work._seconds(jax.devices()[0]) < 60


def test_a_host_that_has_taken_no_step_is_known_by_what_it_does():
    signs = Sign(), Sign(0, "compilation"), Sign(4, "steps"), Sign(4)
    assert [sign.place for sign in signs] == [
        "",
        " (compilation)",
        ", since step 4 (steps)",
        ", since step 4",
    ]


def test_a_sign_of_life_of_another_version_is_understood():
    assert Sign.parsed('{"beat": 7, "step": 3, "colour": "red"}') == (7, Sign(step=3))


class Store:
    """The coordinator's store, in this process."""

    def __init__(self):
        self.kept, self.answers = {}, True

    def key_value_set(self, key, value, allow_overwrite=False):
        assert self.answers, "it does not answer"
        self.kept[key] = value

    def key_value_dir_get(self, prefix):
        assert self.answers, "it does not answer"
        return [(key, value) for key, value in self.kept.items() if key.startswith(prefix)]


BEAT = 0.05  # seconds; a test waits for some of them


@pytest.fixture
def watching(monkeypatch):
    """(index of this host, of two; seconds of silence) -> its watch, the store, and a queue of what it ends with."""
    watches = []

    def watch(host: int, timeout: Any = 600):
        store, ends = Store(), queue.SimpleQueue()

        def end(sentence, code):
            ends.put((sentence, code))
            watches[-1]._stopping.set()  # there would be no process any more

        monkeypatch.setattr("bit_jax.scale.watch.BEAT", BEAT)
        monkeypatch.setattr("bit_jax.scale.jax_internals.store", lambda: store)
        monkeypatch.setattr(jax, "process_index", lambda: host)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr("input_pipeline.exits.end_at_once", end)
        watches.append(Watch(timeout))
        return watches[-1], store, ends

    yield watch
    for watch in watches:
        watch.stop()


@pytest.mark.parametrize(
    ("host", "named"),
    [
        (0, "the coordinator, a process beside host 0's, is not heard any more: nothing for 0.5 s; it froze"),
        (1, "host 0 is not heard any more: nothing for 0.5 s; it died or froze, or one of the two hosts is cut off"),
    ],
)
def test_where_the_store_does_not_answer_no_host_blames_itself_or_only_the_other(watching, host, named):
    _, store, ends = watching(host, timeout=0.5)
    store.answers = False
    sentence, code = ends.get(timeout=600)
    assert (sentence, code) == (
        f"host {host} of 2: {named}; start all hosts again to continue from the last checkpoint",
        1,
    )


def test_a_host_that_hears_of_a_failure_ends_after_the_host_that_failed(watching):
    """A scheduler takes the exit code of the first process that ends for that of the job: 2 is a wrong request."""
    watch, store, ends = watching(1)
    told = queue.SimpleQueue()
    watch.told_of_loss.append(lambda sentence: told.put(time.monotonic()))
    store.kept["bit_jax/failed/0"] = "--steps 0 must be positive"
    heard = told.get(timeout=600)
    assert ends.get(timeout=600)[0].startswith("host 1 of 2: host 0 ended: --steps 0 must be positive; ")
    assert time.monotonic() - heard > TO_READ * BEAT  # after which host 0 ends


def test_a_host_that_fails_by_itself_meanwhile_says_so(watching):
    watch, store, ends = watching(1)
    heard = threading.Event()
    watch.told_of_loss.append(lambda sentence: heard.set())
    store.kept["bit_jax/failed/0"] = "--steps 0 must be positive"
    assert heard.wait(60)
    watch.stop()  # as at the end of `leave`
    with pytest.raises(queue.Empty):
        ends.get(timeout=10 * BEAT)


def test_no_thread_is_in_the_store_any_more_when_the_watch_has_stopped(watching):
    """Python ends a thread that comes back to it at its own end, within gRPC's C++, by aborting the process."""
    watch, store, _ = watching(1)
    asked = threading.Event()

    def answer_late(prefix):
        asked.set()
        time.sleep(10 * BEAT)
        return []

    store.key_value_dir_get = answer_late
    assert asked.wait(600)
    watch.stop()
    assert not {"signs of life", "watch"} & {thread.name for thread in threading.enumerate()}


def test_the_last_sentence_is_said_though_nobody_reads():
    """A full pipe must not keep a process from ending."""
    code = "import os; from input_pipeline.exits import end_at_once; os.write(2, b'x' * 65536); end_at_once('no', 7)"
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=writing)
    try:
        assert process.wait(timeout=600) == 7
    finally:
        process.kill()
        os.close(reading)
        os.close(writing)


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


def test_a_host_that_stands_still_goes_on_or_is_named_with_its_place_and_says_itself_that_it_froze(three):
    """It goes on, and blames nobody, if it stood still for less than the timeout."""
    processes = three(10)
    os.kill(processes[0].pid, signal.SIGSTOP)
    time.sleep(2)  # twenty beats
    os.kill(processes[0].pid, signal.SIGCONT)
    time.sleep(1)
    assert [process.poll() for process in processes] == [None, None, None]

    frozen, *others = reversed(processes)
    os.kill(frozen.pid, signal.SIGSTOP)
    for process in others:
        code, said = ended(process)
        sentence = (
            "host 2 is not heard any more: nothing for 10 s, since step 41 (saving); it died, froze, or is cut off"
        )
        assert code == 1
        assert [line for line in said if line.startswith(f"told: {sentence}")]
        assert [line for line in said if line.startswith("error:") and sentence in line], said
    os.kill(frozen.pid, signal.SIGCONT)
    code, said = ended(frozen)
    assert code == 1
    assert [line for line in said if "error: host 2 of 3: this host stood still for" in line], said
    assert not [line for line in said if "not heard" in line], said
