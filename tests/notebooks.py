"""Runs the notebooks of examples/: `python tests/notebooks.py` runs all and stores what they print in them."""

import os
from pathlib import Path

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SECONDS = 600  # for a cell


def executed(path: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own, on the CPU, and returns it with what it printed.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "JAX_PLATFORMS")}
    os.environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    try:
        # files instead of ports: nothing else on the machine can talk to the kernel
        kernel = KernelManager(kernel_name="python3", transport="ipc")
        try:
            NotebookClient(notebook, km=kernel, timeout=SECONDS, record_timing=False).execute()
        finally:
            kernel.shutdown_kernel(now=True)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """Returns all text that the cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type == "stream" for output in outputs), "only text is stored"
    return "\n".join(output.text for output in outputs)


if __name__ == "__main__":
    for book in NOTEBOOKS:
        finished = executed(book)
        finished.metadata.language_info = {"name": "python"}  # not which Python it was
        nbformat.write(finished, book)
        print(f"{book.name}: {len(printed(finished).splitlines())} lines stored")
