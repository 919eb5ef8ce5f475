"""`folder:PATH` datasets: image files in PATH/SPLIT/CLASS/, the layout of torchvision's ImageFolder."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from input_pipeline.examples import DatasetError, Example, cannot_read, canonical
from input_pipeline.image_file import kind_of, read_image_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
LAYOUT = "folder:PATH holds PATH/SPLIT/CLASS/IMAGE"


class FolderSource:
    """One split of a folder. Classes and files are ordered by the code points of their canonical names, so the order
    does not depend on the file system. Class names are canonical; files are read under their own names."""

    def __init__(self, directory: Path, split: str):
        self.name = f"{directory.name}/{split}"
        self._root = _split_root(directory, split)
        self._directories = directory_names(self._root)
        if not self._directories:
            raise DatasetError(f"{self._root} has no class directories; put each class's images into one of its own")
        self.class_names = [canonical(name) for name in self._directories]
        _require_one_spelling(self._root, self._directories)
        of_class = [_names(self._root / name, directories=False) for name in self._directories]
        empty = [name for name, files in zip(self._directories, of_class, strict=True) if not files]
        if empty:
            raise DatasetError(f"{self._root / empty[0]} has no images; fill that class's directory or remove it")
        self.labels = np.repeat(np.arange(len(of_class), dtype=np.int32), [len(files) for files in of_class])
        self._files = [name for files in of_class for name in files]

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        return self._root / self._directories[self.labels[index]] / self._files[index]

    def __getitem__(self, index: int) -> Example:
        label, path = int(self.labels[index]), self.path(index)
        identity = f"{path.parent.name}/{path.name}"
        return {"image": read_image_file(path), "label": label, "id": identity}


def directory_names(directory: Path) -> list[str]:
    """Returns the names of PATH's splits, or of a split's classes, in the order of their canonical names."""
    return _names(directory, directories=True)


def _split_root(directory: Path, split: str) -> Path:
    root = directory / split
    if _is_directory(root):
        return root
    if not _is_directory(directory):
        raise DatasetError(f"{directory} is not a directory; {LAYOUT}")
    there = directory_names(directory)
    raise DatasetError(
        f"{directory} has no split {split!r}; its directories are {', '.join(there[:8]) or 'none'}. {LAYOUT}"
    )


def _is_directory(path: Path) -> bool:
    """Whether the path is a directory; raises `CannotRead` if the system does not say."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise cannot_read(path, error) from None


def _require_one_spelling(root: Path, names: Sequence[str]) -> None:
    """Refuses two directories whose names a person cannot tell apart: Unicode has several spellings of "é"."""
    spellings: dict[str, str] = {}
    for name in names:
        other = spellings.setdefault(canonical(name), name)
        if other != name:
            raise DatasetError(
                f"{root} has two directories for the class {canonical(name)}, {other!a} and {name!a}, which Unicode "
                "takes for the same name; move the images of both into one"
            )


def _names(directory: Path, *, directories: bool) -> list[str]:
    """Returns the names of everything in a directory except hidden files. Anything that is neither a class nor an image
    is an error, because nobody would notice an image that is left out for its name."""
    try:
        with os.scandir(directory) as entries:
            modes = [(entry.name, _mode(entry)) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise cannot_read(error.filename or directory, error) from None
    expected = "a class directory" if directories else f"an image file ({', '.join(SUFFIXES)})"
    for name, mode in sorted(modes):
        if stat.S_ISDIR(mode) if directories else stat.S_ISREG(mode) and is_image_name(name):
            continue
        what = f"is {kind_of(mode)}, not" if mode and not stat.S_ISREG(mode) else "is not"
        raise DatasetError(f"{directory / name} {what} {expected}; move it elsewhere. {LAYOUT}")
    return sorted((name for name, _ in modes), key=lambda name: (canonical(name), name))


def is_image_name(name: str) -> bool:
    """Whether a file of that name is taken for an image, in a folder of them."""
    return name.lower().endswith(SUFFIXES)


def _mode(entry: os.DirEntry) -> int:
    """Returns an entry's kind, with symbolic links followed. For most files the directory knows it without a `stat`."""
    if entry.is_dir():
        return stat.S_IFDIR
    if entry.is_file():
        return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except FileNotFoundError:
        return stat.S_IFLNK
