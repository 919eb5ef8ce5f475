"""The catalogue, and fetching from a real HTTP server on the loopback that misbehaves as servers do."""

import base64
import hashlib
import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from bit_jax import zoo
from input_pipeline.errors import RequestError

CONTENT = np.random.default_rng(0).bytes(3 << 20)
NAME = "BiT-M-R50x1"


def test_catalogue():
    assert len(zoo.ZOO) == 307
    assert sum("run" in name for name in zoo.ZOO) == 285
    assert len({published.path for published in zoo.ZOO.values()}) == 307
    addresses = {
        "BiT-S-R152x4": ("BiT-S-R152x4.npz", "R152x4", 1000),
        "BiT-M-R50x3": ("BiT-M-R50x3.npz", "R50x3", 21843),
        "BiT-M-R152x2-ILSVRC2012": ("BiT-M-R152x2-ILSVRC2012.npz", "R152x2", 1000),
        "BiT-M-R101x3-run2-cifar100": ("vtab/BiT-M-R101x3-run2-cifar100.npz", "R101x3", 100),
        "R152x2_T_384": ("distill/R152x2_T_384.npz", "R152x2", 1000),
    }
    for name, (path, architecture, classes) in addresses.items():
        published = zoo.ZOO[name]
        assert published.url == f"https://storage.googleapis.com/bit_models/{path}"
        assert (published.architecture, published.num_classes) == (architecture, classes)


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at every path.

    Attributes:
        content: what is sent; announced: what x-goog-hash is of.
        drops: how many answers to cut off after a megabyte.
        etag, status, ranges: of the answers; ranges False ignores Range.
        seen: the Range header of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = self.announced = CONTENT
        self.drops, self.status, self.ranges, self.etag = 0, 200, True, '"1"'
        self.seen: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        wanted = self.headers["Range"]
        server.seen.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if not server.ranges or self.headers["If-Range"] not in (None, server.etag):
            start = 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.etag)
        self.send_header("x-goog-hash", "crc32c=AAAAAA==")
        self.send_header("x-goog-hash", f"md5={base64.b64encode(hashlib.md5(server.announced).digest()).decode()}")
        self.end_headers()
        if server.drops:
            server.drops -= 1
            body = body[: 1 << 20]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("BIT_JAX_MIRROR", f"http://127.0.0.1:{server.server_port}/bit_models/")
    monkeypatch.setenv("BIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached() -> set[str]:
    return {path.name for path in zoo.cache_dir().rglob("*") if path.is_file()}


WHOLE = {f"{NAME}.npz", f"{NAME}.npz.md5", f"{NAME}.npz.lock"}


def test_fetch_once_and_find_again(server):
    path = zoo.find(NAME)
    assert path.read_bytes() == CONTENT
    assert (path.parent / f"{NAME}.npz.md5").read_text() == f"{hashlib.md5(CONTENT).hexdigest()}  {NAME}.npz\n"
    assert cached() == WHOLE
    assert zoo.find(NAME) == path
    assert len(server.seen) == 1


def test_subfolders(server):
    path = zoo.find("BiT-M-R50x1-run0-dtd")
    assert path == zoo.cache_dir() / "vtab" / "BiT-M-R50x1-run0-dtd.npz"


def test_dropped_connections_are_resumed(server):
    server.drops = 2
    assert zoo.find(NAME).read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={1 << 20}-", f"bytes={2 << 20}-"]
    assert cached() == WHOLE


def test_a_later_start_resumes_what_has_arrived(server):
    server.drops = zoo.ATTEMPTS
    server.ranges = False  # no progress beyond the first megabyte
    with pytest.raises(zoo.FetchError, match="kept"):
        zoo.find(NAME)
    assert f"{NAME}.npz" not in cached()
    server.ranges, server.seen = True, []
    assert zoo.find(NAME).read_bytes() == CONTENT
    assert server.seen == [f"bytes={1 << 20}-"]


def test_a_file_changed_meanwhile_is_fetched_from_the_start(server):
    server.drops = zoo.ATTEMPTS
    server.ranges = False
    with pytest.raises(zoo.FetchError):
        zoo.find(NAME)
    server.ranges, server.etag = True, '"2"'
    server.content = server.announced = CONTENT[::-1]
    assert zoo.find(NAME).read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_starts_over(server):
    part = zoo.cache_dir() / f"{NAME}.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(CONTENT) + 5))
    (zoo.cache_dir() / f"{NAME}.npz.part.etag").write_text(server.etag)
    assert zoo.find(NAME).read_bytes() == CONTENT
    assert cached() == WHOLE


def test_wrong_checksum(server):
    server.announced = CONTENT + b"x"
    with pytest.raises(zoo.FetchError, match="MD5"):
        zoo.find(NAME)
    assert cached() == {f"{NAME}.npz.lock"}


def test_not_found(server):
    server.status = 404
    with pytest.raises(zoo.FetchError, match="404") as caught:
        zoo.find(NAME)
    assert str(zoo.cache_dir() / f"{NAME}.npz") in str(caught.value)
    assert len(server.seen) == 1
    assert cached() == {f"{NAME}.npz.lock"}


def test_a_server_in_trouble_is_asked_again(server):
    server.status = 503
    with pytest.raises(zoo.FetchError, match="503"):
        zoo.find(NAME)
    assert len(server.seen) == zoo.ATTEMPTS


def test_offline_says_what_to_fetch_and_where_to_put_it(server, monkeypatch):
    monkeypatch.setenv("BIT_JAX_MIRROR", "http://127.0.0.1:1")
    with pytest.raises(zoo.FetchError) as caught:
        zoo.find(NAME)
    assert "http://127.0.0.1:1/BiT-M-R50x1.npz" in str(caught.value)
    assert str(zoo.cache_dir() / f"{NAME}.npz") in str(caught.value)


def test_an_unwritable_cache(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIT_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(zoo.FetchError, match="BIT_JAX_CACHE"):
        zoo.find(NAME)


def test_two_at_once_fetch_once(server):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(zoo.find(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert server.seen == [None]


def test_unknown_names_get_the_nearest():
    with pytest.raises(RequestError, match="BiT-M-R152x2"):
        zoo.find("BiT-M-R152x3")
    with pytest.raises(RequestError, match="307"):
        zoo.find("zzz")


def test_paths_are_left_alone(small_npz):
    assert zoo.find(str(small_npz)) == small_npz
    assert zoo.find("nowhere/else.npz") == Path("nowhere/else.npz")
