"""FlagPerf's case and FlagPerf's definitions: what its launcher passes and reads, and its figures by hand."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from conftest import HARDLY_OPTIMIZES, ROOT
from PIL import Image

from bit_jax import config
from bit_jax.accounts.timeline import Timeline
from bit_jax.launch import free_port
from bit_jax.process.reporter import Reporter
from bit_jax.report import card
from bit_jax.training import figures, finetuning, run, steps
from bit_jax.training.evaluation import evaluate
from bit_jax.training.flagperf import Rank0Share, epoch_steps, p_core_unsynchronized
from bit_jax.training.hyperrule import Recipe, Schedule
from bit_jax.training.optimizer import learning_rate
from bit_jax.training.workdir import Workdir
from input_pipeline.errors import RequestError
from parity.in_torch import schedule as in_torch
from parity.sides.recorded import RecordedRun

CASE = ROOT / "launch" / "flagperf" / "training"
# what driver and utils of a FlagPerf checkout are taken from: one of your own, or the stand-ins
OF_FLAGPERF = Path(os.environ.get("FLAGPERF_CHECKOUT", ROOT / "tests" / "data" / "flagperf")) / "training"
FINISHED = {
    "e2e_time": "e2e_time",
    "training_images_per_second": "p_whole",
    "converged": "converged",
    "final_accuracy": "final_acc1",
    "raw_train_time": "raw_train_time",
    "init_time": "init_time",
    "num_trained_samples": "trained_examples",
    "throughput(ips)_raw": "p_whole",
    "throughput(ips)_no_eval": "p_train",
    "throughput(ips)_pure_compute": "p_core",
}


def flagperfs_rate(step: int, lr: float, warmup: int, decays: tuple[int, ...]) -> float:
    """FlagPerf's get_lr for a step of an epoch, by its formula: a tenth for each number that is below the step."""
    return lr * step / warmup if step < warmup else lr * 0.1 ** len([number for number in decays if number < step])


def test_the_schedule_that_restarts_is_flagperfs_with_every_epoch(x64):
    """Three epochs of 13 steps, whose last decay comes with the epoch's last step, as in FlagPerf's 1x8."""
    schedule = Schedule(0.003, 4, (6, 9, 11), 39, restart_every=13)
    rates = [float(rate) for rate in jax.vmap(learning_rate(schedule))(jnp.arange(39))]
    by_formula = [flagperfs_rate(step, 0.003, 4, (6, 9, 11)) for _ in range(3) for step in range(13)]
    np.testing.assert_allclose(rates, by_formula, rtol=1e-14)
    np.testing.assert_allclose(
        [in_torch.learning_rate(dataclasses.asdict(schedule), step) for step in range(39)], by_formula, rtol=1e-14
    )
    plain = dataclasses.replace(schedule, restart_every=None)
    assert float(learning_rate(plain)(20)) != pytest.approx(by_formula[20])  # the switch does something


def test_a_cosine_is_not_restarted(tmp_path):
    with pytest.raises(RequestError, match="--schedule cosine is another schedule"):
        dataclasses.replace(
            config.FLAGPERF,
            run=config.RunConfig(workdir=tmp_path, flagperf_compat=("schedule",)),
            additions=config.Additions(schedule="cosine"),
        )


@pytest.mark.parametrize(("devices", "batch", "expected"), [(8, 16, 10_010), (16, 20, 4004), (1, 16, 80_073)])
def test_an_epoch_of_imagenet_has_flagperfs_number_of_steps(devices, batch, expected):
    assert epoch_steps(1_281_167, devices, batch) == expected


def test_rank_0s_share_of_seven_examples_on_three_devices():
    """DistributedSampler drops the seventh and gives rank 0 the first and the fourth; padding is nobody's."""
    share = Rank0Share(devices=3, examples=7)
    index = jnp.array([0, 1, 2, 3, 4, 5, 6, -1])
    assert share.size == 2
    assert np.flatnonzero(share.holds(index)).tolist() == [0, 3]
    assert not Rank0Share(1, 7).holds(index)[-1]
    assert Rank0Share(8, 50_000).size == 6250
    # predictions are right for 0, 1, 2 and 6: one of two in the share, four of seven in all
    label = jnp.array([0, 1, 2, 0, 0, 0, 0, 0])
    predicted = jnp.array([0, 1, 2, 1, 1, 1, 0, 0])
    batch = {"label": label, "index": index, "mask": index >= 0}
    logits = jax.nn.one_hot(predicted, 3)

    def eval_step(_, rows):
        return steps.evaluation_sums(logits, rows) | steps.share_sums(logits, rows, share)

    accuracy = evaluate(eval_step, None, [batch], expected=7)
    assert (accuracy.acc1, accuracy.rank0_acc1, accuracy.rank0_examples) == (4 / 7, 1 / 2, 2)


def test_an_evaluation_without_the_switch_says_nothing_of_a_share():
    logits, batch = jnp.eye(2), {"label": jnp.array([0, 1]), "mask": jnp.ones(2, bool)}
    accuracy = evaluate(lambda _, rows: steps.evaluation_sums(logits, rows), None, [batch], expected=2)
    assert (accuracy.rank0_acc1, accuracy.rank0_examples) == (None, None)


def test_the_unsynchronized_rate_counts_the_dispatch_alone():
    timeline = Timeline()
    timeline.seconds.update(whole=100.0, dispatch=0.5)
    assert p_core_unsynchronized(timeline, trained=50) == 100
    assert p_core_unsynchronized(Timeline(), trained=0) is None


def test_the_cards_memory_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    """The smallest card counts, in GiB; nothing is known if there is no such program or it says something else."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert figures.card_memory() is None  # on the CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for script, expected in (
        ('test "$1" = --query-gpu=memory.total && echo 40960 && echo 40536', 39.5859375),
        ("echo No devices were found", None),
        ("echo; exit 9", None),
        ("exit 0", None),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert figures.card_memory() == expected, script
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert figures.card_memory() is None


def test_an_observer_is_told_when_an_activity_begins_and_ends():
    told = []
    timeline = Timeline(lambda activity, seconds: told.append((activity, seconds)))
    with contextlib.suppress(KeyError), timeline("fails"):
        raise KeyError
    with timeline("whole"):
        assert told[-1] == ("whole", None)
    assert [activity for activity, _ in told] == ["fails", "whole", "whole"]  # what failed did not end
    assert told[-1][1] == timeline["whole"]


def test_an_observer_that_fails_stops_nothing_and_one_that_waits_holds_nothing_up():
    heard, held = [], threading.Event()

    def observer(activity, seconds):
        held.wait(60)
        heard.append(activity)
        raise OSError("no space left on device")

    reporter = Reporter("test")
    timeline = Timeline(finetuning.told_by(reporter, observer))
    for activity in ("whole", "steps", "whole"):
        with timeline(activity):
            assert not heard  # the observer still waits
    held.set()
    reporter.close()
    assert heard == ["whole"]  # the first report failed, so the others were dropped
    assert reporter.failure == "no space left on device"


def test_another_schedule_is_another_run_and_a_run_of_before_the_switch_is_not(tmp_path):
    cfg = dataclasses.replace(config.FLAGPERF, run=config.RunConfig(workdir=tmp_path))
    plain = Recipe(512, 480, 0.1, Schedule(0.003, 500, (3000,), 40_000))
    content = Workdir.of(cfg, recipe=plain).content
    assert "restart_every" not in content["recipe"]["schedule"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    Workdir.of(cfg, recipe=plain).check()
    reporting = dataclasses.replace(cfg.run, flagperf_compat=("accuracy", "p_core"))
    Workdir.of(dataclasses.replace(cfg, run=reporting), recipe=plain).check()
    restarting = dataclasses.replace(plain, schedule=dataclasses.replace(plain.schedule, restart_every=10_010))
    with pytest.raises(RequestError, match="restart_every: None there, 10010 here"):
        Workdir.of(cfg, recipe=restarting).check()
    # and parity takes the run's steps at the rates that the run had
    content = Workdir.of(cfg, recipe=restarting, global_batch=128, class_names=["a", "b"]).content
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert RecordedRun.of(tmp_path).schedule == restarting.schedule.described()
    assert RecordedRun.of(tmp_path).schedule["restart_every"] == 10_010


def test_a_finished_run_lends_no_figure_that_it_did_not_take(tmp_path):
    """One from before there were such figures, too, whose result says nothing of them."""
    cfg = dataclasses.replace(config.DIGITS, run=config.RunConfig(tmp_path))
    finished = run.Run.of(cfg)
    for path in (finished.workdir.config, finished.workdir.result, finished.workdir.final):
        path.write_text(json.dumps(finished.workdir.content))
    asked = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, flagperf_compat=("accuracy", "p_core")))
    for known in ({}, {"flagperf_compat": ["accuracy"]}):
        finished.workdir.result.write_text(json.dumps(known | {"steps": 1}))
        assert finetuning.finetune(finished)["steps"] == 1
        with pytest.raises(RequestError, match=r"finished without --flagperf-compat .*p_core, .* another --workdir"):
            finetuning.finetune(run.Run.of(asked))
    finished.workdir.result.write_text(json.dumps({"flagperf_compat": ["accuracy", "p_core"], "steps": 1}))
    assert finetuning.finetune(run.Run.of(asked))["steps"] == 1


@pytest.fixture
def script(monkeypatch):
    """The case's training script as a module, with FlagPerf's driver."""
    folder = CASE / "benchmarks" / "bigtransfer" / "jax"
    monkeypatch.syspath_prepend(str(OF_FLAGPERF / "benchmarks"))
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("run_pretraining", folder / "run_pretraining.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] in ("driver", "config")]:
        del sys.modules[name]


def base_configuration(script, **changed) -> SimpleNamespace:
    names = {name: value for name, value in vars(script.config).items() if not name.startswith("__")}
    given = {"data_dir": "/data/", "train_data": "/data/train", "eval_data": "/data/val"}
    return SimpleNamespace(**names | given | changed)


def test_the_cases_own_configuration_is_the_preset(script, monkeypatch):
    """FlagPerf's numbers stand in its case, because its readers look for them there; they are the preset's."""
    environment = {"FLAGPERF_NNODES": "2", "FLAGPERF_NPROC": "8", "FLAGPERF_NODE_RANK": "1", "FLAGPERF_WORKDIR": "/w"}
    for name, value in (environment | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}).items():
        monkeypatch.setenv(name, value)
    cfg = script.train.configuration(script.training_flags(base_configuration(script)))
    preset = config.FLAGPERF
    assert cfg.model.model == "/data/backbone_weights/bigtransfer/BiT-M-R152x2.npz"
    splits = {"dataset": "folder:/data/", "train_split": "train", "eval_split": "val"}
    assert cfg.data == dataclasses.replace(preset.data, **splits)
    assert cfg.optimizer == preset.optimizer
    assert cfg.run == dataclasses.replace(preset.run, workdir=Path("/w"), log_every=20)
    assert (cfg.scale.coordinator, cfg.scale.hosts, cfg.scale.host) == ("10.0.0.1:29501", 2, 1)
    assert cfg.scale.mesh == "data=16"
    given = base_configuration(
        script, flagperf_compat="accuracy p_core", flags="--microbatches 2 --seed 7", workdir="/x"
    )
    changed = script.train.configuration(script.training_flags(given))
    assert changed.run.flagperf_compat == ("accuracy", "p_core")
    assert (changed.run.workdir, changed.run.seed, changed.scale.microbatches) == (Path("/x"), 7, 2)


@pytest.mark.parametrize("wrong", [{"lr_gamma": 0.5}, {"gradient_accumulation_steps": 2}])
def test_what_the_training_cannot_do_is_refused(script, wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        script.training_flags(base_configuration(script, **wrong))


def test_a_result_from_before_the_switches_is_finished_too(script):
    result = dict.fromkeys([*FINISHED.values(), "train_seconds", "input_wait_seconds"], 1.0)
    assert "flagperf_compat" not in script.finished(result)
    assert script.finished(result | {"flagperf_compat": ["p_core"]})["flagperf_compat"] == {"switches": ["p_core"]}


def test_the_case_names_the_versions_that_this_project_has():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    requirements = (CASE / "nvidia" / "bigtransfer-jax" / "config" / "requirements.txt").read_text()
    assert f"bit_jax-{version}-py3-none-any.whl" in requirements
    pinned = next(line for line in (ROOT / "constraints-3.13.txt").read_text().splitlines() if line.startswith("jax=="))
    image = (CASE / "nvidia" / "docker_image" / "jax_0.12" / "Dockerfile").read_text()
    assert pinned.replace("jax", "jax[cuda13]") in image
    assert "jax_0.12".split("_")[1] in pinned
    assert f"JAX {pinned.removeprefix('jax==')} " in (CASE / "nvidia" / "bigtransfer-jax" / "README.md").read_text()


def test_the_stored_card_has_the_columns_of_the_one_that_is_printed():
    assert f"| {' | '.join(card.COLUMNS)} |" in (CASE / "nvidia" / "bigtransfer-jax" / "README.md").read_text()


# The rest plays FlagPerf's run.py: it copies the case into a checkout, starts a task on each host, and reads the logs.


@pytest.fixture
def checkout(tmp_path):
    """A FlagPerf checkout with the case in it, configured for two hosts of two CPU devices each."""
    training = tmp_path / "FlagPerf" / "training"
    for part in ("benchmarks/driver", "utils"):
        shutil.copytree(OF_FLAGPERF / part, training / part)
    shutil.copytree(CASE, training, dirs_exist_ok=True)
    (training / "nvidia" / "bigtransfer-jax" / "config" / "config_CPUx2x2.py").write_text(
        'vendor = "nvidia"\n'
        "batch_size = 2\n"
        "max_steps = 6\n"
        "warmup_steps = 1\n"
        "lr_steps = [2, 3]\n"
        "target_mAP = 1.1\n"
        'flagperf_compat = "accuracy schedule p_core"\n'
        'flags = "--resize-to 20 --crop 16 --host-timeout 30"\n'
    )
    return training


@pytest.fixture
def data_dir(tmp_path, small_npz):
    """FlagPerf's layout: train/ and val/ by class, and the weights, here small ones under the large ones' name."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (9, 8)), ("val", (6, 5))):
        for number, (name, count) in enumerate(zip(("cat", "dog"), counts, strict=True)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = np.clip(rng.integers(0, 160, (40, 40, 3)) + 90 * number, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.png")
    weights = tmp_path / "data" / "backbone_weights" / "bigtransfer"
    weights.mkdir(parents=True)
    shutil.copy(small_npz, weights / "BiT-M-R152x2.npz")
    return tmp_path / "data"


def start(training: Path, log_dir: Path, data_dir: Path, host: int, port: int, cache: Path) -> subprocess.Popen:
    """Starts the task of a host by the words of run.py's command, in their order."""
    words = (
        f"--vendor nvidia --case_name bigtransfer:jax_0.12:CPU:2:2:1 --model_name bigtransfer "
        f"--train_script run_pretraining.py --nnodes 2 --nproc 2 --hosts 127.0.0.1,127.0.0.1 --hosts_ports 2222 "
        f"--data_dir {data_dir}/ --log_dir {log_dir} --log_level debug --extern_config_file config_CPUx2x2.py "
        f"--enable_extern_config --master_port {port} --round 1 --visible_dev_env CUDA_VISIBLE_DEVICES "
        f"--master_addr 127.0.0.1 --node_rank {host} --host_addr 127.0.0.1"
    ).split()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{HARDLY_OPTIMIZES} --xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "run_benchmarks/jax/start_jax_task.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=training, env=environment, **pipes)


def perf_log(path: Path) -> list[dict]:
    """The events in a host's log: lines that begin with FlagPerf's header, and JSON behind it."""
    header = "[PerfLog] "
    lines = path.read_text().splitlines()
    return [json.loads(line.removeprefix(header)) for line in lines if line.startswith(header)]


@pytest.mark.slow
def test_flagperfs_launcher_runs_the_case_on_two_hosts(checkout, data_dir, tmp_path):
    log_dir = tmp_path / "FlagPerf" / "training" / "result" / "run20261127000000"
    log_dir.mkdir(parents=True)
    port = free_port()
    tasks = [start(checkout, log_dir, data_dir, host, port, tmp_path / "xla") for host in (0, 1)]
    try:
        pid_file = log_dir / "start_jax_task.pid"
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            assert any(task.poll() is None for task in tasks), [task.communicate()[0] for task in tasks]
            time.sleep(0.05)
        assert int(pid_file.read_text()) in {task.pid for task in tasks}  # both hosts of this test share the directory
        said = [task.communicate()[0] for task in tasks]
    finally:
        for task in tasks:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(task.pid).children(recursive=True):
                    child.kill()
            task.kill()
            task.wait()
    assert [task.returncode for task in tasks] == [0, 0], said

    of_round = log_dir / "bigtransfer:jax_0.12:CPU:2:2:1" / "round1"
    events = [perf_log(of_round / f"127.0.0.1_noderank{host}" / f"noderank{host}.out.log") for host in (0, 1)]
    order = ["INIT_START", "INIT_EVALUATION", "INIT_END", "TRAIN_START", "TRAIN_END"]
    assert [[event["event"] for event in host] for host in events] == [[*order, "FINISHED"], order]
    for host, of_host in enumerate(events):
        assert {event["metadata"]["rank"] for event in of_host} == {host}
        assert all(set(event["metadata"]) == {"file", "lineno", "time_ms", "rank"} for event in of_host)
        times = [event["metadata"]["time_ms"] for event in of_host]
        assert times == sorted(times)

    workdir = tmp_path / "FlagPerf/training/result/workdirs/run20261127000000/bigtransfer:jax_0.12:CPU:2:2:1/round1"
    result = json.loads((workdir / "result.json").read_text())
    finished = events[0][-1]["value"]
    assert {key: finished[key] for key in FINISHED} == {key: result[name] for key, name in FINISHED.items()}
    pure = finished["num_trained_samples"] / finished["pure_training_computing_time"]
    assert pure == pytest.approx(finished["throughput(ips)_pure_compute"])
    assert (result["hosts"], result["devices"], result["batch_per_device"], result["steps"]) == (2, 4, 2, 6)
    assert result["eval_examples"] == 11
    # DistributedSampler over four ranks gives rank 0 the examples 0 and 4 of eleven
    assert result["rank0_examples"] == 2
    assert result["schedule_restarts_every"] == 3  # 17 examples: five a device, in batches of two
    assert finished["flagperf_compat"] == {
        "switches": ["accuracy", "p_core", "schedule"],
        **{name: result[name] for name in ("rank0_acc1", "rank0_examples", "p_core_unsynchronized")},
        "schedule_restarts_every": 3,
    }
    # between TRAIN_START and TRAIN_END lies the clock of raw_train_time
    moments = {event["event"]: event["metadata"]["time_ms"] / 1000 for event in events[0]}
    assert moments["TRAIN_END"] - moments["TRAIN_START"] == pytest.approx(result["raw_train_time"], abs=0.5)
    assert events[0][1]["value"]["time"] == pytest.approx(result["evaluation_before_seconds"])


@pytest.mark.parametrize(("changed", "code"), [("extern_config_file", 3), ("train_script", 4)])
def test_the_starter_says_what_the_checkout_lacks(checkout, data_dir, tmp_path, changed, code):
    words = (
        f"--vendor nvidia --case_name case --model_name bigtransfer --train_script run_pretraining.py --nnodes 1 "
        f"--nproc 1 --hosts a --hosts_ports 1 --data_dir {data_dir} --log_dir {tmp_path} --log_level debug "
        f"--extern_config_file config_CPUx2x2.py --master_port 1 --round 1 --node_rank 0 --host_addr a"
    ).split()
    words[words.index(f"--{changed}") + 1] = "missing.py"
    command = [sys.executable, "run_benchmarks/jax/start_jax_task.py", *words]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == code
    assert "no missing.py in" in done.stdout + done.stderr
