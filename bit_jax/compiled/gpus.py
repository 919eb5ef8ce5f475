"""The GPUs that `plan` knows: what XLA compiles for, and the published rates that a roofline is made of."""

import dataclasses

from input_pipeline.errors import RequestError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One GPU, and its links to the others of its host.

    Attributes:
        title: as the driver calls it.
        memory: bytes that the driver reports.
        bandwidth: bytes/s of that memory.
        cores, lanes, clock: streaming multiprocessors, float32 lanes of each, GHz.
        shared, shared_optin: bytes of shared memory a multiprocessor has, and a kernel may ask for.
        cache: bytes of the second level.
        capability: CUDA's major number.
        flops: peak dense products, 2 an accumulated product, per second, by precision.
        link: bytes/s that it can send to the others of its host while receiving as much.

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
        """XLA's GpuTargetConfigProto as text.

        Args:
            memory: bytes that XLA is told of; near them it begins to rematerialize.
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


def accelerator(name: str) -> Accelerator:
    """Raises RequestError for a name that is not in the table."""
    if name not in ACCELERATORS:
        raise RequestError(f"unknown --device {name!r}; there are {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
