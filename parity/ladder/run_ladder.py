"""A comparison on a real run's batches in place of generated pictures."""

import dataclasses
from pathlib import Path

from rich.console import Console

import input_pipeline
from parity.ladder.ladder import Ladder
from parity.options import Options
from parity.sides.inputs import Batches
from parity.sides.recorded import RecordedRun


class RunLadder(Ladder):
    """A ladder whose pictures are the batch of a run's step or, in further looks, those of the steps after it.

    Args:
        options: options of the comparison; its weights are the run's parameters before the step.
        folder, console: see `Ladder`.
        run: the run.
        source: the run's dataset; None: only `batch` is there, and further looks see it again.
        step: number of steps before the step.
        batch: the step's batch, if the run left it; None: the dataset's.
    """

    def __init__(
        self,
        options: Options,
        folder: Path,
        console: Console,
        *,
        run: RecordedRun,
        source: input_pipeline.Source | None,
        step: int,
        batch: Batches | None = None,
    ):
        super().__init__(options, folder, console)
        self._run, self._source, self._step, self._batch = run, source, step, batch

    def pictures(self, look: int = 0) -> Path:
        """Returns the file of the batch of a look, of which the first --rows rows are kept."""
        path = self.folder / f"batch {self._step + look}.npz"
        if not path.exists():
            batch = self._of_step(self._step + look)
            rows = {name: getattr(batch, name)[:, : self.options.rows] for name in ("image", "label")}
            dataclasses.replace(batch, **rows).save(path)
        return path

    def _of_step(self, number: int) -> Batches:
        left = self._batch is not None and (number == self._step or self._source is None)
        if left and self._batch is not None:
            return self._batch
        assert self._source is not None, "without a dataset there is a batch"
        return self._run.batches(self._source, number, 1)
