"""Terminal output: names are shown as they are, without markup, colour codes or bytes that no terminal can print."""

import sys
import unicodedata
from typing import IO, Any

from rich.console import Console as RichConsole

WIDTH = 140  # columns of a table that is written to a file or a pipe


def printable(text: object) -> str:
    """Returns the text with control characters and undecodable bytes of file names written as escapes.

    A class directory may have any name: an ESC in it must not recolour the terminal, and a byte that is not UTF-8
    (which Python keeps as a surrogate) must not end the program when it is printed.
    """
    return "".join(_escaped(character) for character in str(text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    if "\udc80" <= character <= "\udcff":  # the byte that Python's surrogateescape stands for
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode()


class Console(RichConsole):
    """rich's console, except that a closed pipe raises BrokenPipeError; rich would end the process with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(
    *, stderr: bool = False, file: IO[str] | None = None, width: int = WIDTH, quiet: bool = False
) -> RichConsole:
    """Makes a console that prints text as it is: no markup, no highlighting, and lines that are not folded.

    Args:
        stderr: whether it writes to standard error.
        file: file that it writes to instead.
        width: columns if the output is not a terminal; a terminal has its own width.
        quiet: whether nothing is printed at all.
    """
    terminal = (file or (sys.stderr if stderr else sys.stdout)).isatty()
    settings: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}
    return Console(stderr=stderr, file=file, width=None if terminal else width, quiet=quiet, **settings)
