"""An object store on the loopback for tests: moto's S3 server, in a thread of the test's process."""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from bit_jax.stores.store import Store
from input_pipeline.files import Url

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Name of a bucket that this process and those that it starts can write to, as s3://NAME."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ending:
        ending.callback(server.stop)
        address, port = server.get_host_and_port()
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{address}:{port}")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        name = f"bucket-{secrets.token_hex(4)}"  # fsspec keeps what it has opened by its name
        boto3.client("s3").create_bucket(Bucket=name)
        yield name


@pytest.fixture
def url(bucket) -> Url:
    """URL of a work directory that nobody has written to."""
    return Url(f"s3://{bucket}/{secrets.token_hex(4)}/run")


@pytest.fixture
def store(url) -> Store:
    return Store(url)


def text(store: Store, key: str) -> str:
    """The content of an object that is there."""
    content = store.read(key)
    assert content is not None
    return content.decode()


def copied_to(store: Store, folder: Path) -> Path:
    """A directory with all objects of the store, as a tool of the store would copy them."""
    for key in store.sizes():
        store.fetch(key, folder / key)
    return folder
