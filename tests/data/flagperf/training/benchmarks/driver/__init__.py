"""A stand-in for FlagPerf's driver: what training scripts call of it, with its arguments and its log lines."""

import argparse
import enum
import importlib
import inspect
import json
import logging
import sys
import time
from types import ModuleType
from typing import Any


class Event(enum.IntEnum):
    INIT_START = 0
    INIT_END = 1
    TRAIN_START = 3
    TRAIN_END = 4
    INIT_EVALUATION = 10
    FINISHED = 17


class PerfLogger:
    def __init__(self, rank: int):
        self.rank = rank
        self._logger = logging.Logger("stand-in")  # it has no handler, so messages go to standard error as they are

    def log(self, event: Event, message: Any = None, stacklevel: int = 1) -> None:
        said = {"event": event.name}
        if message is not None:
            said["other" if isinstance(message, str) else "value"] = message
        caller = inspect.stack()[min(stacklevel + 1, len(inspect.stack()) - 1)]
        time_ms = int(time.time() * 1e3)
        said["metadata"] = {"file": caller.filename, "lineno": caller.lineno, "time_ms": time_ms, "rank": self.rank}
        self._logger.log(101, "[PerfLog] " + json.dumps(said))


class Driver:
    """Takes the arguments of a training script, and lets the machine's configuration change the case's."""

    def __init__(self, config: ModuleType, mutable_params: list[str]):
        parser = argparse.ArgumentParser(config.name)
        for name in ("--extern_module_dir", "--extern_config_dir", "--extern_config_file", "--data_dir"):
            parser.add_argument(name)
        parser.add_argument("--enable_extern_config", action="store_true")
        parser.add_argument("--vendor", required=True)
        given = parser.parse_args()
        sys.path.append(given.extern_config_dir)
        machine = vars(importlib.import_module(given.extern_config_file.removesuffix(".py")))
        sys.path.pop()
        for name, value in machine.items():
            if not name.startswith("__") and (name in mutable_params or given.enable_extern_config):
                setattr(config, name, value)
        for name, value in vars(given).items():
            if value is not None:
                setattr(config, name, value)
        self.config = config
        self.logger = PerfLogger(config.local_rank)

    def event(self, event: Event, message: Any = None) -> None:
        self.logger.log(event, message, stacklevel=2)
