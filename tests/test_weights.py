"""Official files in and out: bit-equal, total, one copy in memory, and every kind of broken file named."""

import errno
import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bit_jax
from bit_jax.formats import official, weights
from bit_jax.formats.weights import WeightsError
from bit_jax.model.architecture import HEAD_BIAS, HEAD_KERNEL, Architecture
from bit_jax.published import catalogue
from input_pipeline.errors import RequestError
from parity.sides.inputs import random_arrays


@pytest.mark.parametrize("name", catalogue.ARCHITECTURES)
def test_layout_is_the_models_own_tree(name):
    architecture = Architecture.parse(name, 1000)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(architecture.model().init, jax.random.key(0), image)["params"]
    assert {key: leaf.shape for key, leaf in weights.flatten(shapes).items()} == architecture.layout


def test_parameters_of_r152x2_take_945_megabytes():
    architecture = Architecture.parse("R152x2", 1000)
    assert sum(4 * np.prod(shape) for shape in architecture.layout.values()) == pytest.approx(945e6, rel=2e-3)


@pytest.mark.parametrize(("units", "width"), [((1, 1, 1, 1), 0.5), ((2, 1, 3, 1), 1.5), ((3, 4, 6, 3), 1)])
def test_architecture_is_read_off_the_file(tmp_path, units, width):
    architecture = Architecture(units, width, 7)
    np.savez(tmp_path / "w.npz", **random_arrays(architecture))
    model, params = bit_jax.load(tmp_path / "w.npz")
    assert (model.units, model.width, model.num_classes) == (units, width, 7)
    assert {key: leaf.shape for key, leaf in weights.flatten(params).items()} == architecture.layout


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
    architecture = Architecture((1, 1, 1, 1), 2, 10)
    arrays = random_arrays(architecture)
    np.savez(tmp_path / "w.npz", **arrays)
    largest, total = (f(array.nbytes for array in arrays.values()) for f in (max, sum))
    tracemalloc.start()
    for _ in weights.read(tmp_path / "w.npz")[1]:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * largest < total


# What `save` writes, `load` reads.

KEYS = sorted(SMALL.layout)
WRITTEN = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32", ">f4", "float64", ">f8")
REFUSED = ("int32", "uint8", "bool", "complex64", "longdouble", "O")
SPECIAL = (0.0, -0.0, 1e-45, 2.0**-24, 448.0, 3.4e38, 1e300, -1e39, np.nan, np.inf, -np.inf)


@given(
    dtypes=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(WRITTEN + REFUSED), max_size=3),
    values=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(SPECIAL), max_size=2),
    columns_first=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_save_accepts_load_gives_back_equal(tmp_path, small_npz, dtypes, values, columns_first):
    """Each example changes a few arrays' dtypes and values; what is refused leaves nothing behind."""
    flat = dict(np.load(small_npz))
    with np.errstate(all="ignore"):
        for key, dtype in dtypes.items():
            flat[key] = flat[key].astype(jnp.dtype(dtype) if "float8" in dtype or "bf" in dtype else dtype)
        for key, value in values.items():
            if flat[key].dtype.kind in "fV":
                flat[key].flat[-1] = value
    flat = {key: np.asfortranarray(array) if columns_first else array for key, array in flat.items()}
    path = tmp_path / "w.npz"
    wrong = {key for key in dtypes if dtypes[key] in REFUSED} or {
        key for key, array in flat.items() if not np.all(np.abs(array.astype(np.float64)) < 3.5e38)
    }
    if wrong:
        with pytest.raises(WeightsError) as caught:
            bit_jax.save(path, weights.unflatten(flat))
        named = str(caught.value)
        assert all(key in named for key in wrong)
        assert not list(tmp_path.iterdir())
        return
    bit_jax.save(path, weights.unflatten(flat))
    with jax.enable_x64(True):
        _, params = bit_jax.load(path, dtype=jnp.float64)
    for key, array in weights.flatten(params).items():
        np.testing.assert_array_equal(array, flat[key].astype(np.float64))
    _, params = bit_jax.load(path)
    for key, array in weights.flatten(params).items():
        np.testing.assert_array_equal(array, flat[key].astype(np.float32))
    path.unlink()


def test_narrow_floats_are_written_as_float32_and_float64_stays(tmp_path, small_npz):
    _, params = bit_jax.load(small_npz)
    params["head"]["conv2d"]["bias"] = np.arange(10.0)
    narrow = jax.tree.map(lambda leaf: leaf if leaf.dtype == np.float64 else leaf.astype(jnp.bfloat16), params)
    bit_jax.save(tmp_path / "w.npz", narrow)
    with np.load(tmp_path / "w.npz") as saved:
        assert {saved[key].dtype for key in saved.files} == {np.dtype(np.float32), np.dtype(np.float64)}
        assert saved[HEAD_BIAS].dtype == np.float64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda array: np.asarray(array, np.int32), "int32"),
        (lambda array: array.at[2].set(np.nan), "NaN"),
        (lambda array: array.at[0].set(-np.inf), "NaN"),
        (lambda array: np.asarray(array, np.float64) + 1e39, "float32's range"),
        (lambda array: np.asarray(array, np.complex64), "complex64"),
        (list, "list"),
        (lambda array: torch.zeros(10), "torch.float32"),
    ],
)
def test_save_refuses_what_load_refuses_and_leaves_the_old_file(tmp_path, small_npz, change, said):
    _, params = bit_jax.load(small_npz)
    params["head"]["conv2d"]["bias"] = change(params["head"]["conv2d"]["bias"])
    (tmp_path / "w.npz").write_bytes(b"old")
    with pytest.raises(WeightsError, match=said) as caught:
        bit_jax.save(tmp_path / "w.npz", params)
    assert HEAD_BIAS in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("params", [[1, 2], {1: np.zeros(3)}, {"head": {2: np.zeros(3)}}, None])
def test_save_refuses_what_is_no_tree_of_names(tmp_path, params):
    with pytest.raises(WeightsError, match="not a tree"):
        bit_jax.save(tmp_path / "w.npz", params)


def test_the_home_directory_is_expanded_and_addresses_are_refused(tmp_path, small_npz, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, params = bit_jax.load(small_npz)
    bit_jax.save("~/w.npz", params)
    assert (tmp_path / "w.npz").exists()
    assert bit_jax.load("~/w.npz")[0].num_classes == 10
    with pytest.raises(RequestError, match="is a URL"):
        bit_jax.load("gs://bucket/w.npz")


@pytest.mark.parametrize("number", [-1, 10.0, "10", True])
def test_a_number_of_classes_that_cannot_be(small_npz, number):
    with pytest.raises(RequestError, match="num_classes is"):
        bit_jax.load(small_npz, num_classes=number)


@pytest.mark.parametrize("dtype", [jnp.int32, "float99", jnp.float8_e5m2])
def test_a_dtype_that_is_not_computed_in(small_npz, dtype):
    with pytest.raises(RequestError, match="choose one of float32, bfloat16, float16, float64"):
        bit_jax.load(small_npz, dtype=dtype)


# Broken files. Each is one sentence that names the file.


def broken(tmp_path, change) -> str:
    arrays = random_arrays(SMALL)
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
        (lambda data: b"", "is empty"),
        (lambda data: b"not a zip at all" * 100, "is no file of weights"),
        (lambda data: bytes(2000) + data[2000:], "begins with zeros"),
        (lambda data: data[:4_000_000] + bytes(16) + data[4_000_016:], "CRC"),
    ],
)
def test_damaged_files(tmp_path, small_npz, content, said):
    (tmp_path / "w.npz").write_bytes(content(small_npz.read_bytes()))
    with pytest.raises(WeightsError, match=said) as caught:
        bit_jax.load(tmp_path / "w.npz")
    assert "delete" not in str(caught.value)


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


def npy(shape, content=b"", dtype="<f4") -> bytes:
    """An array's file as a header may claim it to be."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + content


def changed_archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A small BiT with members replaced or added."""
    arrays = random_arrays(SMALL)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, array in arrays.items():
            if f"{key}.npy" not in members:
                archive.writestr(f"{key}.npy", npy(array.shape, array.tobytes()))
        for name, content in members.items():
            archive.writestr(name, content)


BIAS = f"{HEAD_BIAS}.npy"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"resnet/block1/unit999999/a/group_norm/gamma.npy": npy((3,), bytes(12))}, "more units"),
        ({f"resnet/block1/unit{'9' * 5000}/a/group_norm/gamma.npy": npy((3,), bytes(12))}, "1 extra"),
        ({BIAS: npy((2**40,), bytes(40))}, "for shape"),
        ({BIAS: npy((2**62, 4))}, "for shape"),  # whose product is 0 in 64 bits
        ({BIAS: npy((-1, -10), bytes(40))}, "for shape"),
        ({BIAS: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(100_000)}, "not plain arrays"),
        ({BIAS: npy((10,), bytes(160), "<f16")}, "at most 64 bits"),
        ({BIAS: npy((10,), bytes(20), "|V2")}, "not a float"),
    ],
)
def test_numbers_in_a_file_are_not_believed(tmp_path, members, said):
    """Whatever a file names, reading it takes no more memory than the file has bytes."""
    changed_archive(tmp_path / "w.npz", members)
    tracemalloc.start()
    with pytest.raises(WeightsError, match=said) as caught:
        weights.read(tmp_path / "w.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (tmp_path / "w.npz").stat().st_size
    assert len(str(caught.value)) < 3000


def test_a_head_without_classes(tmp_path):
    kernel = npy((1, 1, 1024, 0))
    changed_archive(tmp_path / "w.npz", {f"{HEAD_KERNEL}.npy": kernel, BIAS: npy((0,))})
    with pytest.raises(WeightsError, match="0 classes"):
        weights.read(tmp_path / "w.npz")


def test_a_zip_bomb(tmp_path):
    """Deflate makes a thousandth of zeros; the sizes that the zip's directory names are held against the file's."""
    bomb = npy((10_000_000,), bytes(40_000_000))
    with zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(BIAS, bomb)
    with pytest.raises(WeightsError, match="are said to hold 40,000"):
        weights.read(tmp_path / "w.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_does_not_write(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "w.npz", "w", compression) as archive:
        archive.writestr(BIAS, npy((10,), bytes(40)))
    with pytest.raises(WeightsError, match="compression"):
        weights.read(tmp_path / "w.npz")


def test_a_size_in_the_directory_that_the_file_does_not_have(tmp_path, small_npz):
    data = bytearray(small_npz.read_bytes())
    directory = struct.unpack("<I", data[-6:-2])[0]
    struct.pack_into("<II", data, directory + 20, 2**31, 2**31)  # the first member's sizes, packed and unpacked
    (tmp_path / "w.npz").write_bytes(data)
    with pytest.raises(WeightsError, match="are said to hold"):
        weights.read(tmp_path / "w.npz")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_file_that_the_system_does_not_give_is_not_called_damaged(small_npz, monkeypatch, number):
    def refuse(*arguments, **settings):
        raise OSError(number, "the reason")

    _, arrays = weights.read(small_npz)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", refuse)
    for attempt in (lambda: weights.read(small_npz), lambda: next(arrays)):
        with pytest.raises(RequestError, match=r"cannot read .*: the reason") as caught:
            attempt()
        assert not isinstance(caught.value, WeightsError)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(RequestError, match=r"cannot read .*: the reason"):
        weights.read(small_npz)


def test_too_little_memory_is_not_called_damage(small_npz, monkeypatch):
    def refuse(count):
        raise MemoryError

    monkeypatch.setattr(official, "_aligned_bytes", refuse)
    with pytest.raises(RequestError, match="memory"):
        bit_jax.load(small_npz)


# Other people's files: what they are and what to do, by their content.


def torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(3)}}, file)
    return file.getvalue()


def safetensors() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", safetensors(), "is no BiT in the names of"),
        ("x.pth.tar", torch_zip(), "holds no state dict of a BiT"),
        ("x.pth", pickle.dumps({"w": [1.0]}), "damaged PyTorch file"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        ("x.npy", npy((10,), bytes(40)), "single NumPy array"),
        ("x.npz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("x.npz", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        ("x.npz", b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "XML"),
        ("x.npz", b"", "empty"),
        ("x.npz", b"\x1f\x8b" + bytes(100), "gzip"),
        ("x.tar", bytes(257) + b"ustar" + bytes(300), "tar archive"),
        ("saved_model.pb", b"x", "SavedModel"),
        ("_CHECKPOINT_METADATA", b"{}", "Orbax"),
        ("final.npz", b"x", "name the final.npz"),
        ("anything", b"x", "is a directory"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_other_files_are_recognized(tmp_path, name, content, said):
    directory = said in ("SavedModel", "Orbax", "name the final.npz", "is a directory")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=said) as caught:
        bit_jax.load(tmp_path if directory else tmp_path / name)
    assert "delete" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_bytes() == content


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


def test_names_in_a_file_are_told_in_one_line(small_npz, tmp_path):
    arrays = dict(np.load(small_npz)) | {"resnet/\x1b[31m\n\x85name": np.zeros(1, np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(weights.WeightsError) as refused:
        weights.read(tmp_path / "w.npz")
    assert "resnet/\\x1b[31m\\n\\x85name" in str(refused.value)
