"""ImageNet's two archives in small, for tfds's own builder: an archive of archives by synset, and one of validation
images."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from input_pipeline import imagenet
from parity.sides.inputs import pictures

SYNSETS = {"n01440764": 3, "n01443537": 5, "n15075141": 4}  # labels 0, 1 and 999
VALIDATION = 5


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pictures(1, 60 + seed % 17, 70 + seed % 23, seed)[0]).save(file, "JPEG", quality=90)
    return file.getvalue()


def train_members(counts: dict[str, int] = SYNSETS) -> list[tuple[str, bytes]]:
    """(name, content) of each synset's archive."""
    members = []
    for synset, count in counts.items():
        images = [(f"{synset}_{number}.JPEG", jpeg(int(synset[1:]) % 1000 + number)) for number in range(count)]
        members.append((f"{synset}.tar", tar(images)))
    return members


def validation_members(count: int = VALIDATION) -> list[tuple[str, bytes]]:
    return [(validation_name(number), jpeg(5000 + number)) for number in range(1, count + 1)]


def validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def tar(members: Iterable[tuple[str, bytes | None]]) -> bytes:
    """An archive's bytes; None: a directory."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content or b""))
    return file.getvalue()


def write(directory: Path, train: bytes | None = None, validation: bytes | None = None) -> Path:
    """Both archives, as they should be unless told otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / imagenet.TRAIN.name).write_bytes(tar(train_members()) if train is None else train)
    (directory / imagenet.VALIDATION.name).write_bytes(tar(validation_members()) if validation is None else validation)
    return directory
