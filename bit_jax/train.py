"""Fine-tunes a BiT model: `python -m bit_jax.train PRESET --workdir DIR`, or `python train.py` in the repository.

`--help` behind a preset lists its flags.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU; the rest is CUDA's and NCCL's: see plan.py

from bit_jax.process import hugepages, signs
from bit_jax.process.age import age

if __name__ == "__main__":
    hugepages.restart()

import jax
import tyro

from bit_jax import config, doctor
from bit_jax.accounts.timeline import STARTING, Observer, Timeline, nobody
from bit_jax.compiled import profile
from bit_jax.published import fetch
from bit_jax.scale import alike, hosts
from bit_jax.stores.mirror import local
from bit_jax.training import figures, finetuning, run
from bit_jax.training.stall import Watchdog
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code, leave
from input_pipeline.limits import raise_descriptor_limit


def main() -> None:
    cfg = configuration()
    if cfg.scale.doctor:
        with _joined(cfg, Timeline()):
            return doctor.examine(cfg)
    if result := train(cfg):
        with contextlib.suppress(BrokenPipeError):  # the run is done and kept, whether or not anybody reads of it
            title = f"{result['model']} on {result['dataset']}"
            terminal.console(width=120).print(figures.table([figures.flagperf_row(result)], title))
            if cfg.run.profile:
                with contextlib.suppress(RequestError):  # the log says why there is no table
                    profile.show(profile.load(local(cfg.run.workdir)), terminal.console(width=120))
            print(f"{cfg.run.workdir}: final.npz, result.json, metrics.jsonl, tensorboard/, checkpoints/", flush=True)


def configuration(arguments: Sequence[str] | None = None, prog: str | None = None) -> config.Config:
    """Returns the configuration that a command line asks for: a preset and flags; by default this process's own.

    Args:
        prog: the command's name in messages; None: this process's.
    """
    return tyro.extras.overridable_config_cli(
        config.PRESETS, prog=prog, description=__doc__, args=arguments, config=(tyro.conf.OmitArgPrefixes,)
    )


def train(cfg: config.Config, observer: Observer = nobody) -> dict[str, Any] | None:
    """Trains as this host of the configured run, for programs that start training themselves.

    Args:
        observer: see `finetuning.finetune`.

    Returns:
        The content of result.json on the first host, None on the others.
    """
    timeline = Timeline(before=age())
    with signs.giving(), Watchdog(cfg.run.stall_timeout, timeline) as watchdog, _joined(cfg, timeline):
        with timeline(STARTING):
            settled = run.Run.of(cfg)
        result = finetuning.finetune(settled, observer, timeline, watchdog)
        first = hosts.is_first()
    return result if first else None


@contextlib.contextmanager
def _joined(cfg: config.Config, timeline: Timeline) -> Iterator[None]:
    """Prepares this process for the run and joins the run's other hosts while the `with` block runs."""
    raise_descriptor_limit()
    keep_compiled_programs()
    with contextlib.ExitStack() as hosts_of_the_run:
        with timeline("joining"):
            hosts_of_the_run.enter_context(hosts.joined(cfg.scale))
            alike.require_same_run(cfg)
        yield


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the cache directory, so that a run that is started again, or another of the same
    shapes, does not compile anew."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RequestError):  # without a home there is none, and the run compiles anew
            jax.config.update("jax_compilation_cache_dir", str(fetch.cache_dir() / "xla"))


if __name__ == "__main__":
    leave(exit_code(main))
