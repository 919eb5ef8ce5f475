"""The catalogue, and fetching from a real HTTP server on the loopback that misbehaves as servers do."""

import base64
import hashlib
import http.server
import json
import os
import pwd
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from bit_jax import zoo
from bit_jax.published import fetch, locate
from bit_jax.published.catalogue import CATALOGUE, PublishedFile
from bit_jax.published.errors import FetchError
from input_pipeline.claims import CLAIM
from input_pipeline.errors import RequestError

CONTENT = np.random.default_rng(0).bytes(3 << 20)
NAME = "BiT-M-R50x1"


def test_catalogue():
    assert len(CATALOGUE) == 307
    assert sum("run" in name for name in CATALOGUE) == 285
    assert len({published.path for published in CATALOGUE.values()}) == 307
    addresses = {
        "BiT-S-R152x4": ("BiT-S-R152x4.npz", "R152x4", 1000),
        "BiT-M-R50x3": ("BiT-M-R50x3.npz", "R50x3", 21843),
        "BiT-M-R152x2-ILSVRC2012": ("BiT-M-R152x2-ILSVRC2012.npz", "R152x2", 1000),
        "BiT-M-R101x3-run2-cifar100": ("vtab/BiT-M-R101x3-run2-cifar100.npz", "R101x3", 100),
        "R152x2_T_384": ("distill/R152x2_T_384.npz", "R152x2", 1000),
    }
    for name, (path, architecture, classes) in addresses.items():
        published = CATALOGUE[name]
        assert published.url == f"https://storage.googleapis.com/bit_models/{path}"
        assert (published.architecture, published.num_classes) == (architecture, classes)


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at every path.

    Attributes:
        content: what is sent; announced: what x-goog-hash is of.
        drops: how many answers to cut off after a megabyte.
        etag, status, ranges: of the answers; ranges False ignores Range.
        other: headers to send in place of the right ones, or not at all where None; `rest`: the same of a 206.
        endless: send zeros for ever in place of the content.
        redirects: addresses to send the first requests to.
        seen: the Range header of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = self.announced = CONTENT
        self.drops, self.status, self.ranges, self.etag, self.endless = 0, 200, True, '"1"', False
        self.other: dict[str, str | None] = {}
        self.rest: dict[str, str | None] = {}
        self.redirects: list[str] = []
        self.seen: list[str | None] = []

    def handle_error(self, request, client_address):
        """Clients that hang up are what some tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        wanted = self.headers["Range"]
        server.seen.append(wanted)
        if server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects.pop())
            self.end_headers()
            return
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
        md5 = base64.b64encode(hashlib.md5(server.announced).digest()).decode()
        headers = {"Content-Length": str(len(body)), "ETag": server.etag, "x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
        self.send_response(206 if start else 200)
        for name, value in (headers | server.other | (server.rest if start else {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if server.drops:
            server.drops -= 1
            body = body[: 1 << 20]
            self.close_connection = True
        while server.endless:
            try:
                self.wfile.write(bytes(1 << 20))
            except OSError:
                self.close_connection = True
                return
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
    monkeypatch.setattr(fetch, "PAUSES", (0, 0, 0, 0))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached() -> set[str]:
    return {path.name for path in fetch.cache_dir().rglob("*") if path.is_file()}


WHOLE = {f"{NAME}.npz", f"{NAME}.npz.md5"}
ATTEMPTS = len(fetch.PAUSES) + 1


def test_one_header_for_each_hash_as_google_sends_them(server, monkeypatch):
    send = Handler.send_header

    def split(self, name, value):
        for each in value.split(",") if name == "x-goog-hash" else [value]:
            send(self, name, each)

    monkeypatch.setattr(Handler, "send_header", split)
    locate.weight_file(NAME)
    assert cached() == WHOLE


def test_fetch_once_and_find_again(server):
    path = locate.weight_file(NAME)
    assert path.read_bytes() == CONTENT
    assert (path.parent / f"{NAME}.npz.md5").read_text() == f"{hashlib.md5(CONTENT).hexdigest()}  {NAME}.npz\n"
    assert cached() == WHOLE
    assert locate.weight_file(NAME) == path
    assert len(server.seen) == 1


def test_subfolders(server):
    path = locate.weight_file("BiT-M-R50x1-run0-dtd")
    assert path == fetch.cache_dir() / "vtab" / "BiT-M-R50x1-run0-dtd.npz"


def test_dropped_connections_are_resumed(server):
    server.drops = 2
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={1 << 20}-", f"bytes={2 << 20}-"]
    assert cached() == WHOLE


def test_a_later_start_resumes_what_has_arrived(server):
    server.drops = ATTEMPTS
    server.ranges = False  # no progress beyond the first megabyte
    with pytest.raises(FetchError, match="kept"):
        locate.weight_file(NAME)
    assert f"{NAME}.npz" not in cached()
    server.ranges, server.seen = True, []
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == [f"bytes={1 << 20}-"]


def test_a_file_changed_meanwhile_is_fetched_from_the_start(server):
    server.drops = ATTEMPTS
    server.ranges = False
    with pytest.raises(FetchError):
        locate.weight_file(NAME)
    server.ranges, server.etag = True, '"2"'
    server.content = server.announced = CONTENT[::-1]
    assert locate.weight_file(NAME).read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_starts_over(server):
    part = fetch.cache_dir() / f"{NAME}.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(CONTENT) + 5))
    note = {"size": None, "md5": None, "etag": server.etag}
    (fetch.cache_dir() / f"{NAME}.npz.part.json").write_text(json.dumps(note))
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert cached() == WHOLE


def test_wrong_checksum(server):
    server.announced = CONTENT + b"x"
    with pytest.raises(FetchError, match="MD5"):
        locate.weight_file(NAME)
    assert cached() == set()


def test_not_found(server):
    server.status = 404
    with pytest.raises(FetchError, match="404") as caught:
        locate.weight_file(NAME)
    assert str(fetch.cache_dir() / f"{NAME}.npz") in str(caught.value)
    assert len(server.seen) == 1
    assert cached() == set()


def test_a_server_in_trouble_is_asked_again(server):
    server.status = 503
    with pytest.raises(FetchError, match="503"):
        locate.weight_file(NAME)
    assert len(server.seen) == ATTEMPTS


def test_offline_says_what_to_fetch_and_where_to_put_it(server, monkeypatch):
    monkeypatch.setenv("BIT_JAX_MIRROR", "http://127.0.0.1:1")
    with pytest.raises(FetchError) as caught:
        locate.weight_file(NAME)
    assert "http://127.0.0.1:1/BiT-M-R50x1.npz" in str(caught.value)
    assert str(fetch.cache_dir() / f"{NAME}.npz") in str(caught.value)


def test_an_unwritable_cache(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIT_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="BIT_JAX_CACHE"):
        locate.weight_file(NAME)


def test_two_at_once_fetch_once(server):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(locate.weight_file(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert server.seen == [None]


# Servers that send something else, or do not say what they send.

TINY = PublishedFile("tiny", "R14x0.5", 10, "tiny.npz")


@pytest.fixture
def tiny(server, monkeypatch, small_npz):
    """The server with the smallest BiT, of which it announces no MD5."""
    monkeypatch.setitem(CATALOGUE, "tiny", TINY)
    server.content = server.announced = small_npz.read_bytes()
    server.other = {"x-goog-hash": None}
    return server


def refused(said: str, name: str = "tiny") -> str:
    """The sentence with which fetching ends."""
    with pytest.raises(FetchError, match=said) as caught:
        locate.weight_file(name)
    assert "\n" not in str(caught.value)
    assert "delete" not in str(caught.value)
    return str(caught.value)


def test_without_an_md5_the_file_is_read_whole_and_nothing_claims_more(tiny, small_npz, capsys):
    (fetch.cache_dir()).mkdir()
    (fetch.cache_dir() / "tiny.npz.md5").write_text("of an earlier file")
    assert locate.weight_file("tiny").read_bytes() == small_npz.read_bytes()
    assert cached() == {"tiny.npz"}
    assert "read whole as R14x0.5 with 10 classes" in capsys.readouterr().err


@pytest.mark.parametrize("digest", ["!!!a", "", "AAAA", "é"])
def test_a_malformed_md5_confirms_nothing(tiny, digest):
    tiny.other = {"x-goog-hash": f"crc32c=AAAAAA==,md5={digest}"}
    locate.weight_file("tiny")
    assert cached() == {"tiny.npz"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:4_000_000] + bytes(16) + data[4_000_016:], "CRC"),
        (lambda data: b"<!DOCTYPE html><html>Sign in to the proxy</html>", "web page"),
        (lambda data: b"<?xml version='1.0'?><Error>AccessDenied</Error>", "XML"),
        (lambda data: b"\x1f\x8b" + bytes(100), "gzip"),
        (lambda data: bytes(len(data)), "begins with zeros"),
    ],
)
@pytest.mark.parametrize("length", ["announced", "not announced"])
def test_what_is_no_such_file_is_not_stored(tiny, change, said, length):
    """A server that closes the connection half-way, or answers with something else and calls it right."""
    tiny.content = change(tiny.content)
    tiny.other |= {"Content-Length": None} if length == "not announced" else {}
    assert str(fetch.cache_dir()) not in refused(said)
    assert cached() == set()


def test_half_of_a_file_without_its_length_does_not_pass_for_the_whole(server):
    server.other = {"Content-Length": None}
    server.drops = 1
    refused("has MD5", NAME)
    assert cached() == set()
    assert locate.weight_file(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(("architecture", "classes"), [("R14x1", 10), ("R26x0.5", 10), ("R14x0.5", 11)])
def test_weights_of_another_architecture_or_head(tiny, monkeypatch, architecture, classes):
    monkeypatch.setitem(CATALOGUE, "tiny", PublishedFile("tiny", architecture, classes, "tiny.npz"))
    assert "R14x0.5 with 10 classes, not" in refused(f"{architecture} with {classes} classes as its name promises")
    assert cached() == set()


@pytest.mark.parametrize("length", ["abc", "-5", "1e9", "", "9" * 30])
def test_a_content_length_that_is_none(server, length):
    server.other = {"Content-Length": length}
    refused("Content-Length", NAME)
    assert cached() == set()


def test_an_endless_answer_is_cut_off(tiny):
    tiny.endless = True
    tiny.other |= {"Content-Length": None}
    refused("no such file has more than")
    assert cached() == set()
    assert len(tiny.seen) == 1


def test_an_answer_announced_as_far_too_long_is_not_begun(server):
    server.other = {"Content-Length": str(10**12)}
    refused("announces 1,000,000,000,000 bytes", NAME)
    assert cached() == set()


@pytest.mark.parametrize(
    "rest",
    [
        {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"},
        {"Content-Range": f"bytes {1 << 20}-{len(CONTENT)}/{len(CONTENT) + 1}"},
        {"Content-Range": f"bytes {1 << 20}-{(1 << 20) + 9}/{len(CONTENT)}"},
        {"Content-Range": "bytes */10"},
        {"Content-Range": "nonsense"},
        {"Content-Range": None},
        {"ETag": '"2"'},
        {"x-goog-hash": "md5=AAAAAAAAAAAAAAAAAAAAAA=="},
    ],
)
def test_a_206_that_is_not_the_rest_is_not_appended(server, rest):
    server.drops, server.rest = 1, rest
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={1 << 20}-", None]
    assert cached() == WHOLE


def test_a_206_need_not_repeat_what_the_first_answer_said(server):
    server.drops = 1
    server.rest = {"Content-Length": None, "ETag": None, "x-goog-hash": None}
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={1 << 20}-"]
    assert cached() == WHOLE


def test_a_206_that_nobody_asked_for(server, monkeypatch):
    send = Handler.send_response
    monkeypatch.setattr(Handler, "send_response", lambda self, code: send(self, 206))
    refused("not asked for", NAME)
    assert cached() == set()


@pytest.mark.parametrize("etag", [None, 'W/"1"', "1"])
def test_without_a_strong_etag_nothing_is_resumed(server, etag):
    server.drops, server.other = 1, {"ETag": etag}
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == [None, None]
    assert cached() == WHOLE


@pytest.mark.parametrize(
    "note",
    ["", "[]", "{}", '{"size": "a", "md5": 1, "etag": "\\"1\\""}', '{"size":1,"md5":null,"etag":"a\\nb: c"}', b"\xff"],
)
def test_a_damaged_note_beside_a_part_is_not_believed(server, note):
    part = fetch.cache_dir() / f"{NAME}.npz.part"
    part.parent.mkdir()
    part.write_bytes(bytes(1000))
    (fetch.cache_dir() / f"{NAME}.npz.part.json").write_bytes(note if isinstance(note, bytes) else note.encode())
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == [None]
    assert cached() == WHOLE


def test_a_part_that_is_whole_is_only_verified(server):
    part = fetch.cache_dir() / f"{NAME}.npz.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    note = {"size": len(CONTENT), "md5": hashlib.md5(CONTENT).hexdigest(), "etag": server.etag}
    (fetch.cache_dir() / f"{NAME}.npz.part.json").write_text(json.dumps(note))
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert server.seen == []
    assert cached() == WHOLE


def test_redirects_are_followed_and_judged_by_what_comes(server):
    here = f"http://127.0.0.1:{server.server_port}"
    server.redirects = [f"{here}/elsewhere"]
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    server.redirects = [f"{here}/login"] * 20
    refused("302", "BiT-M-R50x3")
    server.content, server.other, server.redirects = b"<html>login</html>", {"x-goog-hash": None}, [f"{here}/login"]
    refused("web page", "BiT-M-R50x3")
    assert cached() == WHOLE


@pytest.mark.parametrize("status", [204, 304, 407, 502])
def test_other_answers(server, monkeypatch, status):
    server.status = status
    monkeypatch.setattr(Handler, "send_error", lambda self, code: (self.send_response(code), self.end_headers()))
    refused(str(status), NAME)
    assert cached() == set()


@pytest.mark.parametrize("mirror", ["/data/bit", "file:///data/bit", "ftp://host/bit", "gs://bit_models"])
def test_a_mirror_that_is_no_http_address(server, monkeypatch, mirror):
    monkeypatch.setenv("BIT_JAX_MIRROR", mirror)
    with pytest.raises(RequestError, match=r"BIT_JAX_MIRROR .* is no http address"):
        locate.weight_file(NAME)


@pytest.mark.parametrize("host", ["a..b", "127.0.0.1:port", "a b", "x" * 70])
def test_a_host_that_cannot_be(server, monkeypatch, host):
    monkeypatch.setenv("BIT_JAX_MIRROR", f"http://{host}/bit")
    refused("cannot fetch", NAME)


def test_a_killed_process_blocks_nobody(server):
    """Its claim names a process that is gone."""
    claim = fetch.cache_dir() / f".{NAME}.npz{CLAIM}"
    script = (
        "import os; from pathlib import Path; from input_pipeline import claims\n"
        f"owner = claims.claimed(Path({str(claim)!r}), 'x', 'y'); owner.__enter__(); os._exit(9)"
    )
    fetch.cache_dir().mkdir()
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 9
    assert cached() == {f".{NAME}.npz{CLAIM}"}
    assert locate.weight_file(NAME).read_bytes() == CONTENT
    assert cached() == WHOLE


# What `--model` names.


def test_published_addresses_are_their_models(server, monkeypatch):
    path = locate.weight_file(NAME)
    assert locate.weight_file(CATALOGUE[NAME].url) == path
    assert locate.weight_file("https://storage.googleapis.com/bit_models/BiT-M-R50x1.npz") == path
    assert len(server.seen) == 1


@pytest.mark.parametrize("model", ["https://example.org/w.npz", "gs://bucket/w.npz", "file:///w.npz"])
def test_other_addresses_are_refused(server, model):
    with pytest.raises(RequestError, match="the address of no published file"):
        locate.weight_file(model)
    assert server.seen == []


def test_the_home_directory_is_expanded(small_npz, monkeypatch):
    monkeypatch.setenv("HOME", str(small_npz.parent))
    assert locate.weight_file("~/small.npz") == small_npz
    monkeypatch.setenv("BIT_JAX_CACHE", "~/cache")
    assert fetch.cache_dir() == small_npz.parent / "cache"
    monkeypatch.delenv("BIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fetch.cache_dir() == small_npz.parent / ".cache" / "bit_jax"


def test_a_user_without_a_home(monkeypatch, capsys):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "BIT_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(RequestError, match="set BIT_JAX_CACHE"):
        locate.weight_file(NAME)
    zoo.list_files("R50x1_224")
    assert "distill/R50x1_224.npz" in capsys.readouterr().out


def test_a_cache_that_is_full_or_read_only(server, monkeypatch):
    def refuse(*arguments, **settings):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    refused("Read-only file system.*BIT_JAX_CACHE", NAME)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["list"], ["--help"]])
def test_a_reader_that_has_gone_ends_the_list_quietly(arguments, buffered):
    """The reader reads one line, as `| head -1` does."""
    command = [sys.executable, "-m", "bit_jax.zoo", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, complaint = process.communicate()
    assert (process.returncode, complaint) == (141, b"")


def test_unknown_names_get_the_nearest():
    with pytest.raises(RequestError, match="BiT-M-R152x2"):
        locate.weight_file("BiT-M-R152x3")
    with pytest.raises(RequestError, match="307"):
        locate.weight_file("zzz")


def test_paths_are_left_alone(small_npz):
    assert locate.weight_file(str(small_npz)) == small_npz
    assert locate.weight_file("nowhere/else.npz") == Path("nowhere/else.npz")
