"""The file of a bundle: a zip archive of arrays and files, none of them compressed or pickled, with a manifest.

The manifest, `manifest.json`, is the archive's last member. It gives the SHA-256 of every other member, and whatever
the bundle's writer entered. Entries of arrays and files are what `Writer` returns and `Reader` takes.
"""

import contextlib
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from input_pipeline.errors import RequestError
from input_pipeline.files import replacing
from input_pipeline.terminal import printable
from parity.ladder.kept import SAMPLE, SMALL, Kept, Sketch, Whole

FORMAT = "parity bundle"
# Version 2 may have `additions` among its options, which programs that read version 1 alone would not ask for. What has
# none is still written as version 1, which those programs read.
VERSION, PLAIN = 2, 1
MANIFEST = "manifest.json"
CHUNK = 1 << 20  # bytes read at a time
EPOCH = (1980, 1, 1, 0, 0, 0)  # date of every member: the same content gives the same file
AGAIN = "copy or record it again"

Entry = dict[str, Any]


class Writer:
    """Writes a bundle; see `writing`."""

    def __init__(self, archive: zipfile.ZipFile, *, fingerprints: bool):
        self._archive, self._fingerprints = archive, fingerprints
        self._members: dict[str, str] = {}

    def kept(self, array: np.ndarray, *, sample: int = SAMPLE, sketched: bool = False) -> Entry:
        """Stores an array, or a sketch of it if that is asked for and the array is not small.

        Args:
            sample: values that a sketch keeps.
            sketched: whether to sketch the array even in a bundle of whole arrays.
        """
        if not (self._fingerprints or sketched) or array.size <= SMALL:
            return {"array": self.array(array)}
        sketch = Sketch.of(array, sample=min(sample, array.size))
        return {"sketch": self.array(sketch.numbers), "facts": sketch.facts}

    def array(self, array: np.ndarray) -> str:
        """Stores an array; returns the member's name."""
        content = io.BytesIO()
        np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
        content.seek(0)
        return self._add(".npy", content)

    def file(self, path: Path) -> str:
        """Stores a file's bytes; returns the member's name."""
        with open(path, "rb") as content:
            return self._add("", content)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest."""
        whole = {"format": FORMAT, "version": VERSION, "members": self._members} | manifest
        self._archive.writestr(zipfile.ZipInfo(MANIFEST, EPOCH), json.dumps(whole))

    def _add(self, suffix: str, content: IO[bytes]) -> str:
        name, digest = f"{len(self._members):06d}{suffix}", hashlib.sha256()
        with self._archive.open(zipfile.ZipInfo(name, EPOCH), "w", force_zip64=True) as member:
            while chunk := content.read(CHUNK):
                digest.update(chunk)
                member.write(chunk)
        self._members[name] = digest.hexdigest()
        return name


@contextlib.contextmanager
def writing(path: Path, *, fingerprints: bool) -> Iterator[Writer]:
    """Opens a bundle to be written; the file gets its name once it is complete, and after an error nothing remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        yield Writer(archive, fingerprints=fingerprints)


class Reader:
    """Reads a bundle, every byte of which is verified when it is opened.

    Attributes:
        path: path of the bundle.
        manifest: the manifest.
        sha256: SHA-256 of the manifest, which identifies the whole content.

    Raises:
        RequestError: the file is missing, damaged, something else than a bundle, or a newer program's.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            content = self._archive.read(MANIFEST)
            self.manifest: dict[str, Any] = json.loads(content)
            foreign = self.manifest.get("format") != FORMAT
        except FileNotFoundError:
            raise RequestError(f"bundle {path} does not exist; python -m parity record writes one") from None
        except OSError as error:
            raise RequestError(f"bundle {path} cannot be read ({error.strerror}); mend that and start again") from None
        except Exception as error:  # damaged archives and texts make zipfile and json raise many kinds
            foreign = isinstance(error, KeyError) or not zipfile.is_zipfile(path)
            if not foreign:
                raise self.damaged(error) from None
        if foreign:
            raise RequestError(f"{path} is not a bundle; give a file that python -m parity record wrote")
        self._check_version()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._verify(self.manifest["members"])
        except Exception as error:
            raise self.damaged(error) from None

    def damaged(self, error: Exception) -> RequestError:
        """Returns the error that the bundle is damaged."""
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        return RequestError(f"bundle {self.path} is damaged ({reason}); {AGAIN}")

    def kept(self, entry: Entry) -> Kept:
        """Returns what is kept of an array."""
        if "array" in entry:
            return Whole(self.array(entry["array"]))
        return Sketch.restored(self.array(entry["sketch"]), entry["facts"])

    def array(self, name: str) -> np.ndarray:
        """Returns the array of a member.

        Raises:
            RequestError: the member is no array, or one of Python objects, which are never read.
        """
        try:
            return np.load(io.BytesIO(self._archive.read(name)), allow_pickle=False)
        except Exception as error:
            raise self.damaged(error) from None

    def extract(self, name: str, path: Path) -> Path:
        """Writes a member's bytes to a path, which is returned."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._archive.open(name) as member, open(path, "wb") as file:
            shutil.copyfileobj(member, file)
        return path

    def _check_version(self) -> None:
        version = self.manifest.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise RequestError(
                f"bundle {self.path} has version {printable(str(version))}, and this program reads version {VERSION}; "
                "use the program that recorded it, or a newer one"
            )

    def _verify(self, members: dict[str, str]) -> None:
        """Raises ValueError if a member is compressed, missing, unknown or has another SHA-256."""
        names = set(self._archive.namelist()) - {MANIFEST}
        if names != members.keys():
            raise ValueError(f"{len(names ^ members.keys())} members are missing or unknown")
        for name, expected in members.items():
            if self._archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"member {name} is compressed")
            digest = hashlib.sha256()
            with self._archive.open(name) as member:
                while chunk := member.read(CHUNK):
                    digest.update(chunk)
            if digest.hexdigest() != expected:
                raise ValueError(f"member {name} has another SHA-256 than the manifest says")
