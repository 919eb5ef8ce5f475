"""A side of the comparison: a framework and its settings, as the command line writes them."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal

from bit_jax.process import hugepages
from input_pipeline.errors import RequestError

COUNTS = {"jax": ("devices", "fsdp", "microbatches"), "torch": ("devices",)}
SWITCHES = {
    "jax": ("tuned", "probe", "deterministic", "device64", "hugepages"),
    "torch": ("compile", "compile_units", "cuda_graphs", "channels_last", "deterministic", "device64", "hugepages"),
}
HEAD = "head"  # name of the head in the parameter tree, and the --train of a probe, which names it alone
REMAT = ("remat=norm", "remat=unit")
EXPORTED = ("onnx", "stablehlo")  # what runs a model that was exported to a file; it has no other setting
# entry of the attestation whose difference can be accepted -> field of a side that takes the other side's value
ACCEPTABLE = {"standardization eps": "standardize_eps", "group norm eps": "norm_eps"}


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        framework: jax, torch, or one of `EXPORTED`.
        devices: number of devices; on a CPU JAX's are virtual, and PyTorch's are processes that share the threads.
        fsdp: JAX: number of devices over which parameters are split.
        microbatches: JAX: number of parts in which a training step's batch is computed, one after the other.
        remat: JAX: activations that the backward pass recomputes; see train.py's --remat.
        tuned: JAX: whether to compile as train.py does, with its XLA options and its code for these devices.
        probe: JAX: whether, with --train head, the head alone is trained on features that the body computed before, as
            by train.py --dataset features:DIRECTORY.
        deterministic: whether a GPU may use only algorithms that give the same bits every time.
        device64: whether float64 is computed on the accelerator too, and not on the CPU.
        hugepages: whether memory is in large pages, as with train.py on CPUs.
        code: folder of another version of this project, whose code the side runs; None: this one's.
        flags: JAX: flags of XLA, name=value, in addition to XLA_FLAGS and those that `tuned` sets.
        compile: torch: whether to compile the model with torch.compile.
        compile_units: torch: whether to compile each of the model's units by itself, which PyTorch calls regional
            compilation: units that are alike are compiled once.
        cuda_graphs: torch: whether what is compiled launches its kernels in CUDA graphs, as JAX does by itself.
        channels_last: torch: whether images and kernels have the channels_last memory format.
        model: torch: `package.module:factory` of a model in place of the reference.
        state_dict: torch: file that the model's parameters are loaded from.
        norm_eps, standardize_eps: jax and torch: constants that this project's model computes with; None: BiT's, and
            what the weight file says.
        file: onnx and stablehlo: the exported file.
    """

    framework: str
    devices: int = 1
    fsdp: int = 1
    microbatches: int = 1
    remat: Literal["none", "norm", "unit"] = "none"
    tuned: bool = False
    probe: bool = False
    deterministic: bool = False
    device64: bool = False
    hugepages: bool = False
    code: str | None = None
    flags: tuple[str, ...] = ()
    compile: bool = False
    compile_units: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False
    model: str | None = None
    state_dict: str | None = None
    norm_eps: float | None = None
    standardize_eps: float | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.file is not None:
            return f"{self.framework}:{self.file}"
        settings = [f"{name}={getattr(self, name)}" for name in COUNTS["jax"] if getattr(self, name) != 1]
        settings += [f"remat={self.remat}"] if self.remat != "none" else []
        settings += [word for word in SWITCHES[self.framework] if getattr(self, word)]
        settings += ["flags=" + "+".join(self.flags)] if self.flags else []
        settings += [f"code={self.code}"] if self.code else []
        name = self.framework + (":" + ",".join(settings) if settings else "")
        return name + (f" ({self.model})" if self.model else "")

    @property
    def ours(self) -> bool:
        """Whether the model is this project's own, and not another's or an exported file."""
        return self.model is None and self.file is None

    @property
    def processes(self) -> int:
        """Number of processes: PyTorch has one for each device."""
        return self.devices if self.framework == "torch" else 1

    def fields(self) -> dict[str, Any]:
        """Returns the attributes that are not the defaults, as JSON's types, for the side's process: `Side(**fields)`.

        What another version of the code does not know is thus named only where it is asked for; `code` is left out,
        because the process is that code's.
        """
        given = dataclasses.asdict(self) | {"code": None}
        return {
            field.name: given[field.name] for field in dataclasses.fields(self) if given[field.name] != field.default
        }

    def environment(self, precision: str) -> dict[str, str]:
        """Returns environment variables for the side's process. Float64, which decides what is right, runs on the CPU
        even if there is a GPU, unless the side has `device64`."""
        variables = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
        variables |= hugepages.environment() if self.hugepages else {}
        if self.code is not None:  # and not the code of the folder that the command was started in
            paths = (os.path.abspath(self.code), os.environ.get("PYTHONPATH"))
            variables |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
        if self.framework in ("jax", "stablehlo"):
            # the other framework needs memory of the same GPU
            variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            virtual = f"xla_force_host_platform_device_count={self.devices}"
            flags = [os.environ.get("XLA_FLAGS", ""), *(f"--{flag}" for flag in (virtual, *self.flags))]
            variables |= {"XLA_FLAGS": " ".join(flags).strip()}
            variables |= {"JAX_PLATFORMS": "cpu"} if precision == "fp64" and not self.device64 else {}
        elif self.deterministic:
            variables |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # PyTorch refuses cuBLAS's products without it
        return variables


def parse_side(
    text: str, *, model: str | None = None, state_dict: str | None = None, exported: bool = False, probe: bool = False
) -> Side:
    """Parses `torch`, `torch:compile,channels_last`, `jax:tuned` or `jax:devices=8,fsdp=4,microbatches=2,remat=norm`.

    Args:
        text: the side.
        model, state_dict: a PyTorch side's model and its parameters.
        exported: whether `onnx:FILE` and `stablehlo:FILE` are taken, too; they neither train nor can be timed.
        probe: whether `jax:probe` is taken, too; it is for comparisons that choose with --train what trains.

    Raises:
        RequestError: the text has another form or names a side that is not taken, `fsdp` does not divide `devices`, or
            there is no such file.
    """
    framework, _, rest = text.partition(":")
    if framework in EXPORTED:
        return _exported(framework, rest, taken=exported)
    settings = rest.split(",") if rest else []
    fields = [_field(framework, setting) for setting in settings]
    if framework not in COUNTS or None in fields:
        raise RequestError(
            f"side {text!r} is neither torch[:devices=N,compile,compile_units,cuda_graphs,channels_last,"
            "deterministic,device64,hugepages,code=DIR] nor "
            "jax[:devices=N,fsdp=N,microbatches=N,remat=R,tuned,probe,deterministic,device64,hugepages,"
            "flags=NAME=VALUE+...,code=DIR]" + (", onnx:FILE or stablehlo:FILE" if exported else "")
        )
    side = Side(framework, **dict(field for field in fields if field))
    if side.devices % side.fsdp:
        raise RequestError(f"side {text!r}: fsdp={side.fsdp} does not divide devices={side.devices}")
    if side.code is not None and not Path(side.code, "parity", "serve.py").is_file():
        raise RequestError(
            f"side {text!r}: {side.code} holds no parity/serve.py; name a folder with this project's code"
        )
    if side.compile and side.compile_units:
        raise RequestError(f"side {text!r} compiles the model or each of its units; leave out compile or compile_units")
    if side.compile_units and model is not None:
        raise RequestError(f"side {text!r}: which units {model} has is not known; write compile, not compile_units")
    if side.cuda_graphs and not (side.compile or side.compile_units):
        raise RequestError(f"side {text!r}: CUDA graphs hold what is compiled; add compile or compile_units")
    if side.probe and not probe:
        raise RequestError(
            f"side {text!r} trains a head on features, which only comparisons with --train head do, such as "
            "python -m parity curve; leave out probe"
        )
    return dataclasses.replace(side, model=model, state_dict=state_dict) if framework == "torch" else side


def _exported(framework: str, file: str, *, taken: bool) -> Side:
    """Returns the side of an exported file, whose name may hold commas and colons."""
    if not taken:
        raise RequestError(
            f"side {framework}:{file} is an exported file, which can be compared in the rungs forward, loss and "
            "accuracy alone; give torch or jax"
        )
    if not file or not Path(file).is_file():
        missing = "names no file" if not file else "is not to be had: there is no such file"
        raise RequestError(f"side {framework}:{file} {missing}; write {framework}:FILE with a model that was exported")
    return Side(framework, file=file)


def _field(framework: str, setting: str) -> tuple[str, Any] | None:
    """Parses one of the framework's settings into (name, value); None if the framework has no such setting."""
    name, _, value = setting.partition("=")
    if name in COUNTS.get(framework, ()) and re.fullmatch(r"[1-9]\d*", value):
        return name, int(value)
    if setting in SWITCHES.get(framework, ()):
        return name, True
    if framework == "jax" and setting in REMAT:
        return name, value
    if framework == "jax" and name == "flags" and value:
        return name, tuple(value.split("+"))
    if framework in COUNTS and name == "code" and value:
        return name, os.path.expanduser(value)
    return None
