"""Tables of runs: a row for each, in the form of FlagPerf's row, where the time of each went, and what was watched."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from bit_jax.accounts.goodput import ROWS
from bit_jax.report.record import Record
from bit_jax.training import figures
from bit_jax.watching import numbers
from bit_jax.watching.spikes import Spike
from input_pipeline.files import is_number
from input_pipeline.terminal import printable

NOT_FINITE = "not finite"  # `--watch-every` leaves such a number out
# {column: cell} for each row; all rows have the same columns. Where these are work directories, the column that names
# the rows is "", because no path is empty.
Rows = list[dict[str, str]]


def table(records: Sequence[Record]) -> Table:
    """Returns the table of the runs for the terminal."""
    title, rows = runs(records)
    return figures.table(rows, title)


def runs(records: Sequence[Record]) -> tuple[str, Rows]:
    """Returns a title and a row for each run. The model and the dataset are the title where all runs have the same,
    else a column."""
    whats = [printable(f"{record.known.get('model')} on {record.known.get('dataset')}") for record in records]
    same = len(set(whats)) == 1
    rows = [
        {"run": printable(record.workdir)}
        | ({} if same else {"model and dataset": what})
        | {"steps": record.steps}
        | figures.flagperf_row(record.known)
        for record, what in zip(records, whats, strict=True)
    ]
    return whats[0] if same else "", rows


def tables(records: Sequence[Record]) -> dict[str, Rows]:
    """Returns {title: rows} of what there is to say beside `runs`."""
    found = {"Where the time went, over all starts": times(records), "Watched": watched(records)}
    return {title: rows for title, rows in found.items() if rows}


def times(records: Sequence[Record]) -> Rows:
    """Returns where the time of each run went, over all starts, a column for each run; no rows where no run says so."""
    known = [(printable(record.workdir), record.account) for record in records if record.account is not None]
    if not known:
        return []
    said = [row for row in ROWS if any(account.seconds[row] for _, account in known)]
    rows = [{"": row} | {name: _of(account.wall, account.seconds[row]) for name, account in known} for row in said]
    rows.append({"": "in all"} | {name: _of(account.wall, account.wall) for name, account in known})
    rows.append({"": "starts"} | {name: str(len(account.starts)) for name, account in known})
    for figure in ("p_whole", "p_train", "p_core"):
        rows.append({"": figure} | {name: _shown(account.figures[figure]) for name, account in known})
    return rows


def watched(records: Sequence[Record]) -> Rows:
    """Returns the newest numbers of `--watch-every` and the losses that stood out, a column for each run; no rows where
    there are neither."""
    known = [(printable(record.workdir), record) for record in records if record.watched or record.spikes]
    if not known:
        return []
    rows: dict[str, Callable[[Record], str]] = {
        "at step": lambda record: str(record.watched.get("step", "")),
        "gradient norm": lambda record: _number(record.watched, numbers.GRADIENT),
        "update to weights": lambda record: _number(record.watched, numbers.UPDATE),
        "largest activation": lambda record: _largest(record.watched, numbers.LARGEST, ".4g"),
        "dead ReLUs": lambda record: _largest(record.watched, numbers.DEAD, ".2%"),
        "loss spikes": lambda record: _spikes(record.spikes),
    }
    return [{"": row} | {name: cell(record) for name, record in known} for row, cell in rows.items()]


def _largest(watched: dict[str, Any], name: str, form: str) -> str:
    """Returns the number of the whole model, and the part in which it is largest, such as "3.2 in head"."""
    parts = {key.removeprefix(f"{name}/"): value for key, value in watched.items() if key.startswith(f"{name}/")}
    parts = {part: value for part, value in parts.items() if is_number(value)}
    if not parts:
        return ""
    if not is_number(watched.get(name)):
        return NOT_FINITE
    part, most = max(parts.items(), key=lambda item: item[1])
    whole = format(watched[name], form)
    if most == watched[name]:
        return f"{whole} in {printable(part)}"
    return f"{whole}; most in {printable(part)}: {most:{form}}"


def _spikes(spikes: Sequence[Spike]) -> str:
    if not spikes:
        return "0"
    last = spikes[-1]
    return f"{len(spikes)}; the last at step {last.step}, {last.loss:.3g} after a median of {last.median:.3g}"


def _number(watched: dict[str, Any], name: str) -> str:
    if not watched:
        return ""
    return f"{watched[name]:.4g}" if is_number(watched.get(name)) else NOT_FINITE


def _of(wall: float, seconds: float) -> str:
    return f"{seconds:,.1f} s  {seconds / wall if wall else 0:6.1%}"


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.1f}"
