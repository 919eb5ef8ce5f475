"""Predictions for image files, with the names that belong to the head, and files of features."""

import dataclasses
import hashlib
import json
import os
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import Shown
from PIL import Image

from bit_jax import predict
from bit_jax.formats import weights
from bit_jax.formats.described import Description, described
from bit_jax.model.architecture import Architecture
from bit_jax.predictions.views import Preprocessing
from bit_jax.published import locate
from bit_jax.training.target import Target
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.features import Features
from input_pipeline.loose_files import find
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
    predict.predict_files(predict.Request((strange,), str(npz(tmp_path, 3)), Preprocessing(size=32)))
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


@pytest.fixture
def animals(tmp_path):
    """Five images in two directories of classes, whose order by name is not that of their code points as they lie."""
    for number, name in enumerate(
        ("zebra/b.png", "zebra/a.png", "E\u0301lan/1.png", "bee/x.png", "bee/.hidden", "bee/y.png")
    ):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)).save(path, "PNG")
    return tmp_path / "animals"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    monkeypatch.setattr(Target, "compiler_options", {"xla_backend_optimization_level": 0})  # compiles in less time
    return exit_code(predict.main)


def test_features_of_a_directory_of_classes(tmp_path, animals, monkeypatch):
    path, out = npz(tmp_path, 3), tmp_path / "new" / "features.npz"
    assert run(monkeypatch, "--weights", path, "--size", 32, "--features", out, "--batch-per-device", 1, animals) == 0
    with np.load(out) as file:  # without pickles
        assert set(file.files) == {"features", "names", "labels", "class_names", "metadata"}
        assert (file["features"].dtype, file["labels"].dtype) == (np.float32, np.int32)
    found = Features.load(out)
    assert found.class_names == ["bee", "zebra", "\u00c9lan"]
    assert found.names == ["bee/x.png", "bee/y.png", "zebra/a.png", "zebra/b.png", "E\u0301lan/1.png"]
    assert found.labels.tolist() == [0, 0, 1, 1, 2]
    assert found.metadata["weights"] == str(path)
    assert (found.metadata["size"], found.metadata["resize"]) == (32, "pillow")
    assert found.metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    model, params = weights.load(path, num_classes=0)
    shown = [Image.open(animals / name).resize((32, 32), Image.Resampling.BILINEAR) for name in found.names]
    images = (np.stack([np.asarray(image, np.float32) for image in shown]) - 127.5) / 127.5
    expected = np.asarray(jax.jit(model.apply)({"params": params}, images))
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-4)
    assert (np.abs(expected[0] - expected[1]) > 1e-3).any()


def test_features_of_loose_files_have_no_labels(tmp_path, image, monkeypatch):
    out = tmp_path / "features.npz"
    assert run(monkeypatch, "--weights", npz(tmp_path, 3), "--size", 32, "--features", out, image) == 0
    found = Features.load(out)
    assert (found.names, found.labels.tolist(), found.class_names) == ([str(image)], [-1], [])


def test_a_page_of_predictions(tmp_path, animals, monkeypatch, capsys):
    page = tmp_path / "page.html"
    assert run(monkeypatch, "--weights", npz(tmp_path, 6), "--size", 32, "--html", page, animals / "bee", animals) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 5 * (2 + 5)
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 2 + 5
    assert text.count('<div class="bar">') == 5 * (2 + 5)
    shown = Shown(page, tmp_path, 800)
    assert shown.count(21, 101, 192) > 500  # bars
    assert "zebra/a.png" in shown.text


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no images"),
        (["a/.hidden"], "have no images"),
        (["a.png", "notes.txt"], "notes.txt is not an image file"),
        (["a/b.png", "c.png"], "has directories and c.png beside them"),
        (["a/b/c.png"], "b is not an image file"),
    ],
)
def test_directories_that_are_not_understood(tmp_path, files, said):
    (tmp_path / "d").mkdir()
    for name in files:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    with pytest.raises(RequestError, match=said):
        find([tmp_path / "d"])


def test_a_file_that_holds_no_features_is_refused(tmp_path):
    good = Features(np.zeros((2, 3), np.float32), ["a", "b\udce9"], np.array([0, -1]), ["x"], {"size": 32})
    good.save(tmp_path / "a.npz")
    again = Features.load(tmp_path / "a.npz")
    assert (again.names, again.metadata, again.labels.tolist()) == (good.names, good.metadata, [0, -1])
    good.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for change, said in (
        ({"labels": np.array([0, 1])}, "a label is not one of its 1 classes"),
        ({"names": ["a"]}, "are of 2, 1 and 2"),
        ({"features": np.zeros(2, np.float32)}, "its features has 1 axes"),
    ):
        dataclasses.replace(good, **change).save(tmp_path / "c.npz")
        with pytest.raises(RequestError, match=said):
            Features.load(tmp_path / "c.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    for name, wrong, said in (
        ("labels", np.array([0.9, -1]), "its labels is float64, not whole numbers"),
        ("features", np.ones((2, 3), np.complex64), "its features is complex64, not floating-point numbers"),
        ("names", np.array([1, 2]), "its names is int64, not text"),
        ("class_names", np.array([b"x"]), "its class_names is .*S1, not text"),
        ("metadata", np.array(b"{}"), "its metadata is .*S2, not text"),
    ):
        np.savez(tmp_path / "c.npz", **arrays | {name: wrong})
        with pytest.raises(RequestError, match=said):
            Features.load(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", other=1)
    (tmp_path / "e.npz").write_bytes(b"PK no zip")
    for name, said in (
        ("d.npz", "is no file of features"),
        ("e.npz", r"is no file of features \(it is no zip archive\);"),
    ):
        with pytest.raises(RequestError, match=said):
            Features.load(tmp_path / name)


@pytest.mark.parametrize("flag", ["--html", "--features"])
def test_an_output_never_takes_the_place_of_an_input(tmp_path, image, monkeypatch, capsys, flag):
    path = npz(tmp_path, 3)
    for place, said in ((path, "--weights and"), (image, "IMAGE and")):
        before = place.read_bytes()
        assert run(monkeypatch, "--weights", path, "--size", 32, flag, place, image) == 2
        assert f"{said} {flag} both name" in capsys.readouterr().err
        assert place.read_bytes() == before
