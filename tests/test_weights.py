"""Official files in and out: bit-equal, total, one copy in memory, and every kind of broken file named."""

import struct
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_weights

import bit_jax
from bit_jax import weights, zoo
from bit_jax.resnetv2 import parse_architecture
from bit_jax.weights import WeightsError


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_layout_is_the_models_own_tree(name):
    architecture = weights.Architecture(*parse_architecture(name), 1000)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(architecture.model().init, jax.random.key(0), image)["params"]
    assert {key: leaf.shape for key, leaf in weights.flatten(shapes).items()} == weights.layout(architecture)


def test_parameters_of_r152x2_take_945_megabytes():
    architecture = weights.Architecture(*parse_architecture("R152x2"), 1000)
    assert sum(4 * np.prod(shape) for shape in weights.layout(architecture).values()) == pytest.approx(945e6, rel=2e-3)


@pytest.mark.parametrize(("units", "width"), [((1, 1, 1, 1), 0.5), ((2, 1, 3, 1), 1.5), ((3, 4, 6, 3), 1)])
def test_architecture_is_read_off_the_file(tmp_path, units, width):
    architecture = weights.Architecture(units, width, 7)
    np.savez(tmp_path / "w.npz", **random_weights(architecture))
    model, params = bit_jax.load(tmp_path / "w.npz")
    assert (model.units, model.width, model.num_classes) == (units, width, 7)
    assert {key: leaf.shape for key, leaf in weights.flatten(params).items()} == weights.layout(architecture)


def test_load_save_load_is_bit_equal_and_saves_the_same_bytes(tmp_path, small_npz):
    _, params = bit_jax.load(small_npz)
    bit_jax.save(tmp_path / "a.npz", params)
    _, again = bit_jax.load(tmp_path / "a.npz")
    bit_jax.save(tmp_path / "b.npz", again)
    original, saved = np.load(small_npz), np.load(tmp_path / "a.npz")
    assert set(saved.files) == set(original.files)
    for key in original.files:
        np.testing.assert_array_equal(saved[key], original[key])
        assert saved[key].dtype == np.float32
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz"}


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, small_npz, monkeypatch):
    _, params = bit_jax.load(small_npz)
    (tmp_path / "w.npz").write_bytes(b"old")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full_disk)
    with pytest.raises(OSError, match="No space"):
        bit_jax.save(tmp_path / "w.npz", params)
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]
    assert (tmp_path / "w.npz").read_bytes() == b"old"


def test_save_refuses_parameters_that_are_not_a_bit(tmp_path, small_npz):
    _, params = bit_jax.load(small_npz)
    del params["block2"]["unit01"]["b"]["group_norm"]["beta"]
    with pytest.raises(WeightsError, match="1 missing"):
        bit_jax.save(tmp_path / "w.npz", params)
    assert not list(tmp_path.iterdir())


def test_new_head_is_zero_and_the_rest_is_kept(small_npz):
    model, params = bit_jax.load(small_npz, num_classes=3)
    _, original = bit_jax.load(small_npz)
    assert model.num_classes == 3
    assert params["head"]["conv2d"]["kernel"].shape == (1, 1, 1024, 3)
    assert not np.any(params["head"]["conv2d"]["kernel"])
    assert not np.any(params["head"]["conv2d"]["bias"])
    del params["head"], original["head"]
    jax.tree.map(np.testing.assert_array_equal, params, original)


def test_new_head_of_the_same_size_is_zero_too(small_npz):
    _, params = bit_jax.load(small_npz, num_classes=10)
    assert not np.any(params["head"]["conv2d"]["kernel"])


def test_dtype_decides_the_computation(small_npz):
    with jax.enable_x64(True):
        model, params = bit_jax.load(small_npz, dtype=jnp.float64)
        assert model.dtype == jnp.float64
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    with pytest.raises(ValueError, match="jax_enable_x64"):
        bit_jax.load(small_npz, dtype=jnp.float64)


def test_numbered_convolutions_are_accepted(tmp_path, small_npz):
    arrays = dict(np.load(small_npz))
    numbered = {
        key.replace("standardized_conv2d/", f"standardized_conv2d_{n}/") if n % 2 else key: array
        for n, (key, array) in enumerate(arrays.items())
    }
    assert set(numbered) != set(arrays)
    np.savez(tmp_path / "w.npz", **numbered)
    _, params = bit_jax.load(tmp_path / "w.npz")
    for key, array in weights.flatten(params).items():
        np.testing.assert_array_equal(array, arrays[key])


def test_compressed_and_column_major_files_are_read_too(tmp_path, small_npz):
    arrays = dict(np.load(small_npz))
    np.savez_compressed(tmp_path / "w.npz", **{key: np.asfortranarray(array) for key, array in arrays.items()})
    _, params = bit_jax.load(tmp_path / "w.npz")
    for key, array in weights.flatten(params).items():
        np.testing.assert_array_equal(array, arrays[key])


def test_reading_holds_one_array_at_a_time(tmp_path):
    architecture = weights.Architecture((1, 1, 1, 1), 2, 10)
    arrays = random_weights(architecture)
    np.savez(tmp_path / "w.npz", **arrays)
    largest, total = (f(array.nbytes for array in arrays.values()) for f in (max, sum))
    tracemalloc.start()
    for _ in weights.read(tmp_path / "w.npz")[1]:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * largest < total


# Broken files. Each is one sentence that names the file.


def broken(tmp_path, change) -> str:
    arrays = random_weights(SMALL)
    change(arrays)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightsError) as caught:
        bit_jax.load(tmp_path / "w.npz")
    assert "w.npz" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_every_missing_extra_and_misshapen_key_is_in_one_error(tmp_path):
    norm = "resnet/block3/unit01/b/group_norm/gamma"
    kernel = "resnet/block2/unit01/c/standardized_conv2d/kernel"

    def change(arrays):
        del arrays[norm], arrays["resnet/group_norm/beta"]
        arrays["global_step"] = np.zeros((), np.float32)
        arrays["resnet/block4/unit01/d/extra"] = np.zeros(3, np.float32)
        arrays[kernel] = arrays[kernel].transpose(3, 2, 0, 1)

    error = broken(tmp_path, change)
    assert set(error.missing) == {norm, "resnet/group_norm/beta"}
    assert set(error.extra) == {"global_step", "resnet/block4/unit01/d/extra"}
    assert len(error.misshapen) == 1
    for named in (norm, "global_step", kernel, "2 missing", "2 extra", "1 misshapen"):
        assert named in str(error)


def test_a_whole_stage_missing(tmp_path):
    def change(arrays):
        for key in [key for key in arrays if "/block4/" in key]:
            del arrays[key]

    assert "resnet/block4/unit01/a/group_norm/beta" in str(broken(tmp_path, change))


def test_a_gap_between_units(tmp_path):
    def change(arrays):
        for key in [key for key in arrays if "/block2/" in key]:
            arrays[key.replace("unit01", "unit03")] = arrays[key]

    assert "block2/unit02" in str(broken(tmp_path, change))


def test_not_a_bit_at_all(tmp_path):
    error = broken(tmp_path, lambda arrays: (arrays.clear(), arrays.update(weight=np.zeros(3, np.float32))))
    assert "official layout" in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    key = "resnet/block1/unit01/b/standardized_conv2d/kernel"

    def change(arrays):
        arrays[key][0, 1, 2, 3] = value

    assert key in str(broken(tmp_path, change))


def test_pickled_objects_are_refused(tmp_path):
    def change(arrays):
        arrays["resnet/head/conv2d/bias"] = np.array([{"a": 1}] * 10, object)

    assert "pickled" in str(broken(tmp_path, change))


def test_integers_are_refused(tmp_path):
    def change(arrays):
        arrays["resnet/head/conv2d/bias"] = np.zeros(10, np.int32)

    assert "int32" in str(broken(tmp_path, change))


def test_the_same_array_under_two_spellings(tmp_path):
    key = "resnet/block1/unit01/b/standardized_conv2d/kernel"

    def change(arrays):
        arrays[key.replace("conv2d/", "conv2d_9/")] = arrays[key]

    assert "second array" in str(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-1000], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: b"not a zip at all" * 100, "not an .npz"),
        (lambda data: data[:4_000_000] + bytes(16) + data[4_000_016:], "CRC"),
    ],
)
def test_damaged_files(tmp_path, small_npz, content, said):
    (tmp_path / "w.npz").write_bytes(content(small_npz.read_bytes()))
    with pytest.raises(WeightsError, match=said):
        bit_jax.load(tmp_path / "w.npz")


def test_every_single_damaged_header_byte_is_an_error_or_harmless(tmp_path, small_npz):
    """Central directory and headers: whatever bit flips there, loading raises WeightsError or gives the same arrays."""
    data = bytearray(small_npz.read_bytes())
    original = dict(np.load(small_npz))
    directory = struct.unpack("<I", data[-6:-2])[0]
    rng = np.random.default_rng(0)
    for position in [*rng.integers(directory, len(data), 60), *rng.integers(0, 200, 60)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "w.npz").write_bytes(damaged)
        try:
            arrays = dict(weights.read(tmp_path / "w.npz")[1])
        except WeightsError:
            continue
        for key, array in original.items():
            np.testing.assert_array_equal(arrays[key], array)


def test_a_zip_without_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"without \.npy"):
        bit_jax.load(tmp_path / "w.npz")


def test_no_file_and_a_directory(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        bit_jax.load(tmp_path / "nowhere.npz")
    with pytest.raises(WeightsError, match="directory"):
        bit_jax.load(tmp_path)
