"""Several hosts as several processes: the same run as one, and an end with a sentence whatever becomes of one."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import HARDLY_OPTIMIZES, SMALL_DIGITS, last_step

from bit_jax.config import ScaleConfig
from bit_jax.launch import free_port
from bit_jax.scale import coordinator, hosts, schedulers
from bit_jax.training import metrics
from input_pipeline.errors import RequestError

ROOT = Path(__file__).parent.parent
TIMEOUT = 15  # seconds without a sign of life; hosts that share two busy cores are silent for some
RUN = (
    f"train.py digits {SMALL_DIGITS} --global-batch 16 --warmup-steps 2 --decay-steps 6 --steps 8 "
    "--log-every 1 --checkpoint-every 2 --eval-every 100 --precision fp64 --mixup 0.3 --base-lr 0.01 "
    f"--host-timeout {TIMEOUT}"
).split()
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HARMLESS = ("[Gloo]", "step", "continuing")


@pytest.fixture(scope="module")
def environment(compilation_cache):
    return (
        os.environ
        | compilation_cache
        | {
            "XLA_FLAGS": HARDLY_OPTIMIZES,
            "http_proxy": "http://127.0.0.1:9",  # nothing listens there: hosts of a cluster meet without it
        }
    )


@pytest.fixture
def started():
    """(command, environment) -> its process; whatever is left of it at the test's end is killed and waited for, so that
    no other test is blamed for it."""
    processes = []

    def start(command, environment):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        left = processes_of(process)
        process.kill()
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def launch(small_npz, environment, started):
    """(hosts, devices of each, flags) -> the launcher, started."""

    def start(hosts, devices, *flags):
        command = [sys.executable, "-m", "bit_jax.launch", "--hosts", hosts, "--devices", devices, "--", *RUN]
        return started([*command, "--model", small_npz, *flags], environment)

    return start


def processes_of(launcher) -> list[psutil.Process]:
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.Error:
        return []


def host_of(launcher, number) -> psutil.Process:
    return next(process for process in processes_of(launcher) if process.cmdline()[-2:] == ["--host", str(number)])


def until_step(workdir, step, launcher):
    while last_step(workdir) < step:
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.01)


def said_by(launcher) -> tuple[int, list[str]]:
    """Exit code, and what was said but for steps."""
    said, _ = launcher.communicate()
    return launcher.returncode, [line for line in said.splitlines() if line and not line.startswith(HARMLESS)]


def the_same_run(workdir, other):
    """Within 1e-10, which leaves room for another order of summation and for nothing else."""
    expected, found = (dict(np.load(folder / "final.npz")) for folder in (workdir, other))
    for key, array in expected.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-10, err_msg=key)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (workdir, other)]
    losses = [[entry["loss"] for entry in map(json.loads, entries) if "loss" in entry] for entries in lines]
    np.testing.assert_allclose(*losses, rtol=1e-10)
    results = [json.loads((folder / "result.json").read_text()) for folder in (workdir, other)]
    assert results[0]["final_acc1"] == results[1]["final_acc1"]
    return results


def alone(small_npz, environment, devices, *flags):
    command = [sys.executable, *RUN, "--model", small_npz, *flags]
    environment = environment | {"XLA_FLAGS": f"{HARDLY_OPTIMIZES} --xla_force_host_platform_device_count={devices}"}
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True, capture_output=True)


@pytest.mark.slow
def test_two_hosts_of_two_devices_are_one_of_four(launch, small_npz, environment, tmp_path):
    flags = ("--steps", 3, "--decay-steps", 2, "--watch-every", 2)
    alone(small_npz, environment, 4, *flags, "--workdir", tmp_path / "alone")
    by_the_clock = ("--checkpoint-every", 100, "--checkpoint-minutes", 1e-6)
    code, said = said_by(launch(2, 2, *flags, *by_the_clock, "--workdir", tmp_path / "run"))
    assert code == 0, said
    # host 0's wish comes with step 1 and is seen when step 2 has begun; step 3 is the last
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "3"}
    assert len([line for line in said if "final.npz" in line]) == 1  # only the first host prints
    one, two = the_same_run(tmp_path / "alone", tmp_path / "run")
    assert (one["hosts"], one["devices"], one["mesh"]) == (1, 4, {"data": 4, "fsdp": 1})
    assert (two["hosts"], two["devices"], two["mesh"]) == (2, 4, {"data": 4, "fsdp": 1})
    assert two["products"] == {"matrix": "float64", "convolution": "float64"}
    watched = [metrics.read(tmp_path / name / "metrics.jsonl")[0] for name in ("alone", "run")]
    numbers = [next(entry for entry in entries if "watch/grad_norm" in entry) for entries in watched]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-9)


@pytest.mark.slow
def test_whatever_ends_a_host_the_others_say_so_and_the_run_goes_on(launch, small_npz, environment, tmp_path):
    """Asked to end, the first killed, out of disk: and then one host with four devices finishes what two began.

    One that is killed is the same for the others as one that is cut off, which has a test of its own.
    """
    workdir = tmp_path / "run"
    flags = ("--steps", 16, "--workdir", workdir)

    def started_until_it_makes_progress():
        before = last_step(workdir)
        launcher = launch(2, 1, *flags)
        until_step(workdir, before + 1, launcher)
        return launcher

    launcher = started_until_it_makes_progress()
    host_of(launcher, 1).send_signal(signal.SIGTERM)
    code, said = said_by(launcher)
    assert code == 143, said
    sentence = r"error: ended by a signal after step (\d+), which is saved; the same command continues"
    ended = [match[1] for match in (re.fullmatch(sentence, line) for line in said) if match]
    assert len(ended) == 2
    assert len(set(ended)) == 1  # both after the same step

    launcher = started_until_it_makes_progress()
    host_of(launcher, 0).kill()
    code, said = said_by(launcher)
    assert code == 128 + signal.SIGKILL
    assert [line for line in said if line.startswith("error: host 1 of 2: host 0 is not heard any more")], said

    launcher = started_until_it_makes_progress()
    subprocess.run(["prlimit", "--pid", str(host_of(launcher, 0).pid), "--fsize=0"], check=True)
    code, said = said_by(launcher)
    assert code in (1, 2)
    assert [line for line in said if re.match(r"error: host 1 of 2: host 0 ended: .*File too large", line)], said

    code, said = said_by(launch(1, 4, *flags, "--mesh", "fsdp=4"))
    assert code == 0, said
    assert not (workdir / "damaged").exists()
    alone(small_npz, environment, 1, "--steps", 16, "--workdir", tmp_path / "alone")
    _, result = the_same_run(tmp_path / "alone", workdir)
    assert (result["hosts"], result["devices"], result["mesh"]) == (1, 4, {"data": 1, "fsdp": 4})
    assert result["resumed_from_step"] >= int(ended[0])


ENDS_TOGETHER = """
import sys, time
from bit_jax.config import ScaleConfig
from bit_jax.scale import hosts, watch
from input_pipeline.errors import Stopped
from input_pipeline.exits import exit_code

watch.BEAT = 0.1
address, host = sys.argv[1:]

def main():
    with hosts.joined(ScaleConfig(coordinator=address, hosts=2, host=int(host))):
        if host == "0":
            time.sleep(2)  # as where it writes the manifest of a large checkpoint
            print("written", flush=True)
        raise hosts.on_all_hosts(Stopped(15, "ended by a signal"))

sys.exit(exit_code(main))
"""


def test_no_host_ends_before_the_first_has_written_what_all_say_is_saved(started, environment):
    """A host that ends is told to the others, which then end at once; but not where all end for the same reason."""
    address = f"127.0.0.1:{free_port()}"
    both = [started([sys.executable, "-c", ENDS_TOGETHER, address, host], environment) for host in range(2)]
    (first, written), (other, sentence) = (said_by(host) for host in both)
    assert (written, first) == (["written", "error: ended by a signal"], 143)
    assert (sentence, other) == (["error: ended by a signal"], 143)


UNEVEN = """
import dataclasses, sys
from pathlib import Path
from bit_jax import config
from bit_jax.scale import hosts
from bit_jax.scale.spread import Spread
from input_pipeline.exits import exit_code

address, host = sys.argv[1:]
cfg = dataclasses.replace(config.DIGITS, run=config.RunConfig(Path("here")))

def main():
    with hosts.joined(config.ScaleConfig(coordinator=address, hosts=2, host=int(host))):
        for number in range(2):  # the same words may be exchanged again
            assert hosts.exchange("words", f"{host}{number}") == [f"0{number}", f"1{number}"]
        Spread.of(cfg, None)

sys.exit(exit_code(main))
"""


def test_hosts_with_different_numbers_of_devices_say_so_together(started, environment):
    """JAX's own collectives between hosts need as many devices on each."""
    address = f"127.0.0.1:{free_port()}"
    devices = [{}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}]
    both = [
        started([sys.executable, "-c", UNEVEN, address, host], environment | devices[host] | {"JAX_PLATFORMS": "cpu"})
        for host in range(2)
    ]
    for host in both:
        code, said = said_by(host)
        assert code == 2, said
        assert said[-1].startswith("error: host 1 has 2 device(s) and host 0 has 1, but every host needs as many"), said


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_PROCID": "{}",
    "SLURM_LOCALID": "{}",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "{}",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{}",
}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "401408.0;tcp://127.0.0.1:34911"}


# the collectives take less time, and are tried as they are in the test that cuts a cable
SMALL_COLLECTIVES = """
import sys
from bit_jax import doctor, train
from input_pipeline.exits import exit_code
doctor.ELEMENTS = 2**12
sys.exit(exit_code(train.main))
"""


@pytest.mark.parametrize(
    ("said", "flags"),
    [
        (SLURM, ""),
        pytest.param(OPEN_MPI_4, "", marks=pytest.mark.slow),
        pytest.param(OPEN_MPI, "--coordinator 127.0.0.1:4110", marks=pytest.mark.slow),
    ],
    ids=range(3),
)
def test_what_a_scheduler_says_of_its_processes_is_understood(started, small_npz, environment, tmp_path, said, flags):
    own = ["--model", small_npz, "--workdir", tmp_path / "run", "--doctor", *flags.split()]
    command = [sys.executable, "-c", SMALL_COLLECTIVES, *RUN[1:], *own]
    processes = []
    for number in range(2):
        told = environment | {name: text.format(number) for name, text in said.items()}
        processes.append(started(command, told))
    (code, printed), (other_code, other) = (said_by(process) for process in processes)
    assert (code, other_code) == (0, 0), (printed, other)
    assert "hosts: 2, devices: 2 (data=2,fsdp=1); alike, and every collective's result is right" in printed
    assert not other


@pytest.mark.parametrize(
    ("visible", "variables", "own"),
    [
        ("0,1,2,3,4,5,6,7", {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, [1]),
        ("0,1,2,3,4,5,6,7", {"SLURM_STEP_TASKS_PER_NODE": "2(x8),1"}, [4, 5, 6, 7]),  # none is left unused
        ("5", {}, schedulers.ALL),  # srun --gpus-per-task=1
        ("GPU-8a2f", {}, schedulers.ALL),
        ("MIG-GPU-8a2f/1/0", {}, schedulers.ALL),
        ("4,5", {"SLURM_GPUS_PER_TASK": "2"}, schedulers.ALL),
        ("4,5", {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=2"}, schedulers.ALL),
        ("4,5", {"SLURM_TRES_BIND": "gres/gpu:per_task:2"}, schedulers.ALL),
        ("4,5", {"SLURM_TRES_BIND": "gres/gpu:none"}, [1]),
        ("0,1,2,3", {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, schedulers.ALL),
        ("0,1,2", {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "1"}, [1]),
        ("0,1,2", {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "0"}, schedulers.ALL),
        ("0,1", {"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_STEP_NUM_NODES": "1"}, [1]),
        ("", {}, schedulers.ALL),
        ("0,1,-1,2", {}, [1]),  # CUDA stops at what is no device
    ],
)
def test_which_gpus_are_a_processes_own(monkeypatch, visible, variables, own):
    for name, text in (SLURM | {"CUDA_VISIBLE_DEVICES": visible} | variables).items():
        monkeypatch.setenv(name, text.format(1))
    task = schedulers.Task.find()
    assert task is not None
    assert task.own_gpus() == own


@pytest.mark.parametrize(
    ("visible", "variables", "said"),
    [
        ("0,1,2", {"SLURM_STEP_TASKS_PER_NODE": "2"}, "started 2 processes on this machine, which see 3 GPUs"),
        ("0,1", {"SLURM_STEP_TASKS_PER_NODE": "4"}, "started 4 processes on this machine, which see 2 GPUs"),
        ("0,1", {"SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_STEP_TASKS_PER_NODE='' says nothing of node 0"),
        ("0,1", {"SLURM_PROCID": ""}, "SLURM_PROCID='' is no number"),
    ],
)
def test_gpus_that_cannot_be_told_apart_are_refused(monkeypatch, visible, variables, said):
    for name, text in (SLURM | {"CUDA_VISIBLE_DEVICES": visible} | variables).items():
        monkeypatch.setenv(name, text.format(1))

    def own():
        task = schedulers.Task.find()
        assert task is not None
        task.own_gpus()

    with pytest.raises(RequestError, match=re.escape(said)):
        own()


def test_a_port_in_use_is_said_at_once():
    """gRPC itself would share it with the other server."""
    with socket.create_server(("", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"cannot listen on port {port} .*another port"):
            coordinator.start(f"[::]:{port}", 2, heartbeat_timeout=1, shutdown_timeout=1)


def test_the_coordinator_lives_until_the_last_host_is_gone_whatever_signals_come():
    """The next start of the run then finds its port free."""
    port = free_port()
    running = coordinator.start(f"127.0.0.1:{port}", 2, heartbeat_timeout=600, shutdown_timeout=600)
    process, signals = running._process, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    try:
        with socket.create_connection(("127.0.0.1", port)):
            for number in signals:
                process.send_signal(number)
            process.stdin.close()  # as where host 0 dies
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5 * coordinator.GONE)
        assert process.wait(timeout=600) == 0
        assert coordinator.refusal(port) == ""
    finally:
        process.kill()


@pytest.fixture
def namespaces():
    """Two network namespaces, each with an address of its own, and a cable between them: (run in one, cut or mend)."""
    names = [f"bit{os.getpid()}n{host}" for host in range(2)]
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")

    def configure(line: str) -> None:
        subprocess.run([ip, *line.split()], check=True, capture_output=True)

    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in names:
            configure(f"netns add {name}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    try:
        configure(f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        for host, name in enumerate(names):
            configure(f"-n {name} address add {ADDRESSES[host]}/24 dev cable{host}")
            for device in ("lo", f"cable{host}"):
                configure(f"-n {name} link set {device} up")
        yield (
            lambda host: [ip, "netns", "exec", names[host]],
            lambda state: configure(f"-n {names[0]} link set cable0 {state}"),
        )
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], check=True)


@pytest.mark.slow
def test_a_cut_cable_is_told_on_both_sides_and_the_run_goes_on(namespaces, started, small_npz, environment, tmp_path):
    within, cable = namespaces

    def both(port, *flags):
        """Starts two hosts as on two machines: each has an address of its own, and neither has the other's parent."""
        where = ["--coordinator", f"{ADDRESSES[0]}:{port}", "--hosts", 2, "--workdir", tmp_path / "run"]
        command = [sys.executable, *RUN, "--steps", 24, "--model", small_npz, *where, *flags]
        return [started([*within(host), *command, "--host", host], environment) for host in range(2)]

    examined = both(4001, "--doctor")
    (code, said), (other_code, _) = (said_by(host) for host in examined)
    assert (code, other_code) == (0, 0), said
    assert "hosts: 2, devices: 2 (data=2,fsdp=1); alike, and every collective's result is right" in said
    rates = [float(line.split("│")[5]) for line in said if re.match(r"│ all-(reduce|gather)", line)]
    assert len(rates) == 2
    assert min(rates) > 0

    cut_off = both(4002)
    until_step(tmp_path / "run", 6, cut_off[0])
    cable("down")
    for number, host in enumerate(cut_off):
        code, said = said_by(host)
        assert code == 1
        named = f"error: host {number} of 2: host {1 - number} is not heard any more: nothing for {TIMEOUT} s"
        assert any(line.startswith(named) for line in said), said

    cable("up")
    (code, said), (other_code, _) = (said_by(host) for host in both(4003))
    assert (code, other_code) == (0, 0), said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["hosts"], result["steps"]) == (2, 24)
    assert 2 <= result["resumed_from_step"] < 24


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"coordinator": "127.0.0.1:1"}, "needs --hosts and --host"),
        ({"coordinator": "127.0.0.1", "hosts": 2, "host": 0}, "has no port"),
        ({"coordinator": "127.0.0.1:1", "hosts": 2, "host": 2}, "--host 2 is not one of --hosts 2"),
        ({"hosts": 2, "host": 0}, "need --coordinator ADDRESS:PORT"),
    ],
)
def test_flags_that_name_no_host_are_refused(flags, said):
    with pytest.raises(RequestError, match=said), hosts.joined(ScaleConfig(**flags)):
        pass


def test_the_first_signal_ends_a_host_that_waits_for_the_others(started, environment):
    """Python cannot run a signal's handler there."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    process = started([sys.executable, "-c", ENDS_TOGETHER, address, 0], environment)
    listens, end = None, time.monotonic() + 600
    while listens is None:  # the coordinator, to which the host then connects
        assert time.monotonic() < end
        with contextlib.suppress(OSError):
            listens = socket.create_connection(address.split(":"))
        time.sleep(0.05)
    listens.close()
    process.send_signal(signal.SIGTERM)
    assert said_by(process) == (143, ["error: ended by a signal before the run began"])


def test_hosts_that_do_not_find_each_other_say_so(started, environment, tmp_path):
    flags = "--coordinator 127.0.0.1:1 --hosts 2 --host 1 --start-timeout 1".split()
    command = [sys.executable, "train.py", "digits", "--workdir", tmp_path / "run", *flags]
    code, said = said_by(started(command, environment))
    assert code == 1  # another host may have died, so a supervisor tries again
    assert said[-1].startswith("error: the hosts did not find each other in 1 s"), said
    assert not any("Traceback" in line for line in said)
