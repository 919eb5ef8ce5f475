"""The notebooks of examples/ run from top to bottom, and say what their texts say of them."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from notebooks import printed

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SAYS = {
    "fine_tune_your_folder": [r"60 steps, 300 test images, (8[5-9]|9\d)% right", "most confused", "10 classes"],
    "is_my_port_right": [r"root_block/pool, value, errs by itself", "FAILS at forward: root_block", "HOLDS: jax and"],
    "load_and_predict": [r"shirt.png: T-shirt, 9\d%", r"boot.png: ankle boot, [89]\d%", r"pooled +\(2, 1024\)"],
}


def test_every_notebook_is_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_was_printed_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = printed(notebook)
    assert all(re.search(words, stored) for words in SAYS[path.stem])
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|var|Users)/|\x1b\[|Traceback", stored)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    copy = shutil.copy(path, tmp_path)
    command = [sys.executable, str(ROOT / "tests" / "notebooks.py"), copy]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = printed(nbformat.read(copy, as_version=4))
    for words in SAYS[path.stem]:
        assert re.search(words, shown), f"{words} is not in:\n{shown}"
