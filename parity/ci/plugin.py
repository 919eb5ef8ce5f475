"""A plugin for pytest that runs the rungs of a bundle as tests.

A test that takes the fixture `parity_rung` runs once for each rung that the bundle has, in order:

    def test_rung(parity_rung):
        assert parity_rung.verdict != "bug", parity_rung.findings

with `pytest --parity-bundle reference.bundle`. After a rung that fails, those behind it are skipped, as in `all`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the flags of the plugin."""
    group = parser.getgroup("parity", "JAX or PyTorch against a recorded reference")
    group.addoption("--parity-bundle", help="file that `python -m parity record` wrote; its rungs become tests")
    group.addoption("--parity-candidate", default="jax", help="side to judge, such as jax:tuned (default: jax)")
    group.addoption("--parity-weights", help="the recorded weights, if the bundle does not contain them")
    group.addoption("--parity-until", help="last rung to run (default: the last that was recorded)")


def pytest_configure(config: pytest.Config) -> None:
    """Opens the bundle, so that one that is not to be had is told before any test is collected."""
    if config.getoption("--parity-bundle") is not None:
        _opened(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeats a test that takes `parity_rung` for each rung; without a bundle it is skipped."""
    if "parity_rung" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--parity-bundle") is None:
        skipped = pytest.mark.skip(reason="no --parity-bundle was given")
        metafunc.parametrize("parity_rung", [pytest.param(None, marks=skipped)], indirect=True, ids=["no bundle"])
        return
    _, _, names = _opened(metafunc.config)
    metafunc.parametrize("parity_rung", names, indirect=True, ids=names, scope="session")


@pytest.fixture(scope="session")
def parity_ladder(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The comparison with the bundle, whose processes end with the tests."""
    from rich.console import Console

    from parity.bundles.against import RecordedLadder
    from parity.ladder.attestation import attest
    from parity.ladder.ladder import working_folder

    bundle, options, names = _opened(request.config)
    with working_folder() as folder, RecordedLadder(bundle, options, folder, Console(quiet=True)) as ladder:
        attest(ladder, rungs=names)
        yield ladder


@pytest.fixture(scope="session")
def parity_rung(request: pytest.FixtureRequest, parity_ladder: Any) -> Any:
    """The `RungResult` of one rung."""
    from parity.ladder.rungs import RUNGS

    failed = request.config.stash.get(FAILED, None)
    if failed is not None:
        pytest.skip(f"the rung before it, {failed}, failed")
    result = RUNGS[request.param](parity_ladder)
    if result.verdict == "bug":
        request.config.stash[FAILED] = request.param
    return result


FAILED = pytest.StashKey[str]()  # name of the rung that failed
BUNDLE = pytest.StashKey[Any]()


def _opened(config: pytest.Config) -> Any:
    """Returns what `Against.opened` returns for the flags; the bundle is opened once.

    Raises:
        UsageError: the bundle is not to be had.
    """
    from input_pipeline.errors import RequestError
    from parity.bundles.against import Against

    if BUNDLE not in config.stash:
        flags: Any = {
            name: config.getoption(f"--parity-{name}") for name in ("bundle", "candidate", "weights", "until")
        }
        try:
            config.stash[BUNDLE] = Against(**flags | {"bundle": Path(flags["bundle"])}).opened()
        except RequestError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[BUNDLE]
