"""Exported files: that they are the model, that one which is not is not written, and that others can use them."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import sysconfig
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import parity
from flax import nnx
from jax import export

from bit_jax.convert import converted
from bit_jax.export import check, onnx_graph, saved_model, stablehlo, targets
from bit_jax.export.source import Source
from bit_jax.formats import weights
from bit_jax.model.architecture import HEAD_KERNEL, Architecture
from input_pipeline.errors import RequestError, RunFailed
from parity import faults

# what a user without this project types; -S leaves out the files that would put it on the path
STABLEHLO = """
import jax
exported = jax.export.deserialize(bytearray(open(path, "rb").read()))
logits = exported.call(images)
"""
STABLEHLO_BESIDE = """
import jax
exported = jax.export.deserialize(bytearray(open(path, "rb").read()))
logits = exported.call(dict(np.load(path + ".npz")), images)
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(path)
[logits] = session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})
"""
SAVED_MODEL = """
import tensorflow as tf
logits = tf.saved_model.load(path).signatures["serving_default"](images=images)["logits"]
"""
AROUND = """
import importlib.util, sys
import numpy as np
assert importlib.util.find_spec("bit_jax") is None
path, images = sys.argv[1], np.load(sys.argv[2])
{}
np.save(sys.argv[3], np.asarray(logits))
"""


with mock.patch.object(check, "SHAPES", check.SHAPES[1:]):
    IMAGES = check.images()  # one size, to compile less; the ladder below gives the files another


@pytest.fixture(scope="module")
def source(small_npz):
    architecture, arrays = weights.read(small_npz)
    return Source(architecture, dict(arrays))


@pytest.fixture(scope="module")
def exact(source):
    """The model's logits of `IMAGES`, by dtype; compiled once for all tests."""
    return {dtype: check.own_logits(source, IMAGES, dtype) for dtype in (np.float64, np.float32)}


@pytest.fixture
def known(exact, monkeypatch):
    monkeypatch.setattr(check, "images", lambda: IMAGES)
    monkeypatch.setattr(check, "own_logits", lambda source, batches, dtype: exact[dtype])


def outside(program, path, images):
    """Returns the logits that a process without this project computes from a file."""
    given, made = path.with_name("images.npy"), path.with_name("logits.npy")
    np.save(given, images)
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"], "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-S", "-c", AROUND.format(program), path, given, made]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return np.load(made)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A format that writes another model than it was given."""

    made: check.Format
    standardize_eps: float | None = None
    fault: str | None = None
    only_beside: bool = False  # right where the weights lie within the file

    def require(self, *, checked):
        self.made.require(checked=checked)

    def write(self, source, path, dtype, *, beside):
        eps = self.standardize_eps or source.architecture.standardize_eps
        if self.only_beside and not beside:
            eps = source.architecture.standardize_eps
        architecture = dataclasses.replace(source.architecture, standardize_eps=eps)
        with faults.injected(self.fault) if self.fault else contextlib.nullcontext():
            self.made.write(Source(architecture, source.arrays), path, dtype, beside=beside)

    def run(self, path, batches):
        return self.made.run(path, batches)


def test_sizes_may_stay_open_and_change_nothing(source, exact, x64):
    """Batch, height and width are symbolic, in one program for three platforms."""
    exported = stablehlo.trace(source, np.dtype(np.float64), beside=True)
    assert [str(size) for size in exported.in_avals[-1].shape] == ["batch", "height", "width", "3"]
    assert exported.platforms == ("cpu", "cuda", "tpu")
    logits = jax.jit(exported.call)({key: jnp.asarray(array) for key, array in wide(source).items()}, IMAGES[0])
    np.testing.assert_allclose(logits, exact[np.float64][0], rtol=0, atol=1e-11)


@pytest.mark.slow
def test_gradients_may_leave_the_batch_open(source, x64):
    model, params = source.architecture.model(jnp.float64), weights.unflatten(wide(source))
    size = IMAGES[0].shape[1:]

    def gradient(params, images):
        return jax.grad(lambda params: (model.apply({"params": params}, images) ** 2).sum())(params)

    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), params)
    images = jax.ShapeDtypeStruct(export.symbolic_shape(f"batch, {', '.join(map(str, size))}"), jnp.float64)
    exported = export.export(jax.jit(gradient))(shapes, images)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 * float(jnp.abs(other).max())),
        exported.call(params, IMAGES[0]),
        jax.jit(gradient)(params, IMAGES[0]),
    )


def wide(source):
    return {key: array.astype(np.float64) for key, array in source.arrays.items()}


@pytest.mark.parametrize("beside", [False, True])
def test_onnx_is_the_model_elsewhere(source, exact, known, tmp_path, beside):
    pytest.importorskip("onnxruntime")
    found = targets.export(source, tmp_path / "model.onnx", beside=beside)
    assert found is not None
    assert found.apart < 1e-11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"][: 1 + beside]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # whoever may read one may read both
    same_predictions(outside(ONNX, tmp_path / "model.onnx", IMAGES[0].astype(np.float32)), exact[np.float64][0])


@pytest.mark.parametrize("beside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stablehlo_is_the_model_elsewhere(source, exact, tmp_path, beside):
    targets.export(source, tmp_path / "model.stablehlo", beside=beside, checked=False)
    program = STABLEHLO_BESIDE if beside else STABLEHLO
    same_predictions(outside(program, tmp_path / "model.stablehlo", IMAGES[0].astype(np.float32)), exact[np.float64][0])


@pytest.mark.slow
def test_stablehlo_is_checked(source, known, tmp_path):
    found = targets.export(source, tmp_path / "model.stablehlo", beside=True)
    assert found is not None
    assert found.apart < 1e-11


@pytest.mark.slow
def test_a_saved_model_is_the_model_elsewhere(source, exact, known, tmp_path):
    pytest.importorskip("tensorflow")
    found = targets.export(source, tmp_path / "model.savedmodel")
    assert found is not None
    assert found.apart < 1e-11
    program = SAVED_MODEL
    same_predictions(
        outside(program, tmp_path / "model.savedmodel", IMAGES[0].astype(np.float32)), exact[np.float64][0]
    )
    names = {path.name for path in (tmp_path / "model.savedmodel").iterdir()}
    assert names <= saved_model.CONTENTS  # a directory with anything else in it is not replaced
    targets.export(source, tmp_path / "model.savedmodel", checked=False)  # replaces it
    assert (tmp_path / "model.savedmodel" / "saved_model.pb").exists()
    assert not list(tmp_path.glob(".model*"))


def same_predictions(logits, exact):
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_array_equal(logits.argmax(1), exact.argmax(1))


def unpadded(graph, images):
    """The root block with the padding that MaxPool itself has."""
    x = graph.std_conv(images, "root_block", 2)
    return graph.node("MaxPool", [x], "root_block/pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)


@pytest.mark.parametrize(
    "fault", ["epsilon of timm", "epsilon of timm, beside", "epsilon of GroupNorm", "padding of the pool"]
)
def test_a_graph_that_is_not_the_model_is_not_written(source, known, tmp_path, monkeypatch, fault):
    pytest.importorskip("onnxruntime")
    beside = fault.endswith("beside")
    made = Wrong(onnx_graph, 1e-8 if "timm" in fault else None, only_beside=beside)
    if fault == "padding of the pool":
        monkeypatch.setattr(onnx_graph.Graph, "root", unpadded)
    if fault == "epsilon of GroupNorm":
        monkeypatch.setattr(onnx_graph, "NORM_EPS", 1.01 * onnx_graph.NORM_EPS)
    monkeypatch.setitem(targets.FORMATS, ".onnx", made)
    with pytest.raises(RunFailed, match="is not written"):
        targets.export(source, tmp_path / "model.onnx", beside=beside)
    assert list(tmp_path.iterdir()) == []


def test_a_head_of_zeros_does_not_hide_a_graph_that_is_wrong(source, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(check, "images", lambda: IMAGES)
    new = Source(source.architecture, source.arrays | {HEAD_KERNEL: np.zeros_like(source.arrays[HEAD_KERNEL])})
    monkeypatch.setattr(onnx_graph.Graph, "root", unpadded)
    with pytest.raises(RunFailed, match="is not written"):
        targets.export(new, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"standardize_eps": 1e-5}, {"fault": "pool-padding"}])
def test_a_program_that_is_not_the_model_is_not_written(source, known, tmp_path, monkeypatch, wrong):
    monkeypatch.setitem(targets.FORMATS, ".stablehlo", Wrong(stablehlo, **wrong))
    with pytest.raises(RunFailed, match="is not written"):
        targets.export(source, tmp_path / "model.stablehlo")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_no_file_holds_go_beside(tmp_path):
    architecture = Architecture.parse("R152x4", 21843)
    large = {key: np.broadcast_to(np.float32(0), shape) for key, shape in architecture.layout.items()}
    for suffix in (".onnx", ".stablehlo"):
        with pytest.raises(RequestError, match=r"are 4\.4 GB, .* add --weights-beside"):
            targets.export(Source(architecture, large), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_refused(source, tmp_path):
    with pytest.raises(RequestError, match="No such file or directory; mend that"):
        targets.export(source, tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing_is_named(source, known, tmp_path, monkeypatch, package):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=rf"{package}, which is not installed; pip install 'bit-jax\[onnx\]'"):
        targets.export(source, tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_ladder_holds_for_what_is_written(small_npz, source, tmp_path):
    pytest.importorskip("onnxruntime")
    for framework, name in (("onnx", "model.onnx"), ("stablehlo", "model.stablehlo")):
        targets.export(source, tmp_path / name, checked=False)
        flags = ["--size", "32x40", "--rows", "4", "--batches", "1", "--disturbances", "1"]
        run = ["--run", tmp_path / framework]
        done = parity("forward", "--weights", small_npz, *flags, *run, "--candidate", f"{framework}:{tmp_path / name}")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_model_works_as_a_module_of_nnx(source, exact):
    """`flax.nnx.bridge.ToNNX`: initialized, given loaded parameters, called, compiled, differentiated, trained."""
    model, images = source.architecture.model(), jnp.asarray(IMAGES[0], jnp.float32)
    params = weights.unflatten({key: jnp.asarray(array, jnp.float32) for key, array in source.arrays.items()})
    module = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), images)
    nnx.update(module, params)
    for call in (lambda module, images: module(images), nnx.jit(lambda module, images: module(images))):
        same_predictions(call(module, images), exact[np.float64][0])

    def loss(apply):
        return (apply(images) ** 2).sum()

    gradient = nnx.jit(nnx.grad(loss))(module)
    expected = jax.jit(jax.grad(lambda params: loss(lambda images: model.apply({"params": params}, images))))(params)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * float(jnp.abs(other).max())),
        nnx.to_pure_dict(gradient),
        expected,
    )
    optimizer = nnx.Optimizer(module, optax.sgd(0.003, momentum=0.9), wrt=nnx.Param)
    optimizer.update(module, gradient)
    assert not np.array_equal(module.head["conv2d"]["kernel"], params["head"]["conv2d"]["kernel"])


def test_convert_writes_a_program_and_says_how_far_it_is(small_npz, known, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    said = converted(str(small_npz), tmp_path / "model.onnx", beside=True)
    assert said["kind"] == "ONNX"
    assert all(entry["difference"] < limit for entry, limit in zip(said["compared"], (1e-11, 1e-4), strict=True))
    with pytest.raises(RequestError, match="add --overwrite"):
        converted(str(small_npz), tmp_path / "model.onnx", checked=False)
    converted(str(small_npz), tmp_path / "model.onnx", beside=True, checked=False, overwrite=True)
    for flags, sentence in (
        ({"naming": "timm"}, "is a program; leave it out"),
        ({"target": tmp_path / "a.npz", "beside": True}, "--weights-beside is for .stablehlo and .onnx"),
    ):
        with pytest.raises(RequestError, match=sentence):
            converted(str(small_npz), **({"target": tmp_path / "b.onnx"} | flags))
