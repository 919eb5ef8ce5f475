"""A linear probe: a head trained on stored features is the head that the same steps on the images train."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import parity
from conftest import SMALL
from PIL import Image
from rich.console import Console

from bit_jax import config, predict
from bit_jax.config import Additions
from bit_jax.formats import weights
from bit_jax.model.architecture import HEAD_BIAS, HEAD_KERNEL, HeadAlone
from bit_jax.predictions import rows
from bit_jax.predictions.views import Preprocessing
from bit_jax.scale import sharding
from bit_jax.training import finetuning, metrics, steps
from bit_jax.training import run as runs
from bit_jax.training.target import Target
from input_pipeline import Loader, open_source
from input_pipeline.errors import RequestError
from input_pipeline.features import Features, FeatureViews, open_features
from input_pipeline.loose_files import find
from parity import faults
from parity.ladder.ladder import Ladder, working_folder
from parity.ladder.selftest import climb, first_bug, inject, options_for
from parity.options import Options
from parity.sides.inputs import pictures
from parity.sides.recorded import RecordedRun

SIDE, CLASSES = 16, ("ant", "bee", "cat")
PROBE = [name for name, fault in faults.FAULTS.items() if fault.candidate == "jax:probe"]


@pytest.fixture(scope="module")
def stored(small_npz, tmp_path_factory):
    """A folder of images, images/SPLIT/CLASS/, and its features, features/SPLIT.npz."""
    place = tmp_path_factory.mktemp("probe")
    for split, of_class in (("train", 8), ("test", 3)):
        for number, name in enumerate(CLASSES):
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            for index, image in enumerate(pictures(of_class, SIDE, SIDE, seed=number + 10 * (split == "test"))):
                Image.fromarray(image).save(folder / f"{index}.png")
        asked = predict.Request((), str(small_npz), Preprocessing(size=SIDE), batch_per_device=2)
        features = predict.features_of(find([place / "images" / split]), asked, small_npz)
        features.save(place / "features" / f"{split}.npz")
    return place


def flags(stored, small_npz, workdir, *, optimizer=None, **data):
    data = {"dataset": f"features:{stored / 'features'}", "global_batch": 8} | data
    short = config.OptimizerConfig(base_lr=0.1, warmup_steps=0, steps=6, **optimizer or {})
    return config.Config(
        config.ModelConfig(str(small_npz)),
        config.DataConfig(**data),
        short,
        config.RunConfig(workdir, eval_every=3, watch_every=4),
    )


@pytest.fixture(scope="module")
def finished(stored, small_npz, tmp_path_factory):
    """The folder and the result of a probe, on eight devices."""
    workdir = tmp_path_factory.mktemp("run") / "probe"
    return workdir, finetuning.finetune(runs.Run.of(flags(stored, small_npz, workdir)))


def test_a_probe_leaves_the_whole_model_with_the_accuracy_that_it_reports(finished, stored, small_npz):
    workdir, result = finished
    assert (result["architecture"], result["eval_examples"]) == ("the head of R14x0.5 with 3 classes", 9)
    kept = json.loads((workdir / "config.json").read_text())
    assert (kept["class_names"], kept["recipe"]["crop"], kept["recipe"]["mixup"]) == (list(CLASSES), SIDE, 0)
    body, final = dict(np.load(small_npz)), dict(np.load(workdir / "final.npz"))
    assert final.keys() == body.keys()
    for key in body.keys() - {HEAD_KERNEL, HEAD_BIAS}:
        np.testing.assert_array_equal(final[key], body[key], err_msg=key)

    architecture, _ = weights.read(workdir / "final.npz")
    test, view = open_source(f"folder:{stored / 'images'}", "test"), Preprocessing(size=SIDE)
    views = view.views(predict.described(workdir / "final.npz"), SIDE)
    target = Target(sharding.make_mesh(), predict.choose("fp32"))
    work = rows.Work(workdir / "final.npz", architecture, target, test, views, 8)
    computed = rows.compute(work, rows.classify(work, tuple(range(len(CLASSES))))).rows
    features = Features.load(stored / "features" / "test.npz")
    logits = features.features @ final[HEAD_KERNEL][0, 0] + final[HEAD_BIAS]
    np.testing.assert_array_equal(computed["predicted"], logits.argmax(axis=1))
    assert result["final_acc1"] == (computed["predicted"] == features.labels).mean()
    assert result["final_loss"] == pytest.approx(computed["loss"].mean(), rel=1e-4)
    watched = [entry for entry in metrics.read(workdir / "metrics.jsonl")[0] if "watch/grad_norm" in entry]
    assert [entry["step"] for entry in watched] == [4]
    assert watched[0]["watch/grad_norm"] == watched[0]["watch/grad_norm/head"] > 0
    assert not [name for name in watched[0] if "activation" in name]


def test_the_checkpoint_is_of_the_head_alone_and_the_run_is_known_again(finished, stored, small_npz, capsys):
    workdir, result = finished
    run = runs.Run.of(flags(stored, small_npz, workdir))
    assert {key for key, _ in run.arrays()} == {HEAD_KERNEL, HEAD_BIAS}
    assert finetuning.finetune(run) == result
    assert "finished" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_features_do_not_continue_a_probe(finished, stored, small_npz, tmp_path, split):
    """The same rows in another order, though model, view and classes are the same."""
    file = Features.load(stored / "features" / f"{split}.npz")
    turned = {name: getattr(file, name)[::-1] for name in ("features", "names", "labels")}
    place = changed(stored, tmp_path / "features", split, **turned)
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    kept = json.loads((workdir / "config.json").read_text())
    kept["config"]["data.dataset"] = f"features:{place}"
    (workdir / "config.json").write_text(json.dumps(kept))
    name = {"train": "train", "test": "validation"}[split]
    with pytest.raises(RequestError, match=rf"of another configuration \(features: {name}_rows: "):
        finetuning.finetune(runs.Run.of(flags(stored, small_npz, workdir, dataset=f"features:{place}")))


def test_parity_judges_no_step_of_a_probe(finished, stored, tmp_path):
    """Not with the images in place of the features either, on which nothing would be as the run recorded it."""
    for dataset in (None, f"folder:{stored / 'images'}"):
        with pytest.raises(RequestError, match=r"a linear probe, .* parity curve --train head --candidate jax:probe"):
            RecordedRun.of(finished[0], dataset=dataset)


def test_every_row_is_its_own_image_in_each_epoch(stored):
    source, file = open_features(f"features:{stored / 'features'}", "train")
    expected = Features.load(stored / "features" / "train.npz")
    batches = [batch for _, batch in Loader(source, FeatureViews(file.channels), 8, seed=1).train(0, 6)]
    batches += [batch for _, batch in Loader(source, FeatureViews(file.channels), 5).evaluation()]
    for batch in batches:
        shown = batch["mask"]
        np.testing.assert_array_equal(batch["features"][shown], expected.features[batch["index"][shown]])
        np.testing.assert_array_equal(batch["label"][shown], expected.labels[batch["index"][shown]])


def test_the_gradient_is_that_of_training_the_head_on_the_images(x64, small_npz):
    """Both agree within 1e-12 in float64. The features of another row have another gradient."""
    model, params = weights.load(small_npz, dtype=jnp.float64)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, SIDE, SIDE, 3)))
    targets = jax.nn.one_hot(jnp.arange(4), 10, dtype=jnp.float64)
    head = {"head": params["head"]}
    quickly = {"xla_backend_optimization_level": 0}

    @jax.jit(compiler_options=quickly)
    def of_images(params):
        added = Additions(train="head")
        gradients = steps.loss_and_gradients(model, params, images, targets, additions=added)
        return gradients, rows.pooled(model, params, images)

    (loss, expected), pooled = of_images(params)
    found_loss, found = steps.loss_and_gradients(model, head, pooled, targets)
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-13)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12), found, expected)
    _, shifted = steps.loss_and_gradients(model, head, jnp.roll(pooled, 1, axis=0), targets)
    apart = np.abs(shifted["head"]["conv2d"]["kernel"] - expected["head"]["conv2d"]["kernel"]).max()
    assert apart > 1e-3


def changed(stored: Path, to: Path, split: str, **fields) -> Path:
    """Copies the features with one split's file changed."""
    for name in ("train", "test"):
        file = Features.load(stored / "features" / f"{name}.npz")
        if name == split:
            metadata = file.metadata | fields.pop("metadata", {})
            file = dataclasses.replace(file, metadata=metadata, **fields)
        file.save(to / f"{name}.npz")
    return to


@pytest.mark.parametrize(
    ("split", "fields", "said"),
    [
        ("train", {"metadata": {"sha256": "0" * 64}}, "were not computed alike (sha256 0000"),
        ("test", {"metadata": {"size": 24}}, "(size 16 and 24)"),
        ("train", {"labels": np.full(24, -1)}, "as 24 of 24 images, lies in no directory of a class"),
        ("test", {"features": np.full((9, 1024), np.nan)}, "features that are not finite"),
        ("test", {"class_names": ["ant", "bee", "dog"]}, "classes that features/train (features) has not: dog"),
    ],
)
def test_features_that_do_not_fit_are_refused(stored, small_npz, tmp_path, split, fields, said):
    place = changed(stored, tmp_path / "features", split, **fields)
    with pytest.raises(RequestError) as caught:
        runs.Run.of(flags(stored, small_npz, tmp_path / "run", dataset=f"features:{place}"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "optimizer", "said"),
    [
        ({}, {"mixup": 0.1}, "--mixup 0.1 mixes images"),
        ({"eval_split": "validation"}, {}, "validation.npz cannot be read (No such file or directory)"),
        ({"dataset": "features:"}, {}, "train.npz cannot be read"),
    ],
)
def test_requests_that_a_probe_cannot_mean(stored, small_npz, tmp_path, data, optimizer, said):
    with pytest.raises(RequestError) as caught:
        runs.Run.of(flags(stored, small_npz, tmp_path / "run", optimizer=optimizer, **data))
    assert said in str(caught.value)


@pytest.mark.parametrize("model", ["R14x0.5", "embedded"])
def test_a_random_body_has_other_features(stored, small_npz, tmp_path, model):
    asked = flags(stored, small_npz, tmp_path / "run")
    asked = dataclasses.replace(asked, model=config.ModelConfig(model, "random"))
    with pytest.raises(RequestError, match="--init random draws another body"):
        runs.Run.of(asked)


def test_other_weights_have_other_features(stored, small_npz, tmp_path):
    _, arrays = weights.read(small_npz)
    other = tmp_path / "other.npz"
    np.savez(other, **{key: 2 * array for key, array in arrays})
    with pytest.raises(RequestError, match=r"small.npz \(R14x0.5\), sha256 .* --model is .*other.npz"):
        runs.Run.of(flags(stored, other, tmp_path / "run"))


def test_only_training_takes_features(stored):
    with pytest.raises(RequestError, match="holds features and no images"):
        open_source(f"features:{stored / 'features'}", "test")
    with pytest.raises(RequestError, match="add it"), working_folder() as folder:
        Ladder(Options(candidate="jax:probe"), folder)
    assert HeadAlone(SMALL.units, SMALL.width, 10).layout.keys() == {HEAD_KERNEL, HEAD_BIAS}


@pytest.mark.parametrize(
    "command",
    [
        ["throughput", "--arms", "torch", "jax:probe"],
        ["convolutions", "--jax", "jax:probe"],
        ["determinism", "--side", "jax:probe"],
        ["step", "--workdir", "RUN", "--first", "--candidate", "jax:probe"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_choose_no_part_to_train_refuse_a_probe(finished, command):
    """At once, in a sentence: its head would be given images, or nothing would be different."""
    done = parity(*(finished[0] if word == "RUN" else word for word in command))
    assert done.returncode == 2
    assert "side 'jax:probe' trains a head on features, which only comparisons" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def compared(tmp_path_factory, compiled_once, hardly_optimized):
    options = options_for(faults.FAULTS[PROBE[0]])
    with Ladder(options, tmp_path_factory.mktemp("ladder"), Console(quiet=True)) as ladder:
        yield ladder


@pytest.mark.slow
def test_pytorch_trains_the_same_head_on_the_images(compared):
    assert climb(compared, ["gradients", "optimizer", "curve"]) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBE)
def test_wrong_features_are_found(compared, name):
    failed, found = inject(compared, faults.FAULTS[name])
    assert found, failed and first_bug(failed)
