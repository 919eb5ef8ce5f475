"""What is added to a kernel's variance comes with the weights, and is respected by all that computes with them."""

import zipfile

import jax
import numpy as np
import pytest

import bit_jax
from bit_jax.formats import weights
from bit_jax.model.architecture import STANDARDIZE_EPS, Architecture
from input_pipeline.errors import RequestError
from parity.in_torch import resnetv2

TIMM = 1e-8


@pytest.fixture
def timm_npz(small_npz, tmp_path):
    """The small model's file, as of a model that was trained in timm."""
    _, params = bit_jax.load(small_npz)
    bit_jax.save(tmp_path / "timm.npz", params, standardize_eps=TIMM)
    return tmp_path / "timm.npz"


def with_comment(path, comment):
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    return path


def test_save_keeps_it_within_the_file_and_load_returns_it(timm_npz, tmp_path):
    copied = timm_npz.rename(tmp_path / "elsewhere.npz")
    architecture, _ = weights.read(copied)
    model, params = bit_jax.load(copied)
    assert architecture.standardize_eps == model.standardize_eps == TIMM
    assert Architecture.of(model) == architecture
    bit_jax.save(tmp_path / "again.npz", params, standardize_eps=model.standardize_eps)
    assert (tmp_path / "again.npz").read_bytes() == copied.read_bytes()


def test_bits_own_value_leaves_the_file_as_it_always_was(small_npz, tmp_path):
    model, params = bit_jax.load(small_npz)
    bit_jax.save(tmp_path / "plain.npz", params)
    bit_jax.save(tmp_path / "said.npz", params, standardize_eps=STANDARDIZE_EPS)
    assert model.standardize_eps is None
    assert (tmp_path / "plain.npz").read_bytes() == (tmp_path / "said.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "said.npz") as archive:
        assert archive.comment == b""


def test_the_argument_of_load_decides(timm_npz, small_npz):
    assert bit_jax.load(timm_npz, standardize_eps=STANDARDIZE_EPS)[0].standardize_eps is None
    assert bit_jax.load(small_npz, standardize_eps=TIMM)[0].standardize_eps == TIMM


def test_numpy_reads_the_file_as_ever(timm_npz, small_npz):
    with np.load(timm_npz) as ours, np.load(small_npz) as official:
        assert all(np.array_equal(ours[key], official[key]) for key in official.files)


def test_both_sides_of_parity_read_it_by_themselves(timm_npz, small_npz, x64):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 33, 32, 3))
    logits = {}
    for path in (timm_npz, small_npz):
        model, params = bit_jax.load(path, dtype="float64")
        logits[path] = jax.jit(model.apply)({"params": params}, images)
    torch = pytest.importorskip("torch")
    reference = resnetv2.load(str(timm_npz)).double()
    with torch.no_grad():
        theirs = reference(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert reference.constants.standardize_eps == TIMM
    assert np.abs(theirs - logits[timm_npz]).max() < 1e-11
    assert np.abs(theirs - logits[small_npz]).max() > 1e-9


@pytest.mark.parametrize(
    ("comment", "problem"),
    [
        (b'{"standardize_eps": 1e-8', "damaged comment"),
        (b'{"standardize_eps": "1e-8"}', "damaged comment"),
        (b'{"standardize_eps": NaN}', "damaged comment"),
        (b'{"standardize_eps": -1e-8}', "damaged comment"),
        (b'{"standardize_eps": 1e-8, "more": 1}', "damaged comment"),
    ],
)
def test_a_malformed_comment_ends_in_a_sentence(timm_npz, comment, problem):
    with pytest.raises(weights.WeightsError, match=problem):
        weights.read(with_comment(timm_npz, comment))


def test_anothers_comment_says_nothing(timm_npz):
    assert weights.read(with_comment(timm_npz, b"by hand"))[0].standardize_eps == STANDARDIZE_EPS


@pytest.mark.parametrize("cut", [1, 5, 24])
def test_a_cut_comment_is_not_taken_for_bits_own(timm_npz, cut):
    timm_npz.write_bytes(timm_npz.read_bytes()[:-cut])
    with pytest.raises(weights.WeightsError, match="truncated"):
        weights.read(timm_npz)


@pytest.mark.parametrize("eps", [0, -1e-8, 1.0, float("nan"), True, "1e-8"])
def test_a_value_that_is_none_is_refused(small_npz, tmp_path, eps):
    _, params = bit_jax.load(small_npz)
    for attempt in (
        lambda: bit_jax.save(tmp_path / "x.npz", params, standardize_eps=eps),
        lambda: bit_jax.load(small_npz, standardize_eps=eps),
    ):
        with pytest.raises(RequestError, match="standardize_eps"):
            attempt()
    assert not (tmp_path / "x.npz").exists()
