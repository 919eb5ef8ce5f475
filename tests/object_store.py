"""An object store on the loopback for tests: moto's S3 server, in a thread of the test's process.

It answers one request after the other. With a thread for each, as moto starts it, two conditional writes at once can
both succeed, because it looks whether there is such an object before it writes one; then `Store.require` refuses it.
"""

import contextlib
import logging
import os
import secrets
import threading
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
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=False, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ending:
        ending.callback(server.shutdown)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
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
