"""Recognizes files and directories that are not a BiT `.npz` by their content, and says what to do with them."""

import os
import re
import stat
import zipfile
from pathlib import Path

WANTED = (
    "a BiT is read from an official .npz (`python -m bit_jax.zoo list` names those that can be fetched), safetensors, "
    "or a PyTorch file in the names of the original code, timm or Hugging Face"
)

# (first bytes, description, remedy) of files that people may take for weights
BEGINNINGS = (
    (b"\x93NUMPY", "a single NumPy array (.npy)", WANTED),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them", WANTED),
    (b"GGUF", "a GGUF file", WANTED),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, which stands for the file itself",
        "`git lfs pull` in that repository brings the file",
    ),
    (b"\x1f\x8b", "compressed by gzip", "unpack it first"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it first"),
    (b"BZh", "compressed by bzip2", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"%PDF", "a PDF document", WANTED),
)
TAR_MAGIC = slice(257, 262)  # a tar archive has "ustar" here
START = 1024  # bytes of a file that are read to recognize it
PICKLE = rb"\x80[\x02-\x05]"  # what a pickle begins with
# one of these makes a directory one of weights
WEIGHTS = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"}
HEADER = 100_000_000  # bytes: the longest header that the safetensors format allows

# (name of an entry, description, remedy) of directories that people may take for weights
CONTENTS = (
    ("saved_model.pb", "a TensorFlow SavedModel", WANTED),
    ("_CHECKPOINT_METADATA", "an Orbax checkpoint", "a run writes its weights as final.npz in its work directory"),
    ("manifest.ocdbt", "an Orbax checkpoint", "a run writes its weights as final.npz in its work directory"),
    ("final.npz", "a run's work directory", "name the final.npz in it"),
)


def container(path: Path) -> str | None:
    """Returns what may hold a BiT's weights: `npz`, `safetensors`, `pickle` (what torch.save writes), or `directory`
    (with one of the last two in it, or an index of several). Whatever `recognize` can name better is an `npz`, because
    its reader says so.

    Raises:
        OSError: the file or directory cannot be read.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return "directory" if WEIGHTS & set(os.listdir(path)) else "npz"
    if not stat.S_ISREG(mode):
        return "npz"
    with open(path, "rb") as file:
        start = file.read(START)
    if _is_safetensors(start):
        return "safetensors"
    return "pickle" if re.match(PICKLE, start) or (start.startswith(b"PK") and _is_torch(path)) else "npz"


def recognize(path: Path) -> str | None:
    """Returns a clause that says what the file or directory is and what to do, or None if it may be an .npz.

    It reads only the first bytes of a file, and the names in a zip file or directory.

    Raises:
        OSError: the file or directory cannot be read.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return _directory(path)
    if not stat.S_ISREG(mode):
        return "is a pipe, socket or device; name a file of weights"
    with open(path, "rb") as file:
        start = file.read(START)
    if not start:
        return "is empty; get it again"
    for beginning, what, remedy in BEGINNINGS:
        if start.startswith(beginning):
            return f"is {what}; {remedy}"
    if start.startswith(b"PK"):
        return _zip(path)
    if _is_safetensors(start):
        return "is a safetensors file, and an .npz is wanted here"
    if not any(start):
        return "begins with zeros, as a file does whose download or copy did not finish; get it again"
    if re.match(PICKLE, start):
        return "is a Python pickle, as PyTorch's older .pth files are, and an .npz is wanted here"
    if start[TAR_MAGIC] == b"ustar":
        return "is a tar archive; unpack it first"
    return _text(start)


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= HEADER


def _is_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # damaged directories make zipfile raise many kinds
        return False


def _directory(path: Path) -> str:
    names = set(os.listdir(path))
    for name, what, remedy in CONTENTS:
        if name in names:
            return f"is {what}; {remedy}"
    return "is a directory without weights; name a file of weights"


def _zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damaged directories make zipfile raise many kinds
        return None
    if any(name.endswith("data.pkl") for name in names):
        return "is a PyTorch file, and an .npz is wanted here"
    if "model.weights.h5" in names:
        return f"is a Keras model; {WANTED}"
    if not any(name.endswith(".npy") for name in names):
        return f"is a zip file without .npy arrays; {WANTED}"
    return None


def _text(start: bytes) -> str:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        return f"is a web page, such as a server's login or error page; {WANTED}"
    if text.startswith(b"<?xml"):
        return f"is an XML document, such as a server's error message; {WANTED}"
    if text.startswith((b"{", b"[")):
        return f"is JSON text; {WANTED}"
    return f"is no file of weights; {WANTED}"
