"""launch/slurm.sbatch and launch/jobset.yaml follow the exit codes. No cluster runs here, so srun is a stand-in."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tyro
import yaml
from conftest import ROOT

from bit_jax import config

SBATCH, JOBSET = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "jobset.yaml"

# it ends with the exit codes that codes.txt lists, one at each start; as real ones do, it passes SIGTERM on
SRUN = """#!/bin/bash
echo "$@" >> srun.txt
read -r code < codes.txt
sed -i 1d codes.txt
if [ "$code" = wait ]; then
    trap 'exit 143' TERM
    touch waits
    for _ in {1..600}; do sleep 0.1; done
fi
if [ "$code" -gt 128 ]; then kill -$((code - 128)) $$; fi
exit "$code"
"""


@pytest.fixture
def job(tmp_path):
    """(exit codes of srun) -> the batch script, started where srun and scontrol are stand-ins."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_ins = {
        ".venv/bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "srun": SRUN,
        "scontrol": '#!/bin/sh\necho "$@" > scontrol.txt\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    script = SBATCH.read_text()
    assert "--restarts 10 " in script
    (tmp_path / "job.sbatch").write_text(script.replace("--restarts 10 ", "--restarts 2 --back-off 0.05 "))
    started = []

    def start(*codes):
        (tmp_path / "codes.txt").write_text("".join(f"{code}\n" for code in codes))
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DATA": "tfds",
            "WORKDIR": str(tmp_path / "run"),
            "SLURM_JOB_ID": "77",
        }
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(["bash", "job.sbatch"], cwd=tmp_path, env=environment, **output)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def steps(tmp_path) -> list[str]:
    """The command lines of srun, one for each start."""
    return (tmp_path / "srun.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ((0,), 1, 0),
        ((2, 0), 1, 2),  # a wrong request
        ((137, 139, 0), 3, 0),
        ((137, 137, 137, 0), 3, 1),  # given up
        ((1, 1, 0), 3, 0),  # before the run had begun, as where the processes did not find each other
    ],
)
def test_a_job_starts_its_processes_again_by_their_exit_code(job, tmp_path, codes, starts, code):
    process = job(*codes)
    _, said = process.communicate(timeout=600)
    assert (process.returncode, len(steps(tmp_path))) == (code, starts), said
    assert not (tmp_path / "scontrol.txt").exists()
    assert set(steps(tmp_path)) == {
        f"--wait=90 .venv/bin/python train.py flagperf --data-dir tfds --workdir {tmp_path}/run --batch-per-device 20"
    }


def test_a_job_whose_time_is_over_is_put_back_in_the_queue(job, tmp_path):
    process = job("wait")
    end = time.monotonic() + 600
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120 has it
    _, said = process.communicate(timeout=600)
    assert (process.returncode, len(steps(tmp_path))) == (143, 1), said
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"


def test_the_jobs_own_numbers_fit():
    """srun waits longer than the processes need to notice a death, and the signal comes before the time is over."""
    script = SBATCH.read_text()
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    assert "srun --wait=90 " in script
    assert config.ScaleConfig().host_timeout < 90
    assert "#SBATCH --signal=B:TERM@" in script
    assert "#SBATCH --requeue" in script


def test_a_wrong_request_fails_the_jobset_and_all_else_restarts_it():
    jobset = yaml.safe_load(JOBSET.read_text())
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 10,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
    ]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # podFailurePolicy needs this
    assert container["name"] == "train"
    command, preset, *flags = container["command"]
    assert command == "bit-jax-train"
    flags = [flag.replace("$(JOB_COMPLETION_INDEX)", "1") for flag in flags]
    parsed = tyro.extras.overridable_config_cli(
        config.PRESETS, args=[preset, *flags], config=(tyro.conf.OmitArgPrefixes,)
    )
    assert parsed.scale.hosts == job["completions"] == job["parallelism"]
    assert (
        parsed.scale.coordinator
        == f"{jobset['metadata']['name']}-{hosts['name']}-0-0.{jobset['metadata']['name']}:12345"
    )
    assert parsed.scale.host == 1
