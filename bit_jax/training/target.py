"""What a program is compiled for: devices, precision, and how the model is executed there.

Training, `plan`, the benchmarks and JAX's side of a comparison all take model and compiler options from here, so that
what is planned, timed and judged is what is trained; `plan` alone knows no additions to BiT's recipe.
"""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from bit_jax.model.architecture import Architecture, Remat
from bit_jax.model.layers import param_dtype
from bit_jax.model.precision import Precision
from bit_jax.model.resnetv2 import ResNetV2
from bit_jax.scale import sharding

YNNPACK = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
TOGETHER = 32 * 2**20  # bytes, over all devices, that one collective moves: enough for full bandwidth on NVLink


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is compiled for, and how it is executed there.

    Attributes:
        mesh: the devices; batches are split over all of them, parameters over its `fsdp` axis.
        precision: the precision of the computation.
        remat: the activations that the backward pass computes again instead of keeping them, see `ResNetV2`.
        microbatches: number of parts of a training step's batch that are computed one after the other.
        tuned: whether model and compiler options are those that run best on these devices, or the defaults of the
            model and of XLA, which a comparison can ask for.
        deterministic: whether algorithms that add in a different order each time are excluded.
    """

    mesh: Mesh
    precision: Precision
    remat: Remat = "none"
    microbatches: int = 1
    tuned: bool = True
    deterministic: bool = False

    def model(self, architecture: Architecture) -> ResNetV2:
        """Returns the architecture's model as it is executed here. It computes the same whatever the target.

        Where it is tuned, 1x1 convolutions and those of few places are matrix products on CPUs: a third of a training
        step of R50x1. On GPUs cuDNN's convolutions need no change of layout between them, which products do: 272
        instead of 215 GB of memory traffic in a step of R152x2.
        """
        model = architecture.model(self.precision.dtype, self.precision.product)
        model = model.clone(remat=self.remat, gather=sharding.gather(self.mesh))
        return model.clone(paced=self._hides_collectives, products=self.on_cpu) if self.tuned else model

    @property
    def param_dtype(self) -> jnp.dtype:
        """The dtype of parameters, momentum and statistics."""
        return param_dtype(self.precision.dtype)

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def _hides_collectives(self) -> bool:
        """Whether collectives are to run behind computation: where there are several GPUs."""
        return self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "gpu"

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """XLA's options that differ from its defaults.

        On GPUs values that the program rounds to bfloat16 stay rounded. By default XLA keeps float32 beside them where
        it computed that anyway, and writes both to memory: 8 % more traffic in a bfloat16 step of R152x2.

        On several GPUs, collectives run behind computation. By default XLA runs almost all gradient collectives of this
        program synchronously, and gathers or reduces as many arrays at once as it can, which would put much of a split
        model whole into memory.

        On CPUs matrix products and sums are YNNPACK's, as by default, but convolutions are not: XLA's own, of Eigen,
        take half to all of its time. Vectors are as wide as the processor has them.

        `deterministic` changes nothing on CPUs. On GPUs it excludes algorithms that add in a different order each time,
        and XLA takes the first algorithm that compiles instead of the one that it just measured as the fastest. The
        first option does both, but parts of XLA look at the second one alone. The third leaves matrix products to
        cuBLAS: XLA of JAX 0.11 uses no Triton kernels in deterministic programs, and yet makes fusions that only Triton
        can compile.
        """
        options: dict[str, str | bool] = {}
        if self.deterministic and not self.on_cpu:
            options |= {
                "xla_gpu_deterministic_ops": True,
                "xla_gpu_exclude_nondeterministic_ops": True,
                "xla_gpu_enable_triton_gemm": False,
            }
        if not self.tuned:
            return options
        if self.on_cpu:
            return {"xla_cpu_experimental_ynn_fusion_type": YNNPACK, "xla_cpu_prefer_vector_width": "512"}
        options["xla_allow_excess_precision"] = False
        if not self._hides_collectives:
            return options
        fsdp = self.mesh.shape[sharding.FSDP]
        return options | {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            "xla_gpu_all_gather_combine_threshold_bytes": str(TOGETHER),
            "xla_gpu_all_reduce_combine_threshold_bytes": str(TOGETHER),
            "xla_gpu_reduce_scatter_combine_threshold_bytes": str(TOGETHER // fsdp),  # of what remains
        }
