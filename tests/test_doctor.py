"""`train.py --doctor`: hosts that differ are told apart, and a collective that is wrong or late is no success."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from bit_jax import doctor, train
from bit_jax.accounts.timeline import Timeline
from bit_jax.config import DIGITS, RunConfig, ScaleConfig, of_all_hosts
from bit_jax.launch import free_port
from bit_jax.scale import alike, hosts
from bit_jax.scale.sharding import make_mesh
from bit_jax.training import finetuning
from input_pipeline import fingerprint
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.examples import ArraySource

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(doctor, "ELEMENTS", 1024)


def test_both_collectives_over_both_axes(small):
    links = doctor.measure(make_mesh(fsdp=4))
    assert [(link.collective, link.axis, link.devices) for link in links] == [
        ("all-reduce", "data", 2),
        ("all-gather", "data", 2),
        ("all-reduce", "fsdp", 4),
        ("all-gather", "fsdp", 4),
    ]
    for link, sent in zip(links, (1, 0.5, 1.5, 0.75), strict=True):
        assert link.rate == pytest.approx(sent * 4 * 1024 / link.seconds)


@pytest.mark.parametrize("collective", ["all-reduce", "all-gather"])
def test_a_wrong_number_of_one_device_is_noticed(small, monkeypatch, collective):
    right = doctor._spread

    def with_a_broken_device(devices, axis, of_place):
        def numbers(place):
            made = of_place(place)
            made[0, 100] += place == 2
            return made

        return right(devices, axis, numbers)

    monkeypatch.setattr(doctor, "_spread", with_a_broken_device)
    run = {"all-reduce": doctor._all_reduce, "all-gather": doctor._all_gather}[collective]
    with pytest.raises(RunFailed, match=f"{collective} over data gives a wrong result on"):
        run(make_mesh(), "data")


def test_what_only_one_host_has_is_a_difference():
    found = [{"jax": "1", "digits/train": "a"}, {"jax": "1", "synthetic/train": "b"}]
    assert alike.differences(found) == [
        "digits/train is missing on host 1, a on host 0",
        "synthetic/train is b on host 1, missing on host 0",
    ]


def test_flags_that_hosts_have_in_common():
    """Where hosts differed in one of them, they would make other collectives, and wait for each other forever."""
    scale = ScaleConfig(coordinator="a:1", hosts=2, host=1, microbatches=2, host_timeout=9)
    cfg = dataclasses.replace(DIGITS, scale=scale, run=RunConfig(Path("here"), eval_every=3, seed=4))
    flags = of_all_hosts(cfg)
    assert json.loads(json.dumps(flags)) == flags
    assert {name: flags[name] for name in ("--microbatches", "--eval-every", "--seed", "--mixup")} == {
        "--microbatches": 2,
        "--eval-every": 3,
        "--seed": 4,
        "--mixup": 0.0,
    }
    assert not flags.keys() & {"--coordinator", "--host", "--workdir", "--data-dir", "--host-timeout"}


@pytest.mark.parametrize("doctor", [False, True])
def test_hosts_compare_their_flags_before_anything_else(monkeypatch, doctor):
    """The doctor compares more, later, and shows it."""
    cfg = dataclasses.replace(DIGITS, scale=ScaleConfig(doctor=doctor), run=RunConfig(Path("here")))
    asked = []

    def exchange(what, text):
        asked.append(what)
        return [text, text.replace('"--eval-every": null', '"--eval-every": 3')]

    monkeypatch.setattr(hosts, "exchange", exchange)
    with train._joined(cfg, Timeline()):
        assert asked == []  # one host has nothing to compare
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with contextlib.nullcontext() if doctor else pytest.raises(RequestError) as refused, train._joined(cfg, Timeline()):
        pass
    assert asked == ["alike: command"] + ["alike: flags"] * (not doctor)
    if refused is not None:
        assert str(refused.value) == (
            "the hosts differ: --eval-every is 3 on host 1, None on host 0; make them alike, and start all of them "
            "again"
        )
        assert refused.value.on_all_hosts


def test_hosts_that_see_different_work_directories_are_told(monkeypatch):
    """One would return the finished run's result, and the other would wait for it to begin."""
    monkeypatch.setattr(hosts, "exchange", lambda _, text: ['{"the result in run": "there"}', text])
    run: Any = SimpleNamespace(workdir=SimpleNamespace(path=Path("some/run"), finished=lambda: None))
    with pytest.raises(RequestError, match="the result in run is missing on host 1, there on host 0") as refused:
        finetuning.finetune(run)
    assert refused.value.on_all_hosts


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--doctor", ""], ids=["doctor", "run"])
def test_hosts_that_differ_are_told(tmp_path, flags):
    where = f"--coordinator 127.0.0.1:{free_port()} --hosts 2 {flags} --workdir {tmp_path / 'run'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", "digits", *where.split(), "--host", str(host), "--seed", str(3 * host)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    for said, code in ends:
        assert code == 2
        assert "error: the hosts differ: " in said
        assert "--seed is 3 on host 1, 0 on host 0; " in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_data_that_differ_have_another_fingerprint():
    images, labels = np.zeros((1000, 4, 4), np.uint8), np.arange(1000) % 2

    def of(images=images, labels=labels, names=("cat", "dog")):
        return fingerprint(ArraySource("test", images, labels, names))

    last = images.copy()
    last[-1, 3, 3] = 1
    assert of() == of()
    assert len({of(), of(last), of(labels=1 - labels), of(names=("cat", "dogs")), of(images[:-1], labels[:-1])}) == 5


def test_what_takes_too_long_ends_with_its_sentence():
    program = "import time; from bit_jax.scale import hosts\nwith hosts.within(0.2, 'late', 1): time.sleep(10**6)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: late\n")
