"""Several hosts as several processes: the same run as one, and an end with a sentence whatever becomes of one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT = 5  # seconds without a sign of life
RUN = (
    "train.py digits --global-batch 16 --resize-to 36 --crop 32 --warmup-steps 2 --decay-steps 8 --steps 10 "
    "--log-every 1 --checkpoint-every 2 --eval-every 5 --precision fp64 --mixup 0.3 --base-lr 0.05 "
    f"--host-timeout {TIMEOUT}"
).split()
HARMLESS = ("[Gloo]", "step", "continuing")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def launch(small_npz, environment):
    """(hosts, devices of each, flags) -> the launcher, started."""
    launched = []

    def start(hosts, devices, *flags):
        command = [sys.executable, "-m", "bit_jax.launch", "--hosts", hosts, "--devices", devices, "--", *RUN]
        command += ["--model", small_npz, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        launched.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes))
        return launched[-1]

    yield start
    for process in launched:
        for left in (process, *processes_of(process)):
            left.kill()


def processes_of(launcher) -> list[psutil.Process]:
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.Error:
        return []


def host_of(launcher, number) -> psutil.Process:
    return next(process for process in processes_of(launcher) if process.cmdline()[-2:] == ["--host", str(number)])


def until_step(workdir, step, launcher):
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.01)


def said_by(launcher, seconds=120) -> tuple[int, list[str]]:
    """Exit code, and what was said but for steps."""
    said, _ = launcher.communicate(timeout=seconds)
    return launcher.returncode, [line for line in said.splitlines() if line and not line.startswith(HARMLESS)]


def test_stopped_killed_and_spread_anew_it_is_the_run_of_one_host(launch, small_npz, environment, tmp_path):
    """Two hosts of 4 devices: one is asked to end, then one is killed; four hosts of 1 finish. float64, mixup."""
    workdir = tmp_path / "run"
    launcher = launch(2, 4, "--workdir", workdir, "--mesh", "data=2,fsdp=4")
    until_step(workdir, 1, launcher)
    host_of(launcher, 1).send_signal(signal.SIGTERM)
    code, said = said_by(launcher)
    assert code == 143, said
    ended = [
        re.fullmatch(r"error: ended by a signal after step (\d+), which is saved; the same .*", line) for line in said
    ]
    steps = {match[1] for match in ended if match}
    assert len(steps) == 1  # all after the same
    assert len(list(filter(None, ended))) == 2
    stopped = int(steps.pop())

    launcher = launch(2, 4, "--workdir", workdir, "--mesh", "data=2,fsdp=4", "--steps", 10)
    until_step(workdir, stopped + 1, launcher)
    host_of(launcher, 1).kill()
    killed = time.monotonic()
    code, said = said_by(launcher)
    assert time.monotonic() - killed < TIMEOUT + 20
    assert code == 1
    named = f"error: host 0 of 2: host 1 is not heard any more: nothing for {TIMEOUT} s; it died, or is cut off"
    assert any(line.startswith(named) for line in said), said

    code, said = said_by(launch(4, 1, "--workdir", workdir, "--mesh", "fsdp=4"))
    assert code == 0, said
    result = json.loads((workdir / "result.json").read_text())
    assert (result["hosts"], result["devices"], result["mesh"]) == (4, 4, {"data": 1, "fsdp": 4})
    assert result["resumed_from_step"] >= stopped

    alone = [sys.executable, *RUN, "--model", small_npz, "--workdir", tmp_path / "alone"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(list(map(str, alone)), cwd=ROOT, env=environment | flags, check=True, capture_output=True)
    expected, found = (dict(np.load(tmp_path / name / "final.npz")) for name in ("alone", "run"))
    for key, array in expected.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-10, err_msg=key)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("alone", "run")]
    losses = [[entry["loss"] for entry in map(json.loads, entries) if "loss" in entry] for entries in lines]
    np.testing.assert_allclose(*losses, rtol=1e-10)
    alone_result = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert alone_result["final_acc1"] == result["final_acc1"]
    assert alone_result["products"] == {"matrix": "float64", "convolution": "float64"}


def test_the_first_host_killed_or_failing_is_named_too(launch, tmp_path):
    workdir = tmp_path / "run"
    launcher = launch(2, 1, "--workdir", workdir, "--steps", 10000)
    until_step(workdir, 1, launcher)
    host_of(launcher, 0).kill()
    code, said = said_by(launcher)
    assert code == 128 + signal.SIGKILL
    assert [line for line in said if line.startswith("error: host 1 of 2: host 0 is not heard any more")], said
    # an error of one host alone: the others say whose it was
    launcher = launch(2, 1, "--workdir", workdir, "--steps", 10000)
    until_step(workdir, 3, launcher)
    first = host_of(launcher, 0)
    subprocess.run(["prlimit", "--pid", str(first.pid), "--fsize=0"], check=True)
    code, said = said_by(launcher)
    assert code in (1, 2)
    assert [line for line in said if re.match(r"error: host 1 of 2: host 0 ended: .*File too large", line)], said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--coordinator 127.0.0.1:1", "needs --hosts and --host"),
        ("--coordinator 127.0.0.1 --hosts 2 --host 0", "has no port"),
        ("--coordinator 127.0.0.1:1 --hosts 2 --host 2", "--host 2 is not one of --hosts 2"),
        ("--hosts 2 --host 0", "need --coordinator ADDRESS:PORT"),
        ("--coordinator 127.0.0.1:1 --hosts 2 --host 1 --start-timeout 1", "did not find each other in 1 s"),
    ],
)
def test_wrong_requests(tmp_path, flags, said):
    command = [sys.executable, "train.py", "digits", "--workdir", str(tmp_path / "run"), *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
