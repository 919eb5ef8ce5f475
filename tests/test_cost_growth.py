"""`benchmarks/cost_growth.py`: the exponents beside theory's, and that a point is measured as train.py trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import benchmark

from input_pipeline.errors import RequestError

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cost_growth.py"
SMALL = {"batch": 2, "size": 32, "width": 0.5, "depth": 14}


@pytest.fixture(scope="module")
def growth():
    return benchmark("cost_growth")


def test_exponents_of_known_laws(growth):
    assert growth.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    operations = [growth.theory(SMALL | {"batch": batch})["seconds"] for batch in (2, 4, 8)]
    assert growth.slope([2, 4, 8], operations) == pytest.approx(1)
    large = [growth.theory(SMALL | {"size": size})["seconds"] for size in (512, 1024, 2048)]
    assert growth.slope([512, 1024, 2048], large) == pytest.approx(2, abs=0.01)
    wide = [growth.theory(SMALL | {"width": width})["seconds"] for width in (8, 16, 32)]
    assert growth.slope([8, 16, 32], wide) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("point", ['{"batch": 2', '{"batch": 2}', "2"])
def test_what_is_no_point_is_refused(growth, point):
    with pytest.raises(RequestError, match=r"is no point; write it as \{\"batch\": 8"):
        growth.main(point)


@pytest.mark.slow
def test_a_point_is_measured(growth):
    command = [sys.executable, str(SCRIPT), "--point", json.dumps(SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["seconds"] > 0
    assert growth.theory(SMALL)["gib"] < measured["gib"] < 10 * growth.theory(SMALL)["gib"]
