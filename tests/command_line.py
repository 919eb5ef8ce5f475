"""`python -m parity` in the tests' own process, which spares it the start; what compares has processes of its own."""

import contextlib
import dataclasses
import io
import sys
from unittest import mock

from input_pipeline.exits import exit_code
from parity import __main__ as parity_main


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def parity(*arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    command = mock.patch.object(sys, "argv", ["parity", *map(str, arguments)])
    with command, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = exit_code(parity_main.main)
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())
