"""Reading compiled modules, and compiling for a GPU that is not here."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bit_jax.compiled import hlo
from bit_jax.compiled.gpus import ACCELERATORS
from bit_jax.plan.compilation import UNLIMITED, steps_on_gpus
from bit_jax.plan.estimate import ring_seconds
from bit_jax.plan.request import Request
from input_pipeline.errors import RequestError

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None if importlib.util.find_spec("jax_plugins") else True,
    reason="XLA's compiler for NVIDIA GPUs is not installed; pip install '.[plan]'",
)

MODULE = (ROOT / "tests/data/module.hlo").read_text()
IMAGES, KERNEL, OUT = 4 * 3 * 8 * 8 * 4, 8 * 27 * 4, 4 * 8 * 36 * 4  # bytes


def test_what_a_module_says_of_itself():
    module = hlo.Module(MODULE)
    assert module.convolutions() == 2
    assert module.flops() == 2 * (2 * (4 * 8 * 36) * 27)  # forward and kernel gradient, 27 products a value
    assert module.rematerialized() == 5
    assert module.traffic() == {
        "convolutions": 2 * (IMAGES + KERNEL + OUT),
        "collectives": 2 * KERNEL + (KERNEL + 8 * KERNEL),
        "copies": 2 * KERNEL,
        "other": 2 * 64 + 6 * 2 * OUT,  # the slice, and the loop's body five times
    }
    assert module.collectives() == [
        hlo.Collective("all-reduce", {"f32": KERNEL}, overlapped=True, times=1, group=4),
        hlo.Collective("all-gather", {"f32": 8 * KERNEL}, overlapped=False, times=1, group=8),
    ]
    # bytes bind at this bandwidth, products at that rate
    moved = sum(moved for kind, moved in module.traffic().items() if kind != "collectives")
    assert module.roofline(1e30, 1e9) == pytest.approx(moved / 1e9)
    assert module.roofline(1e9, 1e30) == pytest.approx(module.flops() / 1e9)
    with pytest.raises(ValueError, match="no HLO text"):
        hlo.Module("nothing")


def test_an_all_reduce_counts_once_whether_or_not_its_start_names_the_operands():
    """Since JAX 0.11 it does."""
    array = "f32[8,3,3,3]{3,2,1,0}"
    older = f"%hidden = {array} all-reduce-start"
    assert older in MODULE
    newer = hlo.Module(MODULE.replace(older, f"%hidden = (({array}), {array}) all-reduce-start"))
    module = hlo.Module(MODULE)
    assert newer.collectives() == module.collectives()
    assert newer.traffic() == module.traffic()


def test_of_what_a_fusion_slices_the_slice_counts_also_behind_a_bitcast():
    module = hlo.Module("""
%fused (p0: f32[10,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[40]{0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %matrix = f32[10,4]{1,0} bitcast(%p0)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%matrix, %p1, %zero), dynamic_slice_sizes={1,4}
}

ENTRY %main (x: f32[40], i: s32[]) -> f32[1,4] {
  %x = f32[40]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
""")
    row, place = 16, 4
    assert module.traffic()["other"] == row + place + row


def test_the_model_of_rings():
    request = Request(hosts=2, devices=8, mesh="data=2,fsdp=8", network_gbps=200)
    link, network = request.gpu.link, 25e9
    gather = hlo.Collective("all-gather", {"f32": 800}, True, 1, 8)  # within each host
    assert ring_seconds(gather, request, 2) == pytest.approx(800 * 7 / 8 / link)
    parts = hlo.Collective("all-reduce", {"f32": 100}, True, 1, 2)  # each of 8 devices with its like elsewhere
    assert ring_seconds(parts, request, 2) == pytest.approx(8 * 200 * 1 / 2 / network)
    assert ring_seconds(parts, request, 4) == pytest.approx(8 * 200 * 3 / 4 / network)
    everything = hlo.Collective("all-reduce", {"f32": 100}, True, 1, 16)
    assert ring_seconds(everything, request, 2) == pytest.approx(200 * 7 / 8 / link + 200 / 2 / network)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"device": "v100"}, "unknown --device 'v100'; there are a100-40g"),
        ({"devices": 0}, "--devices 0 must be greater than 0"),
        ({"batch_per_device": 3}, "--batch-per-device 3 must be even"),
        ({"precision": "fp64"}, "--precision fp64 is not planned for"),
    ],
)
def test_wrong_requests(fields, said):
    with pytest.raises(RequestError, match=said):
        Request(**fields).check()
    with pytest.raises(RequestError, match="unknown --model"):
        Request(model="BiT-X").architecture()


def test_where_the_plan_cannot_be_written_is_known_before_anything_is_compiled(tmp_path):
    command = [sys.executable, "-m", "bit_jax.plan", "--model", "R14x0.5", "--json", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is a directory, and a file is to be written there; give another path\n"
    assert done.stdout == ""


@needs_compiler
def test_a_plan_on_the_command_line(tmp_path):
    flags = "--model R14x0.5 --crop 64 --hosts 2 --devices 4 --mesh data=2,fsdp=4 --precision bf16 --remat norm"
    command = [sys.executable, "-m", "bit_jax.plan", *flags.split(), "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("all-gather", "reduce-scatter", "an ESTIMATE", "communication MODEL", "it fits"):
        assert said in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["convolutions"] == 3 * (1 + 4 + 12) - 1  # of each three passes, but no gradient of the image
    assert found["with_xla_rematerialization"]["repeated_instructions"] == 0
    assert found["memory"]["optimizer"] == pytest.approx(found["memory"]["parameters"], rel=0.01)
    by_kind = {(one["kind"], one["group"]): one["bytes"] for one in found["collectives"]}
    # kernels travel in bfloat16; only the head and norms' parameters are float32
    assert by_kind["all-gather", 4]["f32"] == pytest.approx(4 * 1024 * 1000, rel=0.02)
    # gradients are reduced in parts: over fsdp by reduce-scatters, the parts over data
    assert sum(by_kind["all-reduce", 2].values()) * 4 == pytest.approx(
        sum(by_kind["reduce-scatter", 4].values()), rel=0.1
    )
    assert found["memory"]["pool"] + found["memory"]["outside_pool"] == ACCELERATORS["a100-40g"].memory


@needs_compiler
@pytest.mark.slow
def test_xla_compiles_deterministic_steps_for_gpus():
    request = Request(model="R14x0.5", device="h100-80g", crop=32, classes=10)
    steps = steps_on_gpus(request, UNLIMITED)
    options = dataclasses.replace(steps.target, deterministic=True).compiler_options
    assert "xla_gpu_deterministic_ops" in options
    for lowered in (steps.lower_train_step(), steps.lower_eval_step()):
        program = lowered.compile(compiler_options=options).as_text()
        assert "__cudnn$conv" in program
        assert "triton_gemm" not in program
        assert " scatter(" not in program  # they would become loops


@needs_compiler
@pytest.mark.slow
def test_a_norm_is_few_kernels():
    """A GPU takes some microseconds for each, however small its arrays are.

    The 13 norms of this step were 152 kernels when each small sum was one by itself.
    """
    steps = steps_on_gpus(Request(model="R14x0.5", device="h100-80g", crop=128, classes=10), UNLIMITED)
    program = steps.lower_train_step().compile(compiler_options=steps.target.compiler_options).as_text()
    started = program[program.index("\nENTRY ") :].splitlines()
    assert len([line for line in started if " fusion(" in line and "group_norm" in line]) <= 130
