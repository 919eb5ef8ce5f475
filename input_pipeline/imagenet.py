"""Checks of ImageNet's two archives before tfds reads them; tfds itself makes none of them.

tfds pairs the validation labels with the sorted names that it finds in the archive: if an image is missing, or the
archive has an entry for a directory, all labels after it are wrong. For a missing archive tfds only prints a warning.
"""

import contextlib
import dataclasses
import hashlib
import re
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from input_pipeline.examples import DatasetError

CHUNK = 1 << 22
# Free space needed, as a multiple of the archives' size: the dataset, and a margin. tfds's shuffled buckets are deleted
# as the shards are written.
ROOM = 1.05
GIB = 2**30
Advance = Callable[[int], None]  # a function that is called with the number of bytes done so far


@dataclasses.dataclass(frozen=True)
class Archive:
    """One of the files that image-net.org offers for ILSVRC2012.

    Attributes:
        name, size, md5: the file's name, its size in bytes and its MD5.
        images: number of images in it.
    """

    name: str
    size: int
    md5: str
    images: int


TRAIN = Archive("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e", 1_281_167)
VALIDATION = Archive("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622", 50_000)


def find(manual_dir: Path, archive: Archive, *, subset: bool) -> Path:
    """Returns the archive's path.

    Raises:
        DatasetError: the archive is missing, or, unless `subset`, has another size.
    """
    path = manual_dir / archive.name
    if not path.is_file():
        raise DatasetError(f"{path} is missing; get it from https://image-net.org/download-images")
    size = path.stat().st_size
    if size != archive.size and not subset:
        raise DatasetError(
            f"{path} has {size:,} bytes, not {archive.size:,}; fetch it again, "
            "or say --subset if it holds only some images on purpose"
        )
    return path


def train_images(path: Path, synsets: Collection[str], *, subset: bool, advance: Advance) -> int:
    """Counts the images in the training archive, which holds one archive per class.

    Raises:
        DatasetError: a member is no known class, or its images are not named after it, or a member or image is there
            twice, or, unless `subset`, some are missing.
    """
    known, present, images = set(synsets), set(), 0
    with _opened(path) as outer:
        for member in outer:
            advance(member.offset)
            synset = member.name.removesuffix(".tar")
            if not member.isreg() or member.name != f"{synset}.tar" or synset not in known:
                raise DatasetError(
                    f"{path} holds {member.name!r}, which is not one of the {len(known):,} classes' archives such as "
                    f"{min(known)}.tar; repack it without directories and without ./ before the names"
                )
            if synset in present:
                raise DatasetError(f"{path} holds {member.name} twice; fetch it again")
            present.add(synset)
            images += _class_images(path, outer, member, synset)
    missing = sorted(known - present)
    if not present or (missing and not subset):
        raise DatasetError(
            f"{path} lacks {len(missing):,} of {len(known):,} classes, {', '.join(missing[:3])} among them; "
            "fetch it again, or say --subset if that is on purpose"
        )
    _full(path, images, TRAIN.images, subset=subset)
    return images


def validation_images(path: Path, *, subset: bool, advance: Advance) -> int:
    """Counts the images in the validation archive: ILSVRC2012_val_00000001.JPEG and so on, without a gap.

    Raises:
        DatasetError: there is any other member or a gap, or, unless `subset`, images are missing.
    """
    numbers: list[int] = []
    with _opened(path) as archive:
        for member in archive:
            advance(member.offset)
            name = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", member.name)
            if name is None or not member.isreg():
                raise DatasetError(
                    f"{path} holds {member.name!r}; it may hold only ILSVRC2012_val_00000001.JPEG and on, because tfds "
                    "pairs labels with whatever names it finds, in order"
                )
            numbers.append(int(name[1]))
    for expected, number in enumerate(sorted(numbers), 1):
        if number != expected:
            what = "is missing" if number > expected else "is there twice"
            raise DatasetError(
                f"{path}: ILSVRC2012_val_{min(number, expected):08d}.JPEG {what}, and all labels after it would be "
                "wrong; fetch it again"
            )
    _full(path, len(numbers), VALIDATION.images, subset=subset)
    return len(numbers)


def verify_md5(path: Path, archive: Archive, advance: Advance) -> None:
    """Reads the whole file and compares its MD5.

    Raises:
        DatasetError: the MD5 differs.
    """
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(done := done + len(chunk))
    if digest.hexdigest() != archive.md5:
        raise DatasetError(f"{path} has MD5 {digest.hexdigest()}, not {archive.md5}; fetch it again")


def check_room(data_dir: Path, needed: int) -> None:
    """Checks that the file system of `data_dir` has `ROOM` times `needed` bytes free.

    Raises:
        DatasetError: it has less.
    """
    there = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(there).free, int(needed * ROOM)
    if free < wanted:
        raise DatasetError(
            f"{data_dir} has {free / GIB:,.1f} GiB free, but {wanted / GIB:,.1f} GiB are needed; free some or choose "
            "another --data-dir"
        )


def _class_images(path: Path, outer: tarfile.TarFile, member: tarfile.TarInfo, synset: str) -> int:
    names = set()
    inner = outer.extractfile(member)
    assert inner is not None, "a regular file can be opened"
    try:
        with tarfile.open(fileobj=inner, mode="r:") as images:
            for image in images:
                if not image.isreg() or not re.fullmatch(rf"{synset}_\d+\.JPEG", image.name) or image.name in names:
                    raise DatasetError(
                        f"{path}: {member.name} holds {image.name!r}, not {synset}_NUMBER.JPEG, each once; "
                        "fetch it again"
                    )
                names.add(image.name)
    except tarfile.TarError as error:
        raise DatasetError(f"{path}: {member.name} in it is damaged ({error}); fetch it again") from None
    if not names:
        raise DatasetError(f"{path}: {member.name} holds no image; fetch it again")
    return len(names)


def _full(path: Path, images: int, expected: int, *, subset: bool) -> None:
    if not images or (images != expected and not subset):
        raise DatasetError(
            f"{path} holds {images:,} images, not {expected:,}; fetch it again, or say --subset if that is on purpose"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Opens a tar file; the error for damage anywhere in it names the file."""
    try:
        with tarfile.open(path, mode="r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise DatasetError(f"{path} is truncated or no tar archive ({error}); fetch it again") from None
