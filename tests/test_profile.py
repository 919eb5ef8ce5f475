"""What kind of work an instruction is, and what a trace's times add up to."""

from types import SimpleNamespace

import jax
import pytest

from bit_jax.compiled import hlo, profile

STEP = "jit(train_step)/jvp(ResNetV2)"
BACK = "jit(train_step)/transpose(jvp(ResNetV2))"
UNIT = "block1/unit01/a"
SHAPE = "f32[4,8,6,6]{3,2,1,0}"


def module(*lines: str) -> hlo.Module:
    """A module of these instructions, each with its JAX name, after two arrays %x and %y."""
    body = "".join(f"  {line}\n" for line in lines)
    return hlo.Module(
        "HloModule jit_train_step, is_scheduled=true\n\n"
        f"%fused (p: {SHAPE}) -> {SHAPE} {{\n  %p = {SHAPE} parameter(0)\n"
        f'  ROOT %sum = {SHAPE} add(%p, %p), metadata={{op_name="{STEP}/{UNIT}/group_norm/add"}}\n}}\n\n'
        f"ENTRY %main (x: {SHAPE}) -> {SHAPE} {{\n  %x = {SHAPE} parameter(0)\n  %y = {SHAPE} parameter(1)\n{body}}}\n"
    )


def named(opcode: str, name: str, more: str = "") -> str:
    return f'%it = {SHAPE} {opcode}(%x, %y), {more}, metadata={{op_name="{name}"}}'


CUDNN = 'dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$conv{}"'.format
CONVOLUTION = f"{UNIT}/standardized_conv2d/conv_general_dilated"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (named("custom-call", f"{STEP}/{CONVOLUTION}", CUDNN("Forward")), profile.FORWARD),
        (named("custom-call", f"{BACK}/{CONVOLUTION}", CUDNN("BackwardInput")), profile.BY_INPUT),
        (named("custom-call", f"{BACK}/{CONVOLUTION}", CUDNN("Forward")), profile.BY_INPUT),  # of a 1x1 convolution
        (named("custom-call", f"{BACK}/{CONVOLUTION}", CUDNN("BackwardFilter")), profile.BY_KERNEL),
        (named("convolution", f"{BACK}/{CONVOLUTION}", "dim_labels=f01b_i01o->01bf"), profile.BY_KERNEL),
        (named("convolution", f"{BACK}/{CONVOLUTION}", "dim_labels=b01f_01oi->b01f"), profile.BY_INPUT),
        (
            named("dot", f"{BACK}/{CONVOLUTION}", "lhs_contracting_dims={0}, rhs_contracting_dims={0}"),
            profile.BY_KERNEL,
        ),
        (named("dot", f"{BACK}/{CONVOLUTION}", "lhs_contracting_dims={1}, rhs_contracting_dims={1}"), profile.BY_INPUT),
        (named("dot", f"{STEP}/head/conv2d/dot_general", "lhs_contracting_dims={1}"), profile.HEAD),
        (named("pad", f"{BACK}/{UNIT}/standardized_conv2d/pad"), profile.COPIES),
        (named("multiply", f"{STEP}/{UNIT}/standardized_conv2d/jit(_standardize)/mul"), profile.STANDARDIZATION),
        (named("add", f"{BACK}/{UNIT}/group_norm/jit(_group_norm_relu)/reduce_sum"), profile.NORM),
        (named("add", f"{STEP}/block1/unit01/add"), profile.NORM),
        (named("maximum", f"{STEP}/root_block/max"), profile.POOL),
        (named("add", "jit(train_step)/add"), profile.UPDATE),
        (named("copy", f"{STEP}/{UNIT}/group_norm/add"), profile.COPIES),
        (named("all-reduce", f"{BACK}/{CONVOLUTION}", "replica_groups={{0,1}}, to_apply=%fused"), profile.COLLECTIVES),
        (f"%it = {SHAPE} fusion(%x), kind=kLoop, calls=%fused", profile.NORM),  # by its parts: it has no name
        (f"%it = {SHAPE} add(%x, %y)", profile.OTHER),
    ],
)
def test_kinds(line, kind):
    found = module(line)
    assert profile.kind(found, found.instructions["it"]) == kind


def event(name: str, start: float, end: float, program: str = "jit_train_step") -> SimpleNamespace:
    return SimpleNamespace(stats=[("hlo_op", name), ("hlo_module", program)], start_ns=start, end_ns=end)


def trace(*lines: SimpleNamespace, plane: str = "/device:GPU:0") -> SimpleNamespace:
    return SimpleNamespace(planes=[SimpleNamespace(name=plane, lines=list(lines))])


def test_times_are_of_one_step_and_what_overlaps_is_busy_once():
    program = module(
        named("custom-call", f"{STEP}/{CONVOLUTION}", CUDNN("Forward")).replace("%it", "%conv"),
        named("add", "jit(train_step)/add").replace("%it", "%sum"),
    )
    streams = [
        SimpleNamespace(name="Stream #1", events=[event("conv", 0, 4e6), event("conv", 10e6, 16e6)]),
        SimpleNamespace(name="Stream #2", events=[event("sum", 2e6, 6e6), event("command_buffer_1", 16e6, 18e6)]),
        SimpleNamespace(name="XLA Ops", events=[event("conv", 0, 4e6)]),  # the streams again
    ]
    others = [SimpleNamespace(stats=[], start_ns=0, end_ns=1e9), event("conv", 0, 1e9, "jit_eval_step")]
    copies = SimpleNamespace(name="Stream #3", events=others)
    table = profile.tabulate(trace(*streams, copies), program, 2, 0.030, "NVIDIA H100 80GB HBM3", "bf16")
    assert table["seconds"] == pytest.approx(0.015)
    assert table["busy"] == pytest.approx(0.007)  # 0 to 6 and 10 to 18 ms, of two steps
    seconds = {kind: row["seconds"] for kind, row in table["kinds"].items()}
    assert seconds == pytest.approx(
        {profile.FORWARD: 0.005, profile.UPDATE: 0.002, profile.GRAPHS: 0.001, profile.IDLE: 0.008}
    )
    assert table["kinds"][profile.FORWARD]["calls"] == 1
    moved = 3 * 4 * 8 * 36 * 4  # both operands and the result
    assert table["kinds"][profile.UPDATE]["roofline"] == pytest.approx(moved / 3_352_320_000_000)


def test_a_trace_of_something_else_is_refused():
    line = SimpleNamespace(name="Stream #1", events=[event("elsewhere", 0, 1)])
    with pytest.raises(profile.RunFailed, match="shows no instruction of the training step"):
        profile.tabulate(trace(line), module(named("add", "jit(train_step)/add")), 1, 1.0, "cpu", "fp32")


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_profile_that_fails_is_a_sentence_and_ends_no_run(broken, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise RuntimeError("CUPTI is not there")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, refuse if name == broken else lambda *_, **__: None)
    recorder = profile.Recorder(tmp_path / "profile", None, "fp32", remaining=range(1, 3), wanted=1)
    said = [each for step in (1, 2) for each in (recorder.before(step, 0.0), recorder.after(step, 1.0)) if each]
    assert len(said) == 1
    assert said[0].endswith("CUPTI is not there")


@pytest.mark.parametrize(
    ("left", "wanted", "traced"),
    [
        (range(1, 41), 5, range(4, 9)),
        (range(11, 14), 2, range(12, 14)),
        (range(1, 3), 5, range(1, 3)),
        (range(1, 9), 0, range(0)),
    ],
)
def test_which_steps_are_traced(tmp_path, left, wanted, traced):
    recorder = profile.Recorder(tmp_path, None, "fp32", remaining=left, wanted=wanted)
    assert [step for step in left if recorder.first <= step <= recorder.last] == list(traced)
    ends = {traced.start - 1, traced.stop - 1} if traced else set()
    assert [step for step in left if recorder.waits_for(step)] == [step for step in left if step in ends]
