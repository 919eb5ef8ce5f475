"""`folder:PATH`: image files in PATH/SPLIT/CLASS/, as torchvision's ImageFolder takes them."""

import os
from pathlib import Path

import numpy as np

from input_pipeline.examples import DatasetError, Example

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class FolderSource:
    """One split; classes and files in the order of their names' code points, whatever the file system's own order."""

    def __init__(self, directory: Path, split: str):
        self.name = f"{directory.name}/{split}"
        self._root = _split_root(directory, split)
        self.class_names = directory_names(self._root)
        if not self.class_names:
            raise DatasetError(f"{self._root} has no class directories; put each class's images into one of its own")
        of_class = [_names(self._root / name, directories=False) for name in self.class_names]
        empty = [name for name, files in zip(self.class_names, of_class, strict=True) if not files]
        if empty:
            raise DatasetError(f"{self._root / empty[0]} has no images; fill that class's directory or remove it")
        self.labels = np.repeat(np.arange(len(of_class), dtype=np.int32), [len(files) for files in of_class])
        self._files = [name for files in of_class for name in files]

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        return self._root / self.class_names[self.labels[index]] / self._files[index]

    def __getitem__(self, index: int) -> Example:
        label, path = int(self.labels[index]), self.path(index)
        identity = f"{path.parent.name}/{path.name}"
        try:
            image = path.read_bytes()
        except OSError as error:
            raise DatasetError(
                f"example {identity} of {self.name} cannot be read ({error.strerror}); is {self._root} still there?"
            ) from None
        return {"image": image, "label": label, "id": identity}


def directory_names(directory: Path) -> list[str]:
    """Of the splits of PATH, or of the classes of a split."""
    return _names(directory, directories=True)


def _split_root(directory: Path, split: str) -> Path:
    root = directory / split
    if root.is_dir():
        return root
    if not directory.is_dir():
        raise DatasetError(f"{directory} is not a directory; folder:PATH holds PATH/SPLIT/CLASS/IMAGE")
    there = directory_names(directory)
    raise DatasetError(
        f"{directory} has no split {split!r}; its directories are {', '.join(there[:8]) or 'none'}. "
        "folder:PATH holds PATH/SPLIT/CLASS/IMAGE"
    )


def _names(directory: Path, *, directories: bool) -> list[str]:
    """Of all that is in a directory but hidden files; anything that is neither class nor image is an error, because an
    image left out by its name would go unnoticed."""
    try:
        with os.scandir(directory) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DatasetError(
            f"{directory} cannot be listed ({error.strerror}); folder:PATH holds PATH/SPLIT/CLASS/IMAGE"
        ) from None
    for name, is_directory in found:
        if is_directory != directories or not (directories or name.lower().endswith(SUFFIXES)):
            expected = "a class directory" if directories else f"an image file ({', '.join(SUFFIXES)})"
            raise DatasetError(f"{directory / name} is not {expected}; remove it from there")
    return [name for name, _ in found]
