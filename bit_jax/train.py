"""Fine-tunes a BiT model: `python -m bit_jax.train PRESET --workdir DIR`, or `python train.py` in the repository.

`--help` behind a preset lists its flags.
"""

import contextlib
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU; the rest is CUDA's and NCCL's: see plan.py

from bit_jax.process import hugepages

if __name__ == "__main__":
    hugepages.restart()

import jax
import tyro

from bit_jax import config, doctor
from bit_jax.compiled import profile
from bit_jax.published import fetch
from bit_jax.scale import hosts
from bit_jax.training import figures, run
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.limits import raise_descriptor_limit


def main() -> None:
    cfg = tyro.extras.overridable_config_cli(config.PRESETS, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    raise_descriptor_limit()
    keep_compiled_programs()
    with hosts.joined(cfg.scale):
        if cfg.scale.doctor:
            return doctor.examine(cfg)
        result = run.finetune(run.Run.of(cfg))
        first = hosts.is_first()
    if first:
        with contextlib.suppress(BrokenPipeError):  # the run is done and kept, whether or not anybody reads of it
            terminal.console(width=120).print(figures.flagperf_row(result))
            if cfg.run.profile:
                with contextlib.suppress(RequestError):  # the log says why there is no table
                    profile.show(profile.load(cfg.run.workdir), terminal.console(width=120))
            print(f"{cfg.run.workdir}: final.npz, result.json, metrics.jsonl, tensorboard/, checkpoints/", flush=True)


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the cache directory, so that a run that is started again, or another of the same
    shapes, does not compile anew."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RequestError):  # without a home there is none, and the run compiles anew
            jax.config.update("jax_compilation_cache_dir", str(fetch.cache_dir() / "xla"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
