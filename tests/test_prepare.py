"""ImageNet from its two archives, with tfds's own builder: refused where labels or images would be wrong, never half
there, and read again whole."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import archives
import numpy as np
import own_dataset
import pytest

from input_pipeline import DatasetError, Loader, Views, few_shot, imagenet, limits, open_source
from input_pipeline import __main__ as command_line
from input_pipeline.check import check
from input_pipeline.claims import CLAIM, claimed
from input_pipeline.examples import ArraySource
from input_pipeline.exits import exit_code

ROOT = Path(__file__).parent.parent
VERSION = Path("imagenet2012") / "5.1.0"
# TensorFlow and tfds warn of each other's doings
pytestmark = pytest.mark.filterwarnings("ignore")


def nothing(done: int) -> None:
    pass


def run(*arguments) -> tuple[int, str, str]:
    """Runs the command line in this process and returns (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["input_pipeline", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = exit_code(command_line.main)
    return code, out.getvalue(), err.getvalue()


def test_a_killed_attempt_leaves_nothing_that_looks_whole_and_the_next_starts_clean(killed_and_prepared):
    data_dir, left, said, log = killed_and_prepared
    assert left
    assert "not prepared" in said
    assert f"prepare imagenet2012 --data-dir {data_dir}" in said
    assert "which an interrupted attempt left" in log
    assert [path.name for path in (data_dir / "imagenet2012").iterdir()] == ["5.1.0"]


def test_every_image_and_label_is_there(prepared):
    train, validation = (open_source("imagenet2012", split, prepared) for split in ("train", "validation"))
    expected = {name: content for _, inner in archives.train_members() for name, content in _members(inner)}
    assert {train[index]["id"]: train[index]["image"] for index in range(len(train))} == expected
    for index in range(len(train)):
        synset = train[index]["id"].split("_")[0]
        assert train.class_names[train[index]["label"]] == synset
    np.testing.assert_array_equal(np.bincount(train.labels, minlength=1000)[[0, 1, 999]], [3, 5, 4])
    import tensorflow_datasets as tfds

    official = (tfds.core.tfds_path() / "datasets/imagenet2012/validation_labels.txt").read_text().split()
    for index in range(len(validation)):
        example = validation[index]
        assert validation.class_names[example["label"]] == official[int(example["id"][15:23]) - 1]
    assert len(validation) == archives.VALIDATION


def _members(data: bytes):
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]


def test_reading_needs_no_tensorflow(prepared):
    look = (
        "import sys, input_pipeline as i; s = i.open_source('imagenet2012', 'train', sys.argv[1]); "
        "next(i.Loader(s, i.Views(40, 32, True), 4).train(0, 1)); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", look, prepared], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_hosts_that_are_real_processes_read_the_batches_of_one(prepared, tmp_path):
    """One host and two, started from step 2 on: rows, labels and augmented pixels of the global batches."""
    read = (
        "import sys, numpy as np, input_pipeline as i; host, hosts = map(int, sys.argv[2:4]); "
        "s = i.open_source('imagenet2012', 'train', sys.argv[1]); "
        "l = i.Loader(s, i.Views(40, 32, True), 8, seed=3, host=host, hosts=hosts); "
        "batches = [b for _, b in l.train(2, 6)]; "
        "np.savez(sys.argv[4], **{k: np.stack([b[k] for b in batches]) for k in batches[0]})"
    )
    shares = [(host, hosts, tmp_path / f"{host} of {hosts}.npz") for hosts in (1, 2) for host in range(hosts)]
    processes = [
        subprocess.Popen([sys.executable, "-c", read, prepared, str(host), str(hosts), path], cwd=ROOT)
        for host, hosts, path in shares
    ]
    assert [process.wait() for process in processes] == [0] * 3
    of = {(host, hosts): np.load(path) for host, hosts, path in shares}
    for name, rows in of[0, 1].items():
        np.testing.assert_array_equal(np.concatenate([of[host, 2][name] for host in range(2)], axis=1), rows)


def test_what_was_verified_is_written_beside_it(prepared):
    record = json.loads((prepared / VERSION / "prepared.json").read_text())
    assert record["subset"] is True
    assert record["images"] == {"train": 12, "validation": 5}
    assert record["archives"][imagenet.TRAIN.name] == {"bytes": mock.ANY, "md5": None}


def test_an_image_that_went_missing_on_the_way_is_noticed_and_nothing_kept(manual_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "train_images", lambda *_, **__: 13)
    flags = ["--manual-dir", manual_dir, "--data-dir", tmp_path, "--subset"]
    code, _, err = run("prepare", "imagenet2012", *flags)
    assert code == 2
    assert "tfds wrote 12 train examples of 13; nothing was kept" in err
    assert not list(tmp_path.rglob("*.array_record*"))


def test_what_others_made_is_left_and_named(manual_dir, tmp_path, monkeypatch):
    """Whatever looks like unfinished work may be somebody's: tfds's own commands leave such directories too."""
    monkeypatch.setattr(imagenet, "train_images", lambda *_, **__: 13)  # so that the attempt fails in the end
    theirs = tmp_path / "imagenet2012" / "incomplete.ABC123_5.1.0"
    unmarked = tmp_path / ".imagenet2012.unfinished"
    for directory in (theirs, unmarked):
        directory.mkdir(parents=True)
        (directory / "file").write_text("")
    flags = ["--manual-dir", manual_dir, "--data-dir", tmp_path, "--subset"]
    code, _, err = run("prepare", "imagenet2012", *flags)
    assert (code, "did not make it; move it elsewhere" in err) == (2, True)
    assert (unmarked / "file").exists()
    (unmarked / "file").unlink()
    code, _, err = run("prepare", "imagenet2012", *flags)
    assert (code, "nothing was kept" in err) == (2, True)
    assert f"{theirs} is left as it is" in err
    assert (theirs / "file").exists()
    assert not unmarked.exists()
    (tmp_path / VERSION).mkdir()
    code, _, err = run("prepare", "imagenet2012", *flags)
    assert (code, "holds no dataset that tfds knows; move it elsewhere" in err) == (2, True)
    assert (tmp_path / VERSION).exists()


def test_prepared_already(prepared):
    code, _, err = run("prepare", "imagenet2012", "--data-dir", prepared)
    assert code == 0
    assert "prepared already" in err


def test_splits_slices_and_few_shots(prepared):
    assert len(open_source("imagenet2012:5.1.0", "train[:4]", prepared)) == 4
    assert len(open_source("imagenet2012", "train[:50%]+validation", prepared)) == 11
    for split in ("test", "train[:"):
        with pytest.raises(DatasetError, match="train, validation"):
            open_source("imagenet2012", split, prepared)
    with pytest.raises(DatasetError, match=r"has \d examples of class"):
        few_shot(open_source("imagenet2012", "train", prepared), 4, seed=0)
    with pytest.raises(DatasetError, match=r"only: 5\.1\.0"):
        open_source("imagenet2012:4.9.9", "train", prepared)


TRAIN, VALIDATION = archives.train_members(), archives.validation_members()


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        (b"no archive at all", None, "truncated or no tar archive"),
        (archives.tar(TRAIN)[:30000], None, "truncated or no tar archive|is damaged"),
        (archives.tar([("n00000001.tar", TRAIN[0][1])]), None, "'n00000001.tar', which is not one of the 1,000"),
        (archives.tar([(f"./{TRAIN[0][0]}", TRAIN[0][1])]), None, r"without \./ before the names"),
        (archives.tar([("train", None), *TRAIN]), None, "'train', which is not one"),
        (archives.tar([*TRAIN, TRAIN[1]]), None, "n01443537.tar twice"),
        (archives.tar([(TRAIN[0][0], TRAIN[1][1])]), None, "not n01440764_NUMBER.JPEG"),
        (archives.tar([(TRAIN[0][0], b"x" * 600)]), None, "n01440764.tar in it is damaged"),
        (archives.tar([(TRAIN[0][0], archives.tar([]))]), None, "holds no image"),
        (archives.tar([]), None, "lacks 1,000 of 1,000 classes"),
        (None, archives.tar(VALIDATION[1:]), "val_00000001.JPEG is missing"),
        (None, archives.tar(VALIDATION[:2] + VALIDATION[3:]), "val_00000003.JPEG is missing"),
        (None, archives.tar([*VALIDATION, VALIDATION[2]]), "val_00000003.JPEG is there twice"),
        (None, archives.tar([("val", None), *VALIDATION]), "'val'; it may hold only"),
        (None, archives.tar([("notes.txt", b"hello"), *VALIDATION]), "'notes.txt'; it may hold only"),
        (None, archives.tar([]), "holds 0 images"),
    ],
)
def test_archives_that_would_give_wrong_labels_are_refused(tmp_path, train, validation, said):
    archives.write(tmp_path, train, validation)
    flags = ["--manual-dir", tmp_path, "--data-dir", tmp_path / "data", "--subset"]
    code, _, err = run("prepare", "imagenet2012", *flags)
    assert code == 2
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(err.splitlines()[-1])
    assert not (tmp_path / "data" / "imagenet2012").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--manual-dir", "nowhere", "--subset"], "nowhere/ILSVRC2012_img_train.tar is missing"),
        (["--manual-dir", "{archives}"], "bytes, not 147,897,477,120; fetch it again, or say --subset"),
        ([], "name their directory with --manual-dir"),
    ],
)
def test_wrong_requests(manual_dir, tmp_path, flags, said):
    flags = [flag.replace("{archives}", str(manual_dir)) for flag in flags]
    code, _, err = run("prepare", "imagenet2012", "--data-dir", tmp_path, *flags)
    assert code == 2
    assert said in err.splitlines()[-1]


def test_without_tensorflow_it_says_what_to_install_before_anything_is_read(manual_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = ["--manual-dir", manual_dir, "--data-dir", tmp_path, "--subset"]
    code, _, err = run("prepare", "imagenet2012", *flags)
    assert code == 2
    assert err.splitlines() == [mock.ANY]
    assert "needs TensorFlow" in err


def test_a_validation_archive_that_is_missing(manual_dir, tmp_path):
    shutil.copy(manual_dir / imagenet.TRAIN.name, tmp_path)
    with pytest.raises(DatasetError, match=r"img_val\.tar is missing"):
        imagenet.find(tmp_path, imagenet.VALIDATION, subset=True)


def test_the_whole_archives_are_held_to_size_number_and_md5(tmp_path, monkeypatch):
    """All 1,000 classes, with archives of a known size instead of ImageNet's own."""
    import tensorflow_datasets as tfds

    synsets = (tfds.core.tfds_path() / "datasets/imagenet2012/labels.txt").read_text().split()
    image = archives.jpeg(0)
    members = [(f"{synset}.tar", archives.tar([(f"{synset}_1.JPEG", image)])) for synset in synsets]
    whole = archives.tar(members)
    path = archives.write(tmp_path, train=whole) / imagenet.TRAIN.name
    digest = hashlib.md5(whole).hexdigest()
    archive = dataclasses.replace(imagenet.TRAIN, size=len(whole), images=1000, md5=digest)
    monkeypatch.setattr(imagenet, "TRAIN", archive)
    assert imagenet.find(tmp_path, archive, subset=False) == path
    assert imagenet.train_images(path, synsets, subset=False, advance=nothing) == 1000
    done = []
    imagenet.verify_md5(path, archive, done.append)
    assert done[-1] == len(whole)
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(DatasetError, match=f"has MD5 .*, not {digest}"):
        imagenet.verify_md5(path, archive, nothing)
    path.write_bytes(archives.tar(members[:-1]))
    with pytest.raises(DatasetError, match="lacks 1 of 1,000 classes, n15075141"):
        imagenet.train_images(path, synsets, subset=False, advance=nothing)
    two = archives.tar([("n01440764_1.JPEG", image), ("n01440764_2.JPEG", image)])
    path.write_bytes(archives.tar([("n01440764.tar", two), *members[1:]]))
    with pytest.raises(DatasetError, match="holds 1,001 images, not 1,000"):
        imagenet.train_images(path, synsets, subset=False, advance=nothing)


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path, monkeypatch):
    imagenet.check_room(tmp_path / "not" / "there" / "yet", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=10 * 2**30))
    with pytest.raises(DatasetError, match=r"has 10\.0 GiB free, but 10\.5 GiB are needed"):
        imagenet.check_room(tmp_path, 10 * 2**30)


def test_two_at_once(prepared, tmp_path):
    with claimed(tmp_path / f".imagenet2012{CLAIM}", "it", "wait"):
        code, _, err = run("prepare", "imagenet2012", "--data-dir", tmp_path)
    assert code == 2
    assert f"imagenet2012 in {tmp_path} is in use by process {os.getpid()}" in err
    assert "choose another --data-dir" in err


@pytest.fixture(scope="module")
def tfrecord(tmp_path_factory):
    """ImageNet as tfds prepares it unless told otherwise, with an image in it that is none."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfrecord")
    members = [*archives.train_members(), ("n01484850.tar", archives.tar([("n01484850_7.JPEG", b"not an image")]))]
    archives.write(folder, archives.tar(members))
    settings = tfds.download.DownloadConfig(manual_dir=str(folder))
    tfds.builder("imagenet2012", data_dir=folder).download_and_prepare(
        download_dir=str(folder / "downloads"), download_config=settings
    )
    return folder


def test_a_tfrecord_dataset_is_offered_conversion_and_converted(tfrecord, manual_dir):
    offer = f"convert imagenet2012 --data-dir {tfrecord} converts it"
    with pytest.raises(DatasetError, match=offer):
        open_source("imagenet2012", "train", tfrecord)
    code, _, err = run("prepare", "imagenet2012", "--data-dir", tfrecord, "--manual-dir", manual_dir, "--subset")
    assert (code, offer in err) == (2, True)
    code, out, _ = run("convert", "imagenet2012", "--data-dir", tfrecord)
    assert code == 1  # it was converted, checked, and an image in it is damaged
    assert "damaged: n01484850_7.JPEG: not a readable image" in out
    assert len(open_source("imagenet2012", "train", tfrecord)) == 13
    assert run("convert", "imagenet2012", "--data-dir", tfrecord)[0] == 1


def test_nothing_to_convert(tmp_path):
    code, _, err = run("convert", "imagenet2012", "--data-dir", tmp_path)
    assert (code, "holds no dataset to convert" in err) == (2, True)


def test_check_lists_what_is_damaged_or_labelled_out_of_range(tmp_path):
    for name, content in (("a/1.jpg", archives.jpeg(1)), ("b/1.jpg", archives.jpeg(2)), ("b/2.jpg", b"damaged")):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(content)
    code, out, _ = run("check", f"folder:{tmp_path}")
    assert code == 1
    assert "damaged: b/2.jpg: not a readable image" in out
    images = np.zeros((3, 4, 4), np.uint8)
    checked = check(ArraySource("array", images, np.array([0, 7, 1]), ["a", "b"]))
    assert (checked.faults, checked.wrong) == (["label 7 of example 1 is not one of 2 classes"], 1)
    assert not checked.holds
    (tmp_path / "train" / "b" / "2.jpg").write_bytes(archives.jpeg(3))
    assert run("check", f"folder:{tmp_path}", "--splits", "train[:2]")[0] == 0


def test_check_names_a_limit_on_open_files_that_is_too_low(tmp_path, monkeypatch):
    own_dataset.write(tmp_path, "1.0.0", examples=4, shards=4)
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 135)
    code, _, err = run("check", "own_pets", "--data-dir", tmp_path)
    assert code == 2
    assert err == (
        "error: reading own_pets holds 8 files open and other parts of the program up to 128, but this process may "
        "open 135; raise its hard limit, as by ulimit -n 136 in a shell that may, or prepare the dataset in fewer "
        "shards\n"
    )
    assert run("check", "own_pets", "--data-dir", tmp_path, "--splits", "test")[0] == 0


def test_names_are_printed_as_escapes(tmp_path):
    """An ESC in a class's name does not recolour the terminal, and a byte that is no UTF-8 does not end the program."""
    folder = tmp_path / "x[red]y" / "train-small"
    for name, content in ((b"caf\xe9", archives.jpeg(1)), (b"\x1b[31mred", b"damaged")):
        (folder / os.fsdecode(name)).mkdir(parents=True)
        (folder / os.fsdecode(name) / "1.jpg").write_bytes(content)
    code, out, err = run("check", f"folder:{tmp_path / 'x[red]y'}")
    assert code == 1
    assert "x[red]y/train-small: damaged: \\x1b[31mred/1.jpg: not a readable image" in out
    assert "\x1b" not in out + err
    (folder / os.fsdecode(b"caf\xe9") / "1.jpg").unlink()
    code, _, err = run("check", f"folder:{tmp_path / 'x[red]y'}")
    assert (code, "train-small/caf\\xe9 has no images" in err) == (2, True)


def test_a_truncated_shard_and_a_directory_that_is_gone(prepared, tmp_path):
    shutil.copytree(prepared / "imagenet2012", tmp_path / "imagenet2012")
    (shard,) = (tmp_path / VERSION).glob("*train*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DatasetError, match="cannot be read"):
        read_all(tmp_path)
    assert run("check", "imagenet2012", "--data-dir", tmp_path)[0] == 1
    shard.unlink()
    with pytest.raises(DatasetError, match=r"cannot be read .*; is the dataset's directory still there"):
        read_all(tmp_path)
    shutil.rmtree(tmp_path / "imagenet2012")
    with pytest.raises(DatasetError, match="not prepared"):
        read_all(tmp_path)


def read_all(data_dir):
    loader = Loader(open_source("imagenet2012", "train", data_dir), Views(40, 32, flip=True), 4)
    return list(loader.train(0, 6))


def test_any_image_classification_dataset_of_tfds():
    """The datasets are tfds's own mock data: random examples in the real builders' features."""
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=6):
        for name, classes in (("cifar10:3.0.2", 10), ("imagenet2012", 1000), ("oxford_flowers102", 102)):
            source = open_source(name, "train")
            assert (len(source), len(source.class_names)) == (6, classes)
            batch = next(Loader(source, Views(24, 20, flip=True), 4).train(0, 1))[1]
            assert batch["image"].shape == (4, 20, 20, 3)
    for name in ("coco", "glue"):
        with pytest.raises(DatasetError, match="not an image classification dataset"):
            open_source(name, "train")
