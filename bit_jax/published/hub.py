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
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise RequestError(
            f"{name} is fetched by huggingface_hub, which is not installed: `pip install huggingface_hub`, or fetch "
            f"{CONFIG} and {WEIGHTS[0]} of https://huggingface.co/{repository} into a directory and name that"
        ) from None
    problem: Exception | None = None
    try:
        _fetched(hub, repository, CONFIG)
    except EntryNotFoundError:
        pass  # weights alone can be read too
    except Exception as error:
        problem = error
    for file in WEIGHTS if problem is None else ():
        try:
            return _fetched(hub, repository, file).parent
        except EntryNotFoundError as error:
            problem = error
        except FetchError:
            raise
        except Exception as error:  # of the network, of the hub, of the library's cache
            problem = error
            break
    said = " ".join(str(problem).split())[:200]
    raise FetchError(
        f"cannot fetch {name} ({type(problem).__name__}: {said}); fetch {CONFIG} and {WEIGHTS[0]} of "
        f"https://huggingface.co/{repository} elsewhere into a directory and name that"
    )


def _fetched(hub, repository: str, file: str) -> Path:
    """Returns the file in the cache; one that was not there is verified against the hash that the hub announced."""
    cached = hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    path = Path(hub.hf_hub_download(repository, file))
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
