"""What a person is shown: names as they are, without markup, colour codes or bytes that no terminal can print."""

import sys
import unicodedata
from typing import Any

from rich.console import Console

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


def console(*, stderr: bool = False, width: int = WIDTH, quiet: bool = False) -> Console:
    """A console that prints text as it is: no markup, no highlighting, and lines that are not folded.

    Args:
        stderr: whether it writes to standard error.
        width: columns where the output is no terminal; a terminal has its own.
        quiet: whether nothing is printed at all.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    settings: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}
    return Console(stderr=stderr, width=None if terminal else width, quiet=quiet, **settings)
