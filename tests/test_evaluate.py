"""An evaluation: every example once, classes by name, intervals, and the page, through the command line."""

import csv
import hashlib
import html
import json
import math
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import Shown
from conftest import HARDLY_OPTIMIZES, ROOT
from PIL import Image

from bit_jax import evaluate
from bit_jax.formats import weights
from bit_jax.formats.described import Description
from bit_jax.model.architecture import Architecture
from bit_jax.model.class_names import imagenet1k, imagenet21k, in_words
from bit_jax.predictions import classes, rows, views
from bit_jax.predictions.summary import Share, Summary
from bit_jax.predictions.views import Preprocessing
from bit_jax.training import steps
from bit_jax.training.target import Target
from input_pipeline import DatasetError, Views
from input_pipeline.centre_crop import CentreCrop
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from parity.sides.inputs import random_arrays

QUICKLY = {"xla_backend_optimization_level": 0}
EXAMPLES = 39  # no multiple of the batches below
NAMES = ["ant", "bee", "caf\u00e9", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "koi", "zebra"]
DOG = 3


def write_image(path, seed, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All but one of the classes that the weights know, one of them with a name that Unicode spells in two ways."""
    root = tmp_path_factory.mktemp("pets")
    folders = [name.replace("\u00e9", "e\u0301") for name in NAMES if name != NAMES[DOG]]
    for number in range(EXAMPLES):
        write_image(root / "test" / folders[number % len(folders)] / f"{number:02d}.png", number)
    return root


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    arrays = random_arrays(Architecture((1, 1, 1, 1), 0.5, len(NAMES)))
    np.savez(path, **arrays)
    model, params = weights.load(path)
    images = np.random.default_rng(0).uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32) / 2
    logits = np.asarray(jax.jit(model.apply, compiler_options=QUICKLY)({"params": params}, images))
    # no class is likeliest for all images, and the one that the dataset lacks is likely
    arrays["resnet/head/conv2d/kernel"] /= logits.std(axis=0)
    arrays["resnet/head/conv2d/bias"] = (
        -logits.mean(axis=0) / logits.std(axis=0) + np.eye(len(NAMES), dtype=np.float32)[DOG]
    )
    np.savez(path, **arrays)
    (path.parent / "config.json").write_text(json.dumps({"class_names": NAMES, "recipe": {"crop": 32}}))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    monkeypatch.setattr(Target, "compiler_options", QUICKLY)  # compiling takes most of these tests' time
    return exit_code(evaluate.main)


@pytest.fixture(scope="module")
def expected(npz, folder):
    """Logits of all examples by Pillow and the model alone, and the labels as numbers of the head's classes."""
    model, params = weights.load(npz)
    files = sorted((folder / "test").glob("*/*.png"), key=lambda path: str(path).replace("e\u0301", "\u00e9"))
    numbers = {name.replace("\u00e9", "e\u0301"): number for number, name in enumerate(NAMES)}
    views = [np.asarray(Image.open(file).resize((32, 32), Image.Resampling.BILINEAR)) for file in files]
    images = (np.stack(views).astype(np.float32) - 127.5) / 127.5
    logits = jax.jit(model.apply, compiler_options=QUICKLY)({"params": params}, images)
    return np.asarray(logits), [numbers[file.parent.name] for file in files]


@pytest.mark.parametrize("which", ["dataset", pytest.param("head", marks=pytest.mark.slow)])
def test_the_figures_and_the_page_are_those_of_the_logits(tmp_path, npz, folder, expected, monkeypatch, capsys, which):
    logits, labels = expected
    files = {kind: tmp_path / "new" / f"e.{kind}" for kind in ("json", "html", "csv")}
    arguments = ["--weights", npz, "--dataset", f"folder:{folder}", "--classes", which, "--batch-per-device", 1]
    arguments += ["--json", files["json"], "--html", files["html"], "--predictions", files["csv"], "--mistakes", 5]
    assert run(monkeypatch, *arguments) == 0
    figures = json.loads(files["json"].read_text())
    kept = [number for number in range(len(NAMES)) if which == "head" or number != DOG]
    logits, labels = logits[:, kept], np.array([kept.index(label) for label in labels])
    predicted, each = logits.argmax(axis=1), np.arange(EXAMPLES)
    right = predicted == labels
    assert figures["acc1"]["count"] == right.sum()
    assert 0 < right.sum() < EXAMPLES
    assert figures["examples"] == EXAMPLES
    rank = np.argwhere(np.argsort(-logits, axis=1) == labels[:, None])[:, 1]
    assert figures["acc5"]["count"] == (rank < 5).sum()
    assert right.sum() < (rank < 5).sum() < EXAMPLES
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert figures["loss"] == pytest.approx(-np.log(probabilities[each, labels]).mean(), rel=1e-4)
    assert figures["classes"] == {"head": len(NAMES), "competing": len(kept)}
    of_class = {each["name"]: (each["count"], each["examples"]) for each in figures["per_class"]}
    assert all(each["name"] == NAMES[each["head_label"]] for each in figures["per_class"])
    assert all(each["head_label"] == kept[each["label"]] for each in figures["per_class"])
    assert of_class == {
        NAMES[number]: (int(right[labels == place].sum()), int((labels == place).sum()))
        for place, number in enumerate(kept)
        if number != DOG
    }
    assert sum(pair["count"] for pair in figures["confused"]) == (~right).sum()
    assert {pair["predicted"] for pair in figures["confused"]} == {NAMES[kept[label]] for label in predicted[~right]}

    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [line["id"].split("/")[1] for line in lines[:3]] == ["00.png", "11.png", "22.png"]
    for column, numbers in (("label", labels), ("predicted", predicted)):
        assert [line[column] for line in lines] == [NAMES[kept[number]] for number in numbers]
    for column, shares in (
        ("probability", probabilities.max(axis=1)),
        ("label_probability", probabilities[each, labels]),
    ):
        np.testing.assert_allclose([float(line[column]) for line in lines], shares, rtol=1e-4)
    assert [int(line["rank"]) for line in lines] == rank.tolist()

    printed, page = capsys.readouterr().out, files["html"].read_text()
    rules = {
        "head": "all 12 classes of the head compete",
        "dataset": "11 of the head's 12 classes, and only these compete",
    }
    for text in (printed, html.unescape(page)):
        assert f"{right.mean():.2%}".rstrip("%") in text
        assert rules[which] in text
    assert page.count('<img src="data:image/png;base64,') == 5
    wrong = np.flatnonzero(~right)
    worst = wrong[np.argsort(-probabilities[wrong].max(axis=1))][:5]
    assert re.findall(r'<span class="id">(.+)</span>', page) == [lines[index]["id"] for index in worst]
    browser = Shown(files["html"], tmp_path, 1000)
    assert browser.bands_without_ink() == 0
    assert browser.count(21, 101, 192) > 500  # bars


SPREAD = [
    ("", ""),
    ("--xla_force_host_platform_device_count=4", "--batch-per-device 2"),
    ("--xla_force_host_platform_device_count=4", "--batch-per-device 1 --mesh data=2,fsdp=2"),
]


@pytest.mark.slow
def test_however_it_is_spread_the_counts_are_the_same(tmp_path, npz, folder, compiled_once):
    """One device, four, four with split parameters, and two hosts that find each other on the loopback."""
    common = ["--weights", str(npz), "--dataset", f"folder:{folder}"]
    figures = []

    def measured(command, flags="", **more):
        path = tmp_path / f"{len(figures)}.json"
        environment = {**os.environ, "XLA_FLAGS": f"{HARDLY_OPTIMIZES} {flags}"}
        command = [sys.executable, "-m", *command, "--json", str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        figures.append(json.loads(path.read_text()))
        return done

    for flags, arguments in SPREAD:
        measured(["bit_jax.evaluate", *common, *arguments.split()], flags)
    launch = ["bit_jax.launch", "--hosts", "2", "--devices", "2", "--"]
    done = measured([*launch, "-m", "bit_jax.evaluate", *common, "--batch-per-device", "2"])
    assert done.stdout.count("acc1") == 1  # only the first host prints
    assert [(each["hosts"], each["devices"]) for each in figures] == [(1, 1), (1, 4), (1, 4), (2, 4)]
    for each in figures[1:]:
        assert each["loss"] == pytest.approx(figures[0]["loss"], rel=1e-5)
        for key in ("acc1", "acc5", "examples", "per_class", "confused"):
            assert each[key] == figures[0][key], key


def test_what_the_first_image_takes_longer_is_not_in_the_images_per_second(tmp_path, npz, folder, monkeypatch):
    """The clock moves only while an image is resized: by 100 s for the first, as if Numba compiled, else by 1 s."""
    now, resize = [0.0], Views.evaluation

    def slow_at_first(self, *arguments):
        now[0] += 1 if now[0] else 100
        return resize(self, *arguments)

    monkeypatch.setattr(rows, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Views, "evaluation", slow_at_first)
    path = tmp_path / "e.json"
    arguments = ["--weights", npz, "--dataset", f"folder:{folder}", "--input-threads", 1, "--json", path]
    assert run(monkeypatch, *arguments) == 0
    figures = json.loads(path.read_text())
    assert (figures["compile_seconds"], figures["seconds"], figures["images_per_second"]) == (100, EXAMPLES, 1)


def test_a_row_that_is_missing_or_twice_is_noticed(npz, folder, monkeypatch):
    def batches(index):
        return [{"index": np.array(index), "mask": np.array([True, True, True, False]), "x": np.arange(4)}]

    assert rows._in_order(batches([2, 0, 1, -1]), 3)["x"].tolist() == [1, 2, 0]
    for index, examples in (([0, 1, 1, -1], 3), ([0, 1, 2, -1], 4), ([0, 1, 3, -1], 3)):
        with pytest.raises(RuntimeError, match="not each of them once"):
            rows._in_order(batches(index), examples)


def test_a_summary_counts_as_training_does():
    """Also where logits are equal, and where they are not finite."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 4)).astype(np.float32)
    logits[3], logits[5, 1] = 0, np.nan  # equal ones, and one that is not finite
    label = rng.integers(0, 4, 40).astype(np.int32)
    batch = {"label": jnp.asarray(label), "mask": jnp.ones(40, bool)}
    sums = steps.evaluation_sums(jnp.asarray(logits), batch)
    rank = np.asarray(steps.label_rank(jnp.asarray(logits), batch["label"]))
    loss = np.where(np.arange(40) == 5, np.nan, 1.0)
    summary = Summary({"rank": rank, "label": label, "predicted": logits.argmax(axis=1), "loss": loss}, tuple("abcd"))
    assert summary.accuracy(1).count == sums["correct1"]
    assert summary.accuracy(5).count == sums["correct5"] == 39
    assert summary.not_finite == 1
    assert 5 not in Summary(summary.rows | {"probability": np.ones(40)}, summary.names).mistakes(40)


def source_of(*names):
    class Named:
        name, class_names, labels = "some/test", names, np.arange(len(names), dtype=np.int32)

        def __len__(self):
            return len(names)

        def __getitem__(self, index):
            return {"image": np.zeros((4, 4), np.uint8), "label": index, "id": str(index)}

    return Named()


def labels_by_name(matched):
    return [matched.names[matched.source[index]["label"]] for index in range(len(matched.source))]


IDS = list(imagenet1k())


@pytest.mark.parametrize(
    "names",
    [
        ("n02099601", "n01440764"),  # as in tfds, and in ImageNet-A's and -R's folders
        ("golden retriever", "tench, Tinca tinca"),
        ("n02099601", "tench, Tinca tinca"),
    ],
    ids=["by WordNet id", "by words", "by WordNet id and by words"],
)
def test_subsets_of_imagenet_are_matched_with_a_head_of_1000(names, request):
    head = classes.Head.of(None, 1000, "w.npz")
    assert head is not None
    matched = classes.match(source_of(*names), head, "dataset")
    assert matched.notes[0] == f"matched with ImageNet's {request.node.callspec.id}"
    assert labels_by_name(matched) == ["golden retriever", "tench, Tinca tinca"]
    assert matched.competing == (0, 207)
    assert matched.source.labels.tolist() == [1, 0]
    everything = classes.match(source_of(*names), head, "head")
    assert everything.competing == tuple(range(1000))
    assert everything.source.labels.tolist() == [207, 0]


def test_only_classes_that_occur_compete_where_it_is_asked_for():
    """tfds's imagenet_a is such a dataset: it declares all 1,000 classes, and 200 occur."""
    source = source_of(*IDS)
    source.labels = np.array([7, 3, 7], np.int32)
    head = classes.Head.of(None, 1000, "w.npz")
    assert head is not None
    matched = classes.match(source, head, "occurring")
    assert matched.competing == (3, 7)
    assert matched.source.labels.tolist() == [1, 0, 1]


def test_only_classes_that_occur_compete_by_position_too():
    source = source_of("x", "y", "z")
    source.labels = np.array([2, 0, 2], np.int32)
    matched = classes.match_by_position(source, 3, "w.npz", "occurring")
    assert matched.competing == (0, 2)
    assert matched.names == ("x", "z")
    assert matched.source.labels.tolist() == [1, 0, 1]
    assert matched.notes[0] == "matched by position, unverified"


def test_all_of_imagenet_v2_by_its_folders_numbers():
    head = classes.Head.of(None, 1000, "w.npz")
    assert head is not None
    folders = sorted(map(str, range(1000)))
    matched = classes.match(source_of(*folders), head, "dataset")
    assert matched.source.labels.tolist() == [int(name) for name in folders]
    assert matched.notes == ("matched with ImageNet's by number",)


@pytest.mark.parametrize("count", [2, 10, 999])
def test_some_numbers_are_no_classes_of_imagenet(count):
    """The classes of MNIST are called 0 to 9, and its 0 is no tench."""
    head = classes.Head.of(None, 1000, "w.npz")
    assert head is not None
    with pytest.raises(DatasetError, match=f"{count} classes that ImageNet's head of w.npz has not: 0, 1"):
        classes.match(source_of(*map(str, range(count))), head, "dataset")


def test_classes_with_the_same_words_are_told_apart():
    """Both the bird and the machine are called crane; they are ImageNet's only two with the same words."""
    head = classes.Head.of(None, 1000, "w.npz")
    assert head is not None
    matched = classes.match(source_of("n02012849", "n03126707", "n02099601"), head, "dataset")
    assert matched.names == ("crane (n02012849)", "golden retriever", "crane (n03126707)")
    assert classes.match(source_of("n02012849"), head, "dataset").names == ("crane",)
    assert len(set(in_words(IDS))) == 1000
    assert in_words(["mine", "mine"]) == ["mine", "mine"]


def test_a_head_with_imagenets_words_is_imagenets():
    """The config.json of a model from elsewhere may name its classes so."""
    head = classes.Head.of(list(imagenet1k().values()), 1000, "w.npz")
    assert head is not None
    assert head.names == tuple(IDS)


def test_a_head_of_21843_is_matched_by_wordnet_id():
    table = imagenet21k()
    assert len(table) == 21_843
    assert list(table) == sorted(table)
    assert set(IDS) - set(table) == {"n04399382"}
    head = classes.Head.of(None, 21_843, "BiT-M")
    assert head is not None
    matched = classes.match(source_of("n02099601", "n00004475"), head, "dataset")
    assert labels_by_name(matched) == ["golden retriever", "organism, being"]
    assert in_words(["n00004475", "n99999999", "mine"]) == ["organism, being", "n99999999", "mine"]
    with pytest.raises(DatasetError, match="1 classes that ImageNet-21k's head of BiT-M has not: n04399382"):
        classes.match(source_of("n02099601", "n04399382"), head, "dataset")


def test_what_cannot_be_matched_is_refused_by_name():
    head = classes.Head.of(["a", "b"], 2, "w.npz")
    assert head is not None
    with pytest.raises(DatasetError, match=r"2 classes that the head of w\.npz has not: A, c"):
        classes.match(source_of("A", "b", "c"), head, "dataset")
    imagenet = classes.Head.of(None, 1000, "w.npz")
    assert imagenet is not None
    with pytest.raises(DatasetError, match="not: crane"):  # the bird, or the machine?
        classes.match(source_of("crane", "golden retriever"), imagenet, "dataset")
    assert classes.Head.of(None, 7, "w.npz") is None
    assert classes.match_by_position(source_of("x", "y"), 2, "w.npz", "dataset").competing == (0, 1)
    with pytest.raises(RequestError, match="3 classes and the head"):
        classes.match_by_position(source_of("x", "y", "z"), 2, "w.npz", "dataset")


@pytest.mark.parametrize(
    ("count", "examples", "low", "high"),
    [(0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilsons_interval(count, examples, low, high):
    """The examples of Newcombe, Statistics in Medicine 17 (1998), table I, method 3, which has four digits."""
    assert Share(count, examples).interval == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("size", "crop", "share", "interpolation", "pixels"),
    [
        ((61, 97), 32, 0.875, "bilinear", "80a8b4b0fff5a28b"),
        ((97, 61), 33, 0.95, "bicubic", "faf3e222f4c0fae0"),
        ((40, 40), 32, 1.0, "bilinear", "fbe0d264a83a83b1"),
        ((33, 200), 48, 0.875, "bicubic", "6b3b3ab53ee36a88"),
        ((20, 31), 48, 0.9, "bilinear", "11305ea33caeba78"),
        ((32, 51), 32, 1.0, "bilinear", "7fc96b8c25b00290"),
    ],
)
def test_timms_view_has_timms_pixels(size, crop, share, interpolation, pixels):
    """The digests are of what timm 1.0.31's transforms_imagenet_eval made of these images with Pillow 13.0."""
    image = np.random.default_rng(math.prod(size)).integers(0, 256, (*size, 3), np.uint8)
    view = CentreCrop.of(crop, share, interpolation)
    shown = view.evaluation(image)
    assert hashlib.sha256(shown.tobytes()).hexdigest().startswith(pixels)
    into = np.empty_like(shown)
    assert view.evaluation(image, into) is into
    np.testing.assert_array_equal(into, shown)
    if size != (40, 40):
        assert (shown != Views(crop, crop, flip=False).evaluation(image)).any()


def test_size_and_resize_are_the_flags_else_the_weights():
    trained, square = Description(None, 48, "tf"), "resized straight to the square, bilinear"
    centre = "shorter side resized to 54 pixels (bicubic), the centre cut out (timm)"
    for flags, words in (
        (Preprocessing(), f"48x48 pixels, {square} from the four nearest pixels (tf)"),
        (Preprocessing(size=32, resize="pillow"), f"32x32 pixels, {square} with antialiasing (pillow)"),
        (Preprocessing(resize="timm", interpolation="bicubic"), f"48x48 pixels, {centre}"),
    ):
        side = flags.side(trained, lambda: pytest.fail("no image has to be looked at"))
        assert views.in_words(flags.views(trained, side)) == words
    assert Preprocessing().side(Description(), lambda: 96 * 96 - 1) == 128
    assert Preprocessing().side(Description(), lambda: 96 * 96) == 480


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--weights {bare} --dataset digits", "12 classes without names, and digits/test has 10 (0, 1, 2, 3, ...)"),
        ("--weights {bare} --dataset digits --by-position", "10 classes and the head of"),
        ("--weights {npz} --dataset digits", "digits/test has 10 classes that the head of"),
        ("--weights {npz} --dataset digits --split nowhere", "digits has no split 'nowhere'"),
        ("--weights {npz} --dataset digits --size 0", "--size 0 must be greater than 0"),
        ("--weights {npz} --dataset digits --resize timm --crop-pct 1.5", "--crop-pct 1.5 must be above 0"),
        ("--weights {npz} --dataset digits --crop-pct 0.9", "--crop-pct 0.9 belongs to --resize timm"),
        ("--weights {npz} --dataset digits --resize tf --interpolation bilinear", "--interpolation bilinear belongs"),
        ("--weights {npz} --dataset digits --json {tmp}/f --html {tmp}/x/../f", "--json and --html both name"),
        ("--weights {bare} --dataset digits --json {bare}", "--weights and --json both name"),
        ("--weights {npz} --dataset digits --batch-per-device 0", "--batch-per-device 0"),
        ("--weights {npz} --dataset digits --mesh fsdp=3", "--mesh fsdp=3"),
        ("--weights {npz} --dataset digits --json {tmp}", "is a directory"),
        ("--weights BiT-M-R50x7 --dataset digits", "unknown model"),
    ],
)
def test_wrong_requests(tmp_path, npz, monkeypatch, capsys, arguments, said):
    bare = tmp_path / "bare.npz"
    bare.write_bytes(npz.read_bytes())
    words = [word.format(npz=npz, bare=bare, tmp=tmp_path) for word in arguments.split()]
    assert run(monkeypatch, *words) == 2
    sentence = capsys.readouterr().err
    assert said in sentence
    assert sentence.count("\n") == 1
