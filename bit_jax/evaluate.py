"""Accuracy of a model on a dataset, without training: `python -m bit_jax.evaluate --weights W --dataset D`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import input_pipeline
from bit_jax.config import ScaleConfig
from bit_jax.formats import weights
from bit_jax.formats.described import Description, described
from bit_jax.model.precision import choose
from bit_jax.predictions import classes, page, rows
from bit_jax.predictions.classes import Competing
from bit_jax.predictions.evaluation import Evaluation
from bit_jax.predictions.progress import counting
from bit_jax.predictions.views import Preprocessing
from bit_jax.published import locate
from bit_jax.scale import hosts, sharding
from bit_jax.train import keep_compiled_programs
from bit_jax.training.target import Target
from input_pipeline import terminal
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath, require_distinct, require_positive, typed


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share the work; they do not change the accuracy."""

    batch_per_device: int = 32
    """Number of images that each device classifies at a time."""
    mesh: str = ""
    """Device mesh, such as data=2,fsdp=8. Images are split over all devices;
    parameters are split over fsdp, for models that one device cannot hold. Empty: each device holds all parameters."""
    coordinator: str = ""
    """ADDRESS:PORT of host 0, for an evaluation on several hosts, which all get the same command.
    Leave it out under SLURM (srun) and Open MPI (mpirun) and in Kubernetes indexed jobs."""
    hosts: int | None = None
    """Number of hosts, with --coordinator. None: as many as the scheduler starts, or one."""
    host: int | None = None
    """Index of this host, starting at 0, with --coordinator. None: the scheduler's index."""

    @property
    def scale(self) -> ScaleConfig:
        return ScaleConfig(mesh=self.mesh, coordinator=self.coordinator, hosts=self.hosts, host=self.host)


@dataclasses.dataclass(frozen=True)
class Request:
    """A model and the split that it is evaluated on."""

    weights: Annotated[str, tyro.conf.arg(metavar="PATH|NAME")]
    """Weights of the model: a file or directory of the official layout, the original PyTorch code, timm or Hugging
    Face; `embedded`, a published name or address, or hf:OWNER/NAME."""
    dataset: str
    """Dataset, written like train.py's --dataset: digits, folder:PATH (PATH/SPLIT/CLASS/IMAGE), idx:DIRECTORY,
    or a tfds name prepared as array_record, such as imagenet2012."""
    data_dir: UserPath | None = None
    """Directory with the prepared tfds datasets. None: tfds's default directory."""
    split: str = "test"
    """Split to evaluate on, or a slice of one, such as validation[:10%]."""
    classes: Competing = "dataset"
    """Classes whose logits compete for the prediction, where the dataset lacks some of the head's:
    `dataset`, those that the dataset has, as ImageNet-A and -R are measured;
    `occurring`, those that the split has an example of; `head`, all."""
    by_position: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take labels as numbers of the head's classes, for weights without class names, such as those of VTAB.
    Otherwise classes are matched by name, and a class that the head lacks is refused."""
    view: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of matrix products and convolutions."""
    devices: Devices = Devices()
    json: UserPath | None = None
    """File to write the figures to, with the accuracy of every class."""
    html: UserPath | None = None
    """File to write a page to: accuracies, worst classes, and the most confident mistakes with their images."""
    predictions: UserPath | None = None
    """File (CSV) to write the prediction for every image to. The images are read once more, for their names."""
    mistakes: int = 48
    """Number of mistakes that the page shows."""
    input_threads: int | None = None
    """Threads that read, decode and resize images. None: one per core, or two where no image has to be decoded."""

    def check(self) -> None:
        """Refuses what can be refused before anything is read.

        Raises:
            RequestError: a number is out of its range, or a file cannot be written.
        """
        require_positive(typed(self.devices, "batch_per_device", "hosts") | typed(self, "mistakes", "input_threads"))
        self.view.check()
        outputs = {"--json": self.json, "--html": self.html, "--predictions": self.predictions}
        require_distinct({"--weights": Path(self.weights)} | outputs)
        for path in filter(None, outputs.values()):
            writable(path)


def main() -> None:
    carry_out(configuration())


def configuration(arguments: Sequence[str] | None = None, prog: str | None = None) -> Request:
    """Returns the request that a command line makes; by default this process's own.

    Args:
        prog: the command's name in messages; None: this process's.
    """
    return tyro.cli(Request, prog=prog, description=__doc__, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def carry_out(request: Request) -> Evaluation | None:
    """Evaluates as this host of those that the request names, prints the figures and writes the files.

    Returns:
        The evaluation on the first host, None on the others.

    Raises:
        RequestError: something in the request is out of its range, or `evaluate` refuses it.
    """
    request.check()
    input_pipeline.raise_descriptor_limit()
    keep_compiled_programs()
    with hosts.joined(request.devices.scale):
        evaluation = evaluate(request)
        if not hosts.is_first():
            return None
        try:
            write(request, evaluation)
        finally:  # the figures are not lost if a file cannot be written
            evaluation.show(terminal.console(width=120))
    return evaluation


def write(request: Request, evaluation: Evaluation) -> None:
    """Writes the files that the request asks for, each atomically."""
    if request.json is not None:
        write_json(request.json, evaluation.as_json())
    if request.html is not None:
        page.write_evaluation(request.html, evaluation, request.mistakes)
    if request.predictions is not None:
        evaluation.write_predictions(request.predictions)


def evaluate(request: Request) -> Evaluation:
    """Classifies every example of a split.

    Raises:
        RequestError: the weights or the dataset cannot be used, or do not fit each other.
    """
    precision = choose(request.precision)  # before any array is made
    mesh = sharding.make_mesh(fsdp=sharding.parse_mesh(request.devices.mesh, jax.device_count()))
    locate.resolve(request.weights)  # a wrong name is said before anything is read or fetched
    source = input_pipeline.open_source(request.dataset, request.split, request.data_dir)
    input_pipeline.require_labels(source)
    input_pipeline.require_descriptors(input_pipeline.descriptors(source), request.dataset)
    path = locate.weight_file(request.weights)
    architecture, _ = weights.read(path)
    known = described(path)
    matched = match(request, source, known, architecture.num_classes)
    side = request.view.side(known, lambda: input_pipeline.typical_area(source, skip_damaged=False)[0])
    rows_each = min(request.devices.batch_per_device, -(-len(source) // mesh.size))
    work = rows.Work(
        path,
        architecture,
        Target(mesh, precision),
        matched.source,
        request.view.views(known, side),
        rows_each * mesh.size,
        request.input_threads,
    )
    with counting(f"evaluating {request.weights}", len(source)) as done:
        computed = rows.compute(work, rows.classify(work, matched.competing), done)
    return Evaluation.of(request.weights, work, matched, computed)


def match(request: Request, source: input_pipeline.Source, known: Description, num_classes: int) -> classes.Matched:
    """Matches the split's labels with the head's classes, as the request says."""
    if request.by_position:
        return classes.match_by_position(source, num_classes, request.weights, request.classes)
    head = classes.Head.of(known.class_names, num_classes, request.weights)
    if head is None:
        raise classes.unnamed(source, num_classes, request.weights)
    return classes.match(source, head, request.classes)


if __name__ == "__main__":
    sys.exit(exit_code(main))
