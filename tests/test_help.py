"""Every flag of every command says in its help what it is, in words that need no subject from elsewhere."""

import contextlib
import io
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tyro

from bit_jax import config, convert, evaluate, launch, predict, reproduce, train, zoo
from bit_jax.compiled import profile
from bit_jax.plan import __main__ as plan
from bit_jax.report import __main__ as report
from input_pipeline import __main__ as input_pipeline_main
from parity import __main__ as parity_main
from parity.ladder import rungs

ROOT = Path(__file__).parent.parent
FRAGMENTS = {"of", "that", "what", "whose", "how", "as", "by", "in"}  # first words of a text without a subject

SCRIPTS = (
    *(
        f"benchmarks/{name}.py"
        for name in ("bandwidth", "cost_growth", "doors", "gpu", "load_weights", "parity_tables")
    ),
    *(f"benchmarks/{name}.py" for name in ("overhead_watching", "photographs", "picture", "plans", "saving")),
    *(f"benchmarks/false_alarms.py {name}" for name in ("simulate", "real", "show")),
    "examples/demo.py",
)

COMMANDS = {
    **{f"train.py {preset}": train.main for preset in config.PRESETS},
    **{f"bit_jax.zoo {name}": zoo.main for name in ("list", "fetch")},
    "bit_jax.convert": convert.main,
    "bit_jax.predict": predict.main,
    "bit_jax.evaluate": evaluate.main,
    "bit_jax.reproduce": reproduce.main,
    "bit_jax.plan": plan.main,
    "bit_jax.launch": launch.main,
    "bit_jax.report": report.main,
    "bit_jax.profile": lambda: tyro.cli(profile.main),
    **{f"input_pipeline {name}": input_pipeline_main.main for name in ("prepare", "convert", "check", "bench")},
    **{f"parity {name}": parity_main.main for name in ("show", "diff")},
    **{
        f"parity {name}": parity_main.main
        for name in (
            "all",
            *rungs.RUNGS,
            "selftest",
            "throughput",
            "convolutions",
            "input",
            "determinism",
            "step",
            "show",
            "diff",
        )
    },
    **{script: partial(runpy.run_path, str(ROOT / script.split()[0]), run_name="__main__") for script in SCRIPTS},
}


@pytest.fixture
def help_of(monkeypatch):
    """(command line, the function that parses it) -> what `--help` prints."""
    monkeypatch.setenv("COLUMNS", "80")  # in wider terminals tyro puts groups of flags side by side

    def shown(command: str, main: Callable) -> str:
        monkeypatch.setattr(sys, "argv", [*command.split(), "--help"])
        out = io.StringIO()  # it has no encoding, so tyro draws its boxes in ASCII
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return out.getvalue()

    return shown


def flags(text: str) -> list[tuple[str, str]]:
    """[(flag or positional argument, its sentences, without the default)] of a help text.

    Every box is a title, indented by one space, a rule, and its content, indented by two; between them a group of flags
    may have a description and a second rule. The help of a flag stands beside it or below it, further to the right.
    """
    boxes = re.split(r"^ (?=\S.*\n -+ *$)", text, flags=re.MULTILINE)[1:]
    sentences: list[tuple[str, str]] = []
    for lines in (box.splitlines()[2:] for box in boxes if not box.startswith("subcommands")):
        rule = next((place for place, line in enumerate(lines) if re.fullmatch(r"  -{9,} *", line)), -1)
        for line in lines[rule + 1 :]:
            if label := re.match(r"  (\S.*?)(  +|$)", line):
                sentences.append((label[1], line[label.end() :].strip()))
            elif line.strip():
                name, shown = sentences.pop()
                sentences.append((name, f"{shown} {line.strip()}"))
    end = re.compile(r" *\((default|required|optional|repeatable)\b.*\)$")
    return [(name, end.sub("", shown).strip()) for name, shown in sentences if name != "-h, --help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence(command, help_of):
    shown = flags(help_of(command, COMMANDS[command]))
    assert shown
    unclear = {name: text for name, text in shown if not text.endswith(".") or text.split()[0].lower() in FRAGMENTS}
    assert unclear == {}


def test_flags_are_read_from_the_boxes(help_of):
    def command(rate: float, steps: int = 3) -> None:
        """A command.

        Args:
            rate: Of what.
        """

    assert flags(help_of("command", lambda: tyro.cli(command))) == [("--rate FLOAT", "Of what."), ("--steps INT", "")]
