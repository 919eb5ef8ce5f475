"""Runs notebooks: `python tests/notebooks.py examples/*.ipynb` runs them and stores what they print in them."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

SECONDS = 600  # for a cell
# files instead of ports: nobody else on the machine can talk to the kernel
KERNEL = Config({"KernelManager": {"transport": "ipc"}})


def printed(notebook: nbformat.NotebookNode) -> str:
    """Returns all text that the cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type == "stream" for output in outputs), "only text is stored"
    return "\n".join(output.text for output in outputs)


def store(path: Path) -> None:
    """Runs a notebook in a kernel of its own and writes it again, with what it printed.

    Raises:
        CellExecutionError: a cell failed; the file stays as it is.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", config=KERNEL, timeout=SECONDS, record_timing=False).execute()
    notebook.metadata.language_info = {"name": "python"}  # not which Python it was
    nbformat.write(notebook, path)
    print(f"{path.name}: {len(printed(notebook).splitlines())} lines stored")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        store(Path(argument))
