"""The chaos run: its disturbances do what they say, and its verdict can be a bad one."""

import importlib.util

import jax
import numpy as np
import pytest
from conftest import ROOT, benchmark
from jax.sharding import NamedSharding, PartitionSpec

from bit_jax.process import signs
from bit_jax.scale.sharding import make_mesh
from input_pipeline import exits


@pytest.fixture(scope="module")
def flipping():
    spec = importlib.util.spec_from_file_location("flipped_train", ROOT / "benchmarks" / "flipped" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "least", "most"), [(np.float64, 2e-4, 5e-4), (np.float32, 3e-5, 7e-5)])
def test_one_bit_of_one_copy_is_flipped_and_it_is_a_small_one(x64, flipping, dtype, least, most):
    """A number that doubles would be noticed without any checksum."""
    right = np.linspace(0.01, 0.03, 6, dtype=dtype).reshape(2, 3)
    array = jax.device_put(right, NamedSharding(make_mesh(), PartitionSpec()))
    copies = [np.asarray(shard.data) for shard in flipping.flipped(array).addressable_shards]
    assert [np.array_equal(copy, right) for copy in copies] == [False] + [True] * 7
    changed = np.abs(copies[0] / right - 1)
    assert (changed > 0).sum() == 1
    assert least < changed.max() < most
    np.testing.assert_array_equal(np.asarray(array), right)


def test_the_signal_that_flips_a_bit_means_nothing_else(flipping):
    assert benchmark("chaos").FLIP == flipping.FLIP
    assert flipping.FLIP not in (signs.TRACES, *exits.ASKING)


def test_a_run_that_ended_otherwise_or_lost_time_is_complained_of():
    chaos = benchmark("chaos")
    good = {"difference": 0.0, "unaccounted": 0.4, "beyond": 0.0}
    assert chaos.complaints("one host", good) == []
    assert chaos.complaints("three hosts", good | {"difference": 1e-11}) == []
    for name, wrong in (
        ("one host", {"difference": 1e-300}),
        ("three hosts", {"difference": 1e-9}),
        ("three hosts", {"difference": float("nan")}),
        ("one host", {"unaccounted": 2.0}),
        ("one host", {"beyond": 2.0}),
    ):
        assert len(chaos.complaints(name, good | wrong)) == 1


def test_runs_are_equal_only_if_their_bytes_are(tmp_path):
    chaos = benchmark("chaos")
    for name, value in (("one", 0.0), ("other", 0.0), ("negative", -0.0), ("wrong", 3e-10), ("broken", np.nan)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "final.npz", kernel=np.array([1.0, value]))
    differences = [chaos.difference(tmp_path / "one", tmp_path / other) for other in ("other", "negative", "wrong")]
    assert differences[0] == 0 < differences[1] < differences[2] == 3e-10
    assert not chaos.difference(tmp_path / "one", tmp_path / "broken") <= chaos.LIMIT
