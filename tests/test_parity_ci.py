"""A comparison beside the runs before it, rungs as tests of pytest, and the compiled program's fingerprint."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command_line import parity

from bit_jax.compiled import hlo
from input_pipeline.errors import RequestError
from parity.ci import baseline, trend
from parity.options import Options
from parity.report import saved
from parity.report.terminal import again

ROOT = Path(__file__).parent.parent


def line(name, precision, difference, used):
    return {
        "rung": "forward",
        "name": name,
        "precision": precision,
        "verdict": "rounding",
        "difference": difference,
        "limit": 1e-9 if precision == "fp64" else 1e-5,
        "used": used,
        "note": "",
    }


def report(share=0.2, apart=1e-12, seconds=3.0, created="2026-01-01T00:00:00+00:00", **options):
    """A saved report of one rung, whose arrays use these shares of their limits."""
    lines = [line("root_block", "fp64", apart, None), line("logits", "fp64", 0.0, None)]
    lines += [line("root_block", "fp32", 1e-7, share), line("logits", "fp32", 1e-7, share / 2)]
    rung = {"name": "forward", "verdict": "rounding", "seconds": seconds, "lines": lines, "findings": [], "details": {}}
    sides = {"fp32": {"candidate": {"device": "cpu: cpu", "versions": {"jax": "1.2"}, "forward program sha256": "abc"}}}
    names = {name: getattr(Options(), name) for name in baseline.SAME}
    return {
        "version": saved.VERSION,
        "created": created,
        "command": "python -m parity all --size 32",
        "options": names | options,
        "sides": {"reference": "torch", "candidate": "jax"},
        "precision": "fp32",
        "attestation": {"sides": sides, "mismatches": []},
        "rungs": [rung],
        "failed": None,
        "holds": True,
    }


def said(current, *before):
    return baseline.compared(current, [baseline.of_report(run) for run in before])


def test_a_run_is_better_worse_or_the_same_beside_the_spread_of_those_before():
    first = "baseline: the first run of jax against torch like this; there is nothing to compare with"
    assert said(report()) == [first]
    assert said(report(), report(size="99")) == [first], "another size is another work"
    two = report(0.2, seconds=3), report(0.3, seconds=4)
    assert said(report(0.25), *two) == [
        "forward fp64: the same, 0.1 % of the limit (0.1 % to 0.1 % in 2 runs)",
        "forward fp32: the same, 25 % of the limit (20 % to 30 % in 2 runs)",
        "forward time: the same, 3.0 s (3.0 s to 4.0 s in 2 runs)",
    ]
    worse = said(report(0.7, apart=3e-12, seconds=7), *two)
    assert [sentence.split(",")[0] for sentence in worse] == [
        *("forward fp64: WORSE", "forward fp32: WORSE", "forward time: WORSE")
    ]
    assert "2.80 times the median" in worse[1]
    assert said(report(0.05), *two)[1].startswith("forward fp32: better, 5 % of the limit")
    assert "would hold" not in said(report(0.2), *[report(0.2)] * 4)[1]
    assert said(report(0.2), *[report(0.2)] * 5)[1].endswith("more than 20 %, so that a tighter limit would hold")


def test_a_compiler_that_changed_nothing_is_told_before_anything_is_compared():
    run = report()
    of, runs = baseline.work(run["options"], run["sides"], "fp32"), [baseline.of_report(run)]
    told = "compiled forward pass is that of 2026-01-01T00:00:00+00:00: the compiler changed nothing in it"
    assert told in str(baseline.same_program(of, run["attestation"], runs))
    assert baseline.same_program(of | {"size": "99"}, run["attestation"], runs) is None
    assert baseline.same_program(of, run["attestation"], []) is None
    run["attestation"]["sides"]["fp32"]["candidate"]["forward program sha256"] = "def"
    assert baseline.same_program(of, run["attestation"], runs) is None


def test_a_baselines_file_grows_by_runs_that_hold_and_nothing_else_is_taken_for_one(tmp_path):
    path = tmp_path / "new" / "baseline.json"
    for number in range(baseline.KEPT + 3):
        baseline.added(path, report(), baseline.opened(path))
        assert len(baseline.opened(path)) == min(number + 1, baseline.KEPT)
    before = path.read_bytes()
    baseline.added(path, report() | {"holds": False}, baseline.opened(path))
    assert path.read_bytes() == before
    path.write_text(json.dumps(report()))
    with pytest.raises(RequestError, match="is no baseline; give another file"):
        baseline.opened(path)
    path.write_text("{")
    with pytest.raises(RequestError, match="is damaged"):
        baseline.opened(path)


def test_a_page_shows_many_runs_in_the_order_of_their_dates(tmp_path):
    for number, day in enumerate((3, 1, 2)):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        run = report(0.1 * day, created=f"2026-01-0{day}T00:00:00+00:00")
        (folder / "report.json").write_text(json.dumps(run))
    done = parity("trend", *sorted(tmp_path.glob("run*")), "--html", tmp_path / "trend.html")
    assert done.returncode == 0, done.stderr
    assert "3 runs, 2026-01-01T00:00:00+00:00 to 2026-01-03" in " ".join(done.stdout.split())
    page = (tmp_path / "trend.html").read_text()
    assert page.count("<svg") == 2
    assert "forward program sha256: abc" in page
    assert "forward fp32" in page
    assert page.index("2026-01-01T00:00:00") < page.index("2026-01-02T00:00:00") < page.index("2026-01-03T00:00:00")
    assert parity("trend", "--html", tmp_path / "t.html").returncode == 2
    assert parity("trend", tmp_path, "--html", tmp_path / "t.html").returncode == 2
    assert [
        run["created"][8:10] for run in trend.write([tmp_path / "run0", tmp_path / "run1"], tmp_path / "t.html")
    ] == [*("01", "03")]


def test_a_failing_comparison_ends_with_the_command_of_its_rung():
    failing = copy.deepcopy(report()) | {"failed": "forward", "holds": False}
    assert again(failing) == "python -m parity forward --size 32"
    failing["command"] = "python -m parity forward --run 'a folder' --size 32"
    assert again(failing) == "python -m parity forward --size 32"
    failing["command"] = "python -m parity all --until loss"
    assert again(failing) == failing["command"]


def test_a_programs_fingerprint_knows_the_work_and_not_the_source():
    def text(source, name):
        scope: dict = {}
        exec(compile(source, name, "exec"), {"jnp": jnp}, scope)
        return jax.jit(scope["f"]).lower(jnp.ones((8, 8))).compile().as_text()

    first = text("def f(x): return jnp.tanh(x @ x)", "one.py")
    moved = text("\n\n\ndef f(x):\n    y = x @ x\n    return jnp.tanh(y)", "two.py")
    other = text("def f(x): return jnp.tanh(x @ x + 1)", "one.py")
    assert first != moved
    assert hlo.fingerprint(first) == hlo.fingerprint(moved)
    assert hlo.fingerprint(first) != hlo.fingerprint(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [([], 0, "1 skipped"), (["--parity-bundle", "none.bundle"], 4, "bundle none.bundle does not exist")],
)
def test_without_a_bundle_the_plugin_skips_and_a_bundle_that_is_not_there_is_told(tmp_path, flags, code, says):
    done = rungs_as_tests(tmp_path, *flags)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr


def rungs_as_tests(folder, *flags):
    test = "def test_rung(parity_rung):\n    assert parity_rung.verdict != 'bug', parity_rung.findings\n"
    (folder / "test_port.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-p", "parity.ci.plugin", "-v", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}  # those are for this repository's tests
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
