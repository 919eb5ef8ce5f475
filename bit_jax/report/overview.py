"""Tables of runs: a row for each, in the form of FlagPerf's row, and where the time of each went."""

from collections.abc import Sequence

from rich.table import Table

from bit_jax.accounts.goodput import ROWS
from bit_jax.report.record import Record
from bit_jax.training import figures
from input_pipeline.terminal import printable

Rows = list[dict[str, str]]  # {column: cell} for each row; all rows have the same columns


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


def times(records: Sequence[Record]) -> Rows:
    """Returns where the time of each run went, over all starts, a column for each run; no rows where no run says so."""
    known = [(printable(record.workdir), record.account) for record in records if record.account is not None]
    if not known:
        return []
    said = [row for row in ROWS if any(account.seconds[row] for _, account in known)]
    rows = [
        {"over all starts": row} | {name: _of(account.wall, account.seconds[row]) for name, account in known}
        for row in said
    ]
    rows.append({"over all starts": "in all"} | {name: _of(account.wall, account.wall) for name, account in known})
    rows.append({"over all starts": "starts"} | {name: str(len(account.starts)) for name, account in known})
    for figure in ("p_whole", "p_train", "p_core"):
        rows.append({"over all starts": figure} | {name: _shown(account.figures[figure]) for name, account in known})
    return rows


def _of(wall: float, seconds: float) -> str:
    return f"{seconds:,.1f} s  {seconds / wall:6.1%}"


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.1f}"
