"""Mutated files through every door that reads one: `python tests/fuzz.py weights|side|images --minutes 10 --seed 0`.

Each file is a good one with a few bytes changed, cut, repeated or exchanged. It has to be read, or refused by a
`RequestError`, within `SECONDS` and without taking more than `MEMORY`. Anything else is a finding: it is shown, its
file is kept, and the exit code is 1. The same seed gives the same files.
"""

import collections
import dataclasses
import gzip
import hashlib
import io
import json
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image

from bit_jax.accounts import starts
from bit_jax.checkpoints import packed, shared
from bit_jax.checkpoints.objects import MANIFEST, Checkpoint, Content, Damage
from bit_jax.checkpoints.pieces import Piece, Tile
from bit_jax.formats import described, safetensors, weights
from bit_jax.formats.names import PEERS
from bit_jax.model.architecture import Architecture
from bit_jax.stores.store import Store
from bit_jax.training import metrics
from input_pipeline import Views, claims, typical_area
from input_pipeline.errors import RequestError
from input_pipeline.files import read_json
from input_pipeline.idx import open_idx
from input_pipeline.preprocess import decode, native_area

SECONDS = 60.0  # for one file; an image of as many pixels as are allowed is read four times
MEMORY = 6 * 2**30  # bytes of address space beside what the imports took
SMALL = Architecture((1, 1, 1, 1), 0.5, 3)
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass
class Door:
    """Something that reads a file.

    Attributes:
        name: for people.
        good: contents that it reads.
        read: is given the path of a mutated one.
        file: the name that the file must have.
    """

    name: str
    good: list[bytes]
    read: Callable[[Path], object]
    file: str


def main(target: tyro.conf.Positional[Literal["weights", "side", "images"]], minutes: float = 10, seed: int = 0) -> int:
    """Shows how many files each door read and refused.

    Args:
        target: which doors: weight files, side files (JSON, logs, idx, claims), or images.
        minutes: how long to go on.
        seed: decides the files.
    """
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    rng, folder = np.random.default_rng(seed), Path("runs/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    doors = {"weights": weight_doors, "side": side_doors, "images": image_doors}[target](folder)
    counts: dict[str, collections.Counter] = {door.name: collections.Counter() for door in doors}
    until, found = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < until:
        for door in doors:
            content = mutated(door.good[rng.integers(len(door.good))], rng)
            outcome = judged(door, folder, content)
            counts[door.name][outcome.split(":")[0]] += 1
            if outcome not in ("read", "refused"):
                found += 1
                kept = folder / f"finding{found}.{door.file}"
                kept.write_bytes(content)
                print(f"{door.name}: {outcome}; {kept}", flush=True)
    for name, outcomes in counts.items():
        print(f"{name:24} {outcomes.total():>9,} files: " + ", ".join(f"{n:,} {what}" for what, n in outcomes.items()))
    return 1 if found else 0


def judged(door: Door, folder: Path, content: bytes) -> str:
    """`read`, `refused`, or what is wrong with the way that the door took it."""
    path = folder / door.file
    path.write_bytes(content)
    start = time.monotonic()
    try:
        door.read(path)
        outcome = "read"
    except RequestError as error:
        outcome = "refused" if "\n" not in str(error) else f"several lines: {str(error)!r}"
    except Exception as error:
        traceback.print_exc()
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    return f"slow: {seconds:.1f} s" if seconds > SECONDS else outcome


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The content after one to four changes; every tenth time it is left as it is."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5) if rng.random() < 0.9 else 0):
        if not data:
            break
        # most of what a reader trusts stands at the beginning or the end
        near = int(len(data) * rng.beta(0.3, 0.3)) % len(data)
        length = int(min(2 ** rng.integers(0, 12), len(data) - near))
        kind = rng.integers(7)
        if kind == 0:
            data[near] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[near : near + length] = rng.bytes(length)
        elif kind == 2:
            del data[near:]
        elif kind == 3:
            del data[near : near + length]
        elif kind == 4:
            data[near:near] = data[near : near + length]
        elif kind == 5:
            value = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
            number = value.to_bytes(8, str(rng.choice(["little", "big"])))[: int(rng.choice([2, 4, 8]))]
            data[near : near + len(number)] = number
        else:
            other = int(rng.integers(len(data)))
            data[near : near + length] = data[other : other + length]
    return bytes(data)


def weight_doors(folder: Path) -> list[Door]:
    rng = np.random.default_rng(0)
    arrays = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SMALL.layout.items()}
    good = []
    for save in (np.savez, np.savez_compressed):
        held = io.BytesIO()
        save(held, **arrays)
        good.append(held.getvalue())

    def read(path: Path) -> None:
        _, found = weights.read(path)
        collections.deque(found, maxlen=0)

    peer, state = PEERS["timm"], io.BytesIO()
    named = {peer.name(key): peer.array(key, array) for key, array in arrays.items()}
    safetensors.write(state, named, {"format": "pt"})
    pickled = []
    for zipped in (True, False):
        held = io.BytesIO()
        tensors = {name: torch.from_numpy(array.copy()) for name, array in named.items()}
        torch.save({"model": tensors}, held, _use_new_zipfile_serialization=zipped)
        pickled.append(held.getvalue())
    return [
        Door("weights", good, read, "w.npz"),
        Door("safetensors", [state.getvalue()], read, "w.safetensors"),
        Door("torch.save", pickled, read, "w.pth"),
    ]


def side_doors(folder: Path) -> list[Door]:
    config = (ROOT / "bit_jax" / "assets" / "fashion-mnist-R14x0.5" / "config.json").read_bytes()
    result = (ROOT / "bit_jax" / "assets" / "fashion-mnist-R14x0.5" / "result.json").read_bytes()
    logged = (ROOT / "bit_jax" / "assets" / "fashion-mnist-R14x0.5" / "metrics.jsonl").read_bytes()
    images = np.array([2051, 2, 3, 3], ">i4").tobytes() + bytes(18)
    labels = np.array([2049, 2], ">i4").tobytes() + bytes([0, 1])

    def manifest(path: Path) -> None:
        inside = folder / "checkpoint"
        inside.mkdir(exist_ok=True)
        (inside / "a").write_bytes(b"a")
        path.rename(inside / shared.MANIFEST)
        shared._damage(inside)

    store, checkpoint = Store(folder / "store"), Checkpoint(3, "a")
    pieces = [Piece(key, (2,), Tile((0,), (2,)), np.ones(2, np.float32)) for key in ("params/a", "params/b")]
    (folder / "store" / checkpoint.folder).mkdir(parents=True, exist_ok=True)
    index = json.dumps(packed.write(folder / "store" / checkpoint.pieces(0), pieces, checkpoint.origin)).encode()

    def stored(manifest: bytes, index: bytes) -> None:
        store.write(checkpoint.index(0), index)
        store.write(f"{checkpoint.folder}/{MANIFEST}", manifest)
        try:
            content = Content.of(store, checkpoint, store.sizes())
            collections.deque(content.read(store, [part for parts in content.parts.values() for part in parts]), 0)
        except Damage as damage:
            raise RequestError(str(damage)) from None

    def naming(index: bytes) -> bytes:
        return json.dumps({"sha256": {"index.0.json": hashlib.sha256(index).hexdigest()}}).encode()

    def idx(path: Path) -> None:
        other = {"images": labels, "labels": images}["images" if "images" in path.name else "labels"]
        name = "t10k-labels-idx1-ubyte" if "images" in path.name else "t10k-images-idx3-ubyte"
        (folder / name).write_bytes(other)
        try:
            source = open_idx(folder, "test")
            if len(source):
                typical_area(source, skip_damaged=False)
        finally:
            (folder / name).unlink()
            path.unlink()

    digests = json.dumps({"a": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}).encode()
    start = starts.Line(1e9, 3.0, {"whole": 2.0, "other": 1.0}, "whole", 0.5, 1, 1, 8, start=0, step=3, trains=1.0)
    line = "".join(json.dumps(dataclasses.asdict(start)) + "\n" for _ in range(3))
    said = {"token": "1", "beat": "0", "host": "h", "machine": "m", "process": 1, "started": "1", "since": "s"}
    return [
        Door("config.json", [config], lambda path: described.described(path), "config.json"),
        Door("result.json", [result], lambda path: read_json(path, dict, "remedy"), "result.json"),
        Door("metrics.jsonl", [logged], lambda path: metrics.read(path, 100), "metrics.jsonl"),
        Door("starts.jsonl", [line.encode()], starts.read, "starts.jsonl"),
        Door("sha256.json", [digests], manifest, "sha256.json"),
        Door("manifest of a store", [naming(index)], lambda path: stored(path.read_bytes(), index), "manifest.json"),
        Door(
            "index of a store", [index], lambda path: stored(naming(path.read_bytes()), path.read_bytes()), "index.json"
        ),
        Door(
            "claim",
            [json.dumps(said).encode()],
            lambda path: claims.is_alive(claims._read(path), lambda: claims._read(path), path, 0.0),
            "claim",
        ),
        Door("idx images", [images], idx, "t10k-images-idx3-ubyte"),
        Door("idx labels", [labels], idx, "t10k-labels-idx1-ubyte"),
        Door("idx images, gzip", [gzip.compress(images)], idx, "t10k-images-idx3-ubyte.gz"),
    ]


def image_doors(folder: Path) -> list[Door]:
    """What is read has to have the pixels that Pillow gives."""
    rng, good = np.random.default_rng(0), []
    for mode in ("RGB", "L", "CMYK", "P", "RGBA", "I;16", "1"):
        pixels = rng.integers(0, 256, (37, 53, 3), np.uint8)
        image = Image.fromarray(pixels)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        for form in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF"):
            held = io.BytesIO()
            try:
                image.save(held, form)
            except (OSError, KeyError, ValueError):  # no such mode in this format
                continue
            good.append(held.getvalue())
    views = Views(40, 32, flip=True), Views(40, 32, flip=True, resize="tf")

    def read(path: Path) -> None:
        data = path.read_bytes()
        pixels = decode(data)
        assert native_area(data) > 0
        for view in views:
            view.train(data, np.random.default_rng(0))
        with Image.open(io.BytesIO(data)) as opened:
            if not opened.mode.startswith("I"):
                np.testing.assert_array_equal(pixels, np.asarray(opened.convert("RGB")))

    return [Door("images", good, read, "image")]


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
