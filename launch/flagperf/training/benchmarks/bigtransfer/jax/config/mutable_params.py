"""The names that a machine's own configuration may change."""

mutable_params = [
    "vendor",
    "data_dir",
    "train_data",
    "eval_data",
    "transfered_weight",
    "lr",
    "momentum",
    "warmup_steps",
    "lr_steps",
    "batch_size",
    "target_mAP",
    "max_steps",
    "seed",
    "log_freq",
    "precision",
    "remat",
    "flagperf_compat",
    "workdir",
    "flags",
]
