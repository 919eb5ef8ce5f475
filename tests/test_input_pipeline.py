"""Sources and loader: what is read, in which order, and that position alone decides it."""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import DatasetError, Loader, Views, few_shot, open_source
from input_pipeline.preprocess import decode, native_area
from input_pipeline.sources import ArraySource

VIEWS = Views(resize=12, crop=8, flip=True)


def numbered(count: int, classes: int = 3) -> ArraySource:
    """A source whose images tell their index."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 10, 10), np.uint8)
    return ArraySource("numbered", images, np.arange(count) % classes, [str(label) for label in range(classes)])


def rows_of(batches) -> dict[str, np.ndarray]:
    batches = [batch for _, batch in batches]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def by_hosts(source, global_batch, hosts, read) -> dict[str, np.ndarray]:
    """What all hosts read together, in global order."""
    shares = [
        [b for _, b in read(Loader(source, VIEWS, global_batch, 5, host=host, hosts=hosts))] for host in range(hosts)
    ]
    assert len({len(share) for share in shares}) == 1
    return rows_of((0, batch) for step in zip(*shares, strict=True) for batch in step)


def test_digits():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train[0]["image"].shape == (8, 8)
    assert train[0]["image"].max() == 255 * 15 // 16
    assert set(train.labels) == set(range(10)) == {int(name) for name in train.class_names}


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
@given(count=st.integers(1, 40), share=st.integers(1, 4), start=st.integers(0, 6), seed=st.integers(0, 3))
def test_training_continues_from_a_step_number_bit_for_bit(count, share, start, seed):
    source, batch = numbered(count), share * 2
    whole = rows_of(Loader(source, VIEWS, batch, seed).train(0, start + 3))
    rest = rows_of(Loader(source, VIEWS, batch, seed).train(start, start + 3))
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
    loader = Loader(source, Views(resize=10, crop=10, flip=True), 100, seed=0)
    rows = rows_of(loader.train(0, 4))
    flipped = []
    for image, index in zip(rows["image"], rows["index"], strict=True):
        original = np.asarray(decode(source[index]["image"]))
        assert np.array_equal(image, original) or np.array_equal(image, original[:, ::-1])
        flipped.append(not np.array_equal(image, original))
    assert 0.4 < np.mean(flipped) < 0.6  # 400 fair coins: six standard deviations are 0.15
    first, second = (
        dict(zip(rows["index"][part], flipped[part], strict=True)) for part in (slice(200), slice(200, 400))
    )
    assert first != second


def test_evaluation_resizes_straight_to_the_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(VIEWS.evaluation(image), expected)


def test_encoded_images():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    np.testing.assert_array_equal(np.asarray(decode(encoded.getvalue())), pixels)
    assert native_area(encoded.getvalue()) == 63
    for broken in (b"no image", encoded.getvalue()[:60]):
        with pytest.raises(DatasetError, match="not a readable image"):
            decode(broken)


def test_a_damaged_image_is_named():
    class Damaged(ArraySource):
        def __getitem__(self, index):
            return super().__getitem__(index) | ({"image": b"damaged"} if index == 3 else {})

    source = numbered(8)
    source.__class__ = Damaged
    with pytest.raises(DatasetError, match="example 3 of numbered"):
        rows_of(Loader(source, VIEWS, 4).train(0, 2))


def test_crop_larger_than_resize():
    with pytest.raises(DatasetError, match="crop 9"):
        Views(resize=8, crop=9, flip=False)


@pytest.fixture
def tiny_imagenet(tmp_path):
    """A data directory in which tfds's own builder prepared nine training and five validation images."""
    with tarfile.open(Path(__file__).parent / "data" / "imagenet2012_tiny.tar.gz") as archive:
        # an attribute, because Python before 3.11.4 knows no `filter` argument
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(tmp_path)
    return tmp_path


def test_tfds_imagenet_without_tensorflow(tiny_imagenet):
    train = open_source("imagenet2012", "train", tiny_imagenet)
    assert (len(train), len(train.class_names)) == (9, 1000)
    np.testing.assert_array_equal(np.bincount(train.labels, minlength=1000)[[0, 1, 999]], [3, 2, 4])
    for index in range(9):
        example = train[index]
        assert example["label"] == train.labels[index]
        assert example["id"].startswith(train.class_names[example["label"]])
        assert example["image"].startswith(b"\xff\xd8")  # still a JPEG
    rows = rows_of(Loader(train, VIEWS, 4).evaluation())
    np.testing.assert_array_equal(rows["label"][rows["mask"]], train.labels)
    assert rows["image"][rows["mask"]].std() > 10
    assert len(open_source("imagenet2012", "train[:4]", tiny_imagenet)) == 4
    assert len(open_source("imagenet2012", "validation", tiny_imagenet)) == 5
    assert "tensorflow" not in sys.modules


def test_tfds_splits_that_are_not_there(tiny_imagenet):
    for split in ("test", "train[:"):
        with pytest.raises(DatasetError, match="train, validation"):
            open_source("imagenet2012", split, tiny_imagenet)
    with pytest.raises(DatasetError, match=r"has 3 examples of class|has 0 examples of class|has 2 examples of class"):
        few_shot(open_source("imagenet2012", "train", tiny_imagenet), 4, seed=0)
