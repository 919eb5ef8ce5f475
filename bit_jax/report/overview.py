"""A table of runs, a row for each, in the form of FlagPerf's row."""

from collections.abc import Sequence

from rich.table import Table

from bit_jax.report.record import Record
from bit_jax.training import figures


def table(records: Sequence[Record]) -> Table:
    """Returns the table. The model and the dataset are its title where all runs have the same, else a column."""
    whats = [f"{record.known.get('model')} on {record.known.get('dataset')}" for record in records]
    same = len(set(whats)) == 1
    rows = [
        {"run": str(record.workdir)}
        | ({} if same else {"model and dataset": what})
        | {"steps": record.steps}
        | figures.flagperf_row(record.known)
        for record, what in zip(records, whats, strict=True)
    ]
    return figures.table(rows, whats[0] if same else "")
