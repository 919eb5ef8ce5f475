"""Commands that are started again: what is retried and what is not, on which hosts, and that nothing is left behind.

Most tests run a stand-in for train.py, which dies as it is told. The slow ones train.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import HARDLY_OPTIMIZES, ROOT, SMALL_DIGITS, last_step

from bit_jax import config, launch
from bit_jax.supervision import guard, supervisor
from bit_jax.supervision.causes import Cause, End, cause_of
from bit_jax.supervision.command import flag, number, trains
from bit_jax.supervision.records import Record, RunFolder
from bit_jax.supervision.sizes import Sizes
from bit_jax.supervision.supervisor import Start, has_returned, seconds_before_next, table
from input_pipeline import exits
from input_pipeline.exits import exit_code

# acts.json holds, for each start, what each host does: an exit code, a negative signal, "stop" to freeze, "wait" for a
# signal, be "deaf" to it but note that it came, or what it does after it has given signs of life; and what host 0 then
# writes to starts.jsonl
STAND_IN = """
import ctypes, json, os, signal, subprocess, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
workdir, host = Path(flags["--workdir"]), int(flags.get("--host", 0))
with open(workdir / f"host{host}.txt", "a+") as own:
    print(flags.get("--hosts"), flags.get("--coordinator"), os.environ.get("XLA_FLAGS", ""), file=own)
    own.seek(0)
    start = len(own.readlines()) - 1
print("host", host, "runs", flush=True)
acts = json.loads((workdir / "acts.json").read_text())
act = acts[min(start, len(acts) - 1)]
todo = act["hosts"][host] if host < len(act["hosts"]) else 0
if host == 0 and "line" in act:
    with open(workdir / "starts.jsonl", "a") as file:
        print(json.dumps({"began": time.time()} | act["line"]), file=file)
if todo in ("wait", "deaf"):
    deaf = lambda *_: (workdir / f"host{host}.heard").touch()
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(143)) if todo == "wait" else deaf)
    (workdir / f"host{host}.waits").write_text(str(os.getpid()))
    time.sleep(600)
if todo == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
if todo in ("freezes", "thaws", "hangs", "leaves", "dies within"):
    from bit_jax.process import signs
    if todo == "dies within" and os.fork():
        os.wait()
        time.sleep(5)
        sys.exit(0)
    with signs.giving():
        time.sleep(0.5)
        if todo == "dies within":
            os._exit(1)
        if todo == "thaws":
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"], start_new_session=True)
        if todo in ("freezes", "thaws"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if todo == "hangs":
            ctypes.PyDLL(None).sleep(600)  # with Python's lock
    time.sleep(5 if todo == "leaves" else 0)
    sys.exit(0)
dying = [workdir / f"start{start}.host{other}.dies" for other, does in enumerate(act["hosts"]) if does in (-9, -11)]
if todo == "quiet":
    time.sleep(5)
    sys.exit(0)
if todo < 0:
    dying[0].write_text(str(os.getpid()))
    os.kill(os.getpid(), -todo)
while todo == 1 and dying and not (dying[0].exists() and dying[0].read_text()):
    time.sleep(0.01)
while todo == 1 and dying and os.path.exists("/proc/" + dying[0].read_text()):
    time.sleep(0.01)
time.sleep(0.2 if todo == 1 and dying else 0)  # it notices only now that the other one died
sys.exit(todo)
"""


@pytest.fixture
def workdir(tmp_path):
    """A work directory beside a stand-in for train.py; its run has begun."""
    (tmp_path / "train.py").write_text(STAND_IN)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {}, "global_batch": 4}))
    return folder


def told(workdir, *acts):
    """Writes what the hosts do in each start; the last act is that of all further starts."""
    (workdir / "acts.json").write_text(json.dumps([act if isinstance(act, dict) else {"hosts": act} for act in acts]))


def starts(workdir, host=0) -> list[list[str]]:
    """What a host was given at each of its starts: (number of hosts, coordinator, XLA_FLAGS)."""
    path = workdir / f"host{host}.txt"
    return [line.rstrip("\n").split(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []


def words(workdir, *flags, back_off=0.02) -> list[str]:
    command = ["--", workdir.parent / "train.py", "--workdir", workdir, "--host-timeout", 0]
    return [str(word) for word in ("--back-off", back_off, *flags, *command)]


@pytest.fixture
def launched(monkeypatch, capfd):
    """(arguments of `python -m bit_jax.launch`) -> its exit code, and the lines that it wrote to standard error."""
    before = {number: signal.getsignal(number) for number in exits.ASKING}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        code = exit_code(launch.main)
        return code, capfd.readouterr().err.splitlines()

    yield run
    for asking, handler in before.items():
        signal.signal(asking, handler)


def test_a_killed_host_starts_the_command_again(launched, workdir):
    told(workdir, [1, -9], [0, 0])
    code, said = launched(words(workdir, "--restarts", 3))
    assert code == 0
    assert [len(starts(workdir, host)) for host in (0, 1)] == [2, 2]
    assert said == [
        "launch: host 1 was killed by SIGKILL; the other hosts have 90 s to end",
        "launch: start 1 ended: host 1 was killed by SIGKILL; restart 1 of 3 is in 0.02 s",
        "launch: start 2 is on 2 hosts",
    ]
    ports = [coordinator for _, coordinator, _ in starts(workdir)]
    assert ports[0] != ports[1]  # what is left of the first start may still listen there


def test_a_wrong_request_is_not_started_again(launched, workdir):
    told(workdir, [2, 1])
    code, said = launched(words(workdir, "--restarts", 3))
    assert (code, len(starts(workdir))) == (2, 1)
    assert said == ["launch: host 0 ended with exit code 2: the request is wrong, and would be at every start"]


NAN = {"hosts": [1, 1], "line": {"step": 6, "ended": "failed", "why": "the loss of step 7 is nan; lower --base-lr"}}


def test_a_fault_that_returns_at_the_same_step_is_given_up(launched, workdir):
    told(workdir, NAN)
    code, said = launched(words(workdir, "--restarts", 9))
    assert (code, len(starts(workdir))) == (1, 2)
    assert said[0] == "launch: start 1 ended after step 6: the loss of step 7 is nan; restart 1 of 9 is in 0.02 s"
    assert [line.split()[1] for line in said if line.endswith("  the loss of step 7 is nan")] == ["1", "2"]
    assert said[-1] == (
        "error: a fault of the run's own has returned after step 6, and would return again: the loss of step 7 is nan"
    )


def test_a_fault_at_another_step_or_of_the_machine_is_no_return(launched, workdir):
    lost = {"hosts": [1, 1], "line": {"step": 6, "ended": "lost host", "why": "host 1 is not heard any more"}}
    later = {"hosts": [1, 1], "line": {"step": 8, "ended": "failed", "why": "the loss of step 9 is nan"}}
    told(workdir, lost, lost, NAN, later, [0, 0])
    code, _ = launched(words(workdir, "--restarts", 9))
    assert (code, len(starts(workdir))) == (0, 5)


def test_the_causes_are_listed_when_it_is_given_up(launched, workdir):
    told(workdir, {"hosts": [-9, 1], "line": {"step": 3}}, [1, -11], [-9, 1])
    code, said = launched(words(workdir, "--restarts", 2))
    assert (code, len(starts(workdir))) == (1, 3)
    *_, titles, first, second, third, last = said
    assert titles.split() == ["launch:", "start", "began", "hosts", "step", "cause"]
    rows = [line.removeprefix("launch: ").split(maxsplit=5) for line in (first, second, third)]
    assert [(row[0], *row[3:]) for row in rows] == [
        ("1", "2", "3", "host 0 was killed by SIGKILL"),
        ("2", "2", "?", "host 1 was killed by SIGSEGV"),
        ("3", "2", "?", "host 0 was killed by SIGKILL"),
    ]
    assert last == "error: given up after 2 restarts: host 0 was killed by SIGKILL"


def test_a_frozen_host_is_killed_after_the_grace(launched, workdir):
    told(workdir, [1, "stop"], [0, 0])
    code, said = launched(words(workdir, "--restarts", 1, "--grace", 0.5))
    assert code == 0
    assert said[:2] == [
        "launch: host 1 has not ended in 0.5 s and is killed",
        "launch: start 1 ended: host 0 ended with exit code 1, and host 1 was frozen or waited for others, and was "
        "killed; restart 1 of 1 is in 0.02 s",
    ]


def test_a_host_that_gives_no_sign_of_life_any_more_is_killed_and_started_again(launched, workdir):
    """One is stopped. The other holds Python's lock and can still say where."""
    told(workdir, ["freezes", "hangs"], [0, 0])
    code, said = launched(words(workdir, "--restarts", 1, "--silence", 2))
    assert (code, [len(starts(workdir, host)) for host in (0, 1)]) == (0, [2, 2])
    assert len([line for line in said if "has given no sign of life for 2 s, and is killed" in line]) == 2
    assert any("train.py" in line and "in <module>" in line for line in said), said
    (ended,) = [line for line in said if line.startswith("launch: start 1 ended: ")]
    assert re.search(r": host [01] gave no sign of life any more, and was killed; restart 1 of 1 is in 0.02 s$", ended)


def test_a_single_host_is_watched_as_well(launched, workdir):
    told(workdir, ["freezes"], [0])
    code, said = launched(words(workdir, "--restarts", 1, "--silence", 1, "--hosts", 1))
    assert (code, len(starts(workdir))) == (0, 2)
    assert "host 0 gave no sign of life any more, and was killed; restart 1 of 1" in said[-2]


def test_only_what_is_silent_after_a_sign_of_life_is_killed(launched, workdir):
    """These say that they leave, or die within a host that goes on, or have never given a sign."""
    told(workdir, ["leaves", "dies within", "quiet", 0])
    assert launched(words(workdir, "--restarts", 1, "--silence", 2, "--hosts", 4)) == (0, [])


def test_a_host_that_thaws_in_time_goes_on(launched, workdir):
    told(workdir, ["thaws"])
    assert launched(words(workdir, "--restarts", 1, "--silence", 30, "--hosts", 1)) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--silence", 0), ("--silence", 2, "--command-starts-hosts")])
def test_nobody_is_watched_where_that_is_off(launched, workdir, flags):
    told(workdir, ["thaws"])
    hosts = () if "--command-starts-hosts" in flags else ("--hosts", 1)
    assert launched(words(workdir, "--restarts", 1, *flags, *hosts)) == (0, [])


@pytest.fixture
def rsh(tmp_path):
    """A stand-in for ssh, which runs the command here, but not for machines that have a file NAME.away."""
    script = tmp_path / "rsh"
    script.write_text(f'#!/bin/sh\n[ -e {tmp_path}/"$1".away ] && exit 255\necho Welcome to $1\nexec sh -c "$2"\n')
    script.chmod(0o755)
    return script


def test_the_run_goes_on_with_the_hosts_that_divide_its_batch(launched, workdir, rsh, tmp_path):
    """One of four machines stays away, and three do not divide the global batch of 4. Then it is there again."""
    away = tmp_path / "b.away"
    told(workdir, [-9, 1], [-9, 1, 0, 0], [0, 0, 0, 0])
    away.touch()
    on = ("--on", "u@a", "b", "c", "d", "--rsh", rsh, "--devices", 1)
    code, said = launched(words(workdir, "--restarts", 1, "--min-hosts", 2, *on))
    assert code == 1  # the second start is on the same two
    assert "launch: start 1 is on 2 hosts: u@a, c; b does not answer (exit code 255)" in said
    assert "launch: host 0 on u@a was killed by SIGKILL; the other hosts have 90 s to end" in said
    away.unlink()
    code, _ = launched(words(workdir, "--restarts", 1, "--min-hosts", 2, *on))
    assert code == 0
    assert [hosts for hosts, *_ in starts(workdir)] == ["2", "2", "4"]
    assert {coordinator.split(":")[0] for _, coordinator, _ in starts(workdir)} == {"a"}
    assert {variables for *_, variables in starts(workdir, 1)} == {
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    }


def test_too_few_machines_count_as_a_start(launched, workdir, rsh, tmp_path):
    told(workdir, [0, 0])
    (tmp_path / "b.away").touch()
    flags = ("--restarts", 1, "--rsh", rsh)
    code, said = launched(words(workdir, *flags, "--on", "a", "b"))
    assert (code, starts(workdir)) == (1, [])
    assert said[-1].startswith("error: given up after 1 restart: 1 of 2 hosts can be started, and --min-hosts is 2; b ")
    code, said = launched(words(workdir, *flags, "--on", "a", "b", "c", "--hosts", 2))  # c is a spare one
    assert code == 0
    assert [hosts for hosts, *_ in starts(workdir)] == ["2"]


def test_a_run_begins_on_all_hosts(launched, workdir, rsh, tmp_path):
    told(workdir, [0, 0])
    (tmp_path / "b.away").touch()
    (workdir / "config.json").unlink()
    code, said = launched(words(workdir, "--restarts", 1, "--on", "a", "b", "--min-hosts", 1, "--rsh", rsh))
    assert (code, starts(workdir)) == (1, [])
    assert "1 of 2 hosts can be started, and a run begins on all of them" in said[-1]


def test_a_machine_that_says_nothing_is_away(launched, workdir, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "ANSWERS", 3.0)
    silent = tmp_path / "silent"
    silent.write_text('#!/bin/sh\n[ "$1" = b ] && exec sleep 60\nexec sh -c "$2"\n')
    silent.chmod(0o755)
    monkeypatch.setattr("bit_jax.supervision.machines.PATIENCE", 0.2)
    told(workdir, [0])
    code, said = launched(words(workdir, "--on", "b", "a", "--min-hosts", 1, "--rsh", silent))
    assert code == 0
    assert said == ["launch: start 1 is on 1 host: a; b does not answer"]


def test_a_command_that_starts_its_hosts_itself_is_run_as_it_is(launched, workdir):
    told(workdir, [-9], [0])
    code, said = launched(words(workdir, "--restarts", 1, "--command-starts-hosts"))
    assert code == 0
    assert starts(workdir)[1][:2] == ["None", "None"]
    assert said[0] == "launch: start 1 ended: the command was killed by SIGKILL; restart 1 of 1 is in 0.02 s"


def test_a_signal_while_the_hosts_are_started_reaches_all_of_them(launched, workdir, monkeypatch):
    """Without --restarts: the second host is started after the signal has come."""
    told(workdir, ["wait", "wait"])
    of_host, place = launch.commands.of_host, workdir / "host0.waits"

    def asked_in_between(command, coordinator, hosts, host):
        if host == 1:
            until(lambda: place.exists() and place.read_text())
            os.kill(os.getpid(), signal.SIGTERM)
        return of_host(command, coordinator, hosts, host)

    monkeypatch.setattr(launch.commands, "of_host", asked_in_between)
    code, _ = launched(words(workdir))
    host = psutil.Process(int(place.read_text())) if psutil.pid_exists(int(place.read_text())) else None
    left = host is not None and not ended(host)
    if left:
        host.kill()
    assert (code, left) == (128 + signal.SIGTERM, False)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--restarts", -1), "--restarts -1 must not be negative"),
        (("--min-hosts", 3), "--min-hosts 3 is more than --hosts 2"),
        (("--hosts", 3, "--on", "a", "b"), "--hosts 3 is more than the 2 machines of --on"),
        (("--on", "a", "u@a"), "names a machine twice"),
        (("--restarts", 1, "--grace", 60), "--grace 60 is not above the 60 s of --host-timeout"),
        (("--silence", -1), "--silence -1.0 must not be negative"),
        (("--silence", "nan"), "--silence nan must not be negative"),
        (("--back-off", 0), "--back-off 0.0 must be greater than 0"),
        (("--back-off", 9, "--back-off-limit", 3), "--back-off-limit 3.0 is below --back-off 9.0"),
        (("--command-starts-hosts", "--hosts", 2), "which has its own machines"),
    ],
)
def test_wrong_requests(launched, flags, sentence):
    code, said = launched([*map(str, flags), "--", "train.py"])
    assert code == 2
    assert sentence in said[-1]


def test_the_grace_is_longer_than_the_commands_own_default():
    assert launch.HOST_TIMEOUT == config.ScaleConfig().host_timeout < launch.Launch().grace


@pytest.fixture
def process(workdir):
    """(arguments) -> `python -m bit_jax.launch`, started; it and its hosts are killed in the end."""
    running = []

    def start(*arguments):
        command = [sys.executable, "-m", "bit_jax.launch", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=workdir, **pipes))
        return running[-1]

    yield start
    for started in running:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(started.pid).children(recursive=True):
                child.kill()
        started.kill()
    for left in psutil.process_iter(["cmdline"]):  # without a parent, by a failed test
        if str(workdir) in (left.info["cmdline"] or ()):
            left.kill()
    for started in running:
        started.communicate()


def until(condition, seconds=60):
    """Returns once the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ended(process: psutil.Process) -> bool:
    """Whether the process has ended, even if nobody has asked yet how."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def waiting(workdir) -> list[psutil.Process]:
    """The two hosts, once both wait for a signal."""
    files = [workdir / f"host{host}.waits" for host in range(2)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    return [psutil.Process(int(file.read_text())) for file in files]


def test_a_signal_goes_to_the_hosts_and_nothing_is_started_again(process, workdir):
    told(workdir, ["wait", "wait"])
    started = process(*words(workdir, "--restarts", 3))
    hosts = waiting(workdir)
    started.send_signal(signal.SIGTERM)
    out, said = started.communicate(timeout=600)
    assert (started.returncode, said) == (143, "")
    assert sorted(out.splitlines()) == ["host 0 runs", "host 1 runs"]
    assert all(ended(host) for host in hosts)
    assert len(starts(workdir)) == 1


def test_a_second_signal_kills_the_hosts(process, workdir):
    told(workdir, ["deaf", "deaf"])
    started = process(*words(workdir, "--restarts", 3))
    hosts = waiting(workdir)
    started.send_signal(signal.SIGTERM)
    # two signals that a process on a busy machine has not handled yet are one
    until(lambda: all((workdir / f"host{host}.heard").exists() for host in range(2)), 600)
    assert not any(ended(host) for host in hosts)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=600)
    assert (started.returncode, said) == (143, "error: ended at once, because it was asked a second time\n")
    until(lambda: all(ended(host) for host in hosts))


def test_a_signal_before_the_next_start_ends_the_command(process, workdir):
    told(workdir, [-9, -9])
    started = process(*words(workdir, "--restarts", 3, back_off=60))
    assert any("restart 1 of 3 is in 60 s" in line for line in started.stderr)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=600)
    assert started.returncode == 130
    assert said == "error: ended by a signal before the next start; the same command continues\n"


@pytest.mark.parametrize("killed", ["the supervisor", "a guard"])
def test_no_host_outlives_what_started_it(process, workdir, killed):
    told(workdir, ["wait", "wait"])
    started = process(*words(workdir, "--restarts", 3))
    hosts = waiting(workdir)
    guards = [host.parent() for host in hosts]
    if killed == "the supervisor":
        started.kill()
    else:
        guards[1].kill()
        hosts[0].kill()
        assert any("was killed by SIGKILL" in line for line in started.stderr)
    until(lambda: all(ended(process) for process in [*hosts, *guards]))


def test_a_guard_kills_its_host_when_its_input_ends(workdir):
    told(workdir, ["wait"])
    beside = subprocess.Popen(
        [sys.executable, "-m", guard.__name__],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with beside, beside.stdin as input_, beside.stdout as output:
        assert output.readline().startswith("ready ")
        command = [sys.executable, str(workdir.parent / "train.py"), "--workdir", str(workdir)]
        told_to_it = {"command": command, "environment": {}, "folder": "/", "silence": 0}
        print(json.dumps(told_to_it), file=input_, flush=True)
        assert output.readline() == "host 0 runs\n"
        place = workdir / "host0.waits"
        until(lambda: place.exists() and place.read_text())
        host = psutil.Process(int(place.read_text()))
        assert host.cwd() == "/"
        host.suspend()  # even then
        input_.close()
        assert beside.wait(60) == 128 + signal.SIGKILL
        assert ended(host)


def test_a_guard_that_is_not_needed_ends(workdir):
    done = subprocess.run(
        [sys.executable, "-m", guard.__name__],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input="",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < int(done.stdout.removeprefix("ready ")) < 2**16


LOST, ONE, TWO = End("host 0", 137), End("host 0", 1), End("host 1", 2)


@pytest.mark.parametrize(
    ("ends", "record", "fault", "sentence"),
    [
        ([End("host 0", 0), End("host 1", 0)], Record(ended="finished"), None, ""),
        (
            [ONE, End("host 1", 137)],
            Record(6, "lost host", "host 1 is silent"),
            "machine",
            "host 1 was killed by SIGKILL",
        ),
        ([LOST, TWO], None, "machine", "host 0 was killed by SIGKILL"),  # the other one waited for it at the start
        ([ONE, TWO], None, "request", "host 1 ended with exit code 2"),
        ([TWO, End("host 0", 137, killed=True)], None, "request", "host 1 ended with exit code 2"),
        ([End("host 1 on b", 255, far=True), ONE], None, "machine", "the connection to host 1 on b was lost"),
        ([End("host 1", 255)], None, "machine", "host 1 was killed by signal 127"),
        ([End("host 0", 143), End("host 1", 143)], None, "machine", "host 0 was asked to end by SIGTERM"),
        ([ONE, ONE], Record(6, "lost host", "host 1 is not heard any more: nothing"), "machine", "host 1 is not heard"),
        ([ONE, ONE], Record(6, "lost host", "host 1 ended: the disk is full"), "run", "host 1 ended: the disk is full"),
        ([ONE, ONE], Record(6, "stalled", "the run has made no progress; so"), "machine", "the run has made no progr"),
        (
            [ONE, End("host 1", 137, silent=True)],
            None,
            "machine",
            "host 1 gave no sign of life any more, and was killed",
        ),
        ([ONE, ONE], Record(6, "failed", "the loss is nan"), "run", "the loss is nan"),
        ([ONE, ONE], Record(6, "defect", ""), "run", "host 0 ended with exit code 1"),
        ([ONE, ONE], Record(6), "run", "host 0 ended with exit code 1"),
        ([ONE, ONE], None, "machine", "host 0 ended with exit code 1 before the run had begun"),
        (
            [ONE, TWO],
            Record(6, "lost host", "host 1 ended: no space; free some", began=True),
            "run",
            "host 1 ended: no",
        ),
        ([TWO], Record(6, "refused", "cannot write; free space", began=True), "run", "cannot write"),
    ],
)
def test_whose_fault_it_is(ends, record, fault, sentence):
    cause = cause_of(ends, record)
    assert (None if cause is None else cause.fault) == fault
    assert cause is None or cause.sentence.startswith(sentence)


def failed(*steps, fault="run", kind="failed"):
    return [Start("", 2, step, Cause(fault, "", kind)) for step in steps]


def test_the_back_off_doubles_until_there_is_progress():
    def seconds(*steps):
        return [seconds_before_next(failed(*steps[:count]), 5, 30) for count in range(1, len(steps) + 1)]

    assert seconds(None, None, None, None, None) == [5, 10, 20, 30, 30]
    assert seconds(100, 100, 90, 140, 140, None, 141) == [5, 10, 20, 5, 10, 20, 5]
    assert seconds(None, None, 0) == [5, 10, 5]


def test_which_fault_returns():
    assert not has_returned(failed(6))
    assert has_returned(failed(6, 6))
    assert has_returned(failed(6, 8, 6))
    assert not has_returned(failed(6, 8))
    assert has_returned(failed(None, None))
    assert not has_returned(failed(6, 6, fault="machine"))
    assert not has_returned([*failed(6), *failed(6, kind="defect")])


def test_a_table_of_starts():
    lines = table([Start("2026-01-01 00:00:00", 2, 140, Cause("machine", "it died")), *failed(None)])
    assert lines[0] == "start  began                hosts  step  cause"
    assert lines[1] == "1      2026-01-01 00:00:00  2      140   it died"
    assert lines[2].split() == ["2", "2", "?"]


def test_what_a_command_says_of_itself():
    words = "train.py digits --workdir a_b --mesh=data=2,fsdp=2 --workdir b --host_timeout=9 --last".split()
    assert flag(words, "--host-timeout") == "9"
    assert [flag(words, name) for name in ("--workdir", "--mesh", "--other", "--last")] == [
        "b",
        "data=2,fsdp=2",
        None,
        None,
    ]
    assert [number(["--hosts", text], "--hosts", 7) for text in ("3", "x", "-3")] == [3, 7, 7]
    assert trains(["/x/train.py"])
    assert trains(["-m", "bit_jax.train", "digits"])
    assert not trains(["-m", "bit_jax.evaluate"])


def test_starts_are_read_whatever_state_their_file_is_in(tmp_path):
    workdir, file = RunFolder(str(tmp_path)), tmp_path / "starts.jsonl"
    assert (workdir.length(), workdir.last_start()) == (0, None)
    lines = [{"began": 1, "step": 9, "hosts": 4, "devices": 8}, {"began": 2, "hosts": 2, "devices": 4}]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"began": 2, "step": 12}]))
    assert workdir.last_start() == Record(12, None, "", devices=4, hosts=2)
    with file.open("a") as more:
        more.write('{"began": 2, "step": 13, "ended": "failed", "wh')
    assert workdir.last_start() == Record(12, None, "", devices=4, hosts=2)
    length = workdir.length()
    with file.open("ab") as more:
        more.write(b'\n[1]\n\xff\n{"began": 3, "step": "?", "ended": "lost host", "why": "gone"}\n')
    assert workdir.last_start(length) == Record(None, "lost host", "gone")
    assert workdir.last_start(workdir.length()) is None
    for nowhere in (None, "gs://bucket/run"):
        assert (RunFolder(nowhere).last_start(), RunFolder(nowhere).config(), RunFolder(nowhere).length()) == (
            None,
            None,
            0,
        )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes(), 7),
        (Sizes(global_batch=12), 6),
        (Sizes(global_batch=128, devices=8), 4),
        (Sizes(global_batch=128, devices=8, microbatches=8), 2),
        (Sizes(global_batch=96, devices=2, fsdp=8), 4),
        (Sizes(global_batch=5, devices=8), None),
    ],
)
def test_the_largest_number_of_hosts_that_divides_the_batch(sizes, expected):
    assert sizes.largest(7, at_least=1) == expected
    assert sizes.largest(7, at_least=7) == (7 if expected == 7 else None)


def test_sizes_come_from_the_flags_and_the_work_directory(workdir):
    command = f"train.py digits --workdir {workdir} --mesh fsdp=2 --microbatches 2".split()
    assert Sizes.of(command, 1) == Sizes(4, 2, 2, 1)
    assert Sizes.of(["-m", "bit_jax.evaluate", *command[1:]], 1) == Sizes()
    (workdir / "starts.jsonl").write_text('{"began": 1, "hosts": 2, "devices": 16}\n')
    content = {"config": {"data.batch_per_device": None}, "global_batch": 64}
    (workdir / "config.json").write_text(json.dumps(content))
    assert Sizes.of(command, None) == Sizes(64, 2, 2, 8)
    content["config"]["data.batch_per_device"] = 4
    (workdir / "config.json").write_text(json.dumps(content))
    assert Sizes.of(command, None) == Sizes(64, 1, 2, 8)
    (workdir / "config.json").write_text("{")
    assert Sizes.of(command, None) == Sizes(None, 1, 2, 8)


TIMEOUT = 15  # seconds without a sign of life; hosts that share two busy cores are silent for some
TRAIN = (
    f"train.py digits {SMALL_DIGITS} --warmup-steps 2 --decay-steps 6 --log-every 1 --checkpoint-every 2 "
    "--eval-every 100 --precision fp64 --mixup 0.3 --base-lr 0.01 --steps 16"
).split()


@pytest.fixture(scope="module")
def environment(compilation_cache):
    return os.environ | compilation_cache | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": HARDLY_OPTIMIZES}


@pytest.fixture(scope="module")
def undisturbed(small_npz, environment, tmp_path_factory):
    """The work directory of a run on one device that nothing happens to."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, *TRAIN, "--model", small_npz, "--global-batch", 16, "--workdir", workdir]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True, capture_output=True)
    return workdir


@pytest.fixture
def trained(small_npz, environment, tmp_path):
    """(the launcher's flags, train.py's) -> the launcher, started; it writes to said.txt."""
    running = []

    def launched(own, *flags):
        command = [sys.executable, "-m", "bit_jax.launch", "--devices", 1, "--grace", TIMEOUT + 10, *own, "--", *TRAIN]
        command += ["--model", small_npz, "--workdir", tmp_path / "run", "--host-timeout", TIMEOUT, *flags]
        with open(tmp_path / "said.txt", "wb") as said:
            output = {"stdout": subprocess.DEVNULL, "stderr": said}
            running.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **output))
        return running[-1]

    yield launched
    for started in running:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(started.pid).children(recursive=True):
                child.kill()
        started.kill()
        started.wait()


def host_of(launcher, host) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(child for child in children if child.cmdline()[-2:] == ["--host", str(host)])


def until_beyond(workdir, step, launcher, said):
    until(lambda: last_step(workdir) > step or launcher.poll() is not None, 300)
    assert launcher.poll() is None, said.read_text()


def the_same_weights(one, other):
    """Within 1e-10, which leaves room for another order of summation and for nothing else."""
    expected, found = (dict(np.load(folder / "final.npz")) for folder in (one, other))
    for key, array in expected.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-10, err_msg=key)


@pytest.mark.slow
def test_a_run_goes_on_by_itself_with_fewer_hosts_and_then_with_all(trained, undisturbed, rsh, tmp_path):
    """Two hosts begin it with 8 rows each. The first one freezes, and its machine stays away: the other one takes all
    16, in two passes. It is killed, and the machine is back."""
    workdir, said = tmp_path / "run", tmp_path / "said.txt"
    on = ("--on", "127.0.0.1", "localhost", "--min-hosts", 1, "--rsh", rsh, "--restarts", 2, "--back-off", 0.5)
    launcher = trained(on, "--batch-per-device", 8, "--mesh", "data=2")
    until_beyond(workdir, 4, launcher, said)
    (tmp_path / "127.0.0.1.away").touch()
    frozen = host_of(launcher, 0)
    frozen.suspend()
    until(lambda: "start 2 is on 1 host: localhost; 127.0.0.1 does not answer" in said.read_text(), 300)
    assert ended(frozen)
    on_two = last_step(workdir)
    until_beyond(workdir, on_two + 4, launcher, said)  # a checkpoint is written in between
    (tmp_path / "127.0.0.1.away").unlink()
    host_of(launcher, 0).kill()
    assert launcher.wait(600) == 0, said.read_text()

    assert "host 0 on 127.0.0.1 has not ended in 25 s and is killed" in said.read_text()
    assert "the global batch of 16 that it began with; that is 16 rows a device (devices: 1)" in said.read_text()
    assert "in passes of 8" in said.read_text()
    assert "--mesh data=2 does not fit the present number of devices, 1" in said.read_text()
    assert "start 3 is on 2 hosts" in said.read_text()
    result = json.loads((workdir / "result.json").read_text())
    assert (result["hosts"], result["global_batch"], result["microbatches"]) == (2, 16, 1)
    assert on_two < result["resumed_from_step"] < 16
    the_same_weights(undisturbed, workdir)
