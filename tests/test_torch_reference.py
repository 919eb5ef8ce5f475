"""The PyTorch reference against what the original PyTorch code computes in float64."""

from pathlib import Path

import golden_inputs
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from parity.in_torch import precision, resnetv2

GOLDEN = np.load(Path(__file__).parent / "data" / "bit_pytorch_float64.npz")
TOLERANCE = 1e-9  # float64 rounding is seen at 1e-13; a wrong epsilon moves a logit by 1e-6
LABELS = torch.tensor([3, 141, 592, 653])


def load(directory, depth, classes, seed, **constants):
    path = directory / "golden.npz"
    np.savez(path, **golden_inputs.weights(depth, 1, classes, seed))
    return resnetv2.load(str(path), **constants).double()


def logits_of(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images).double().permute(0, 3, 1, 2)).numpy()


@pytest.fixture(scope="module")
def r50x1(tmp_path_factory):
    return load(tmp_path_factory.mktemp("r50x1"), 50, 1000, 11)


@pytest.mark.parametrize(("size", "which"), [("128x128", 0), ("97x131", 1)])
def test_r50x1_logits(r50x1, size, which):
    logits = logits_of(r50x1, golden_inputs.images(11)[which])
    np.testing.assert_allclose(logits, GOLDEN[f"R50x1-1000-{size}"], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_r101x1_logits_with_21843_classes(tmp_path):
    logits = logits_of(load(tmp_path, 101, 21843, 13), golden_inputs.images(13)[1])
    np.testing.assert_allclose(logits[:, :1000], GOLDEN["R101x1-21843-97x131"], rtol=0, atol=TOLERANCE)


def test_r50x1_gradients(r50x1):
    images = torch.from_numpy(golden_inputs.images(11)[2]).double().permute(0, 3, 1, 2)
    loss = F.cross_entropy(r50x1(images), LABELS)
    gradients = torch.autograd.grad(loss, list(r50x1.parameters()))
    np.testing.assert_allclose(loss.item(), GOLDEN["grad/loss"], rtol=TOLERANCE)
    names = [original_name(name) for name, _ in r50x1.named_parameters()]
    assert {f"grad/{name}" for name in names} | {"grad/loss"} == {key for key in GOLDEN if key.startswith("grad/")}
    for name, gradient in zip(names, gradients, strict=True):
        norm, total = GOLDEN[f"grad/{name}"]
        np.testing.assert_allclose(gradient.norm(), norm, rtol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(gradient.sum(), total, rtol=0, atol=TOLERANCE * max(norm, 1), err_msg=name)


def original_name(name):
    """The original code's name of a parameter."""
    parts = name.split(".")
    kind = {"gamma": "weight", "kernel": "weight"}.get(parts[-1], "bias")
    if parts[0] == "root_block":
        return "root.conv.weight"
    if parts[0] == "group_norm":
        return f"head.gn.{kind}"
    if parts[0] == "head":
        return f"head.conv.{kind}"
    layer = (
        "downsample" if "proj" in parts else ("gn" if "group_norm" in parts else "conv") + str(" abc".index(parts[2]))
    )
    return f"body.{parts[0]}.{parts[1]}.{layer}.{kind}"


@pytest.mark.parametrize(("fault", "wrong"), [("norm_eps", 1e-6), ("standardize_eps", 1e-8), ("GROUPS", 16)])
def test_golden_logits_notice_a_wrong_constant(tmp_path, monkeypatch, fault, wrong):
    given = {fault: wrong} if fault != "GROUPS" else {}
    monkeypatch.setattr(resnetv2, "GROUPS", 16 if fault == "GROUPS" else resnetv2.GROUPS)
    model = load(tmp_path, 50, 1000, 11, **given)
    difference = np.abs(logits_of(model, golden_inputs.images(11)[1]) - GOLDEN["R50x1-1000-97x131"]).max()
    assert difference > 100 * TOLERANCE


def test_a_file_with_an_unknown_array_is_refused(tmp_path, small_npz):
    path = tmp_path / "extra.npz"
    np.savez(path, **np.load(small_npz), **{"resnet/block1/unit01/d/kernel": np.zeros(1)})
    with pytest.raises(RuntimeError, match=r"block1\.unit01\.d\.kernel"):
        resnetv2.load(str(path))


@pytest.mark.parametrize("name", ["tf32", "fp32"])
def test_pytorch_can_export_in_a_process_that_chose_a_precision(name):
    """`torch.export` reads the older setting, which PyTorch refuses to tell where the newer ones say something else."""
    precision.choose(name)
    assert torch.backends.cudnn.allow_tf32 == (name == "tf32")
    assert set(precision.float32_settings().values()) == {"tf32" if name == "tf32" else "ieee"}
