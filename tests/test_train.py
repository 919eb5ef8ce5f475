"""train.py as its users run it: a real process, real digits, killed and continued, refused where it should be."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import tyro
from conftest import HARDLY_OPTIMIZES, SMALL_DIGITS
from PIL import Image

from bit_jax import config, train
from bit_jax.accounts import starts
from bit_jax.accounts.timeline import Timeline
from bit_jax.compiled import profile
from bit_jax.scale.sharding import make_mesh
from bit_jax.training import finetuning, resources, run
from bit_jax.training.loop import Begun, Loop
from input_pipeline import claims
from input_pipeline.exits import exit_code
from parity.sides.inputs import pictures

REPOSITORY = Path(__file__).parent.parent
SHORT = (
    f"{SMALL_DIGITS} --global-batch 16 --steps 6 --warmup-steps 2 --decay-steps 4 "
    "--log-every 2 --eval-every 4 --checkpoint-every 2"
)


@pytest.fixture
def command(small_npz, compilation_cache):
    """(flags, devices) -> what `subprocess` needs to train the smallest BiT for six steps."""

    def of(*flags, devices=1) -> dict:
        flags_of_xla = f"{HARDLY_OPTIMIZES} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | compilation_cache | {"XLA_FLAGS": flags_of_xla}
        arguments = ["train.py", "digits", "--model", small_npz, *SHORT.split(), *flags]
        return {"args": [sys.executable, *map(str, arguments)], "cwd": REPOSITORY, "env": environment}

    return of


def finish(command: dict) -> subprocess.CompletedProcess:
    done = subprocess.run(**command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def lines_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(workdir / "final.npz"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A finished run: (its folder, what it printed)."""
    return tmp_path_factory.mktemp("undisturbed") / "run"


@pytest.fixture
def finished(command, undisturbed):
    """The folder of an undisturbed run."""
    if not undisturbed.exists():
        done = finish(command("--workdir", undisturbed, "--profile", 2))
        (undisturbed / "stdout").write_text(done.stdout)
    return undisturbed


def test_a_run_leaves_what_it_promises(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["steps"] == 6
    assert result["eval_examples"] == 40
    assert (result["devices"], result["hosts"], result["batch_per_device"], result["global_batch"]) == (1, 1, 16, 16)
    assert 0 < result["p_whole"] < result["p_train"] <= result["p_core"]
    assert result["p_whole"] == pytest.approx(96 / result["raw_train_time"])
    assert result["init_time"] > result["compile_time"]
    assert result["converged"] is None  # no target was set
    assert result["e2e_time"] > result["compile_time"] + result["train_seconds"] + result["evaluation_seconds"]
    assert result["trained_examples"] == 96
    assert result["p_train"] == pytest.approx(96 / result["train_seconds"])
    assert result["mem_gib"] > 0.1
    over_all = result["over_all_starts"]
    assert over_all["starts"] == 1
    assert sum(over_all["seconds"].values()) == over_all["e2e_time"] >= result["e2e_time"]
    for figure in ("p_whole", "p_train", "p_core"):
        assert over_all[figure] == pytest.approx(result[figure], rel=0.01)
    kept, most = over_all["goodput"] * over_all["e2e_time"], result["train_seconds"] - result["input_wait_seconds"]
    # saving and other, as the end of the profile, are in the training time as well as before and after it
    assert most - over_all["seconds"]["saving"] - over_all["seconds"]["other"] < kept < most
    assert result["versions"]["jax"]
    assert set(arrays_of(finished)) == set(np.load(finished / "final.npz").files)
    assert len(list((finished / "tensorboard").iterdir())) == 1
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"4", "6"}
    lines = lines_of(finished)
    assert [(line["step"], "loss" in line, "val_acc1" in line) for line in lines] == [
        (2, True, False),
        (4, True, False),
        (4, False, True),
        (6, True, False),
        (6, False, True),
    ]
    assert lines[-1]["val_acc1"] == result["final_acc1"]
    for shown in ("p_whole", "p_train", "p_core", "1x1", f"{result['final_acc1']:.5f}"):
        assert shown in (finished / "stdout").read_text()


def test_a_profile_says_where_a_steps_time_goes(finished, capsys):
    table = profile.load(finished)
    assert (table["steps"], table["device"], table["roofline"]) == (2, "cpu", None)
    result = json.loads((finished / "result.json").read_text())
    assert 0 < table["busy"] <= table["seconds"] < result["train_seconds"] / 2
    kinds = table["kinds"]
    assert {profile.FORWARD, profile.BY_INPUT, profile.BY_KERNEL, profile.NORM, profile.STANDARDIZATION} < set(kinds)
    assert kinds[profile.IDLE]["seconds"] == pytest.approx(table["seconds"] - table["busy"])
    known = [one for one in table["instructions"] if one["of"]]
    assert sum(one["seconds"] for one in known) > 0.5 * table["busy"], "most of the time is the program's own"
    assert {one["calls"] for one in known if one["kind"] == profile.FORWARD} == {1.0}
    assert len(list((finished / "profile").glob("plugins/profile/*/*.xplane.pb"))) == 1
    profile.main(finished, instructions=3)
    shown = capsys.readouterr().out
    assert "convolutions, forward" in shown
    assert shown.count("GFLOP") == 3
    assert "where a step" not in (said := (finished / "stdout").read_text())
    assert "GroupNorm and ReLU" in said


def test_final_weights_give_the_reported_accuracy(finished):
    """The accuracy in result.json again, from final.npz alone, through another route."""
    import bit_jax
    from bit_jax.training import steps
    from input_pipeline import Views, open_source

    model, params = bit_jax.load(finished / "final.npz")
    source = open_source("digits", "test[:40]")
    views = Views(20, 16, flip=False)
    pixels = np.stack([views.evaluation(source[i]["image"]) for i in range(len(source))])
    images = steps.normalize(jnp.asarray(pixels), np.dtype(np.float32))
    logits = jax.jit(model.apply)({"params": params}, images)
    assert (
        np.mean(np.argmax(logits, axis=1) == source.labels)
        == json.loads((finished / "result.json").read_text())["final_acc1"]
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(command, finished, tmp_path):
    finish(command("--workdir", tmp_path / "again"))
    assert (tmp_path / "again" / "final.npz").read_bytes() == (finished / "final.npz").read_bytes()
    finish(command("--workdir", tmp_path / "other", "--seed", 1))
    assert (tmp_path / "other" / "final.npz").read_bytes() != (finished / "final.npz").read_bytes()


def test_a_finished_run_is_shown_and_left_alone(monkeypatch, capsys, command, finished):
    before = (finished / "final.npz").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", command("--workdir", finished)["args"][1:])
    assert exit_code(train.main) == 0
    shown = capsys.readouterr()
    assert "finished" in shown.err
    assert "p_core" in shown.out
    assert (finished / "final.npz").stat().st_mtime_ns == before


@pytest.fixture
def photographs(tmp_path):
    """A folder dataset of 40 pictures in two classes, one of them damaged."""
    for number, pixels in enumerate(pictures(40, 40, 50, seed=0)):
        split, name = ("train", "test")[number >= 32], ("cat", "dog")[number % 2]
        path = tmp_path / "photographs" / split / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photographs" / "train" / "cat" / "06.png").write_bytes(b"damaged")
    return tmp_path / "photographs"


@pytest.mark.slow
def test_a_damaged_image_ends_the_run_or_is_replaced_and_counted(command, photographs, tmp_path):
    flags = ("--dataset", f"folder:{photographs}", "--workdir", tmp_path / "run", "--log-every", "1")
    done = subprocess.run(**command(*flags), capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(
        r"^error: example cat/06.png of photographs/train .*; --skip-damaged [^\n]+\n$", done.stderr, re.MULTILINE
    )
    continued = finish(command(*flags, "--skip-damaged"))
    assert "example cat/06.png of photographs/train is not a readable image" in continued.stderr
    # from the first epoch on: 6 steps of 16 are three epochs of 32
    finish(command(*flags[:2], "--skip-damaged", "--workdir", tmp_path / "whole"))
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["replaced_examples"] == 3
    assert (tmp_path / "whole" / "final.npz").read_bytes() == (tmp_path / "run" / "final.npz").read_bytes()
    # the classes' names reach the predictions
    image = photographs / "test" / "dog" / "33.png"
    predict = [sys.executable, "-m", "bit_jax.predict", "--weights", tmp_path / "whole" / "final.npz", image]
    shown = subprocess.run(predict, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "cat  (0)" in shown
    assert "dog  (1)" in shown


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_after_the_step_with_all_its_threads_and_processes(command, tmp_path, number, code):
    flags = ("--workdir", tmp_path / "run", "--log-every", 1, "--steps", 10000)
    process = subprocess.Popen(**command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, "it ended before the signal"
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code
    assert not any(child.is_running() for child in children)
    assert "Traceback" not in said
    saved = re.search(r"error: ended by a signal after step (\d+), which is saved; the same command continues\n$", said)
    assert saved is not None, said
    assert (tmp_path / "run" / "checkpoints" / saved[1] / "sha256.json").exists()
    ((*_, last),) = starts.read(tmp_path / "run" / "starts.jsonl")
    assert (last.ended, last.step, last.why) == ("stopped", int(saved[1]), saved[0].removeprefix("error: ").strip())


def test_the_log_says_which_side_waits(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr("bit_jax.accounts.timeline.time.perf_counter", lambda: clock[0])
    log: Any = SimpleNamespace(note=said.append)
    unused: Any = None
    timeline = Timeline()
    loop = Loop(unused, unused, unused, unused, timeline, log, unused)
    for waited, stepped, notes in ((0.5, 9.5, 0), (1.5, 88.5, 1), (1.0, 0.0, 1), (0.5, 898.5, 2), (0.1, 0.0, 2)):
        for activity, seconds in (("reading", waited), ("steps", stepped)):
            with timeline(activity):
                clock[0] += seconds
        timeline.part("input", waited, of="reading")
        loop.say_who_waits()
        assert len(said) == notes, said
    assert "the devices wait for input, 2% of the time so far" in said[0]
    assert "input keeps up" in said[1]


def test_the_rate_counts_the_step_that_is_awaited_just_now(tmp_path, monkeypatch):
    """A step takes 2 s on the devices, where the loop waits for it; to begin it takes no time."""
    clock, written = [0.0], []
    monkeypatch.setattr("bit_jax.accounts.timeline.time.perf_counter", lambda: clock[0])
    unused: Any = None
    run: Any = SimpleNamespace(
        global_batch=8, config=SimpleNamespace(run=config.RunConfig(tmp_path, log_every=1)), architecture=unused
    )

    def write(step, **scalars):
        written.append(scalars["images_per_s"])

    log: Any = SimpleNamespace(advance=lambda step: None, write=write)

    def result():
        clock[0] += 2
        return {name: np.float32(0) for name in ("failed", "replaced", "signal", "loss")}, clock[0]

    account: Any = SimpleNamespace(step=0)
    loop = Loop(run, unused, unused, unused, Timeline(), log, account)
    for step in (1, 2, 3):
        with loop.timeline("steps"):
            end: Any = SimpleNamespace(result=result)
            loop.finish(deque([Begun(step, {}, {}, end)]), unused, 0, leave=0)
    assert written == [4.0] * 3


# XLA's threads read the environment without Python's lock. A variable that is new moves all of them in memory.
SAYS_WHAT_THE_ENVIRONMENT_IS_GIVEN = """
import os
import sys
import threading
from bit_jax import train
from bit_jax.training import finetuning
from input_pipeline.exits import exit_code
compiled = []
def heard(event, arguments):
    if event in ("os.putenv", "os.unsetenv") and compiled and arguments[0].decode() not in os.environ:
        print("NEW", event, arguments[0].decode(), "in", threading.current_thread().name, flush=True)
sys.addaudithook(heard)
compile_program = finetuning.compile_program
def compile_and_listen(*arguments, **more):
    compiled.append(True)
    return compile_program(*arguments, **more)
finetuning.compile_program = compile_and_listen
os.environ["BEFORE"] = "not heard"
code = exit_code(train.main)
os.environ["AFTER"] = "heard"
sys.exit(code)
"""


@pytest.mark.slow
def test_nobody_gives_the_environment_a_variable_while_the_devices_compute(command, tmp_path):
    given = command("--workdir", tmp_path / "run", "--profile", 1)
    python, _, *arguments = given["args"]
    given["args"] = [python, "-c", SAYS_WHAT_THE_ENVIRONMENT_IS_GIVEN, *arguments]
    given["env"] = given["env"] | {"PYTHONPATH": str(REPOSITORY)}
    given["env"].pop("CRC32C_SW_MODE", None)  # this process has imported what sets it
    heard = [line for line in finish(given).stdout.splitlines() if line.startswith("NEW")]
    assert heard == ["NEW os.putenv AFTER in MainThread"]


def test_waiting_for_input_counts_while_the_devices_have_nothing_to_do(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bit_jax.training.loop.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    unused: Any = None
    loop = Loop(unused, unused, unused, unused, Timeline(), unused, unused)
    begun: deque[Begun] = deque()
    ends = [None, 3.0, 14.0, 20.0]  # of the step under way while each batch is read; the second one's comes too late

    def read():
        for end in ends:
            clock[0] += 5
            if end is not None:
                begun[-1].end.set_result(({}, end))
            yield {}

    waited = []
    for _ in loop.arriving(read(), begun):
        waited.append(loop.timeline["input"] - sum(waited))
        begun.append(Begun(0, {}, {}, Future()))
    # no step yet; it ended before the wait began; it ended 1 s before the batch came; it ended when the batch came
    assert waited == [5.0, 5.0, 1.0, 0.0]
    clock[0] = 0.0
    assert len(list(loop.arriving(iter([{}]), begun))) == 1  # the last step is still under way
    assert loop.timeline["input"] == sum(waited)


def test_the_state_before_a_step_is_let_go_while_the_devices_work(tmp_path):
    """Not after they have finished, when they would wait for it, and not by the thread that begins the next step."""
    let_go_by = []

    class State(SimpleNamespace):
        """The state after a step that was begun."""

        def __del__(self):
            let_go_by.append(threading.current_thread())

    class Loss:
        """Whoever wants its value waits for the step."""

        def __init__(self, before):
            self.before = before

        def block_until_ready(self):
            states_before.append(self.before())

        def __array__(self, dtype=None, copy=None):
            self.block_until_ready()
            return np.asarray(0.5, dtype)

    def begin(state, batch):
        assert not batch["stopped"]
        quiet = {"replaced": np.int32(0), "signal": np.int32(0), "failed": np.bool_(False)}
        said = quiet | {"loss": Loss(weakref.ref(state))}
        return State(step=state.step + 1), said

    states_before: list[object] = []
    nothing: Any = None
    run: Any = SimpleNamespace(
        config=SimpleNamespace(run=config.RunConfig(tmp_path), model=config.ModelConfig()),
        recipe=SimpleNamespace(schedule=SimpleNamespace(steps=3)),
        workdir=SimpleNamespace(path=tmp_path, profile=tmp_path / "profile"),
        mesh=make_mesh(),
        global_batch=8,
    )
    program: Any = SimpleNamespace(train_step=begin)
    log: Any = SimpleNamespace(advance=lambda step: None)
    saving: Any = SimpleNamespace(wished=False, due=lambda *_: None, save=lambda step, state, wished: None)
    account: Any = SimpleNamespace(step=0)
    loop = Loop(run, program, nothing, saving, Timeline(), log, account)
    batches: Any = iter([(index, {}) for index in range(3)])
    state, _ = loop.train_from(State(step=0), 0, batches, None)
    assert state.step == 3
    assert states_before == [None] * 3
    assert len(let_go_by) == 3
    assert threading.current_thread() not in let_go_by


@pytest.mark.slow
def test_flagperf_on_imagenet(command, prepared, tmp_path):
    """FlagPerf's preset with a narrow model, on what tfds's own builder made of two small archives."""
    flags = "--resize-to 20 --crop 16 --batch-per-device 4 --steps 6 --warmup-steps 2 --decay-steps 4 --log-every 2"
    arguments = command("--dataset", "imagenet2012", "--data-dir", prepared, "--workdir", tmp_path / "run")
    arguments["args"][2:3] = ["flagperf"]
    for flag in SHORT.split():
        arguments["args"].remove(flag)
    arguments["args"] += flags.split()
    done = finish(arguments)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["dataset"], result["eval_dataset"]) == ("imagenet2012/train", "imagenet2012/validation")
    assert (result["eval_examples"], result["steps"], result["batch_per_device"]) == (5, 6, 4)
    assert result["architecture"].endswith("1,000 classes")
    evaluated = [line["step"] for line in lines_of(tmp_path / "run") if "val_acc1" in line]
    assert evaluated == [0, 3, 6]  # before training and after each epoch of 12
    # FlagPerf's clock starts after the evaluation before training
    assert result["p_whole"] == pytest.approx(24 / result["raw_train_time"])
    assert 0 < result["evaluation_before_seconds"] < result["init_time"]
    assert result["raw_train_time"] == pytest.approx(result["train_seconds"] + result["evaluation_seconds"])
    assert result["converged"] is False
    assert "p_core" in done.stdout


@pytest.mark.slow
def test_few_shot_from_scratch_and_a_target_that_ends_training(command, tmp_path):
    flags = "--init random --examples-per-class 2 --eval-every 1 --eval-at-start True --target-acc1 0.01".split()
    done = finish(command(*flags, "--workdir", tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 0  # the zero head calls everything class 0, a tenth of which is right
    assert result["p_core"] is None
    assert "2 a class" in result["dataset"]
    assert (tmp_path / "run" / "final.npz").exists()
    assert "p_core" in done.stdout


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_run(command, tmp_path):
    flags = ("--base-lr", "1e30", "--workdir", tmp_path / "run")
    done = subprocess.run(**command(*flags), capture_output=True, text=True)
    assert done.returncode == 1
    said = re.search(r"\nerror: the loss of step (\d) is (nan|inf); (\S+) holds its batch[^\n]+\n$", done.stderr)
    assert said is not None, done.stderr
    assert np.load(said[3])["image"].shape == (16, 16, 16, 3)
    # the same command comes to the same step at once, from the state before it
    again = subprocess.run(**command(*flags), capture_output=True, text=True)
    assert f"from step {int(said[1]) - 1}\n" in again.stderr
    assert f"the loss of step {said[1]} is {said[2]}" in again.stderr
    assert not (tmp_path / "run" / "final.npz").exists()


# Wrong requests: one sentence, exit code 2, nothing half written.


def refused(capsys, monkeypatch, small_npz, *flags) -> str:
    monkeypatch.setattr(
        sys, "argv", [str(flag) for flag in ("train.py", "digits", "--model", small_npz, *SHORT.split(), *flags)]
    )
    assert exit_code(train.main) == 2
    sentence = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", sentence), sentence
    return sentence


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model BiT-M-R152x3", "BiT-M-R152x2"),
        ("--model nowhere/w.npz", "does not exist"),
        ("--model R51x1 --init random", "architecture"),
        ("--global-batch 12", "not divisible by 8 devices; use 8 or 16"),
        ("--global-batch 4", "use 8"),
        ("--dataset digitz", "near it: digits"),
        ("--dataset idx:nowhere", "neither"),
        ("--eval-split validation", "train and test"),
        ("--examples-per-class 1000", "at most"),
        ("--crop 64", "does not fit"),
        ("--dataset folder:nowhere", "is not a directory"),
        ("--train-split train[:x]", "neither a name nor a slice"),
        ("--workdir /dev/null/run", "/dev/null/run"),
        ("--model https://example.org/w.npz", "https://example.org/w.npz"),
        ("--workdir gopher://host/run", "gopher://host/run cannot be used: Protocol not known: gopher"),
    ],
)
def test_wrong_requests(capsys, monkeypatch, small_npz, tmp_path, flags, said):
    assert said in refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--no-such-flag 1",
        "--steps many",
        "--steps 0",
        "--init magic",
        "--input-threads 0",
        "--resize 512",
    ],
)
def test_malformed_flags(monkeypatch, capsys, tmp_path, flags):
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--workdir", str(tmp_path / "run"), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert not (tmp_path / "run").exists()


def test_a_workdir_is_required(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "digits"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert "--workdir" in capsys.readouterr().err


def test_a_broken_weight_file(capsys, monkeypatch, small_npz, tmp_path):
    (tmp_path / "w.npz").write_bytes(small_npz.read_bytes()[:5000])
    assert "w.npz" in refused(
        capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run", "--model", tmp_path / "w.npz"
    )


def test_weights_that_are_not_finite(capsys, monkeypatch, small_npz, tmp_path):
    arrays = dict(np.load(small_npz))
    arrays["resnet/group_norm/gamma"][3] = np.nan
    np.savez(tmp_path / "w.npz", **arrays)
    # the weights are read once the program is compiled, which is spared here
    monkeypatch.setattr(
        finetuning, "compile_program", lambda made, watched: SimpleNamespace(state_shape=made.state, initial_state=None)
    )
    sentence = refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run", "--model", tmp_path / "w.npz")
    assert "resnet/group_norm/gamma" in sentence


def test_another_configurations_workdir(capsys, monkeypatch, small_npz, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    sentence = refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run", "--base-lr", "0.5", "--seed", "3")
    assert "optimizer.base_lr: 0.01 there, 0.5 here" in sentence
    assert "run.seed: 0 there, 3 here" in sentence


def test_a_folder_with_someone_elses_results(capsys, monkeypatch, small_npz, tmp_path):
    (tmp_path / "final.npz").write_bytes(b"precious")
    assert "choose another" in refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path)
    assert (tmp_path / "final.npz").read_bytes() == b"precious"


@pytest.mark.slow
def test_a_damaged_checkpoint(command, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "final.npz").rename(tmp_path / "run" / ".final.npz.0123abcd.tmp")  # killed while it wrote it
    for path in (tmp_path / "run" / "checkpoints" / "6").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = subprocess.run(**command("--workdir", tmp_path / "run"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"checkpoint .*/6 is damaged: [^\n]+ the one before it is used", done.stderr), done.stderr
    assert "from step 4" in done.stderr
    assert not list((tmp_path / "run").glob(".*"))
    assert (tmp_path / "run" / "final.npz").read_bytes() == (finished / "final.npz").read_bytes()


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_runs(command, finished, tmp_path):
    """A real file system: the error says so, nothing hangs, and the run continues when there is room again."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(**command("--workdir", tmp_path / "run"), **pipes) as process:
            while not (tmp_path / "run" / "config.json").exists():  # it compiles next
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.001)
            process.send_signal(signal.SIGSTOP)
            with contextlib.suppress(OSError), open(tmp_path / "filler", "wb", buffering=0) as filler:
                while filler.write(bytes(2**20)):
                    pass
            process.send_signal(signal.SIGCONT)
            said = process.stderr.read()
        assert process.returncode == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error")]
        assert len(errors) == 1, said
        assert re.search(r"No space|space", errors[0])
        assert not (tmp_path / "run" / "final.npz").exists()
        (tmp_path / "filler").unlink()
        finish(command("--workdir", tmp_path / "run"))
        assert (tmp_path / "run" / "final.npz").read_bytes() == (finished / "final.npz").read_bytes()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def coloured(tmp_path):
    """(split, class names) -> makes that split, an image of its own colour a class."""

    def make(split, names):
        for number, name in enumerate(names):
            path = tmp_path / "coloured" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
        return f"folder:{tmp_path / 'coloured'}"

    return make


def config_of(*flags) -> config.Config:
    return tyro.extras.overridable_config_cli(
        config.PRESETS, args=["digits", "--workdir", "unused", *flags], config=(tyro.conf.OmitArgPrefixes,)
    )


def test_evaluations_classes_are_trainings_by_name(coloured):
    """Their positions differ where evaluation lacks a class, and where another machine spells a name otherwise."""
    coloured("train", ["a", "b", "c", "\u00e9"])
    dataset = coloured("test", ["a", "c", "e\u0301"])
    train_split, evaluation = run.open_sources(config_of("--dataset", dataset))
    assert list(evaluation.class_names) == list(train_split.class_names)
    assert evaluation.labels.tolist() == [0, 2, 3]
    assert [evaluation[index]["label"] for index in range(3)] == [0, 2, 3]


def test_a_class_that_training_lacks_is_refused_by_name(capsys, monkeypatch, small_npz, coloured, tmp_path):
    coloured("train", ["a", "b", "c"])
    dataset = coloured("test", ["a", "b", "c", "extra", "x\x1b[31m"])
    said = refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run", "--dataset", dataset)
    assert "has 2 classes that coloured/train has not: extra, x\\x1b[31m" in said
    assert not (tmp_path / "run").exists()


def test_a_work_directory_in_use(capsys, monkeypatch, small_npz, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with claims.claimed(run / claims.CLAIM, run, "wait"):
        said = refused(capsys, monkeypatch, small_npz, "--global-batch", "16", "--workdir", run)
    assert f"is in use by process {os.getpid()} on" in said
    assert "choose another --workdir" in said
    assert not list(run.iterdir())


@pytest.mark.parametrize("content", ["[1, 2]", "\xff", "[" * 100_000, "{"])
def test_a_damaged_config(capsys, monkeypatch, small_npz, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json is damaged" in refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path)
    assert (tmp_path / "config.json").read_bytes() == content.encode("latin-1")


def test_a_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_of("--workdir=~/runs/x").run.workdir == tmp_path / "runs" / "x"


def test_a_disk_that_cannot_hold_the_checkpoints(capsys, monkeypatch, small_npz, tmp_path):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    said = refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run", "--keep-checkpoints", "3")
    assert re.search(r"the run needs 0\.\d+ of space under \S+, GiB, and there are 0\.009766; free some", said)
    assert not (tmp_path / "run").exists()


def test_too_few_open_files(capsys, monkeypatch, small_npz, tmp_path):
    monkeypatch.setattr(resources, "raise_descriptor_limit", lambda: 64)
    said = refused(capsys, monkeypatch, small_npz, "--workdir", tmp_path / "run")
    assert "the run needs 128 of open files (ulimit -n), and there are 64; raise the hard limit" in said
