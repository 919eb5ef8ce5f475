"""Exported files as sides: what they compute, what is refused, and whether a fault in one is found."""

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import parity
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import bit_jax
from input_pipeline.errors import RequestError
from parity import faults
from parity.exported.tasks import ExportedSide
from parity.ladder import forward_only
from parity.ladder.ladder import Ladder
from parity.options import Options
from parity.report import saved
from parity.sides.side import Side, parse_side

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

ROOT = Path(__file__).parent.parent
ROWS, SIZE = 4, 32
QUICK = ["--size", str(SIZE), "--rows", str(ROWS), "--batches", "1", "--disturbances", "1", "--limit", "18"]


def write(path, function, *shapes, dtype=jnp.float32, **settings):
    """Exports a function of arrays of those shapes, as a user does."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    path.write_bytes(export.export(jax.jit(function), **settings)(*arguments).serialize())
    return path


def write_bit(path, weights, dtype=jnp.float32, **changes):
    """Exports the model of a weight file, with its parameters in it."""
    model, params = bit_jax.load(weights, dtype=dtype)
    model = model.clone(**changes)
    shape = (ROWS, SIZE, SIZE, 3)
    return write(path, lambda images: model.apply({"params": params}, images), shape, dtype=dtype)


def means(images):
    return images.mean((1, 2))


def side_of(path, framework="stablehlo", precision="fp32"):
    return ExportedSide(Side(framework, file=str(path)), precision, lambda *_: None)


def logits_of(side, images):
    return side.program.logits(images)


def toy_onnx(path, shape, kind="FLOAT", outputs=("means",)):
    """Writes an ONNX file whose logits are the channels' means; a name is an open size."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, kind)
    nodes = [helper.make_node("ReduceMean", ["images", "axes"], [name], keepdims=0) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(name, kind, [shape[0], 3]) for name in outputs],
        [helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="a test")
    onnx.save(made, path)
    return path


@pytest.fixture(scope="module")
def good(small_npz, tmp_path_factory):
    return write_bit(tmp_path_factory.mktemp("exported") / "small, fixed.stablehlo", small_npz)


@pytest.mark.parametrize(
    ("shape", "axes", "rows"), [((2, 4, 6, 3), (1, 2), 2), ((4, 3, 4, 6), (2, 3), 4), (("b", 4, 6, 3), (1, 2), None)]
)
def test_images_are_given_in_the_files_layout_and_batches(tmp_path, shape, axes, rows):
    symbolic = export.symbolic_shape(", ".join(map(str, shape)))
    path = write(tmp_path / "f", lambda images: {"logits": images.mean(axes), "more": images}, symbolic)
    side, images = side_of(path), np.random.default_rng(0).uniform(-1, 1, (8, 4, 6, 3))
    assert side.program.images.rows == rows
    assert re.fullmatch(r"\d+\.\d+\.\d+", side.program.described()["format"]["StableHLO"])
    np.testing.assert_allclose(logits_of(side, images), images.mean((1, 2)), atol=1e-6)


def test_onnx_is_run_and_described(tmp_path):
    pytest.importorskip("onnxruntime")
    side, images = side_of(toy_onnx(tmp_path / "f", ["b", 3, 4, 6]), "onnx"), np.random.uniform(-1, 1, (8, 4, 6, 3))
    np.testing.assert_allclose(logits_of(side, images), images.mean((1, 2)), atol=1e-6)
    said = side.program.described()
    assert (said["exported by"], said["format"]["opset"]) == ("a test", "ai.onnx 18")
    assert side.program.images.described(3) == {
        **{"dtype": "float32", "layout": "NCHW", "rows": "any", "height": 4, "width": 6, "classes": 3}
    }


def test_the_rows_losses_are_those_of_the_logits(tmp_path):
    from bit_jax.training.steps import cross_entropy

    rng = np.random.default_rng(1)
    images, targets = rng.uniform(-1, 1, (4, 4, 6, 3)), rng.dirichlet(np.ones(3), 4)
    np.savez(tmp_path / "mixed.npz", **{"images/0": images, "targets/0": targets})
    _, losses = side_of(write(tmp_path / "f", means, (4, 4, 6, 3))).loss(tmp_path / "mixed.npz")
    expected = cross_entropy(jnp.asarray(images.mean((1, 2)), jnp.float32), jnp.asarray(targets, jnp.float32))
    np.testing.assert_allclose(losses["loss of each row"], expected, rtol=1e-5)
    np.testing.assert_allclose(losses["mean loss"], np.mean(expected), rtol=1e-5)


def an_npz(path):
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros(3))


def two_devices(path):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    images = jax.ShapeDtypeStruct((4, 4, 6, 3), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    path.write_bytes(export.export(jax.jit(means))(images).serialize())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: write(path, lambda scale, images: scale * means(images), (), (4, 4, 6, 3)), "takes 2 arrays"),
        (lambda path: write(path, lambda x: x.mean(0), (4, 5)), "takes an array of shape [4, 5]"),
        (lambda path: write(path, lambda x: x.mean((1, 2)), (4, 4, 6, 1)), "[4, 4, 6, 1], and images are wanted"),
        (lambda path: write(path, means, (4, 4, 6, 3), dtype=jnp.uint8), "takes uint8 images"),
        (lambda path: write(path, lambda x: (means(x), x), (4, 4, 6, 3)), "has 2 outputs (0, 1)"),
        (lambda path: write(path, means, (4, 4, 6, 3), platforms=["cuda"]), 'export it with platforms=["cpu"]'),
        (two_devices, "was exported for 2 devices"),
        (lambda path: path.write_text("module @jit_f {}"), "is MLIR's text of a module"),
        (lambda path: path.write_bytes(b"ML\xefR\rStableHLO_v1.15.0"), "is MLIR's bytecode"),
        (an_npz, "is no exported function that JAX can read"),
        (lambda path: path.write_bytes(b""), "is no exported function that JAX can read"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*mean.*")
def test_a_stablehlo_file_that_cannot_be_compared_is_refused(tmp_path, make, said):
    make(tmp_path / "f")
    with pytest.raises(RequestError) as refused:
        side_of(tmp_path / "f")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04"), "is no ONNX model that onnxruntime can run"),
        (lambda path: toy_onnx(path, [4, 4, 6, 1]), "[4, 4, 6, 1], and images are wanted"),
        (lambda path: toy_onnx(path, [4, 3, 4, 6], "INT32"), "takes tensor(int32) images"),
        (lambda path: toy_onnx(path, [4, 3, 4, 6], outputs=("a", "b")), "has 2 outputs (a, b)"),
    ],
)
def test_an_onnx_file_that_cannot_be_compared_is_refused(tmp_path, make, said):
    pytest.importorskip("onnxruntime")
    make(tmp_path / "f")
    with pytest.raises(RequestError) as refused:
        side_of(tmp_path / "f", "onnx")
    assert said in str(refused.value)


def test_without_onnxruntime_the_side_is_refused_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "parity.exported.onnx_program", raising=False)
    with pytest.raises(RequestError, match=r"pip install 'bit-jax\[onnx\]'"):
        importlib.import_module("parity.exported.onnx_program")


@pytest.mark.parametrize(("module", "absent"), [("onnx_program", ("jax", "torch")), ("stablehlo_program", ("torch",))])
def test_a_files_process_imports_one_framework(module, absent):
    if module == "onnx_program":
        pytest.importorskip("onnxruntime")
    look = (
        f"import sys, parity.exported.tasks, parity.exported.{module}; sys.exit(bool({set(absent)} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("takes", "rungs", "said"),
    [
        ({"rows": 6, "height": 48, "width": 48}, ["forward"], "; --size 48 --rows 6 fits it"),
        ({"rows": 3, "height": "any", "width": 40}, ["loss"], "; --size 32x40 --rows 6 fits it"),
        ({"height": 48, "width": 48}, ["accuracy"], "; --eval-size 48 fits it"),
        ({"height": 32, "width": 48}, ["accuracy"], "those of the accuracy rung are square"),
        ({"classes": 1000}, ["forward"], "gives 1,000 logits an image"),
        ({"dtype": "float64"}, ["forward"], "takes float64 images, and --precision fp32 is asked for; take --prec"),
        ({"dtype": "float8_e5m2"}, ["forward"], "export it with float32 images"),
        ({"rows": 2, "height": 32, "width": 32, "classes": 10}, ["forward", "loss", "accuracy"], ""),
        ({}, ["forward", "loss", "accuracy"], ""),
    ],
)
def test_images_that_do_not_fit_are_refused_with_flags_that_do(small_npz, good, tmp_path, takes, rungs, said):
    anything = {"dtype": "float32", "rows": "any", "height": "any", "width": "any", "classes": "any"}
    options = Options(weights=str(small_npz), candidate=f"stablehlo:{good}", size="32")
    ladder = Ladder(options, tmp_path, Console(quiet=True))
    if not said:
        forward_only.check(ladder, anything | takes, rungs)
        return
    with pytest.raises(RequestError) as refused:
        forward_only.check(ladder, anything | takes, rungs)
    assert said in str(refused.value)


def test_sides_are_parsed_with_whatever_the_file_is_called(good):
    side = parse_side(f"stablehlo:{good}", exported=True)
    assert side == Side("stablehlo", file=str(good))
    assert str(side) == f"stablehlo:{good}"
    assert Side(**side.fields()) == side


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["gradients", "--candidate", "stablehlo:{}"],
            "gradients cannot be asked of it; it takes forward",
        ),
        (["all", "--until", "pixels", "--reference", "stablehlo:{}"], "weights, pixels cannot be asked of it"),
        (["forward", "--reference", "stablehlo:{}", "--candidate", "onnx:{}"], "are both exported files"),
        (["forward", "--candidate", "onnx:"], "side onnx: names no file"),
        (["forward", "--candidate", "onnx:no,where"], "side onnx:no,where is not to be had: there is no such file"),
        (["determinism", "--side", "stablehlo:{}"], "is an exported file, which can be compared in"),
        (["throughput", "--arms", "torch", "onnx:{}"], "is an exported file, which can be compared in"),
    ],
)
def test_what_a_file_cannot_do_is_refused_before_anything_starts(good, tmp_path, command, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = parity(*(word.format(good) for word in command))
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_export_from_jax_holds_and_the_report_says_what_was_not_seen(small_npz, good, tmp_path):
    flags = ["--weights", small_npz, *QUICK, "--reference", f"stablehlo:{good}", "--html", tmp_path / "r.html"]
    done = parity("all", *flags, "--candidate", "torch", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    report = saved.load(tmp_path / "run")
    assert [rung["name"] for rung in report["rungs"]] == ["forward", "loss", "accuracy"]
    lines = [line for rung in report["rungs"] for line in rung["lines"]]
    assert {line["precision"] for line in lines} == {"fp32"}
    judged = {line["name"] for line in lines if line["candidate_error"] is not None}
    assert judged == {"logits", "loss of each row", "mean loss"}
    entries = report["attestation"]["sides"]["fp32"]["reference"]
    assert entries["group norm eps"] == "unknown"
    assert "units, weights, constants" in entries["cannot be looked into"]
    assert entries["takes"]["rows"] == ROWS
    assert report["attestation"]["mismatches"] == []
    for said in (
        "there is no float64 of it",
        "cannot be looked into",
        "as an exported file shows no units: root_block",
    ):
        assert said in " ".join(done.stdout.split())
        assert said in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_an_export_from_pytorch_holds(small_npz, tmp_path):
    """Weights in a file beside the model, an open batch."""
    torch = pytest.importorskip("torch")
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from parity.in_torch import resnetv2

    path, images = tmp_path / "model.onnx", torch.zeros(2, 3, SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses what PyTorch itself deprecates
        batch = {0: torch.export.Dim("batch")}
        model = resnetv2.load(str(small_npz)).eval()
        torch.onnx.export(model, (images,), path, dynamic_shapes=(batch,), external_data=True, verbose=False)
    run = ["--run", tmp_path / "run"]
    done = parity("all", "--weights", small_npz, *QUICK, "--candidate", f"onnx:{path}", "--until", "loss", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = saved.load(tmp_path / "run")["attestation"]["sides"]["fp32"]["candidate"]
    assert entries["exported by"].startswith("pytorch")
    assert entries["file"] == "model.onnx, model.onnx.data"
    assert entries["takes"]["rows"] == "any"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["pool-padding", "tf32"])
def test_a_fault_in_the_exported_file_is_found(small_npz, tmp_path, fault):
    with faults.injected(fault):
        path = write_bit(tmp_path / "f", small_npz)
    flags = ["--weights", small_npz, *QUICK, "--candidate", f"stablehlo:{path}", "--run", tmp_path / "run"]
    done = parity("forward", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the candidate's RMSE against float64" in done.stdout
    assert "FAILS at forward: logits differs" in done.stdout


@pytest.mark.slow
def test_a_file_that_is_more_exact_than_asked_is_called_so(small_npz, good, tmp_path):
    flags = ["--weights", small_npz, *QUICK, "--candidate", f"stablehlo:{good}", "--run", tmp_path / "run"]
    done = parity("forward", *flags, "--precision", "bf16")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the file errs less than bf16 does: ask for the precision" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_float64_export_is_judged_in_float64_where_a_wrong_epsilon_shows(small_npz, tmp_path, x64):
    for name, code, changes in (("right", 0, {}), ("wrong", 1, {"standardize_eps": 1e-8})):
        path = write_bit(tmp_path / name, small_npz, jnp.float64, **changes)
        flags = ["--weights", small_npz, *QUICK, "--precision", "fp64", "--run", tmp_path / f"run {name}"]
        done = parity("forward", *flags, "--candidate", f"stablehlo:{path}", "--reference", "torch")
        assert done.returncode == code, done.stdout + done.stderr
