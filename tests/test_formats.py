"""Weights in other names and files: read whole or refused in one sentence, and written so that they compare equal."""

import errno
import importlib.util
import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import ROOT

from bit_jax import convert
from bit_jax.conversion import kinds, layouts
from bit_jax.conversion.conversion import Conversion
from bit_jax.formats import recognize, safetensors, weights
from bit_jax.formats.described import Description, described
from bit_jax.formats.names import PEERS, peer_of
from bit_jax.formats.weights import WeightsError
from bit_jax.model.architecture import HEAD_KERNEL, Architecture
from bit_jax.published.locate import EMBEDDED_FILE
from input_pipeline.errors import RequestError, RunFailed
from parity.in_torch.names import by_name
from parity.sides.weights import weight_file


@pytest.fixture(scope="module")
def official():
    return dict(weights.read(EMBEDDED_FILE)[1])


@pytest.fixture(params=PEERS.values(), ids=PEERS.keys())
def peer(request):
    return request.param


@pytest.fixture
def state(peer, official):
    return {peer.name(key): torch.from_numpy(peer.array(key, array).copy()) for key, array in official.items()}


def require_same(path, official, eps):
    architecture, arrays = weights.read(path)
    arrays = dict(arrays)
    assert architecture.standardize_eps == eps
    assert arrays.keys() == official.keys()
    assert all(np.array_equal(arrays[key], official[key]) for key in official)


@pytest.mark.parametrize("name", ["R14x0.5", "R50x1", "R26x3"])
def test_every_name_leads_back_to_its_key(peer, name):
    keys = list(Architecture.parse(name, 7).layout)
    names = {peer.name(key): key for key in keys}
    assert len(names) == len(keys)
    assert peer_of(names) == (peer, names)
    assert {name: by_name(name) for name in names} == names


@pytest.mark.parametrize("wrap", ["plain", "original", "compiled", "legacy"])
def test_what_torch_saves(peer, state, official, tmp_path, wrap):
    content = {
        "plain": state,
        "original": {
            "step": 3,
            "model": {f"module.{name}": tensor for name, tensor in state.items()},
            "optim": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.003}]},
        },
        "compiled": {"state_dict": {f"net._orig_mod.{name}": tensor for name, tensor in state.items()}},
        "legacy": state,
    }[wrap]
    torch.save(content, tmp_path / "named.npz", _use_new_zipfile_serialization=wrap != "legacy")
    require_same(tmp_path / "named.npz", official, peer.standardize_eps)


def test_a_state_dict_beside_another_that_differs(state, tmp_path):
    torch.save({"model": state, "ema": {name: 2 * tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"2 state dicts .* differ \(ema, model\)"):
        weights.read(tmp_path / "x.pth")


def test_an_average_of_tensors_without_memory_ends_in_a_sentence(state, tmp_path):
    name = next(iter(state))
    torch.save({"model": state, "ema": state | {name: state[name].to_sparse()}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="a tensor without plain memory"):
        weights.read(tmp_path / "x.pth")


@pytest.mark.parametrize("container", ["pickle", "safetensors"])
def test_two_arrays_whose_names_become_one_are_refused(official, tmp_path, container):
    """None of them is dropped: which was meant, nobody knows."""
    peer = PEERS["timm"]
    arrays = {peer.name(key): peer.array(key, array) for key, array in official.items()}
    arrays = {"module.stem.conv.weight": 2 * arrays["stem.conv.weight"], **arrays}
    with open(tmp_path / "x", "wb") as file:
        if container == "pickle":
            torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, file)
        else:
            safetensors.write(file, arrays, {})
    with pytest.raises(WeightsError, match=r"module\.stem\.conv\.weight, stem\.conv\.weight are both stem\.conv"):
        weights.read(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"", "is empty; get it again$"),
        (b"PK\x03\x04", "is an .npz, which is named by itself, or damaged"),
        (None, "are a symbolic link to nothing"),
    ],
)
def test_a_directory_whose_weights_are_something_else(tmp_path, content, said):
    if content is None:
        (tmp_path / "model.safetensors").symlink_to("nowhere")
    else:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; mend that"),
        (MemoryError(), "does not fit into this machine's memory"),
    ],
)
def test_a_file_in_a_directory_that_cannot_be_read_ends_in_a_sentence(tmp_path, monkeypatch, error, said):
    convert.converted("embedded", tmp_path / "hub", checked=False)

    def refused(*_):
        raise error

    if isinstance(error, OSError):
        error.filename = str(tmp_path / "hub/model.safetensors")
        monkeypatch.setattr(recognize, "open", refused, raising=False)
    else:
        monkeypatch.setattr(safetensors.np, "empty", refused)
    with pytest.raises(RequestError, match=rf"cannot read .*hub/model\.safetensors: .*{said}"):
        dict(weights.read(tmp_path / "hub")[1])


def test_a_config_of_images_in_another_range_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}))
    with pytest.raises(RequestError, match=r"config\.json says .* mean \[0\.485, .*; move it away from the weights"):
        described(tmp_path)


@pytest.mark.parametrize("number", [10**13, 10**30])
def test_a_head_that_no_memory_holds_is_refused(number):
    with pytest.raises(RequestError, match=f"a head of {number:,} classes does not fit into this machine's memory"):
        dict(weights.read(EMBEDDED_FILE, num_classes=number)[1])


def test_a_config_that_outlived_its_weights_is_not_believed(official, tmp_path):
    """transformers writes unknown entries of config.json again, beside weights that it trained with its own 1e-8."""
    peer = PEERS["huggingface"]
    with open(tmp_path / "model.safetensors", "wb") as file:
        safetensors.write(file, {peer.name(key): peer.array(key, a) for key, a in official.items()}, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bit", "standardize_eps": 1e-10}))
    require_same(tmp_path, official, 1e-8)


def test_all_that_is_wrong_is_in_one_error(peer, state, official, tmp_path):
    state.pop(peer.name("resnet/group_norm/gamma"))
    bias = peer.name("resnet/head/conv2d/bias")
    state |= {"buffer": torch.zeros(3), bias: torch.zeros(11)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"1 missing .* 1 extra .* 1 misshapen") as caught:
        weights.read(tmp_path / "x.pth")
    assert caught.value.missing == ["resnet/group_norm/gamma"]
    assert caught.value.extra == ["buffer"]


def test_without_a_head(peer, state, tmp_path):
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith(peer.head)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="without a head; give the number of classes of a new head"):
        weights.read(tmp_path / "x.pth")
    architecture, arrays = weights.read(tmp_path / "x.pth", num_classes=3)
    assert architecture.num_classes == 3
    assert not dict(arrays)[HEAD_KERNEL].any()


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"model": RequestError("x")}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="is not loaded for safety"):
        weights.read(tmp_path / "x.pth")


def test_a_tensor_that_claims_more_than_the_file_holds(peer, state, tmp_path):
    state[peer.name("resnet/head/conv2d/bias")] = torch.zeros(1).expand(10**12)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"1,000,000,000,000 numbers in a file of"):
        weights.read(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_safetensors_of_every_float(official, tmp_path, dtype):
    peer = PEERS["timm"]
    narrow = {key: array.astype(dtype) for key, array in official.items()}
    with open(tmp_path / "x.npz", "wb") as file:
        safetensors.write(file, {peer.name(key): peer.array(key, a) for key, a in narrow.items()}, {"format": "pt"})
    require_same(tmp_path / "x.npz", {key: array.astype(np.float64) for key, array in narrow.items()}, 1e-8)


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(w={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}) + bytes(8), "in place of"),
        (header(w={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}) + bytes(12), "not where the array before"),
        (header(w={"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}) + bytes(8), "8 bytes for shape"),
        (header(w={"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}) + bytes(8), "dtype 'I64'"),
        (header(w={"dtype": "F32", "shape": [1]}) + bytes(4), "data_offsets"),
        (header(w=3), "no array of floats"),
        (struct.pack("<Q", 2**26) + b"{}", "too short for its header"),
        (struct.pack("<Q", 3) + b"{}}", "damaged header"),
        (struct.pack("<Q", 17) + b'{"w": 1, "w": 2 }', "occurs twice"),
    ],
)
def test_a_safetensors_header_is_not_believed(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        weights.read(tmp_path / "x")


def test_a_directory_brings_its_class_names_and_its_constant(tmp_path, official):
    said = convert.converted("embedded", tmp_path / "hub", checked=False)
    assert said["names"] == "huggingface"
    require_same(tmp_path / "hub", official, 1e-10)
    assert described(tmp_path / "hub").class_names == described(EMBEDDED_FILE).class_names
    (tmp_path / "run").mkdir()
    one = weight_file(str(tmp_path / "hub"), tmp_path / "run", random_classes=1, seed=0)
    require_same(one, official, 1e-10)
    assert np.load(one).files  # PyTorch's side of a comparison reads nothing else
    assert described(one).class_names == described(EMBEDDED_FILE).class_names


def test_parts_and_their_index(tmp_path, official):
    peer, keys = PEERS["huggingface"], list(official)
    where = {}
    for number, part in enumerate((keys[:20], keys[20:])):
        name = f"model-{number}.safetensors"
        with open(tmp_path / name, "wb") as file:
            safetensors.write(file, {peer.name(key): peer.array(key, official[key]) for key in part}, {})
        where |= {peer.name(key): name for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    require_same(tmp_path, official, 1e-8)
    for elsewhere in ("nowhere", f"../{tmp_path.name}/model-0.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": elsewhere}}))
        with pytest.raises(WeightsError, match="names files that are not in"):
            weights.read(tmp_path)


def test_a_directory_for_timm_brings_its_class_names_and_its_size(tmp_path):
    known = Description(["ant", "bee", "cat"], 160)
    conversion = Conversion(tmp_path, Architecture.parse("R50x1", 3), {}, known)
    (tmp_path / "config.json").write_text(json.dumps(layouts.timm(conversion)))
    assert described(tmp_path) == known


@pytest.mark.parametrize(
    ("target", "naming", "eps"),
    [
        ("x.npz", "official", 1e-10),
        ("x.safetensors", "original", 1e-10),
        ("x.pth", "original", 1e-10),
        ("x.pt", "timm", 1e-8),  # it has no place for the source's 1e-10, and `check.read_back` tells that
    ],
)
def test_every_target_reads_back_equal(tmp_path, official, target, naming, eps):
    convert.converted("embedded", tmp_path / target, naming=naming, checked=False)
    require_same(tmp_path / target, official, eps)


@pytest.mark.slow
def test_a_target_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    state = kinds._state

    def swapped(conversion, naming):
        arrays = state(conversion, naming)
        first, second = "body.block1.unit01.gn2.weight", "body.block1.unit01.gn2.bias"
        return arrays | {first: arrays[second], second: arrays[first]}

    monkeypatch.setattr(kinds, "_state", swapped)
    (tmp_path / "x.safetensors").write_bytes(b"what was there")
    with pytest.raises(RunFailed, match="does not compute what its source does"):
        convert.converted("embedded", tmp_path / "x.safetensors", naming="original", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"what was there"


def test_what_convert_refuses(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"what was there")
    with pytest.raises(RequestError, match="--overwrite"):
        convert.converted("embedded", tmp_path / "x.npz")
    with pytest.raises(RequestError, match=r"suffix \.gguf"):
        convert.converted("embedded", tmp_path / "x.gguf")
    with pytest.raises(RequestError, match="--format timm is not written to an official"):
        convert.converted("embedded", tmp_path / "y.npz", naming="timm")
    with pytest.raises(RequestError, match=r"timm has no model of the name R14x0\.5"):
        convert.converted("embedded", tmp_path / "y", naming="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "naming", "package"), [("x.safetensors", "timm", "timm"), ("hub", "huggingface", "transformers")]
)
def test_the_library_that_a_target_is_for_loads_it(tmp_path, target, naming, package):
    """`check.by_library` starts a process that cannot import this project, and the library runs there."""
    pytest.importorskip("torch")
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "bit_jax.convert", "embedded", tmp_path / target, "--format", naming, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    readback, library, _ = json.loads(done.stdout)["compared"]
    assert readback["difference"] == 0
    assert library["what"].startswith(f"loaded by {package}")
    assert library["difference"] < 1e-12
