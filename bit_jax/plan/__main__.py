"""What a training step would take on GPUs that are not here: memory, traffic, collectives, and a roofline.

    python -m bit_jax.plan --model BiT-M-R152x2 --device a100-40g --devices 8 --precision bf16 --remat norm

Compiles the very train step that train.py runs without additions such as --train or --ema, for that GPU, with XLA's
own compiler (`pip install 'bit-jax[plan]'`; no GPU is needed), and reads the result. Nothing runs, so there are no
times: the roofline divides by published peaks and is a lower bound.
"""

import dataclasses
import sys
from typing import Any

import jax
import tyro

from bit_jax.plan.estimate import plan
from bit_jax.plan.request import Request
from bit_jax.plan.search import search
from bit_jax.plan.show import show, show_search
from input_pipeline import terminal
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json
from input_pipeline.flags import UserPath


@dataclasses.dataclass(frozen=True)
class Arguments:
    request: Request
    search: bool = False
    """Find the largest batch per GPU that fits, for each --remat; --batch-per-device and --remat are ignored."""
    json: UserPath | None = None
    """File that receives everything as JSON, too."""


def main() -> None:
    arguments = tyro.cli(
        Arguments, prog="python -m bit_jax.plan", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )
    request = arguments.request
    request.check()
    if arguments.json is not None:
        writable(arguments.json)
    jax.config.update("jax_platforms", "cpu")  # a GPU that is here must not be taken for the one that is asked for
    console, progress = terminal.console(width=120), terminal.console(stderr=True)
    if arguments.search:
        rows = search(request, progress)
        result: dict[str, Any] = {"request": dataclasses.asdict(request), "search": rows}
        show_search(rows, console)
    else:
        progress.print("compiling twice: a minute or two each for a large model")
        result = plan(request)
        show(result, console)
    if arguments.json is not None:
        write_json(arguments.json, result)


if __name__ == "__main__":
    sys.exit(exit_code(main))
