"""FlagPerf's training script for BiT in JAX: it trains by `bit_jax`, and tells FlagPerf's driver what happens.

The configuration becomes a command line of `python -m bit_jax.train flagperf`, which is printed. This script computes
nothing itself, and nothing that it reports can stop the training.
"""

import dataclasses
import os
import shlex
import sys
from typing import Any

sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))  # benchmarks/, for `driver`
from bit_jax import train  # isort: skip (before any other module of JAX: it sets how much memory JAX may take)
import config
from driver import Event
from driver.helper import InitHelper

from bit_jax.training.finetuning import OBSERVED
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code

EVALUATION_BEFORE, TRAINING = OBSERVED


@dataclasses.dataclass
class State:
    """What the training came to.

    Attributes:
        result: the content of result.json on the first host; None on the others.
        logger: FlagPerf's logger.
    """

    result: dict[str, Any] | None
    logger: Any


def main() -> tuple[Any, State]:
    """Trains, and returns the configuration and the state, as FlagPerf's training scripts do."""
    rank = int(os.environ["FLAGPERF_NODE_RANK"])
    config.local_rank = rank  # the driver's logger takes it from here
    driver = InitHelper(config).init_driver(globals(), locals())
    config.local_rank = rank  # LOCAL_RANK, which the helper looks at, is for one process a device
    driver.event(Event.INIT_START)
    flags = training_flags(driver.config)
    print("python -m bit_jax.train " + shlex.join(flags), flush=True)

    def observer(activity: str, seconds: float | None) -> None:
        if activity == EVALUATION_BEFORE and seconds is not None:
            driver.event(Event.INIT_EVALUATION, {"time": seconds})
        if activity == TRAINING and seconds is None:
            driver.event(Event.INIT_END)
            driver.event(Event.TRAIN_START)
        if activity == TRAINING and seconds is not None:
            driver.event(Event.TRAIN_END)

    return driver.config, State(train.train(train.configuration(flags), observer), driver.logger)


def training_flags(config: Any) -> list[str]:
    """Returns the preset and the flags of `python -m bit_jax.train` for FlagPerf's configuration and environment.

    Raises:
        RequestError: the configuration asks for what the training cannot do.
    """
    if config.lr_gamma != 0.1:
        raise RequestError(f"lr_gamma = {config.lr_gamma} cannot be had: the learning rate is divided by 10; write 0.1")
    if config.gradient_accumulation_steps != 1:
        raise RequestError(
            f"gradient_accumulation_steps = {config.gradient_accumulation_steps} cannot be had; write 1, and "
            'flags = "--microbatches N" to compute a batch in parts'
        )
    hosts, devices = (int(os.environ[name]) for name in ("FLAGPERF_NNODES", "FLAGPERF_NPROC"))
    train_split, eval_split = (os.path.relpath(path, config.data_dir) for path in (config.train_data, config.eval_data))
    weights = os.path.join(config.data_dir, config.transfered_weight, f"BiT-M-R152x{config.model_shard}.npz")
    flags: dict[str, Any] = {
        "--model": weights,
        "--dataset": f"folder:{config.data_dir}",
        "--train-split": train_split,
        "--eval-split": eval_split,
        "--batch-per-device": config.batch_size,
        "--base-lr": config.lr,
        "--momentum": config.momentum,
        "--warmup-steps": config.warmup_steps,
        "--steps": config.max_steps,
        "--target-acc1": config.target_mAP,
        "--precision": config.precision,
        "--remat": config.remat,
        "--seed": config.seed,
        "--log-every": config.log_freq,
        "--mesh": f"data={hosts * devices}",  # the run is refused where there are more devices or fewer
        "--workdir": config.workdir or os.environ["FLAGPERF_WORKDIR"],
    }
    if hosts > 1:
        flags["--coordinator"] = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        flags |= {"--hosts": hosts, "--host": int(os.environ["FLAGPERF_NODE_RANK"])}
    words = [str(word) for flag in flags.items() for word in flag]
    words += ["--decay-steps", *map(str, config.lr_steps)]
    compat = config.flagperf_compat.split()
    return ["flagperf", *words, *(["--flagperf-compat", *compat] if compat else []), *shlex.split(config.flags)]


def finished(result: dict[str, Any]) -> dict[str, Any]:
    """Returns FlagPerf's figures of a finished run, from its result.json; docs/flagperf.md says what each of them is.
    A run that trained nothing has no rates, which are null."""
    figures = {
        "e2e_time": result["e2e_time"],
        "training_images_per_second": result["p_whole"],
        "converged": result["converged"],
        "final_accuracy": result["final_acc1"],
        "raw_train_time": result["raw_train_time"],
        "init_time": result["init_time"],
        "num_trained_samples": result["trained_examples"],
        "pure_training_computing_time": result["train_seconds"] - result["input_wait_seconds"],
        "throughput(ips)_raw": result["p_whole"],
        "throughput(ips)_no_eval": result["p_train"],
        "throughput(ips)_pure_compute": result["p_core"],
    }
    if switches := result.get("flagperf_compat"):
        names = ("rank0_acc1", "rank0_examples", "schedule_restarts_every", "p_core_unsynchronized")
        figures["flagperf_compat"] = {"switches": switches}
        figures["flagperf_compat"] |= {name: result[name] for name in names if name in result}
    return figures


def run() -> None:
    """Trains, and logs FlagPerf's figures on the first host."""
    _, state = main()
    if state.result is not None:
        state.logger.log(Event.FINISHED, message=finished(state.result), stacklevel=0)


if __name__ == "__main__":
    sys.exit(exit_code(run))
