"""`python -m parity record` and `against`: what a reference says is carried in a file to where a candidate is."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from command_line import parity
from rich.console import Console
from test_parity_ci import rungs_as_tests

from input_pipeline.errors import RequestError
from parity import faults
from parity.bundles import against, archive, record
from parity.ladder import selftest
from parity.ladder.kept import SUMS, Sketch, Whole
from parity.ladder.rungs import Rung
from parity.ladder.selftest import climb, first_bug, inject
from parity.report import saved

pytestmark = pytest.mark.usefixtures("compiled_once", "hardly_optimized")

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((40, 500, 10))


def test_a_sketch_estimates_how_far_another_array_is():
    whole, sketch = Whole(LARGE), Sketch.of(LARGE)
    for size in (1e-12, 1e-5, 1.0):
        other = LARGE + size * RNG.standard_normal(LARGE.shape)
        rmse, high = sketch.errors(other) / whole.errors(other)
        assert abs(rmse - 1) < 0.1
        assert abs(high - 1) < 0.4
    assert sketch.errors(LARGE.astype(np.float32))[0] == pytest.approx(
        whole.errors(LARGE.astype(np.float32))[0], rel=0.1
    )
    assert sketch.same(LARGE.copy())
    assert not sketch.same(LARGE + 1e-15)


def test_a_sketch_sees_every_value_and_never_calls_a_right_array_wrong():
    """A single wrong value counts from sqrt(size / SUMS) times the limit on; rounding everywhere is not exaggerated."""
    sketch, blind = Sketch.of(LARGE), np.sqrt(LARGE.size / SUMS)
    for place in RNG.integers(LARGE.size, size=20):
        other = LARGE.copy()
        other.flat[place] += 1e-9 * blind * 1.1
        assert sketch.difference(other) > 1e-9
    for _ in range(20):
        assert sketch.difference(LARGE * (1 + 1e-10 * RNG.uniform(-1, 1, LARGE.shape))) < 1e-9
    other = LARGE.copy()
    other.flat[7] = np.nan
    assert sketch.difference(other) == np.inf
    assert not Sketch.of(other).same(other), "arrays that are not finite are never equal"


def test_zeros_of_both_signs_are_equal_to_a_sketch_as_they_are_to_an_array():
    zeros = np.zeros(10_000)
    assert Whole(zeros).same(-zeros)
    assert Sketch.of(zeros).same(-zeros)


@pytest.fixture
def bundle(tmp_path):
    """The path of a bundle with two arrays."""
    path = tmp_path / "small.bundle"
    with archive.writing(path, fingerprints=True) as writer:
        manifest = {"large": writer.kept(LARGE), "small": writer.kept(LARGE[0, :3])}
        writer.finish(manifest)
    return path


def test_a_bundle_gives_back_what_was_put_in(bundle):
    reader = archive.Reader(bundle)
    small, large = (reader.kept(reader.manifest[name]) for name in ("small", "large"))
    assert (small.exact, large.exact) == (True, False)
    assert small.same(LARGE[0, :3])
    assert large.same(LARGE)
    assert large.shape == LARGE.shape
    assert bundle.stat().st_size < LARGE.nbytes / 20


def test_every_damage_is_found_when_a_bundle_is_opened(bundle):
    content = bundle.read_bytes()
    for place in [*RNG.integers(len(content), size=200), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        bundle.write_bytes(damaged)
        try:
            reader = archive.Reader(bundle)
        except RequestError as error:
            assert str(bundle) in str(error)  # noqa: PT017 (some bytes, such as a date's, mean nothing)
        else:
            assert reader.kept(reader.manifest["large"]).same(LARGE)
    for length in (0, 1, 100, len(content) - 1):
        bundle.write_bytes(content[:length])
        with pytest.raises(RequestError, match=r"is not a bundle|is damaged"):
            archive.Reader(bundle)


def rewritten(bundle, change, kind=zipfile.ZIP_STORED, **members):
    """Writes the bundle again with another manifest and more members."""
    with zipfile.ZipFile(bundle) as before:
        contents = {name: before.read(name) for name in before.namelist()}
    manifest = json.loads(contents.pop(archive.MANIFEST))
    change(manifest)
    with zipfile.ZipFile(bundle, "w", kind) as after:
        for name, content in (contents | members).items():
            after.writestr(name, content)
        after.writestr(archive.MANIFEST, json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest.update(version=3), "version 3, and this program reads version 2; use the program"),
        (lambda manifest: manifest.update(version="new"), "has version new"),
        (lambda manifest: manifest.update(format="something"), "is not a bundle; give a file that"),
        (lambda manifest: manifest["members"].pop("000000.npy"), "1 members are missing or unknown"),
        (lambda manifest: manifest["members"].update({"000000.npy": "0"}), "another SHA-256"),
        (lambda manifest: manifest.pop("members"), "is damaged"),
    ],
)
def test_a_foreign_newer_or_patched_bundle_is_refused(bundle, change, says):
    rewritten(bundle, change)
    with pytest.raises(RequestError, match=says):
        archive.Reader(bundle)


def test_nothing_compressed_and_nothing_pickled_is_read(bundle, tmp_path):
    rewritten(bundle, lambda manifest: None, kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(RequestError, match="is compressed"):
        archive.Reader(bundle)
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], object), allow_pickle=True)
    with archive.writing(tmp_path / "pickle.bundle", fingerprints=False) as writer:
        writer.finish({"array": writer._add(".npy", io.BytesIO(pickled.getvalue()))})
    reader = archive.Reader(tmp_path / "pickle.bundle")
    with pytest.raises(RequestError, match="is damaged"):
        reader.array(reader.manifest["array"])


def test_what_cannot_be_recorded_or_judged_is_refused_before_anything_starts(bundle, tmp_path):
    for arguments, says in {
        ("record", "--bundle", bundle): "exists; choose another name",
        ("record", "--bundle", tmp_path / "b", "--json", tmp_path / "j"): "--json is nothing that record needs",
        ("record", "--bundle", tmp_path): "is a directory",
        ("record", "--bundle", tmp_path / "b", "--reference", f"onnx:{bundle}"): "has no float64 to record",
        ("record", "--bundle", tmp_path / "b", "--weights", tmp_path / "none.npz"): "does not exist",
        ("against", tmp_path / "none.bundle"): "does not exist; python -m parity record",
        ("against", ROOT / "README.md"): "is not a bundle",
        ("against", bundle): "is damaged (KeyError: 'options')",
    }.items():
        done = parity(*arguments)
        assert done.returncode == 2, done.stderr
        assert says in " ".join(done.stderr.split())
    assert not (tmp_path / "b").exists()


SMALL = dataclasses.replace(selftest.SMALL, disturbances=1, size="16")


def recorded(path: Path, **settings) -> Path:
    options = {name: settings.pop(name) for name in ("weights", "precision") if name in settings}
    request = record.Record(path, **settings)
    record.record(dataclasses.replace(SMALL, **options), request, Console(quiet=True))
    return path


def opened(path: Path, folder: Path, **settings) -> against.RecordedLadder:
    bundle, options, _ = against.Against(path, **settings).opened()
    return against.RecordedLadder(bundle, options, folder, Console(quiet=True))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """{name: a bundle of the embedded model}; what shows in float64 is recorded in float64 alone."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "fp64": recorded(folder / "fp64", precision="fp64"),
        "fp32": recorded(folder / "fp32", precision="fp32", until="gradients"),
        "fp16": recorded(folder / "fp16", precision="fp16", until="gradients", fingerprints=True),
    }


@pytest.fixture(scope="module")
def ladders(bundles, tmp_path_factory):
    kinds = [(name, "jax") for name in bundles] + [("fp64", "torch")]
    with_folders = [(name, side, tmp_path_factory.mktemp(f"{name}-{side}")) for name, side in kinds]
    found = {(name, side): opened(bundles[name], folder, candidate=side) for name, side, folder in with_folders}
    for ladder in found.values():
        ladder.__enter__()
    yield found
    for ladder in found.values():
        ladder.__exit__()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, fault in faults.FAULTS.items() if not fault.operation and not fault.additions]
)
def test_every_fault_is_found_through_a_bundle(ladders, name):
    fault = faults.FAULTS[name]
    precision = "fp64" if fault.rung == "accuracy" else fault.precision  # its lines name the precision asked for
    failed, found = inject(ladders[precision, fault.framework], dataclasses.replace(fault, precision=precision))
    assert failed is not None, "no rung failed"
    assert found, f"{failed.name}: {first_bug(failed)}; {failed.findings}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16-head", "no-eps"])
def test_an_operation_is_named_through_a_bundle_if_float64_agrees(ladders, name):
    """Then the candidate's own float64 is the oracle; otherwise the record has the unit, and not what is in it."""
    fault = faults.FAULTS[name]
    failed, found = inject(ladders[fault.precision, "jax"], fault)
    assert failed is not None
    assert found == (fault.precision != "fp64"), failed.findings
    assert first_bug(failed).startswith(fault.line)
    if not found:
        assert "which operation is wrong in float64 is not in the record" in failed.findings[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("fp64", "jax"), ("fp32", "jax"), ("fp16", "jax"), ("fp64", "torch")])
def test_without_a_fault_every_bundle_holds(ladders, bundles, kind):
    names = list(get_args(Rung))
    last = archive.Reader(bundles[kind[0]]).manifest["until"]
    assert climb(ladders[kind], names[: names.index(last) + 1]) is None


@pytest.mark.slow
def test_a_machine_without_the_references_framework_judges_by_the_file(bundles, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no PyTorch here')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "parity", "against", bundles["fp32"], "--until", "forward"]
    command += ["--run", tmp_path / "run", "--junit", tmp_path / "run.xml"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HOLDS: jax and torch (recorded) compute the same" in done.stdout
    report = saved.load(tmp_path / "run")
    attested = report["attestation"]["sides"]["fp32"]["reference"]
    assert attested["bundle sha256"] == archive.Reader(bundles["fp32"]).sha256
    assert "torch" in attested["versions"]
    lines = [line for line in report["rungs"][-1]["lines"] if line["precision"] == "fp32"]
    assert all(line["reference_error"] > 0 and line["candidate_error"] > 0 for line in lines)


@pytest.mark.slow
def test_other_weights_than_the_recorded_ones_are_refused(bundles, small_npz, tmp_path):
    fingerprints = bundles["fp16"]
    assert fingerprints.stat().st_size < bundles["fp32"].stat().st_size / 4
    done = parity("against", fingerprints, "--weights", small_npz)
    assert done.returncode == 2
    assert "are others; give the recorded ones with --weights" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_rungs_are_tests_of_pytest(bundles, tmp_path):
    done = rungs_as_tests(tmp_path, "--parity-bundle", bundles["fp64"], "--parity-until", "loss")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("weights", "pixels", "forward", "loss"):
        assert f"test_rung[{name}] PASSED" in done.stdout
