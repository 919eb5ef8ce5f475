"""`benchmarks/gpu.py`: steps in order, each within its time, and the same command goes on with what is missing."""

import json
import time
from pathlib import Path

import pytest
from conftest import benchmark
from rich.console import Console

from input_pipeline.errors import RequestError, RunFailed

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")


@pytest.fixture(scope="module")
def gpu():
    return benchmark("gpu")


def python(code: str) -> str:
    return f"-c '{code}'"


@pytest.fixture
def small_steps(gpu, monkeypatch, tmp_path):
    """Four steps: one that is done, one that fails, one that never ends, one whose file says that it was reached."""
    made = tmp_path / "made"
    found = [
        gpu.Step("good", python("""open("{json}", "w").write("[]"[:0] + chr(123) + chr(125)); print("said")"""), 60),
        gpu.Step("bad", python("import sys; sys.exit(3)"), 60),
        gpu.Step("endless", python("import time; time.sleep(1000)"), 0.5, alone=False),
        gpu.Step("last", python(f"""open("{made}", "a").write("x")"""), 60, alone=False),
    ]
    monkeypatch.setattr(gpu, "steps", lambda scale: found)
    return made


def outcomes(out: Path) -> dict[str, str]:
    steps = json.loads((out / "gpu.json").read_text())["steps"]
    return {name: step["outcome"] for name, step in steps.items()}


def test_a_failing_or_late_step_stops_no_other_and_what_is_done_is_not_done_again(gpu, small_steps, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(RunFailed, match="not done: bad, endless; their logs are in"):
            gpu.main(out)
    assert outcomes(out) == {"good": "done", "bad": "failed", "endless": "late", "last": "done"}
    assert small_steps.read_text() == "x", "a finished step was run again"
    assert (out / "good.log").read_text() == "said\n"
    assert json.loads((out / "gpu.json").read_text())["steps"]["good"]["result"] == {}
    assert "endless: late after" in capsys.readouterr().out


def test_without_time_nothing_is_begun(gpu, small_steps, tmp_path, capsys):
    with pytest.raises(RunFailed, match="not done: good, bad"):
        gpu.main(tmp_path / "out", minutes=0.1)
    assert "no time is left for good, bad, endless, last; the same command goes on there" in capsys.readouterr().out


def test_only_some_steps(gpu, small_steps, tmp_path):
    gpu.main(tmp_path / "out", only=("la", "good"))
    assert outcomes(tmp_path / "out") == {"good": "done", "last": "done"}
    with pytest.raises(RequestError, match="--only nowhere begins no step's name; there are good, bad, endless, last"):
        gpu.main(tmp_path / "out", only=("nowhere",))


def test_a_step_that_measures_time_runs_alone_and_others_together(gpu):
    timed, judged = gpu.Step("timed", "", 1), gpu.Step("judged", "", 1, alone=False)
    of = {step.name: gpu.Running(step, None, 0.0, 1.0) for step in (timed, judged)}
    assert gpu._may_begin(timed, [])
    assert not gpu._may_begin(timed, [of["judged"]])
    assert not gpu._may_begin(judged, [of["timed"]])
    assert gpu._may_begin(judged, (gpu.TOGETHER - 1) * [of["judged"]])
    assert not gpu._may_begin(judged, gpu.TOGETHER * [of["judged"]])


def test_a_step_that_will_not_end_is_killed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print(0, flush=True); time.sleep(1000)"
    stubborn = gpu.Step("stubborn", python(ignores), 9)
    record = gpu.Record(tmp_path)
    running = gpu.Running.start(stubborn, tmp_path, limit=0.5)
    while not (tmp_path / "stubborn.log").read_text():  # until the signal is ignored
        time.sleep(0.05)
    while (outcome := running.outcome()) is None:
        time.sleep(0.05)
    record.add(running, outcome)
    assert outcomes(tmp_path) == {"stubborn": "late"}
    assert running.process.returncode == -9


def test_what_an_interrupted_command_started_ends_with_it(gpu, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(gpu.Record, "add", lambda self, one, outcome: (_ for _ in ()).throw(KeyboardInterrupt))
    start = gpu.Running.start
    monkeypatch.setattr(gpu.Running, "start", lambda *given: started.append(start(*given)) or started[-1])
    endless = gpu.Step("endless", python("import time; time.sleep(1000)"), 900, alone=False)
    short = gpu.Step("short", python("pass"), 900, alone=False)
    with pytest.raises(KeyboardInterrupt):
        gpu.run([endless, short], gpu.Record(tmp_path), time.monotonic() + 900, Console())
    assert [one.process.returncode for one in started] == [-9, 0]


def test_only_what_an_earlier_attempt_left_is_removed(gpu, tmp_path):
    record = gpu.Record(tmp_path)
    known = gpu.Step("train", "train.py --workdir {dir} --json {json}", 1)
    other = gpu.Step("tests", "-m pytest tests/test_gpu.py", 1, {})
    for name in ("train", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").touch()
    left = {"train", "train.json", "tests", "tests.json"}
    record.clear(known)  # it has not been tried yet: this is somebody else's
    assert {path.name for path in tmp_path.iterdir()} == left
    record.content["steps"] = {"train": {}, "tests": {}}
    for step in (known, other):
        record.clear(step)
    assert {path.name for path in tmp_path.iterdir()} == left - {"train", "train.json"}


def test_wrong_requests(gpu, tmp_path):
    with pytest.raises(RequestError, match="--minutes 0 must be greater than 0"):
        gpu.main(tmp_path, minutes=0)
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(RequestError, match="is not what this command writes; name another --out"):
        gpu.main(tmp_path)


def test_results_in_a_few_words(gpu):
    assert gpu.headline({"same": True}) == "the same bits"
    assert gpu.headline({"same": False}) == "bits DIFFER"
    assert gpu.headline({"holds": False}) == "does NOT hold"
    assert gpu.headline({}) == ""


def test_of_arms_that_were_compiled_beside_each_other_no_rate_is_kept(gpu):
    measured = {"arms": {"torch:compile": {"compile_cold": 80.3, "images_per_s": 1611, "mfu": 8.2}}, "ratios": {}}
    pair = gpu.compiling(gpu.LARGE, "R50x1", "bf16", "train")[0], gpu.compiled(gpu.LARGE, "R50x1", "bf16", "train")[0]
    beside, alone = (gpu.what_holds(step, measured) for step in pair)
    assert beside == {"compile_cold": {"torch:compile": 80.3}}
    assert alone == measured
    assert gpu.headline(beside) == "torch:compile compiled in 80 s"


@pytest.mark.slow
def test_the_command_works_without_a_gpu(gpu, tmp_path):
    """Three kinds of steps run; test_docs_commands.py sees that every step's command is one that its program takes."""
    gpu.main(
        tmp_path / "out",
        minutes=30,
        scale="small",
        only=("machine", "train-R14x0.5-bf16", "eager-forward-R14x0.5-bf16"),
    )
    steps = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert {step["outcome"] for step in steps.values()} == {"done"}
    assert steps["machine"]["result"]["bytes_a_second"] > 0
    assert steps["train-R14x0.5-bf16"]["result"]["p_core"] > 0
    assert steps["train-R14x0.5-bf16"]["profile"]["steps"] == 5
    assert set(steps["eager-forward-R14x0.5-bf16"]["result"]["arms"]) == {*gpu.EAGER, "jax"}
    gpu.show(gpu.Record(tmp_path / "out"), Console())
