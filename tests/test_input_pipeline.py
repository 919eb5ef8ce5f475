"""Sources and loader: what is read, in which order, and that position alone decides it."""

import contextlib
import errno
import gzip
import io
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import own_dataset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import (
    CannotRead,
    DamagedImage,
    DatasetError,
    Loader,
    Views,
    descriptors,
    few_shot,
    image_file,
    limits,
    open_source,
    read_image_file,
    relabelled,
    require_labels,
    sources,
    typical_area,
)
from input_pipeline.check import SHOWN, check
from input_pipeline.errors import RequestError
from input_pipeline.examples import ArraySource, Relabelled, Subset
from input_pipeline.loader import READ_AHEAD
from input_pipeline.preprocess import decode
from input_pipeline.sources import split_names
from input_pipeline.tfds_source import TfdsSource

VIEWS = Views(resize_to=12, crop=8, flip=True)


def numbered(count: int, classes: int = 3) -> ArraySource:
    """A source whose images tell their index."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 10, 10), np.uint8)
    return ArraySource("numbered", images, np.arange(count) % classes, [str(label) for label in range(classes)])


def rows_of(batches) -> dict[str, np.ndarray]:
    batches = [batch for _, batch in batches]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def by_hosts(source, global_batch, hosts, read, **settings) -> dict[str, np.ndarray]:
    """What all hosts read together, in global order."""
    loaders = [Loader(source, VIEWS, global_batch, 5, host=host, hosts=hosts, **settings) for host in range(hosts)]
    shares = [[batch for _, batch in read(loader)] for loader in loaders]
    assert len({len(share) for share in shares}) == 1
    return rows_of((0, batch) for step in zip(*shares, strict=True) for batch in step)


def test_digits():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train[0]["image"].shape == (8, 8)
    assert train[0]["image"].max() == 255 * 15 // 16
    assert set(train.labels) == set(range(10)) == {int(name) for name in train.class_names}


def test_digits_are_scikit_learns_whether_its_file_is_found_or_not(monkeypatch):
    from sklearn.datasets import load_digits  # two seconds, which processes that only collect this test do not need

    expected: Any = load_digits()
    found = sources._all_digits()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for levels, labels in (found, sources._all_digits()):
        np.testing.assert_array_equal(levels, expected.images, strict=True)
        np.testing.assert_array_equal(labels, expected.target, strict=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path, compressed):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6), np.uint8)
    labels = np.array([0, 2, 1, 2, 0], np.uint8)
    write_idx(tmp_path, images, labels, compressed)
    source = open_source(f"idx:{tmp_path}", "test")
    assert len(source) == 5
    assert list(source.class_names) == ["0", "1", "2"]
    np.testing.assert_array_equal(source[3]["image"], images[3])
    assert source[3]["label"] == 2
    with pytest.raises(DatasetError, match="train-images"):
        open_source(f"idx:{tmp_path}", "train")


def write_idx(directory, images, labels, compressed=False, split="t10k"):
    for stem, magic, content in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
        data = np.array([magic, *content.shape], ">i4").tobytes() + content.tobytes()
        name = f"{split}-{stem}-ubyte" + (".gz" if compressed else "")
        (directory / name).write_bytes(gzip.compress(data) if compressed else data)


def test_broken_idx(tmp_path):
    images, labels = np.zeros((5, 4, 6), np.uint8), np.zeros(5, np.uint8)
    write_idx(tmp_path, images, labels[:4])
    with pytest.raises(DatasetError, match="5 test images but 4 labels"):
        open_source(f"idx:{tmp_path}", "test")
    write_idx(tmp_path, images, labels)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="truncated"):
        open_source(f"idx:{tmp_path}", "test")
    path.write_bytes(b"something else")
    with pytest.raises(DatasetError, match="not an idx file"):
        open_source(f"idx:{tmp_path}", "test")
    write_idx(tmp_path, images[:0], labels[:0])
    with pytest.raises(DatasetError, match="no examples"):
        open_source(f"idx:{tmp_path}", "test")


def idx_bytes(*header, content=b""):
    return np.array(header, ">i4").tobytes() + content


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (idx_bytes(2051, -5, 4, 6, content=bytes(120)), r"its header names the shape \(-5, 4, 6\)"),
        (idx_bytes(2051, -5, -4, 6, content=bytes(120)), r"its header names the shape \(-5, -4, 6\)"),
        (idx_bytes(2051, 5, 0, 6), r"its header names the shape \(5, 0, 6\)"),
        (idx_bytes(2051, 1 << 30, 1 << 30, 16, content=bytes(120)), r"is truncated: (136|35) bytes for shape"),
        (idx_bytes(2051, 5, 4, 6, content=bytes(121)), "has more bytes than the 120 of shape"),
        (idx_bytes(2051, 5, 4), "not an idx file of 3 dimensions"),
        (None, "has neither t10k-images-idx3-ubyte nor"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_that_claim_what_is_not_there(tmp_path, images, said, compressed):
    write_idx(tmp_path, np.zeros((5, 4, 6), np.uint8), np.zeros(5, np.uint8), compressed)
    path = tmp_path / f"t10k-images-idx3-ubyte{'.gz' * compressed}"
    if images is None:
        path.unlink()
    else:
        path.write_bytes(gzip.compress(images) if compressed else images)
    with pytest.raises(DatasetError, match=said) as refused:
        open_source(f"idx:{tmp_path}", "test")
    assert "\n" not in str(refused.value)


def test_an_idx_file_whose_gz_is_damaged_anywhere(tmp_path):
    rng = np.random.default_rng(0)
    write_idx(tmp_path, rng.integers(0, 256, (5, 4, 6), np.uint8), np.zeros(5, np.uint8), compressed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    opened = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with contextlib.suppress(DatasetError):
            open_source(f"idx:{tmp_path}", "test")
            opened += 1
    assert opened <= 10  # a .gz has a few bytes, such as its date, that mean nothing here
    path.write_bytes(whole[:-9])
    with pytest.raises(DatasetError, match="is damaged"):
        open_source(f"idx:{tmp_path}", "test")


@pytest.mark.parametrize(
    ("dataset", "said"), [("digitz", "near it: digits"), ("cifar1", "cifar10"), ("cifar10", "not prepared")]
)
def test_unknown_and_unprepared_datasets(tmp_path, dataset, said):
    with pytest.raises(DatasetError, match=said):
        open_source(dataset, "train", tmp_path)


def test_unknown_split():
    with pytest.raises(DatasetError, match="train and test"):
        open_source("digits", "validation")


def test_few_shot_is_the_same_for_the_same_seed_and_balanced():
    source = open_source("digits", "train")
    shots = few_shot(source, 5, seed=1)
    assert len(shots) == 50
    np.testing.assert_array_equal(np.bincount(shots.labels), [5] * 10)
    assert [shots[i]["id"] for i in range(50)] == [few_shot(source, 5, seed=1)[i]["id"] for i in range(50)]
    assert {shots[i]["id"] for i in range(50)} != {few_shot(source, 5, seed=2)[i]["id"] for i in range(50)}
    assert all(shots[i]["label"] == shots.labels[i] for i in range(50))


def test_few_shot_of_other_numbers_of_the_same_classes():
    source = relabelled(numbered(12), ["2", "0", "1"], "the head")
    shots = few_shot(source, 2, seed=0)
    np.testing.assert_array_equal(np.bincount(shots.labels), [2, 2, 2])
    assert [shots[i]["label"] for i in range(6)] == shots.labels.tolist()
    assert {int(shots[i]["id"]) % 3 for i in range(6) if shots[i]["label"] == 0} == {2}
    with pytest.raises(DatasetError, match="no example of class 3; choose another split"):
        few_shot(relabelled(numbered(12), ["0", "1", "2", "3"], "the head"), 2, seed=0)


def test_a_label_out_of_range_stays_an_error_under_other_numbers():
    source = numbered(8)
    source.labels[5] = 7
    renumbered = relabelled(source, ["2", "0", "1"], "the head")
    with pytest.raises(DatasetError, match="example 5 of numbered has label 7, but there are 3 classes"):
        renumbered[5]
    source.labels[5] = -1
    assert renumbered[5]["label"] == -1


def test_a_split_without_labels_is_known_before_it_is_used():
    source = numbered(8)
    require_labels(source)
    source.labels[:] = -1
    with pytest.raises(DatasetError, match="has no label: splits such as a challenge's test set"):
        require_labels(source)
    checked = check(source)
    assert (checked.holds, checked.classes) == (True, 0)
    source.labels[3] = 1
    assert check(source).faults == ["7 examples have no label, and others have"]


def test_few_shot_with_too_few_examples():
    with pytest.raises(DatasetError, match="at most 1"):
        few_shot(numbered(5, classes=3), 2, seed=0)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), share=st.integers(1, 6), hosts=st.integers(1, 5))
def test_evaluation_covers_every_example_once_on_any_number_of_hosts(count, share, hosts):
    rows = by_hosts(numbered(count), share * hosts, hosts, lambda loader: loader.evaluation())
    np.testing.assert_array_equal(rows["index"][rows["mask"]], np.arange(count))
    assert (rows["index"][~rows["mask"]] == -1).all()
    assert (~rows["mask"]).sum() < share * hosts


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), share=st.integers(1, 3), start=st.integers(0, 6), hosts=st.sampled_from([1, 2, 4]))
def test_training_continues_from_a_step_number_bit_for_bit_on_any_number_of_hosts(count, share, start, hosts):
    source, batch = numbered(count), share * 4
    whole = by_hosts(source, batch, 1, lambda loader: loader.train(0, start + 3))
    rest = by_hosts(source, batch, hosts, lambda loader: loader.train(start, start + 3))
    for name, rows in rest.items():
        np.testing.assert_array_equal(rows, whole[name][start * batch :])


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_reads_the_same_global_batches(hosts):
    source = numbered(21)
    alone = by_hosts(source, 8, 1, lambda loader: loader.train(3, 7))
    together = by_hosts(source, 8, hosts, lambda loader: loader.train(3, 7))
    for name, rows in alone.items():
        np.testing.assert_array_equal(rows, together[name])


def test_each_epoch_is_another_permutation():
    rows = rows_of(Loader(numbered(12), VIEWS, 4, seed=0).train(0, 9))
    epochs = rows["index"].reshape(3, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_augmentation_differs_between_epochs_and_flips_half():
    source = numbered(200)
    loader = Loader(source, Views(resize_to=10, crop=10, flip=True), 100, seed=0)
    rows = rows_of(loader.train(0, 4))
    flipped = []
    for image, index in zip(rows["image"], rows["index"], strict=True):
        original = decode(source[index]["image"])
        assert np.array_equal(image, original) or np.array_equal(image, original[:, ::-1])
        flipped.append(not np.array_equal(image, original))
    assert 0.4 < np.mean(flipped) < 0.6  # 400 fair coins: six standard deviations are 0.15
    first, second = (
        dict(zip(rows["index"][part], flipped[part], strict=True)) for part in (slice(200), slice(200, 400))
    )
    assert first != second


class Damaged(ArraySource):
    """Some of its images are not."""

    damaged: frozenset[int] = frozenset()

    def __getitem__(self, index):
        return super().__getitem__(index) | ({"image": b"damaged"} if index in self.damaged else {})


def damaged(count, *which):
    source = numbered(count)
    source.__class__ = Damaged
    source.damaged = frozenset(which)
    return source


def test_a_damaged_image_is_named():
    for read in (lambda loader: loader.train(0, 2), lambda loader: loader.evaluation()):
        with pytest.raises(DamagedImage, match="example 3 of numbered is not a readable image"):
            rows_of(read(Loader(damaged(8, 3), VIEWS, 4)))


def test_a_damaged_image_is_replaced_by_the_next_the_same_on_any_number_of_hosts(caplog):
    def read(source, hosts, start=0):
        return by_hosts(source, 8, hosts, lambda loader: loader.train(start, 6), skip_damaged=True)

    whole, source = read(numbered(16), 1), damaged(16, 3, 4, 15)
    rows = read(source, 1)
    replaced = rows["index"] < -1
    np.testing.assert_array_equal(np.where(replaced, -2 - rows["index"], rows["index"]), whole["index"])
    np.testing.assert_array_equal(replaced, np.isin(whole["index"], [3, 4, 15]))
    stand_in = {3: 5, 4: 5, 15: 0}
    expected = [stand_in.get(index, index) % 3 for index in whole["index"]]
    np.testing.assert_array_equal(rows["label"], expected)
    np.testing.assert_array_equal(rows["image"][~replaced], whole["image"][~replaced])
    assert caplog.text.count("example 15 of numbered is not a readable image") == 1  # in three epochs
    for hosts, start in ((2, 0), (4, 3)):
        for name, part in read(source, hosts, start).items():
            np.testing.assert_array_equal(part, rows[name][8 * start :])


def test_too_many_damaged_images_in_a_row_are_a_damaged_dataset():
    with pytest.raises(DatasetError, match=r"10 examples of numbered from number \d+ on are damaged"):
        rows_of(Loader(damaged(16, *range(2, 14)), VIEWS, 8, skip_damaged=True).train(0, 2))


def sized(*sides, damaged=()):
    """A source of square images as PNG files."""
    source = ArraySource("sized", np.zeros(len(sides)), np.zeros(len(sides)), ["only"])

    class Sized(ArraySource):
        def __getitem__(self, index):
            file = io.BytesIO()
            Image.new("L", (sides[index], sides[index])).save(file, "PNG")
            return super().__getitem__(index) | {"image": b"" if index in damaged else file.getvalue()}

    source.__class__ = Sized
    return source


def test_the_typical_size_is_not_the_first_images():
    area, sentence = typical_area(sized(9, *[200] * 15), skip_damaged=False)
    assert area == 200 * 200
    assert sentence == (
        "of 16 images spread over sized, the smallest has 81 pixels, the largest 40,000, the median 40,000"
    )
    assert typical_area(sized(*[10] * 50, *[20] * 60), skip_damaged=False)[0] == 20 * 20  # the whole is looked at
    assert typical_area(numbered(3), skip_damaged=False)[0] == 100


def test_the_typical_size_is_read_as_training_reads():
    source = sized(9, 20, 20, 20, damaged=[0])
    with pytest.raises(DamagedImage, match=r"example 0 of sized is not a readable image .*--skip-damaged shows"):
        typical_area(source, skip_damaged=False)
    assert typical_area(source, skip_damaged=True)[0] == 400
    with pytest.raises(DatasetError, match="10 examples of sized from number 0 on are damaged"):
        typical_area(sized(9, 9, damaged=[0, 1]), skip_damaged=True)


def test_evaluation_never_replaces_an_image():
    with pytest.raises(DamagedImage, match="example 3"):
        rows_of(Loader(damaged(8, 3), VIEWS, 4, skip_damaged=True).evaluation())


@pytest.mark.parametrize(("label", "said"), [(-1, "no label: splits such as"), (3, "label 3, but there are 3 classes")])
def test_a_label_out_of_range_is_an_error(label, said):
    source = numbered(8)
    source.labels[5] = label
    for read in (lambda loader: loader.train(0, 2), lambda loader: loader.evaluation()):
        with pytest.raises(DatasetError, match=f"example 5 of numbered has {said}"):
            rows_of(read(Loader(source, VIEWS, 4)))


def test_threads_end_with_the_batches():
    before = set(threading.enumerate())
    batches = Loader(numbered(40), VIEWS, 8, threads=3).train(0, 1000)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    rows_of(Loader(numbered(40), VIEWS, 8, threads=3).evaluation())
    Loader(numbered(40), VIEWS, 8, threads=3).train(0, 1000)  # forgotten before the first batch
    deadline = time.monotonic() + 300
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_arrays_are_shown_by_two_threads_and_files_by_one_a_core(monkeypatch):
    """Threads that need not decode would mostly wait for Python's lock, which training's thread needs too."""
    pools = []

    def pool(threads, **settings):
        pools.append(threads)
        return ThreadPoolExecutor(threads, **settings)

    monkeypatch.setattr("input_pipeline.loader.ThreadPoolExecutor", pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5))
    arrays = numbered(40)
    files = ArraySource(arrays.name, arrays._images, arrays.labels, arrays.class_names)
    monkeypatch.setattr(files, "decoded", False, raising=False)
    for source in (arrays, files):
        for shown in (source, Subset(source, np.arange(20), "half"), Relabelled(source, ["a"], np.zeros(1, np.int32))):
            Loader(shown, VIEWS, 8).evaluation().close()
    Loader(arrays, VIEWS, 8, threads=3).evaluation().close()
    assert pools == [2, 2, 2, 5, 5, 5, 3]


FORGET_OFTEN = """
import gc, numpy
from input_pipeline import Loader, Views
from input_pipeline.examples import ArraySource
gc.set_threshold(20, 2, 2)
source = ArraySource("noise", numpy.zeros((40, 10, 10), numpy.uint8), numpy.zeros(40, int), ["only"])
for _ in range(100):
    loader = Loader(source, Views(12, 8, True), 8, threads=3)
    for _ in range(3):
        forgotten = [loader.train(0, 1000)]
        forgotten.append(forgotten)  # only the garbage collector ends it, in whichever thread it runs
    assert len(list(loader.evaluation())) == 5
"""


@pytest.mark.slow
def test_forgotten_batches_do_not_stop_others():
    subprocess.run([sys.executable, "-c", FORGET_OFTEN], check=True)


def test_batches_are_read_ahead_and_no_further():
    """Memory stays bounded however slow training is: what is read ahead is, and no more."""
    placed = []
    loader = Loader(numbered(40), VIEWS, 4, place=lambda batch: placed.append(1) or batch)
    batches = loader.train(0, 1000)
    time.sleep(0.5)
    assert 1 <= len(placed) <= READ_AHEAD + 1
    for _ in range(50):
        next(batches)
    time.sleep(0.5)
    assert 50 <= len(placed) <= 50 + READ_AHEAD + 1
    batches.close()


def test_50_000_examples_over_7_hosts():
    """The hosts' rows are counted without reading any image."""
    counted = np.zeros(50_000, int)
    for host in range(7):
        loader = Loader(Counted(50_000), Views(1, 1, flip=False), 7 * 64, host=host, hosts=7)
        for _, batch in loader.evaluation():
            np.add.at(counted, batch["index"][batch["mask"]], 1)
    assert (counted == 1).all()


class Counted:
    """Single pixels."""

    name, class_names = "counted", ("one",)

    def __init__(self, count):
        self.labels = np.zeros(count, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": np.zeros((1, 1, 3), np.uint8), "label": 0, "id": str(index)}


@pytest.fixture
def pets(tmp_path):
    """A folder of three classes, of 3, 2 and 1 images, made in an order that no sorting gives."""
    for name in ("train/dog/b.png", "train/Zebra/a.JPG", "train/cat/z.png", "train/dog/a.png", "test/cat/1.png"):
        write_image(tmp_path / name, seed=len(name))
    write_image(tmp_path / "train" / "dog" / "B.jpeg", seed=3)
    return tmp_path


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def test_a_folder_is_read_in_the_order_of_its_names(pets):
    source = open_source(f"folder:{pets}", "train")
    assert list(source.class_names) == ["Zebra", "cat", "dog"]
    assert [source[i]["id"] for i in range(5)] == ["Zebra/a.JPG", "cat/z.png", "dog/B.jpeg", "dog/a.png", "dog/b.png"]
    np.testing.assert_array_equal(source.labels, [0, 1, 2, 2, 2])
    assert [source[i]["label"] for i in range(5)] == source.labels.tolist()
    assert source[1]["image"] == (pets / "train" / "cat" / "z.png").read_bytes()
    assert source.name == f"{pets.name}/train"
    assert split_names(f"folder:{pets}") == ["test", "train"]
    assert len(open_source(f"folder:{pets}", "train[20%:]")) == 4


def test_the_same_folder_listed_in_another_order(pets, monkeypatch):
    expected = [open_source(f"folder:{pets}", "train")[i]["id"] for i in range(5)]
    scandir = os.scandir

    @contextlib.contextmanager
    def backwards(path):
        with scandir(path) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    assert [open_source(f"folder:{pets}", "train")[i]["id"] for i in range(5)] == expected


def test_folders_that_are_not_as_they_should_be(pets):
    def said(dataset, split="train"):
        with pytest.raises(DatasetError) as refused:
            open_source(dataset, split)
        return str(refused.value)

    assert "its directories are test, train" in said(f"folder:{pets}", "validation")
    assert "is not a directory" in said("folder:nowhere")
    assert "unknown dataset 'folder'" in said("folder")
    (pets / "train" / "empty").mkdir()
    assert "empty has no images; fill" in said(f"folder:{pets}")
    (pets / "train" / "empty" / ".hidden").write_text("")
    (pets / "train" / "empty" / "notes.txt").write_text("")
    assert "notes.txt is not an image file" in said(f"folder:{pets}")
    (pets / "test" / "stray.png").write_bytes(b"")
    assert "stray.png is not a class directory" in said(f"folder:{pets}", "test")
    (pets / "none").mkdir()
    assert "no class directories" in said(f"folder:{pets}", "none")


def test_a_folder_that_vanishes_is_an_error_and_no_damaged_image(pets):
    batches = Loader(open_source(f"folder:{pets}", "train"), VIEWS, 4, skip_damaged=True).train(0, 1000)
    next(batches)
    shutil.rmtree(pets)
    with pytest.raises(DatasetError, match=r"cannot be read \(No such file or directory\); is .* still there"):
        list(batches)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_the_system_refuses_to_read_is_no_damaged_image(pets, monkeypatch, number):
    source = open_source(f"folder:{pets}", "train")
    opening = os.open

    def refusing(path, *arguments, **settings):
        if str(path).endswith("z.png"):
            raise OSError(number, os.strerror(number), str(path))
        return opening(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", refusing)
    reads = (
        lambda: rows_of(Loader(source, VIEWS, 5, skip_damaged=True).train(0, 1)),
        lambda: typical_area(source, skip_damaged=True),
        lambda: check(source),
        lambda: read_image_file(pets / "train" / "cat" / "z.png"),
    )
    for read in reads:
        with pytest.raises(CannotRead, match=rf"z\.png cannot be read \({os.strerror(number)}\)") as refused:
            read()
        assert ("ulimit -n" in str(refused.value)) == (number == errno.EMFILE)
        assert ("still there" in str(refused.value)) == (number == errno.ESTALE)


def test_what_a_reader_in_another_language_was_refused_is_told_apart_too():
    """array_record's writes the system's error into its message."""

    class Records(list):
        def __getitem__(self, index):
            raise RuntimeError(super().__getitem__(index))

    reasons = ["Too many open files", "Permission denied"]
    records = Records([f"open() failed: {why}; opening /data/x-00005" for why in reasons])
    records.append("Corrupted Riegeli/records file: chunk data hash mismatch; at byte 65644")
    source = TfdsSource("own/train", records, ["only"], 3)
    for index, (kind, said) in enumerate(
        [
            (CannotRead, r"record 0 of own/train cannot be read \(Too many open files\); raise .* with ulimit -n"),
            (CannotRead, r"record 1 of own/train cannot be read \(Permission denied\); mend that"),
            (DatasetError, r"record 2 of own/train cannot be read \(Corrupted .*\); are the dataset's files whole"),
        ]
    ):
        with pytest.raises(kind, match=said) as refused:
            source[index]
        assert type(refused.value) is kind


@contextlib.contextmanager
def listening(path):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # a socket's path has to be short
        server.bind(path.name)
        yield


def test_only_regular_files_are_read(pets):
    folder = pets / "train" / "cat"
    os.mkfifo(folder / "fifo.jpg")
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    with listening(folder / "socket.jpg"):
        for name, kind in (("fifo.jpg", "a FIFO"), ("link.jpg", "a symbolic link to nothing"), ("socket.jpg", "a soc")):
            with pytest.raises(DatasetError, match=rf"{name} is {kind}.*, not an image file"):
                open_source(f"folder:{pets}", "train")
            if name != "link.jpg":
                with pytest.raises(DatasetError, match=rf"{name} is {kind}.*, and only regular files are read"):
                    read_image_file(folder / name)
            (folder / name).unlink()
    with pytest.raises(CannotRead, match="No such file"):
        read_image_file(folder / "link.jpg")
    for path, kind in (("/dev/zero", "a device"), (folder, "a directory")):
        with pytest.raises(DatasetError, match=rf"is {kind}, and only regular files"):
            read_image_file(path)
    (folder / "link.jpg").symlink_to(folder / "z.png")
    source = open_source(f"folder:{pets}", "train")
    assert source[1]["id"] == "cat/link.jpg"
    assert source[1]["image"] == (folder / "z.png").read_bytes()


def test_a_file_that_can_be_no_image_is_not_read_into_memory(tmp_path):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(image_file.MAX_BYTES + 1)
    with pytest.raises(DatasetError, match="has 1,073,741,825 bytes, and at most 1,073,741,824 are read"):
        read_image_file(tmp_path / "sparse.jpg")


def test_idx_files_are_regular_files_too(tmp_path):
    os.mkfifo(tmp_path / "t10k-images-idx3-ubyte")
    with pytest.raises(DatasetError, match="is a FIFO"):
        open_source(f"idx:{tmp_path}", "test")


def test_class_names_are_canonical_and_files_keep_their_names(pets):
    composed, apart = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    for name in (apart, os.fsdecode(b"caf\xe9"), "\x1b[31mred"):
        write_image(pets / "train" / name / f"{apart}.png", seed=1)
    source = open_source(f"folder:{pets}", "train")
    assert list(source.class_names) == sorted(["Zebra", "cat", "dog", composed, os.fsdecode(b"caf\xe9"), "\x1b[31mred"])
    index = source.labels.tolist().index(source.class_names.index(composed))
    assert source[index]["id"] == f"{apart}/{apart}.png"
    assert decode(source[index]["image"]).shape == (9, 7, 3)
    assert few_shot(source, 1, seed=0).class_names == source.class_names
    write_image(pets / "train" / composed / "1.png", seed=1)
    with pytest.raises(DatasetError, match=r"two directories for the class é, 'e\\u0301' and '\\xe9'"):
        open_source(f"folder:{pets}", "train")


def test_paths_as_people_type_them(pets, monkeypatch):
    monkeypatch.setenv("HOME", str(pets.parent))
    assert len(open_source(f"folder:~/{pets.name}", "train")) == 5
    assert split_names(f"folder:~/{pets.name}") == ["test", "train"]
    for dataset, data_dir in (("folder:gs://b/r", None), ("idx:s3://b", None), ("cifar10", "gs://b/data")):
        with pytest.raises(RequestError, match="is a URL, and a path on this machine is needed"):
            open_source(dataset, "train", data_dir)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("own")
    own_dataset.write(data_dir, "1.9.0", examples=9, shards=2)
    own_dataset.write(data_dir, "1.10.0", examples=12, shards=6)
    return data_dir


def test_a_dataset_of_ones_own_is_read_without_its_code(own, tmp_path):
    newest = open_source("own_pets", "train-small", own)
    assert (len(newest), list(newest.class_names)) == (12, ["cat", "dog"])
    assert {decode(newest[index]["image"])[0, 0, 0] for index in range(12)} == set(range(12))
    assert len(open_source("own_pets:1.9.0", "train-small[:5]", own)) == 5
    assert len(open_source("own_pets:1.*.*", "train-small[:50%]+test", own)) == 18
    assert split_names("own_pets", own) == ["train-small", "test"]
    for dataset, split, data_dir, said in (
        ("own_pets", "train", own, "own_pets has no split 'train'; it has train-small, test"),
        ("own_pets:2.0.0", "test", own, "no such version .*; prepared are own_pets:1.10.0, own_pets:1.9.0"),
        ("own_pets/large", "test", own, "no such version or configuration"),
        ("own_pets", "test", tmp_path, "unknown dataset 'own_pets'"),
        ("own_pest", "test", own, "unknown dataset 'own_pest'"),
    ):
        with pytest.raises(DatasetError, match=said):
            open_source(dataset, split, data_dir)
    own_dataset.write(tmp_path, "1.0.0", examples=3, shards=1, config="large")
    assert len(open_source("own_pets/large", "test", tmp_path)) == 3
    with pytest.raises(DatasetError, match=r"prepared are own_pets/large:1\.0\.0"):
        open_source("own_pets/small", "test", tmp_path)


def test_a_known_datasets_other_version_is_named(own, tmp_path):
    shutil.copytree(own / "own_pets" / "1.9.0", tmp_path / "cifar10" / "2.0.0")
    with pytest.raises(DatasetError, match=r"cifar10 is not prepared under .*; prepared there are cifar10:2\.0\.0"):
        open_source("cifar10", "test", tmp_path)


def test_descriptors_are_what_reading_holds_open(own):
    source = open_source("own_pets", "train-small[:50%]+test", own)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with contextlib.closing(Loader(source, VIEWS, 6, threads=8).train(0, 6)) as batches:
            rows_of(batches)
    assert len(os.listdir("/proc/self/fd")) - before == descriptors(source) == 9
    assert descriptors(Subset(source, np.arange(2), "two")) == 9
    assert descriptors(relabelled(source, ["dog", "cat"], "the head")) == 9
    assert descriptors(open_source("digits", "train")) == 0


def test_the_soft_limit_on_open_files_is_raised_to_the_hard_one():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
        assert limits.raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hard_limit_that_is_too_low_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1024)
    limits.require_descriptors(0, "digits")
    limits.require_descriptors(896, "a dataset")
    with pytest.raises(RequestError, match=r"holds 1,088 files open .* may open 1,024; .*ulimit -n 1216"):
        limits.require_descriptors(1088, "imagenet2012")


class Counting(bytes):
    """An encoded image that knows how many of its kind there are."""

    there, most = 0, 0

    def __new__(cls, content):
        cls.there += 1
        cls.most = max(cls.most, cls.there)
        return super().__new__(cls, content)

    def __del__(self):
        Counting.there -= 1


def test_check_keeps_no_image_however_many_are_damaged():
    class AllDamaged(ArraySource):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": Counting(b"damaged")}

    source = numbered(300)
    source.__class__ = AllDamaged
    Counting.most = 0
    checked = check(source)
    assert Counting.most <= 2 * len(os.sched_getaffinity(0))  # one in each thread, and some about to be forgotten
    assert (checked.damaged, checked.wrong, len(checked.faults)) == (300, 0, SHOWN)


def test_synthetic_is_as_large_as_imagenet_and_needs_no_resizing():
    source = open_source("synthetic", "train")
    assert (len(source), len(source.class_names)) == (1_281_167, 1000)
    assert source[1_281_166]["image"].shape == (512, 512, 3)
    assert len(open_source("synthetic", "validation")) == 50_000
    with pytest.raises(DatasetError, match="train, validation, test"):
        open_source("synthetic", "holdout")


@pytest.mark.parametrize(
    ("spec", "first", "count"),
    [
        ("train[:98%]", 0, 1409),
        ("train[98%:]", 1409, 29),
        ("train[-10:]", 1428, 10),
        ("train[5:8]", 5, 3),
        ("train", 0, 1438),
    ],
)
def test_slices(spec, first, count):
    """98 % of 1,438 is 1,409.24; tfds rounds to the nearest too."""
    source, whole = open_source("digits", spec), open_source("digits", "train")
    assert len(source) == count
    assert source[0]["id"] == str(first)
    np.testing.assert_array_equal(source.labels, whole.labels[first : first + count])


@pytest.mark.parametrize("spec", ["train[", "train[1]", "train[a:b]", "train+test", "../train", "-train", ""])
def test_malformed_slices(spec):
    with pytest.raises(DatasetError, match="neither a name nor a slice"):
        open_source("digits", spec)


def test_split_names_with_a_hyphen(pets):
    shutil.copytree(pets / "train", pets / "train-small.v2")
    assert len(open_source(f"folder:{pets}", "train-small.v2")) == 5
    assert len(open_source(f"folder:{pets}", "train-small.v2[:40%]")) == 2


def test_an_empty_slice():
    with pytest.raises(DatasetError, match="no examples"):
        open_source("digits", "train[10:10]")


def test_crop_larger_than_resize():
    with pytest.raises(DatasetError, match="crop 9"):
        Views(resize_to=8, crop=9, flip=False)
