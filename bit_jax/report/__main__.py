"""What became of runs: `python -m bit_jax.report WORKDIR...`.

Prints a row for each run that is finished or under way, and where its time went, over all starts, from the files in its
work directory. Nothing is computed again, and no device is needed.
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from bit_jax.report import card, overview
from bit_jax.report.record import FILES, Record, read
from bit_jax.training import figures
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json
from input_pipeline.flags import Place, UserPath, require_distinct
from input_pipeline.terminal import printable


@dataclasses.dataclass(frozen=True)
class Arguments:
    workdirs: tyro.conf.Positional[tuple[Place, ...]]
    """Work directories of the runs: what they were given as --workdir."""
    flagperf: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print FlagPerf's card instead, in Markdown, with the columns of FlagPerf's own pages."""
    json: UserPath | None = None
    """File that receives everything as JSON, too."""
    html: UserPath | None = None
    """File that receives a page: curves, results side by side, where the time went, and the flags that differ."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m bit_jax.report", description=__doc__)
    if not arguments.workdirs:
        raise RequestError("no run to report; name the --workdir of at least one")
    outputs = {"--json": arguments.json, "--html": arguments.html}
    for flag, path in outputs.items():
        for workdir in (place for place in arguments.workdirs if isinstance(place, Path) and path is not None):
            for name in FILES:  # a report must not take the place of what it is of
                require_distinct({f"the run in {workdir}": workdir / name, flag: path})
    require_distinct(outputs)
    for path in outputs.values():
        if path is not None:
            writable(path)
    records = [read(workdir) for workdir in arguments.workdirs]
    for record in records:
        if record.damaged_lines:
            said = f"{record.workdir}/metrics.jsonl: {record.damaged_lines} damaged line(s) left out"
            print(printable(said), file=sys.stderr)
    if arguments.flagperf:
        for line in card.lines(records):
            print(printable(line))
    else:
        console = terminal.console(width=140)
        console.print(overview.table(records))
        for title, rows in overview.tables(records).items():
            console.print(figures.table(rows, title))
    if arguments.html is not None:
        from bit_jax.report import page  # importing matplotlib takes a second

        page.write(records, arguments.html)
    if arguments.json is not None:
        write_json(arguments.json, [_content(record) for record in records])


def _content(record: Record) -> dict:
    return {
        "workdir": str(record.workdir),
        "finished": record.finished,
        "result": record.result,
        "config": record.config,
        "last": record.last,
        "over_all_starts": None if record.account is None else record.account.described(),
        "watched": record.watched,
        "spikes": [dataclasses.asdict(spike) for spike in record.spikes],
        "flagperf": card.row(record),
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
