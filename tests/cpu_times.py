"""`pytest --cpu-times N`: what the tests cost, in CPU seconds, whatever else the machine does meanwhile.

A test's CPU seconds are those of its process and of the processes that it started and that have ended, from the end of
the test before it: they include fixtures, and the first test of a file includes the file's imports.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

_used = sum(os.times()[:4])


def pytest_addoption(parser):
    parser.addoption("--cpu-times", type=int, metavar="N", help="list the N files and the N tests of most CPU seconds")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Adds the CPU seconds since the report before to each report; pytest-xdist sends them along."""
    global _used
    report = yield
    now = sum(os.times()[:4])
    report.cpu_seconds, _used = now - _used, now
    return report


def pytest_terminal_summary(terminalreporter, config):
    """Prints the files and the tests that took most."""
    count = config.getoption("--cpu-times")
    if not count:
        return
    reports = [report for of_outcome in terminalreporter.stats.values() for report in of_outcome]
    files, tests = Counter(), Counter()
    for report in reports:
        if seconds := getattr(report, "cpu_seconds", 0.0):
            files[Path(report.nodeid.partition("::")[0]).name] += seconds
            tests[report.nodeid.removeprefix("tests/")] += seconds
    terminalreporter.section(f"{files.total():.0f} CPU seconds")
    for counted in (files, tests):
        for name, seconds in counted.most_common(count):
            terminalreporter.line(f"{seconds:8.1f}  {name}")
        terminalreporter.line("")
