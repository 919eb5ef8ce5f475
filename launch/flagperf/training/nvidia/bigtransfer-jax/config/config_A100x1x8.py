vendor = "nvidia"
batch_size = 16
precision = "tf32"  # as in FlagPerf's rows of PyTorch, which call it fp32
