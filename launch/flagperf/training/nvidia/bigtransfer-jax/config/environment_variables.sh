# Without a GPU that it can use, JAX computes on the CPU; with this it refuses.
export JAX_PLATFORMS=cuda
