"""What a person is shown: names as they are, without markup, colour codes or bytes that no terminal can print."""

import sys
import unicodedata
from typing import IO, Any

from rich.console import Console as RichConsole

WIDTH = 140  # columns of a table that goes to a file or a pipe


def printable(text: object) -> str:
    """The text with control characters and undecodable bytes of file names written as escapes.

    A class directory may be called anything: an ESC in its name must not recolour the terminal, and a byte that is no
    UTF-8 (which Python keeps as a surrogate) must not end the program when it is printed.
    """
    return "".join(_escaped(character) for character in str(text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    if "\udc80" <= character <= "\udcff":  # the byte that Python's surrogateescape stands for
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode()


class Console(RichConsole):
    """rich's console, which would end the process with exit code 1 where nobody reads a pipe any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(
    *, stderr: bool = False, file: IO[str] | None = None, width: int = WIDTH, quiet: bool = False
) -> RichConsole:
    """A console that prints text as it is: no markup, no highlighting, and lines that are not folded.

    Args:
        stderr: whether it writes to standard error.
        file: what it writes to instead.
        width: columns where the output is no terminal; a terminal has its own.
        quiet: whether nothing is printed at all.
    """
    terminal = (file or (sys.stderr if stderr else sys.stdout)).isatty()
    settings: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}
    return Console(stderr=stderr, file=file, width=None if terminal else width, quiet=quiet, **settings)
