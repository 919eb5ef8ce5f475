vendor = "nvidia"
batch_size = 20
precision = "tf32"  # as in FlagPerf's rows of PyTorch, which call it fp32
workdir = ""  # name a directory on a disk that both hosts share, unless training/result/ itself lies on one
