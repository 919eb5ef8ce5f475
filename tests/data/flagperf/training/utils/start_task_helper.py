"""A stand-in for what FlagPerf's starters of tasks share: where a case's files are, and where its logs go."""

import os

TRAINING = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


def _case(args) -> str:
    return os.path.join(TRAINING, args.vendor, f"{args.model_name}-{args.framework}")


def get_config_dir_file(args):
    directory = os.path.join(_case(args), "config")
    there = os.path.isfile(os.path.join(directory, args.extern_config_file))
    return (directory, args.extern_config_file) if there else (None, None)


def get_train_script_path(args):
    script = os.path.join(TRAINING, "benchmarks", args.model_name, args.framework, args.train_script)
    return script if os.path.isfile(script) else None


def get_extern_module_dir(args):
    directory = os.path.join(_case(args), "extern")
    return directory if os.path.isdir(directory) else None


def write_pid_file(directory, name):
    with open(os.path.join(directory, name), "w") as file:
        file.write(f"{os.getpid()}\n")


def init_flagperf_logger(logger, args):
    of_round = os.path.join(args.log_dir, args.case_name, f"round{args.round}")
    directory = os.path.join(of_round, f"{args.host_addr}_noderank{args.node_rank}")
    os.makedirs(directory, exist_ok=True)
    logger.init(directory, f"start_{args.framework}_task.log", args.log_level, "both", log_caller=True)
    return directory
