"""A stand-in for FlagPerf's common beginning of training scripts."""

import os

from driver import Driver


class InitHelper:
    def __init__(self, config):
        self.config = config

    def init_driver(self, global_module: dict, local_module: dict) -> Driver:
        driver = Driver(self.config, self.config.mutable_params)
        config = driver.config
        if not os.path.isdir(config.data_dir):
            raise ValueError(f"data_dir '{config.data_dir}' not exists.")
        for name in ("train_data", "eval_data"):
            setattr(config, name, os.path.join(config.data_dir, getattr(config, name)))
        config.local_rank = int(os.getenv("LOCAL_RANK", 0))
        return driver
