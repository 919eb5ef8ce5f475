"""Runs whose work directory is in an object store: killed and continued, alone and as two hosts."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import HARDLY_OPTIMIZES, ROOT, SMALL_DIGITS
from object_store import text

from bit_jax import config, doctor, train
from bit_jax.checkpoints import objects
from bit_jax.report import record
from bit_jax.stores.mirror import Mirror
from bit_jax.supervision.records import RunFolder
from bit_jax.training import finetuning
from bit_jax.training.run import Run
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.files import Url

LIMIT = 1e-10  # largest difference of a parameter between runs on different meshes, in float64
FLAGS = (
    f"digits {SMALL_DIGITS} --precision fp64 --global-batch 8 --mixup 0.3 --base-lr 1e-5 --decay-steps 20 40"
    " --checkpoint-every 4 --log-every 2 --eval-every 1000 --host-timeout 20"
).split()
STEPS = 30


def arguments(weights, workdir) -> list[str]:
    return [str(word) for word in (*FLAGS, "--model", weights, "--steps", STEPS, "--workdir", workdir)]


@pytest.fixture(scope="module")
def environment(compilation_cache):
    """Environment variables of the runs."""
    return os.environ | compilation_cache | {"XLA_FLAGS": HARDLY_OPTIMIZES}


def checkpoint_of_another_start(store, known: set[str], process: subprocess.Popen) -> set[str]:
    """Waits for a complete checkpoint that is not among the known ones, and returns all that there are."""
    while True:
        complete = {one.folder for one in objects.Checkpoint.usable(list(store.sizes(objects.FOLDER)))}
        if complete - known:
            return complete
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_npz, environment):
    """The parameters of a run of one host in a directory."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "train.py", *arguments(small_npz, folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_killed_and_continued_elsewhere_it_ends_with_the_same_bytes(
    undisturbed, small_npz, store, tmp_path, environment, x64
):
    """Each start has an empty directory for temporary files, as on another machine. The store has what a directory has,
    and is refused where a directory is."""
    known: set[str] = set()
    for start in range(3):
        scratch = tmp_path / str(start)
        scratch.mkdir()
        process = subprocess.Popen(
            [sys.executable, "train.py", *arguments(small_npz, store.name)],
            cwd=ROOT,
            env=environment | {"TMPDIR": str(scratch)},
            stderr=subprocess.PIPE,
            text=True,
        )
        if start < 2:
            known = checkpoint_of_another_start(store, known, process)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            assert process.communicate()[1].count("continuing s3://") == 1
            assert process.returncode == 0
            assert list(scratch.iterdir()) == []  # the local copy is gone
    store.fetch("final.npz", tmp_path / "final.npz")
    assert (tmp_path / "final.npz").read_bytes() == (undisturbed / "final.npz").read_bytes()
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, lines.splitlines()) if "loss" in line]
        for lines in (text(store, "metrics.jsonl"), (undisturbed / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]
    found = record.read(Url(store.name))
    assert found.finished
    assert found.account is not None
    assert len(found.account.starts) == 3
    assert not store.sizes(".owner")
    names = {path.name for path in undisturbed.iterdir() if path.is_file()}
    assert {key for key in store.sizes() if "/" not in key} == names
    assert objects.steps(store) == [STEPS, STEPS - STEPS % 4]
    assert [key for key in store.sizes("tensorboard") if "tfevents" in key]

    asked = arguments(small_npz, store.name)
    assert finetuning.finetune(Run.of(train.configuration(asked))) == json.loads(text(store, "result.json"))
    with pytest.raises(RequestError, match=r"^s3://.* holds a run of another .*run.seed: 0 there"):
        Run.of(train.configuration([*asked, "--seed", "1"])).workdir.check()
    store.remove(["result.json", "config.json"])
    Mirror.of.cache_clear()  # as in another process
    with pytest.raises(RequestError, match=r"^s3://.* holds checkpoints but no config.json"):
        Run.of(train.configuration(asked)).workdir.check()


@pytest.mark.slow
def test_two_hosts_of_which_one_is_killed_go_on_with_the_store_alone(
    undisturbed, small_npz, store, tmp_path, environment
):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bit_jax.launch", "--hosts", "2", "--devices", "1", "--restarts", "2"),
            *("--back-off", "0.1", "--", "train.py", *arguments(small_npz, store.name), "--mesh", "fsdp=2"),
        ],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint_of_another_start(store, set(), process)
    hosts = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "train.py" in child.cmdline() and child.cmdline()[child.cmdline().index("--host") + 1 :][:1] == ["1"]
    ]
    hosts[-1].kill()
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "host 1 was killed by SIGKILL" in said
    assert "continuing s3://" in said
    sizes = store.sizes(objects.FOLDER)
    last = objects.Checkpoint.usable(list(sizes))[0]
    assert last.step == STEPS
    assert sizes[last.pieces(0)] == pytest.approx(sizes[last.pieces(1)], rel=0.2)  # the hosts share the work
    store.fetch("final.npz", tmp_path / "final.npz")
    with np.load(undisturbed / "final.npz") as alone, np.load(tmp_path / "final.npz") as together:
        assert max(np.abs(alone[key] - together[key]).max() for key in alone) <= LIMIT
    known = RunFolder(store.name)
    begun, start = known.config(), known.last_start()
    assert begun is not None
    assert begun["global_batch"] == 8
    assert start is not None
    assert (start.step, start.ended, start.hosts) == (STEPS, "finished", 2)


def digits(weights, workdir, **flags) -> config.Config:
    return config.Config(
        config.ModelConfig(str(weights)),
        config.DataConfig("digits", resize_to=36, crop=32, global_batch=16, flip=False),
        config.OptimizerConfig(base_lr=0.05, mixup=0.0, warmup_steps=1, decay_steps=(2,), steps=3),
        config.RunConfig(workdir, log_every=1, checkpoint_every=2, **flags),
    )


def test_the_doctor_and_a_run_ask_the_store_for_its_promises(small_npz, url, store, monkeypatch, capsys):
    asked = []

    def measure(mesh):
        asked.append(store.sizes())
        raise RunFailed("enough")

    monkeypatch.setattr(doctor, "measure", measure)
    with pytest.raises(RunFailed, match="enough"):
        doctor.examine(digits(small_npz, url))
    assert f"{url} keeps the promises" in capsys.readouterr().out
    assert asked == [{}]  # and leaves nothing there
    write = Mirror.of(url).store._files.pipe_file
    monkeypatch.setattr(Mirror.of(url).store._files, "pipe_file", lambda path, data, mode="": write(path, data))
    for refused in (doctor.examine, lambda cfg: finetuning.finetune(Run.of(cfg))):
        with pytest.raises(RequestError, match="several processes can create the same object"):
            refused(digits(small_npz, url))
    assert len(asked) == 1
    assert store.sizes() == {}
