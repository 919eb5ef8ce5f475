"""Sources of examples: a split of a dataset as a random-access sequence of image, label and id.

Order, batches and hosts are not a source's concern; `loader.py` decides them.
"""

import errno
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict, TypeVar, runtime_checkable

import numpy as np

from input_pipeline.errors import RequestError
from input_pipeline.terminal import printable

FINGERPRINTED = 64  # examples that a fingerprint covers
NO_LABEL = -1  # label of every example of a split that is published without labels
NAMED = 8  # classes that an error message names
DAMAGED_IN_A_ROW = 10  # so many damaged images in a row mean that the dataset is damaged
T = TypeVar("T")


class DatasetError(RequestError):
    """The dataset cannot be used as requested; the message names it and the remedy."""


class DamagedImage(DatasetError):
    """The bytes of one image cannot be decoded; everything else may be in order."""


class CannotRead(DatasetError):
    """The operating system refuses to read a file. Its content may be in order, so it does not count as damage."""


GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def cannot_read(what: object, error: OSError | int, where: object = "its directory") -> CannotRead:
    """Makes the error for a file that the operating system refuses to read.

    Args:
        what: the file or example, for the message.
        error: the exception that the system raised, or its error number.
        where: the directory that the file lies in, for the message.
    """
    number = error if isinstance(error, int) else error.errno
    reason = os.strerror(number) if number else str(error)
    if number == errno.EMFILE:
        remedy = "; raise the number of files that a process may hold open, with ulimit -n, and start again"
    elif number in GONE:
        remedy = f"; is {where} still there?"
    else:
        remedy = "; mend that and start again"
    return CannotRead(f"{what} cannot be read ({reason}){remedy}")


class Example(TypedDict):
    # uint8 [height, width] or [height, width, 3], or an encoded file; of a `FeatureSource` float32 [channels]
    image: np.ndarray | bytes
    label: int
    id: str


@runtime_checkable
class Source(Protocol):
    """One split of a dataset.

    Attributes:
        name: dataset and split, for messages and results.
        class_names: a name for each label, in the order of the labels.
        labels: int32 [len(source)], known without decoding an image.

    A source that keeps files open also has an attribute `descriptors`, and a source whose images are arrays has
    `decoded`; see the functions of those names.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


def descriptors(source: Source) -> int:
    """Counts the files that stay open while the whole source is read, such as a dataset's shards.

    Files that are closed after each reading, such as a folder's images, do not count.
    """
    return getattr(source, "descriptors", 0)


def decoded(source: Source) -> bool:
    """Whether the source's images are arrays and not encoded files."""
    return getattr(source, "decoded", False)


class ArraySource:
    """Images held in memory."""

    decoded = True

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
        """images: uint8 [n, height, width] or [n, height, width, 3]; labels: [n]."""
        self.name, self.class_names = name, class_names
        self._images, self.labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self.labels[index]), "id": str(index)}


class _Derived:
    """Examples of another source, which are read as that source reads them."""

    def __init__(self, source: Source):
        self._source = source

    @property
    def descriptors(self) -> int:
        return descriptors(self._source)

    @property
    def decoded(self) -> bool:
        return decoded(self._source)


class Subset(_Derived):
    """Some examples of another source, in the order given."""

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        super().__init__(source)
        self.name, self.class_names, self._indices = name, source.class_names, indices

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


def fingerprint(source: Source) -> str:
    """Returns 64 bits of SHA-256 over the number of examples, the class names, and the content of `FINGERPRINTED`
    examples spread over the source. Hosts that read the same data get the same fingerprint."""
    digest = hashlib.sha256(repr((len(source), list(source.class_names))).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, FINGERPRINTED).astype(int)):
        example = source[int(index)]
        image = example["image"]
        shape = image.shape if isinstance(image, np.ndarray) else len(image)
        digest.update(repr((shape, int(example["label"]), example["id"])).encode())
        digest.update(image.tobytes() if isinstance(image, np.ndarray) else image)
    return digest.hexdigest()[:16]


def canonical(name: str) -> str:
    """Returns a class's name in Unicode's composed form (NFC), because macOS and Linux encode "é" differently."""
    return unicodedata.normalize("NFC", name)


class Relabelled(_Derived):
    """Examples of another source with the same classes in another order."""

    def __init__(self, source: Source, class_names: Sequence[str], numbers: np.ndarray):
        """numbers: int32 [classes of source], the new label for each label of the source."""
        super().__init__(source)
        self.name, self.class_names, self.numbers = source.name, class_names, numbers

    @property
    def labels(self) -> np.ndarray:
        labels = self._source.labels
        known = (labels >= 0) & (labels < len(self.numbers))
        return np.where(known, self.numbers[np.where(known, labels, 0)], NO_LABEL).astype(np.int32)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        if example["label"] == NO_LABEL:
            return example
        return {**example, "label": int(self.numbers[label_of(example, self._source)])}


def label_of(example: Example, source: Source) -> int:
    """Returns the example's label, which is the number of one of the source's classes.

    Raises:
        DatasetError: the example has no label, because its split is published without, or one outside the classes.
    """
    label, classes = example["label"], len(source.class_names)
    if 0 <= label < classes:
        return label
    if label == NO_LABEL:
        raise DatasetError(
            f"example {example['id']} of {source.name} has no label: splits such as a challenge's test set are "
            "published without; choose another split"
        )
    raise DatasetError(
        f"example {example['id']} of {source.name} has label {label}, but there are {classes} classes; "
        "choose another split or prepare the dataset again"
    )


def require_labels(source: Source) -> None:
    """Refuses a split that is published without labels, before anything is trained for it.

    Raises:
        DatasetError: the split's first example has no label, or one outside the classes.
    """
    label_of(source[0], source)


def first_undamaged(
    source: Source,
    index: int,
    use: Callable[[int], T],
    *,
    skip_damaged: bool,
    note: Callable[[int, DamagedImage], None] = lambda index, error: None,
) -> tuple[int, T]:
    """Uses an example or, with `skip_damaged`, the first one after it that is not damaged.

    Args:
        index: the index of the example; the source's first example follows its last.
        use: function that is called with an example's index and raises `DamagedImage` if the example is damaged.
        note: function that is called with the index of each damaged example and the error.

    Returns:
        The index of the example that was used, and what `use` returned for it.

    Raises:
        DamagedImage: the example is damaged and `skip_damaged` is false.
        DatasetError: `DAMAGED_IN_A_ROW` examples in a row are damaged.
    """
    for number in range(index, index + DAMAGED_IN_A_ROW):
        number %= len(source)
        try:
            return number, use(number)
        except DamagedImage as error:
            if not skip_damaged:
                raise DamagedImage(f"{error}; --skip-damaged shows the example after it instead") from None
            note(number, error)
    raise DatasetError(
        f"{DAMAGED_IN_A_ROW} examples of {source.name} from number {index} on are damaged; "
        "python -m input_pipeline check lists all that are"
    )


def relabelled(source: Source, class_names: Sequence[str], whose: str) -> Source:
    """Returns the source with labels numbered as in `class_names`; classes are matched by name, never by position.

    Args:
        class_names: names of the classes in the order of the wanted labels.
        whose: the owner of those classes, for the message: "digits/train", "the head of w.npz".

    Raises:
        DatasetError: `source` has classes that are not in `class_names`; the message names them.
    """
    wanted = {canonical(name): label for label, name in enumerate(class_names)}
    unknown = [name for name in source.class_names if canonical(name) not in wanted]
    if unknown:
        shown = ", ".join(printable(name) for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
        there = ", ".join(printable(name) for name in class_names[:NAMED])
        raise DatasetError(
            f"{printable(source.name)} has {len(unknown):,} classes that {printable(whose)} has not: {shown}{more}; "
            f"its {len(class_names):,} begin with {there}. Leave those classes out, or choose another split"
        )
    numbers = np.array([wanted[canonical(name)] for name in source.class_names], np.int32)
    if len(numbers) == len(class_names) and np.array_equal(numbers, np.arange(len(numbers))):
        return source
    return Relabelled(source, class_names, numbers)


def few_shot(source: Source, examples_per_class: int, seed: int) -> Subset:
    """Chooses `examples_per_class` examples of every class, in random order; the choice depends on the seed alone.

    Raises:
        DatasetError: a class has fewer examples.
    """
    order = np.random.default_rng(seed).permutation(len(source))
    labels = source.labels[order]
    chosen = []
    for label, class_name in enumerate(source.class_names):
        of_class = np.flatnonzero(labels == label)[:examples_per_class]
        if not len(of_class):
            raise DatasetError(
                f"{source.name} has no example of class {printable(class_name)}; choose another split, or train with "
                "all examples instead of a number of each class"
            )
        if len(of_class) < examples_per_class:
            raise DatasetError(
                f"{source.name} has {len(of_class)} examples of class {printable(class_name)}, "
                f"not {examples_per_class}; ask for at most {len(of_class)} a class"
            )
        chosen.append(of_class)
    indices = order[np.sort(np.concatenate(chosen))]
    return Subset(source, indices, f"{source.name} ({examples_per_class} a class, seed {seed})")


def parse_slice(split: str) -> tuple[str, str | None, str | None]:
    """Parses `train` or `train[START:STOP]` into (split, start, stop).

    START and STOP are numbers, negative numbers, percentages or empty.

    Raises:
        DatasetError: the text has another form.
    """
    match = re.fullmatch(r"(\w[\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if match is None:
        raise DatasetError(f"split {split!r} is neither a name nor a slice such as train[:98%] or train[100:200]")
    return match[1], match[2], match[3]


def cut(source: Source, split: str) -> Source:
    """Returns the part of a whole split that a slice such as `train[:98%]` names, with the same rounding as tfds."""
    _, *ends = parse_slice(split)
    if ends == [None, None]:
        return source
    count = len(source)

    def place(end: str | None, default: int) -> int:
        if end is None:
            return default
        at = round(int(end[:-1]) * count / 100) if end.endswith("%") else int(end)
        return min(max(at + count if at < 0 else at, 0), count)

    indices = np.arange(place(ends[0], 0), place(ends[1], count))
    return Subset(source, indices, f"{source.name}{split[split.index('[') :]}")
