"""Fetches a model of the Hugging Face Hub, `hf:OWNER/NAME`, by the hub's own library, and verifies what arrived.

The library decides where the hub is (`HF_ENDPOINT`), where files are kept (`HF_HOME`) and whether it may ask for any
(`HF_HUB_OFFLINE`).
"""

# pyright: reportMissingImports=false
import hashlib
from pathlib import Path

from bit_jax.published.errors import FetchError
from input_pipeline.errors import RequestError

PREFIX = "hf:"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that the hub has is taken
SHA256, SHA1 = 64, 40  # digits of the names that the library's cache gives to files: of LFS, and of Git


def directory(name: str) -> Path:
    """Returns the directory with config.json and weights of a model, fetched unless it is in the library's cache.

    Args:
        name: hf:OWNER/NAME.

    Raises:
        RequestError: the name has another form, or huggingface_hub is not installed.
        FetchError: the hub does not have the model or cannot be reached, or a file is not what the hub announced.
    """
    repository = name.removeprefix(PREFIX)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise RequestError(f"{name} names no model of the hub; write hf:OWNER/NAME, such as hf:google/bit-50")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise RequestError(
            f"{name} is fetched by huggingface_hub, which is not installed: `pip install huggingface_hub`, or fetch "
            f"{CONFIG} and {WEIGHTS[0]} of https://huggingface.co/{repository} into a directory and name that"
        ) from None
    try:
        return _directory(hub, repository)
    except FetchError:
        raise
    except Exception as error:  # of the network, of the hub, of the library's cache
        said = " ".join(str(error).split())[:200]
        raise FetchError(
            f"cannot fetch {name} ({type(error).__name__}: {said}); fetch {CONFIG} and {WEIGHTS[0]} of "
            f"https://huggingface.co/{repository} elsewhere into a directory and name that"
        ) from None


def _directory(hub, repository: str) -> Path:
    config = _if_there(hub, repository, CONFIG)  # weights alone can be read too
    weights = next(filter(None, (_if_there(hub, repository, file) for file in WEIGHTS)), None)
    if weights is None:
        raise FileNotFoundError(f"it has neither {' nor '.join(WEIGHTS)}")
    if config is not None and config.parent != weights.parent:
        # the model was changed after its config.json came into the cache
        _if_there(hub, repository, CONFIG, revision=weights.parent.name)
    return weights.parent


def _if_there(hub, repository: str, file: str, *, revision: str | None = None) -> Path | None:
    """Returns the file in the cache, fetched if need be; None where the hub says, or said once, that the model has no
    such file."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = hub.try_to_load_from_cache(repository, file, revision=revision)
    if cached is not None:  # the path, or an object that stands for the hub's word that there is none
        return Path(cached) if isinstance(cached, str) else None
    try:
        return _fetched(hub, repository, file, revision)
    except LocalEntryNotFoundError:  # which is an EntryNotFoundError too: the hub could not be asked
        raise
    except EntryNotFoundError:
        return None


def _fetched(hub, repository: str, file: str, revision: str | None) -> Path:
    """Returns the file in the cache, fetched and verified against the hash that the hub announced."""
    path = Path(hub.hf_hub_download(repository, file, revision=revision))
    blob = path.resolve()  # the cache names a file by its hash, and the model's directory links there
    if not _is(blob, blob.name):
        blob.unlink()
        path.unlink(missing_ok=True)
        raise FetchError(f"{file} of hf:{repository} is not what the hub announced; nothing of it was kept")
    return path


def _is(path: Path, digest: str) -> bool:
    """Whether a file has the hash: a SHA-256, or Git's SHA-1 of a blob; a name of another form says nothing."""
    if len(digest) == SHA256:
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == digest
    if len(digest) == SHA1:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == digest
    return True
