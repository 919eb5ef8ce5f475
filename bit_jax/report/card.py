"""FlagPerf's card: the table of measured figures on the page of a case, in Markdown.

Source of columns and wording: FlagOpen/FlagPerf 1b5a030, training/nvidia/bigtransfer-pytorch/README.md.
"""

from collections.abc import Sequence
from typing import Any

from bit_jax.compiled import gpus
from bit_jax.config import FLAGPERF, identity
from bit_jax.report.record import Record
from bit_jax.training.figures import case

COLUMNS = ("配置", "precision", "fix_hp", "e2e_time", "p_whole", "p_train", "p_core", "final_acc1", "mem")
NONE = "/"  # FlagPerf's sign for a cell without a figure
HOSTS = {1: "单机", 2: "两机"}
MODEL = "R152x2"  # of FlagPerf's case
# flags that are no part of the recipe, or that have a cell of their own
ELSEWHERE = {
    *("model.model", "model.precision", "data.dataset", "data.train_split", "data.eval_split", "run.seed"),
    *("data.global_batch", "data.batch_per_device"),
}
WORDS = {"base_lr": "lr", "decay_steps": "lr_steps", "steps": "max_steps"}  # FlagPerf's, where they are not the flags'
ADDITIONS = "additions."  # how the flags of additions begin


def lines(records: Sequence[Record]) -> list[str]:
    """Returns the card's lines: the table, and a line for each run that says what its cells cannot."""
    table = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    rows = [[cell.replace("|", r"\|") for cell in row(record).values()] for record in records]
    table += ["| " + " | ".join(cells) + " |" for cells in rows]
    return [*table, "", *(f"- {note(record)}" for record in records)]


def row(record: Record) -> dict[str, str]:
    """Returns {column: cell} of a run; a run that is not finished has no figures."""
    known, result = record.known, record.result or {}
    cells = (
        _machine(known),
        known.get("precision") or NONE,
        ", ".join(departures(record)) or NONE,
        _number(result.get("e2e_time"), ".0f"),
        *(_rate(result.get(name)) for name in ("p_whole", "p_train", "p_core")),
        _number(result.get("final_acc1"), ".5f"),
        _memory(result),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def departures(record: Record) -> list[str]:
    """Returns what differs from the recipe of FlagPerf's case, in the words of FlagPerf's configuration: bs=20. What
    BiT-HyperRule or the dataset settled is taken from the recipe, and all else from the flags."""
    known = record.known
    batch, settled = known.get("batch_per_device"), record.recipe | record.recipe.get("schedule", {})
    given = {
        "model": (str(known.get("architecture") or MODEL).split()[0], MODEL),
        "bs": (FLAGPERF.data.batch_per_device if batch is None else batch, FLAGPERF.data.batch_per_device),
    }
    for key, usual in identity(FLAGPERF).items():
        name = key.partition(".")[2]
        if key not in ELSEWHERE and (name in settled or key in record.flags):
            given[WORDS.get(name, name)] = settled.get(name, record.flags.get(key)), usual
    differing = {name: value for name, (value, usual) in given.items() if value != usual}
    added = {name: value for name, value in record.flags.items() if name.startswith(ADDITIONS)}
    differing |= {name.removeprefix(ADDITIONS): value for name, value in added.items()}
    return [f"{name}={_short(value)}" for name, value in differing.items()]


def note(record: Record) -> str:
    """Returns a sentence with what the run was, and the figures of `--flagperf-compat`, if it has any."""
    known, result = record.known, record.result or {}
    versions = result.get("versions") or {}
    software = f", JAX {versions['jax']}" if "jax" in versions else ""
    what = f"`{record.workdir}`: {known.get('model')} on {known.get('dataset')}{software}"
    if record.result is None:
        return f"{what}; not finished, {record.steps} steps."
    return "; ".join([what, *_compat(result)]) + "."


def _compat(result: dict[str, Any]) -> list[str]:
    clauses = []
    if result.get("rank0_acc1") is not None:
        clauses.append(
            f"accuracy of rank 0's share, as FlagPerf reports it: {result['rank0_acc1']:.5f} "
            f"({result.get('rank0_examples') or 0:,} examples)"
        )
    if result.get("schedule_restarts_every") is not None:
        clauses.append(
            f"the schedule began anew every {result['schedule_restarts_every']:,} steps, as FlagPerf's does with every "
            "epoch"
        )
    if result.get("p_core_unsynchronized") is not None:
        clauses.append(
            f"p_core by FlagPerf's clock, which does not wait for the device: {_rate(result['p_core_unsynchronized'])}"
        )
    return [f"`--flagperf-compat {' '.join(result.get('flagperf_compat') or ())}`", *clauses] if clauses else []


def _machine(known: dict[str, Any]) -> str:
    """Returns the cell of the machine, such as A100单机8卡(1x8)."""
    kind = str(known.get("device_kind") or "")
    if not case(known):
        return NONE
    hosts, each = known["hosts"], known["devices"] // known["hosts"]
    short = kind.removeprefix("NVIDIA ").split("-")[0].split(" ")[0]  # A100 of NVIDIA A100-SXM4-40GB
    name = short if kind.startswith("NVIDIA ") and short else kind
    return f"{name}{HOSTS.get(hosts, f'{hosts}机')}{'单' if each == 1 else each}卡({case(known)})"


def _memory(result: dict[str, Any]) -> str:
    """Returns used/total GiB of the fullest device. Memory of the process, which a CPU has, is no device's."""
    if result.get("mem_gib") is None or result.get("mem_of") != "device":
        return NONE
    total, known = result.get("mem_total_gib"), gpus.memory_of(str(result.get("device_kind")))
    if total is None and known is not None:
        total = known / gpus.GIB
    return f"{result['mem_gib']:.1f}/{_number(total, '.1f') if total is not None else '?'}"


def _rate(value: float | None) -> str:
    return _number(value, ".0f" if value is not None and value >= 100 else ".1f")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_short, value)) + "]"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
