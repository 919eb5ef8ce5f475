"""Every command of README, of the pages and of benchmarks/gpu.py runs as typed: its own parser takes it."""

import contextlib
import functools
import inspect
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from conftest import benchmark

from bit_jax.process import hugepages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# words in capitals that stand for what a reader puts in their place
STANDS_FOR = {
    "PRESET": "digits",
    "RUNG": "forward",
    "N": "2",
    "K": "2",
    "R": "0.1",
    "P": "bf16",
    "ADDRESS:PORT": "host:1",
}
OF_OTHERS = ("pytest", "pip", "build", "venv")  # modules that are run with -m and are not this project's


class Parsed(BaseException):
    """The command line was understood; nothing is run."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of each line in a block and each piece of code in a sentence that runs Python."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for line in [*lines, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))]:
            match = re.match(r"(?:\w+=\S+ )*(?:\S*/)?python3? (.*)", line.strip())
            # a program that is only named has no words behind it
            named = match is None or len(match[1].split()) == (2 if match[1].startswith("-m ") else 1)
            if match is not None and not named and match[1].split()[0] != "-c":
                found.append((page.name, match[1]))
    return found


def arguments(command: str) -> list[str]:
    """The words of a command, without its comment and what stands for more of the same."""
    command = re.split(r"\s#\s|\s&| \| | > ", command)[0]
    command = re.sub(r"\[([^\[\]]*)\]", r"\1", command) if re.search(r"\[-", command) else command
    words = [STANDS_FOR.get(word, word) for word in shlex.split(command)]
    others = ["--workdir", "DIR"] if words[0] == "train.py" else []  # of the flags that "..." stands for
    return [word for given in words for word in (others if given == "..." else [given])]


def file_of(words: list[str]) -> tuple[Path, list[str]]:
    """(the file that the words run, its arguments)."""
    if words[0] != "-m":
        return ROOT / words[0], words[1:]
    place = ROOT / words[1].replace(".", "/")
    return (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")), words[2:]


def stub(described: Any) -> Any:
    """A function with the same flags that does nothing; a class of flags as it is."""
    if not inspect.isfunction(described):
        return described

    @functools.wraps(described)
    def understood(*_: object, **__: object) -> None:
        raise Parsed

    return understood


@pytest.fixture
def parse(monkeypatch) -> Callable[[list[str]], None]:
    """Runs a command up to where its flags are understood."""
    one, several, presets = tyro.cli, tyro.extras.subcommand_cli_from_dict, tyro.extras.overridable_config_cli

    def only_parsed(parser: Callable, described: Any, *arguments: Any, **settings: Any) -> None:
        parser(described, *arguments, **settings)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", lambda f, **settings: only_parsed(one, stub(f), **settings))
    monkeypatch.setattr(
        tyro.extras,
        "subcommand_cli_from_dict",
        lambda them, **settings: only_parsed(several, {name: stub(f) for name, f in them.items()}, **settings),
    )
    monkeypatch.setattr(
        tyro.extras, "overridable_config_cli", lambda them, **settings: only_parsed(presets, them, **settings)
    )
    monkeypatch.setattr(hugepages, "restart", lambda: None)

    def run(words: list[str]) -> None:
        path, arguments = file_of(words)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        monkeypatch.syspath_prepend(path.parent)  # as Python does with a script's folder
        runpy.run_path(str(path), run_name="__main__")

    return run


def steps() -> list[tuple[str, str]]:
    """(gpu.py, command) of each step of benchmarks/gpu.py on a GPU."""
    gpu = benchmark("gpu")
    found = [step.command for step in gpu.steps(gpu.LARGE)]
    paths = {"{json}": "F", "{dir}": "DIR"}
    return [("gpu.py", re.sub("{json}|{dir}", lambda match: paths[match[0]], command)) for command in found]


@pytest.mark.parametrize(("page", "command"), [*commands(), *steps()])
def test_a_shown_command_is_taken_by_its_parser(page, command, parse):
    words = arguments(command)
    if words[0] == "-m" and words[1] in OF_OTHERS:
        pytest.skip("It is not a command of this project.")
    shown = io.StringIO()
    captured = contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown)
    with captured[0], captured[1], pytest.raises((Parsed, SystemExit)) as ended:
        parse(words)
    assert ended.type is Parsed or "--help" in words, f"{page}: python {command}\n{shown.getvalue()}"
