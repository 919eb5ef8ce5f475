# An image for machines with NVIDIA GPUs, which holds the package and all that it needs to train and predict there.
# JAX brings CUDA and cuDNN as Python packages. The host needs NVIDIA's driver for CUDA 13 and its container toolkit.
#   docker build --tag bit-jax .
#   docker run --rm --gpus all --shm-size 16g --volume "$DATA:/data" --volume "$RUNS:/runs" bit-jax \
#       bit-jax-train flagperf --data-dir /data --workdir /runs/imagenet
FROM python:3.13-slim

WORKDIR /bit-jax
COPY . .
RUN pip install --no-cache-dir --constraint constraints-3.13.txt '.[cuda]'

CMD ["bit-jax-train", "--help"]
