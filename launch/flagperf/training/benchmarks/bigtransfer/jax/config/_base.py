"""The case as FlagPerf defines it: BiT-M-R152x2 on ImageNet-1k. Names and values are those of its PyTorch case."""

# which FlagPerf's driver sets
vendor: str = "nvidia"
data_dir: str = None  # holds the two splits and the weights
name: str = "bigtransfer"
local_rank: int = -1

# data, below data_dir; a split holds a directory of images for each class
train_data: str = "train"
eval_data: str = "val"
transfered_weight: str = "backbone_weights/bigtransfer/"
model_shard: int = 2  # the width in the weights' name: BiT-M-R152x2.npz

# recipe
lr: float = 0.003
momentum: float = 0.9
warmup_steps: int = 500
lr_steps: list = [3000, 6000, 9000, 10000]
lr_gamma: float = 0.1
batch_size: int = 16  # of each device
target_mAP: float = 0.83  # noqa: N816 (FlagPerf's name; it is acc1)
max_steps: int = 40000
seed: int = 0

# FlagPerf's driver wants these
log_freq: int = 20
gradient_accumulation_steps: int = 1

# of this project: see `python -m bit_jax.train flagperf --help`
precision: str = "fp32"  # true float32; tf32 is what PyTorch's convolutions compute on an A100 unless they are told
remat: str = "none"
flagperf_compat: str = ""  # switches of --flagperf-compat, separated by spaces
workdir: str = ""  # on a disk that all hosts share; empty: training/result/workdirs/<run>/<case>/round<N>
flags: str = ""  # further flags of the training, as they are typed; they go last
