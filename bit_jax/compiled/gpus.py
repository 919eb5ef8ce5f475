"""The GPUs that `plan` knows: their properties for XLA's compiler, and their published peak rates for rooflines."""

import dataclasses

from input_pipeline.errors import RequestError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One GPU, and its links to the others of its host.

    Attributes:
        title: the driver's name for it.
        memory: bytes of memory that the driver reports.
        bandwidth: bytes/s of that memory.
        cores, lanes, clock: number of streaming multiprocessors, float32 lanes of each, and clock in GHz.
        shared, shared_optin: bytes of shared memory that a multiprocessor has, and that a kernel may ask for.
        cache: bytes of the L2 cache.
        capability: major number of CUDA's compute capability.
        flops: {precision: peak operations per second of dense products, 2 for each accumulated product}.
        link: bytes/s that it can send to the other GPUs of its host while it receives as much.

    Sources: NVIDIA's A100 and H100 data sheets; OpenXLA's gpu_specs for what the compiler reads.
    """

    title: str
    memory: int
    bandwidth: int
    cores: int
    lanes: int
    clock: float
    shared: int
    shared_optin: int
    cache: int
    capability: int
    flops: dict[str, float]
    link: float

    def target(self, memory: int) -> str:
        """Returns XLA's GpuTargetConfigProto as text.

        Args:
            memory: bytes of memory that XLA assumes; it rematerializes if a program needs nearly as much.
        """
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared_optin}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} device_memory_size: {memory}
              cuda_compute_capability {{ major: {self.capability} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
            device_description_str: "{self.title}"
        """


_A100 = Accelerator(
    title="NVIDIA A100-SXM4-40GB",
    memory=42_331_013_120,
    bandwidth=1_555_200_000_000,
    cores=108,
    lanes=64,
    clock=1.41,
    shared=167_936,
    shared_optin=166_912,
    cache=40 * 2**20,
    capability=8,
    flops={"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12},
    link=300e9,
)

ACCELERATORS = {
    "a100-40g": _A100,
    "a100-80g": dataclasses.replace(
        _A100, title="NVIDIA A100-SXM4-80GB", memory=85_100_068_864, bandwidth=2_039_040_000_000
    ),
    "h100-80g": Accelerator(
        title="NVIDIA H100 80GB HBM3",
        memory=84_978_434_048,
        bandwidth=3_352_320_000_000,
        cores=132,
        lanes=128,
        clock=1.98,
        shared=233_472,
        shared_optin=232_448,
        cache=50 * 2**20,
        capability=9,
        flops={"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12},
        link=450e9,
    ),
}


def memory_of(title: str) -> int | None:
    """Returns the bytes of memory of the GPU that the driver calls so, or None if the table does not have it."""
    return next((gpu.memory for gpu in ACCELERATORS.values() if gpu.title == title), None)


def accelerator(name: str) -> Accelerator:
    """Returns the GPU of that name; raises RequestError for a name that is not in the table."""
    if name not in ACCELERATORS:
        raise RequestError(f"unknown --device {name!r}; there are {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
