"""What `convert` may replace, and that nothing else is lost, whatever fails."""

import errno
import io
import json
import os

import numpy as np
import pytest
import torch

from bit_jax import convert
from bit_jax.conversion import check
from bit_jax.conversion.conversion import Conversion
from bit_jax.formats import pickles, weights
from bit_jax.formats.described import described
from bit_jax.formats.names import PEERS
from bit_jax.model.architecture import HEAD_KERNEL
from input_pipeline import files
from input_pipeline.errors import RequestError, RunFailed


def contents(folder):
    """Returns {path: bytes, or where a link leads to} of all below a folder."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def there(tmp_path):
    """Sources, which are not read before a target is refused, and others' files."""
    for place in ("w/model.safetensors", "runs/flowers/final.npz", "weights.npz", "m.stablehlo.npz"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(place.encode())
    (tmp_path / "runs/flowers/checkpoint").write_bytes(b"hours of work")
    (tmp_path / "d.npz").mkdir()
    (tmp_path / "d.npz/notes.txt").write_bytes(b"notes")
    (tmp_path / "linked").symlink_to(tmp_path / "w/model.safetensors")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/model.safetensors").symlink_to(tmp_path / "w/model.safetensors")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/model.safetensors").write_bytes(b"weights")
    (tmp_path / "hub/config.json").write_text("{}")
    (tmp_path / "hub/README.md").write_text("of a person")
    (tmp_path / "x.savedmodel").mkdir()
    (tmp_path / "x.savedmodel/saved_model.txt").write_text("of a person")
    (tmp_path / "plain").write_bytes(b"of a person")
    (tmp_path / "m.onnx").write_bytes(b"a program")
    (tmp_path / "m.onnx.data").write_bytes(b"its weights")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "target", "flags", "said"),
    [
        ("w/model.safetensors", "w", {}, "lie within one another"),
        ("w", "w", {}, "is the source itself"),
        ("w", "w/model.safetensors", {}, "lie within one another"),
        ("w", "w/sub.npz", {}, "lie within one another"),
        ("runs/flowers/final.npz", "runs/flowers", {}, "holds checkpoint, final.npz, which would be lost"),
        ("links/model.safetensors", "links", {}, "lie within one another"),
        ("linked", "w", {}, "lie within one another"),
        ("weights.npz", "d.npz", {}, "is a directory, and a file is to be written"),
        ("weights.npz", "hub", {}, "holds README.md, which would be lost"),
        ("weights.npz", "x.savedmodel", {}, "holds saved_model.txt, which would be lost"),
        ("weights.npz", ".", {}, "would be lost"),
        ("weights.npz", "plain", {}, "is a file, and a directory is to be written"),
        ("m.stablehlo.npz", "m.stablehlo", {"beside": True}, "m.stablehlo.npz is the source itself"),
        ("weights.npz", "m.stablehlo", {"beside": True, "overwrite": False}, "m.stablehlo.npz exists; add --overwrite"),
        ("weights.npz", "m.onnx", {}, "m.onnx.data lies beside .*m.onnx; add --weights-beside"),
        ("weights.npz", "nowhere/x.npz", {}, "nowhere is no directory; make it first"),
    ],
)
def test_nothing_is_lost_that_convert_did_not_write(there, monkeypatch, source, target, flags, said):
    monkeypatch.chdir(there)
    before = contents(there)
    with pytest.raises(RequestError, match=said):
        convert.converted(source, there / target, **({"overwrite": True, "checked": False} | flags))
    assert contents(there) == before


@pytest.mark.parametrize(
    ("target", "package"), [("nowhere/x.npz", None), ("d.npz", None), ("y.pth", "torch"), ("y.onnx", "onnx")]
)
def test_a_target_is_refused_before_its_source_is_fetched(there, monkeypatch, target, package):
    monkeypatch.setattr(convert.locate, "weight_file", lambda source: pytest.fail("it was fetched"))
    if package:
        monkeypatch.setitem(convert.sys.modules, package, None)
    with pytest.raises(RequestError):
        convert.converted("BiT-M-R152x4", there / target, overwrite=True)


def test_what_a_link_leads_to_is_replaced(small_npz, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        convert.converted(str(small_npz), tmp_path / "link", overwrite=True, checked=False)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("directory", "failing"), [*((False, step) for step in (1, 2, 3, 4)), *((True, step) for step in (1, 2))]
)
def test_a_step_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, failing, directory):
    """A program with its weights beside, or a directory, is moved in several steps, and each may fail."""

    def write(path, content):
        if directory:
            path.mkdir()
        for name in ("one", "two") if directory else ("", ".data"):
            (path / name if directory else path.with_name(path.name + name)).write_bytes(content)

    write(tmp_path / "model", b"old")
    before, replace, steps = contents(tmp_path), os.replace, []

    def refused(source, target):
        steps.append(target)
        if len(steps) == failing:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with (
        pytest.raises(RequestError, match=r"cannot write .*Input/output error"),
        files.replacing_path(tmp_path / "model") as new,
    ):
        write(new, b"new")
    assert contents(tmp_path) == before
    with files.replacing_path(tmp_path / "model") as new:
        write(new, b"new")
    assert set(contents(tmp_path).values()) == {b"new"}
    assert contents(tmp_path).keys() == before.keys()


def test_a_full_disk_is_an_error_of_the_system_and_no_defect(monkeypatch):
    """PyTorch's writer may raise RuntimeError, which `replacing_path` would let pass as a defect."""

    def failing(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match=r"PyTorch's writer failed|No space"),
    ):
        pickles.write(file, {"w": np.zeros(1 << 20, np.float32)})
    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match=r"PyTorch's writer failed \(RuntimeError: \[enforce fail"):
        pickles.write(io.BytesIO(), {})


def test_a_new_head_of_zeros_does_not_hide_a_library_that_is_wrong(small_npz, tmp_path, monkeypatch):
    """Every logit of a head of zeros is 0, so the library is given another head."""
    seen = []

    def library(architecture, target, peer, images):
        seen.append(dict(weights.read(target)[1])[HEAD_KERNEL])
        return np.zeros((len(images), architecture.num_classes))  # as every model does whose head is zeros

    monkeypatch.setattr(check, "library_logits", library)
    monkeypatch.setitem(check.PACKAGES, "timm", "torch")  # timm itself is not needed, nor always installed
    with pytest.raises(RunFailed, match="loaded by torch, float64 logits"):
        convert.converted(str(small_npz), tmp_path / "x.safetensors", num_classes=3)
    assert seen[0].any()
    assert list(tmp_path.iterdir()) == []


def test_a_new_head_has_no_names_of_the_old_ones_classes(tmp_path):
    said = convert.converted("embedded", tmp_path / "hub", num_classes=10, checked=False)
    assert not said["class_names_known"]
    assert json.loads((tmp_path / "hub/config.json").read_text())["id2label"]["0"] == "LABEL_0"
    assert described(tmp_path / "hub").class_names is None
    assert not dict(weights.read(tmp_path / "hub")[1])[HEAD_KERNEL].any()
    with pytest.raises(RequestError, match="--num-classes is 0"):
        convert.converted("embedded", tmp_path / "x.npz", num_classes=0)
    with pytest.raises(RequestError, match="--standardize-eps is 2"):
        convert.converted("embedded", tmp_path / "x.npz", standardize_eps=2)


def test_a_constant_that_the_target_has_no_place_for_is_told(small_npz, tmp_path):
    """A .pth in timm's names is computed with timm's constant, whatever its source was trained with."""
    source = Conversion.of(small_npz)
    with open(tmp_path / "x.pth", "wb") as file:
        pickles.write(file, {PEERS["timm"].name(k): PEERS["timm"].array(k, a) for k, a in source.arrays.items()})
    arrays, constant = check.read_back(source, tmp_path / "x.pth")
    assert (arrays.difference, arrays.failed) == (0.0, False)
    assert "read back with 1e-08" in constant.what
    assert "give --standardize-eps 1e-10" in constant.what
    assert constant.difference is not None
    assert constant.difference > 0
    assert not constant.failed
