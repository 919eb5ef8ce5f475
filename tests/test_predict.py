"""Predictions for image files, with the names that belong to the head."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights
from PIL import Image

from bit_jax import predict, weights
from input_pipeline.exits import exit_code


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


def npz(tmp_path, num_classes):
    path = tmp_path / "w.npz"
    np.savez(path, **random_weights(weights.Architecture((1, 1, 1, 1), 0.5, num_classes)))
    return path


def test_imagenet_names(tmp_path, image):
    names = predict.class_names(npz(tmp_path, 1000), 1000)
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert names[207] == "golden retriever"
    assert names[999].startswith("toilet tissue")


def test_names_and_size_of_a_fine_tuned_model(tmp_path, image, capsys, monkeypatch):
    """Through the command line; the answer is the model's own on the image resized to what it was trained at."""
    names = ["ant", "bee", "cat", "dog", "eel", "fox"]
    (tmp_path / "config.json").write_text(json.dumps({"class_names": names, "recipe": {"crop": 32}}))
    path = npz(tmp_path, 6)
    monkeypatch.setattr(sys, "argv", ["predict", "--weights", str(path), str(image)])
    assert exit_code(predict.main) == 0
    printed = capsys.readouterr().out.splitlines()

    model, params = weights.load(path)
    pixels = np.asarray(Image.open(image).resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    logits = np.asarray(model.apply({"params": params}, jnp.asarray((pixels[None] - 127.5) / 127.5)))[0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-probabilities)[:5]
    assert printed[0] == str(image)
    assert [line.split()[1] for line in printed[1:]] == [names[label] for label in best]
    shown = [float(line.split()[0].rstrip("%")) / 100 for line in printed[1:]]
    np.testing.assert_allclose(shown, probabilities[best], atol=1e-4)


def test_a_dataset_that_names_classes_by_wordnet_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"class_names": ["n01440764", "n02099601", "mine"]}))
    assert predict.class_names(npz(tmp_path, 3), 3) == ["tench, Tinca tinca", "golden retriever", "mine"]


def test_a_model_trained_on_tensorflows_pixels_is_shown_those(tmp_path, image):
    """A large image shrinks most differently with and without antialiasing."""
    path, shown = npz(tmp_path, 6), {}
    for resize in ("pillow", "tf"):
        (tmp_path / "config.json").write_text(json.dumps({"config": {"data.resize": resize}, "recipe": {"crop": 32}}))
        [(_, predictions)] = predict.predict(path, [image])
        shown[resize] = [prediction.probability for prediction in predictions]
    assert shown["pillow"] != shown["tf"]


def test_unknown_heads_are_numbered_and_small_ones_short(tmp_path, image):
    [(_, predictions)] = predict.predict(npz(tmp_path, 3), [image])
    assert {prediction.name for prediction in predictions} == {"class 0", "class 1", "class 2"}
    assert sum(prediction.probability for prediction in predictions) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "{npz}"], "at least one image"),
        (["--weights", "{npz}", "nowhere.png"], "cannot read image nowhere.png: No such file"),
        (["--weights", "{npz}", "{npz}"], "w.npz is not a readable image"),
        (["--weights", "nowhere.npz", "{image}"], "does not exist"),
        (["--weights", "{npz}", "{image}", "--size", "0"], "greater than 0"),
    ],
)
def test_wrong_requests(tmp_path, image, capsys, monkeypatch, arguments, said):
    path = npz(tmp_path, 3)
    monkeypatch.setattr(sys, "argv", ["predict", *(argument.format(npz=path, image=image) for argument in arguments)])
    assert exit_code(predict.main) == 2
    sentence = capsys.readouterr().err
    assert said in sentence
    assert sentence.count("\n") == 1
