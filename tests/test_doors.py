"""One model in three places: evaluated here, by timm from the converted file, by onnxruntime from the exported one."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import input_pipeline
from bit_jax import convert
from bit_jax.conversion.check import library_logits
from bit_jax.formats import weights
from bit_jax.formats.names import PEERS
from bit_jax.published import locate

SIDE, IMAGES = 48, 96


@pytest.mark.slow
def test_evaluate_timm_and_onnxruntime_predict_the_same_image_by_image(tmp_path):
    """What the model was trained on are other images than these; its predictions are as good to compare."""
    onnxruntime = pytest.importorskip("onnxruntime")
    split, table = f"test[:{IMAGES}]", tmp_path / "predictions.csv"
    flags = ["--dataset", "digits", "--split", split, "--size", SIDE, "--by-position", "--predictions", table]
    command = [sys.executable, "-m", "bit_jax.evaluate", "--weights", "embedded", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows}, key=lambda name: [row["label"] for row in rows].index(name))

    source = input_pipeline.open_source("digits", split)
    view = input_pipeline.Views(SIDE, SIDE, flip=False)
    pixels = np.stack([view.evaluation(source[index]["image"]) for index in range(IMAGES)])
    images = (pixels.astype(np.float64) - 127.5) / 127.5
    assert len(rows) == IMAGES
    assert len(names) > 5

    convert.converted("embedded", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    [exported] = session.run(["logits"], {"images": images.astype(np.float32).transpose(0, 3, 1, 2)})

    convert.converted("embedded", tmp_path / "model.safetensors", naming="timm")
    architecture, _ = weights.read(locate.weight_file("embedded"))
    by_timm = library_logits(architecture, tmp_path / "model.safetensors", PEERS["timm"], images)
    if isinstance(by_timm, str):
        pytest.skip(f"timm cannot be imported: {by_timm}")
    ours = [row["predicted"] for row in rows]
    for logits in (exported, by_timm):
        theirs = logits.argmax(axis=1)
        # the same image, the same class: the numbers and the names pair up one to one
        pairs = set(zip(ours, theirs.tolist(), strict=True))
        assert len(pairs) == len(set(ours)) == len(set(theirs.tolist())) > 2
        probability = np.exp(logits).max(axis=1) / np.exp(logits).sum(axis=1)
        np.testing.assert_allclose([float(row["probability"]) for row in rows], probability, rtol=1e-4)
