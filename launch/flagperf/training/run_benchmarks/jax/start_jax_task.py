#!/usr/bin/env python3
"""Starts this host's process of a JAX case, in the container: FlagPerf's run.py calls it once on each host.

One process drives all devices of its host. What it prints goes to noderank<N>.out.log in the host's log directory.
Exit codes: 3 no configuration of the case, 4 no training script, else the training script's own.
"""

import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace

TRAINING = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.append(TRAINING)
from utils import flagperf_logger  # noqa: E402 (found by the path above)
from utils import start_task_helper as helper  # noqa: E402

LOGGER = flagperf_logger.FlagPerfLogger()


def parse_args() -> Namespace:
    """Returns what run.py passes; what is not known here is left alone, as by FlagPerf's other starters."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--node_rank", type=int, default=0, help="Index of this host, starting at 0.")
    add("--master_addr", default="127.0.0.1", help="Address of host 0, which all hosts reach.")
    add("--master_port", type=int, default=29501, help="Free port of host 0.")
    add("--nnodes", type=int, required=True, help="Number of hosts.")
    add("--nproc", type=int, required=True, help="Number of devices of each host, all driven by one process.")
    add("--hosts", default="127.0.0.1", help="Addresses of all hosts, separated by commas.")
    add("--hosts_ports", default="", help="Ports of all hosts, separated by commas.")
    add("--host_addr", required=True, help="Address of this host.")
    add("--vendor", required=True, help="Vendor of the devices: a directory of training/.")
    add("--visible_dev_env", help="Environment variable that says which devices a process sees.")
    add("--case_name", required=True, help="Name of the case.")
    add("--round", type=int, required=True, help="Number of this repetition of the case.")
    add("--model_name", required=True, help="Name of the model: a directory of training/benchmarks/.")
    add("--train_script", required=True, help="File name of the training script.")
    add("--enable_extern_config", action="store_true", help="Let the configuration set any name.")
    add("--extern_config_file", required=True, help="File name of the case's configuration.")
    add("--data_dir", default="/mnt/dataset/", help="Directory of the data and of the weights.")
    add("--log_dir", default="/workspace/flagperf/training/result/", help="Directory of this run's logs.")
    add("--log_level", default="debug", help="Level of this script's own log.")
    args, _ = parser.parse_known_args()
    args.framework = "jax"
    return args


def environment(args: Namespace) -> dict[str, str]:
    """Returns the environment of the training script: who the hosts are, which devices it sees, where results go."""
    # beside the run's logs and not among them: FlagPerf copies all logs of all hosts to the first one
    logs = os.path.abspath(args.log_dir)
    results = os.path.join(os.path.dirname(logs), "workdirs", os.path.basename(logs))
    named = {
        "FLAGPERF_NNODES": args.nnodes,
        "FLAGPERF_NPROC": args.nproc,
        "FLAGPERF_NODE_RANK": args.node_rank,
        "FLAGPERF_HOSTS": args.hosts,
        "FLAGPERF_HOSTS_PORTS": args.hosts_ports,
        "FLAGPERF_WORKDIR": os.path.join(results, args.case_name, f"round{args.round}"),
        "MASTER_ADDR": args.master_addr,
        "MASTER_PORT": args.master_port,
    }
    if args.visible_dev_env is not None:
        named[args.visible_dev_env] = ",".join(map(str, range(args.nproc)))
    return os.environ | {name: str(value) for name, value in named.items()}


def command(args: Namespace, log_dir: str) -> str:
    """Returns the shell's command line; ends this process if the configuration or the script is missing."""
    config_dir, config_file = helper.get_config_dir_file(args)
    if config_dir is None:
        LOGGER.error(f"no {args.extern_config_file} in {args.vendor}/{args.model_name}-{args.framework}/config")
        sys.exit(3)
    script = helper.get_train_script_path(args)
    if script is None:
        LOGGER.error(f"no {args.train_script} in benchmarks/{args.model_name}/{args.framework}")
        sys.exit(4)
    words = [sys.executable, "-u", script, "--data_dir", args.data_dir, "--vendor", args.vendor]
    words += ["--extern_config_dir", config_dir, "--extern_config_file", config_file]
    if args.enable_extern_config:
        words.append("--enable_extern_config")
        extern = helper.get_extern_module_dir(args)
        words += [] if extern is None else ["--extern_module_dir", extern]
    log = os.path.join(log_dir, f"noderank{args.node_rank}.out.log")
    return f"set -o pipefail; {shlex.join(words)} 2>&1 | tee {shlex.quote(log)}"


def main() -> int:
    args = parse_args()
    log_dir = helper.init_flagperf_logger(LOGGER, args)
    helper.write_pid_file(args.log_dir, "start_jax_task.pid")
    line = command(args, log_dir)
    LOGGER.info("Start task with command: " + line)
    code = subprocess.run(["bash", "-c", line], env=environment(args)).returncode
    LOGGER.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
