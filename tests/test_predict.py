"""Predictions for image files, with the names that belong to the head."""

import json
import os
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bit_jax import predict
from bit_jax.formats import weights
from bit_jax.formats.described import Description, described
from bit_jax.model.architecture import Architecture
from bit_jax.published import locate
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from parity.sides.inputs import random_arrays


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


def npz(tmp_path, num_classes):
    path = tmp_path / "w.npz"
    np.savez(path, **random_arrays(Architecture((1, 1, 1, 1), 0.5, num_classes)))
    return path


def test_imagenet_names(tmp_path):
    names = predict.class_names(described(npz(tmp_path, 1000)).class_names, 1000)
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
    logits = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray((pixels[None] - 127.5) / 127.5)))[0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-probabilities)[:5]
    assert printed[0] == str(image)
    assert [line.split()[1] for line in printed[1:]] == [names[label] for label in best]
    shown = [float(line.split()[0].rstrip("%")) / 100 for line in printed[1:]]
    np.testing.assert_allclose(shown, probabilities[best], atol=1e-4)


def test_a_dataset_that_names_classes_by_wordnet_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"class_names": ["n01440764", "n02099601", "mine"]}))
    assert predict.class_names(described(npz(tmp_path, 3)).class_names, 3) == [
        "tench, Tinca tinca",
        "golden retriever",
        "mine",
    ]


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
        (["--weights", "{npz}", "nowhere.png"], "nowhere.png cannot be read (No such file"),
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", "it holds a list, not a dict"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"class_names": 7}', "its 'class_names' is 7, not a list of names"),
        (b'{"class_names": ["a", 1]}', "not a list of names"),
        (b'{"class_names": "abc"}', "not a list of names"),
        (b'{"recipe": []}', "its 'recipe' is"),
        (b'{"recipe": {"crop": "32"}}', "its 'crop' is '32', not a number of pixels"),
        (b'{"recipe": {"crop": -1}}', "not a number of pixels"),
        (b'{"recipe": {"crop": true}}', "not a number of pixels"),
        (b'{"recipe": {"crop": 1.5}}', "not a number of pixels"),
        (b'{"config": "x"}', "its 'config' is"),
        (b'{"config": {"data.resize": "cubic"}}', "not pillow or tf"),
        (b'{"config": {"data.resize": ["pillow"]}}', "not pillow or tf"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_config_that_no_run_wrote(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        described(tmp_path / "w.npz")
    sentence = str(caught.value)
    assert said in sentence
    assert str(tmp_path / "config.json") in sentence
    assert "delete" not in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("content", [None, "{}", '{"recipe": null, "config": {}, "class_names": null}', '{"model": 1}'])
def test_a_config_that_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert described(tmp_path / "w.npz") == Description(None, None, "pillow")


def test_the_embedded_models_own_description():
    assert described(locate.EMBEDDED_FILE) == Description([str(label) for label in range(10)], 48, "pillow")


def test_names_from_outside_are_printed_escaped(tmp_path, image, capsys):
    """A class directory with an escape sequence in its name, and an image whose name is no UTF-8."""
    (tmp_path / "config.json").write_text(json.dumps({"class_names": ["\x1b[31mred", "caf\udce9", "plain"]}))
    strange = tmp_path / os.fsdecode(b"\xe9\x1b.png")
    image.rename(strange)
    predict.predict_files((strange,), str(npz(tmp_path, 3)), size=32)
    printed = capsys.readouterr().out
    assert "\\xe9\\x1b.png" in printed
    assert "\\x1b[31mred" in printed
    assert "caf\\xe9" in printed
    assert "\x1b" not in printed


def test_only_ordinary_files_are_images(tmp_path):
    path = npz(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "directory.png").mkdir()
    here = os.open(".", os.O_RDONLY)
    os.chdir(tmp_path)  # a socket's path may have no more than 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    os.chdir(here)
    os.close(here)
    for name in ("pipe.png", "directory.png", "socket.png"):
        with pytest.raises(RequestError, match=f"{name} is .*only regular files are read"):
            list(predict.predict(path, [tmp_path / name]))


def test_the_home_directory_is_expanded(tmp_path, image, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    npz(tmp_path, 3)
    monkeypatch.setattr(sys, "argv", ["predict", "--weights", "~/w.npz", "~/image.png", "--size", "32"])
    assert exit_code(predict.main) == 0
    assert capsys.readouterr().out.startswith(str(image))
