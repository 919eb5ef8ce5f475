"""Models of the Hugging Face Hub, fetched by its own library from a server of its shape on the loopback."""

import hashlib
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from bit_jax import convert
from bit_jax.published import hub, locate
from input_pipeline.errors import RequestError

FETCH = "import sys; from bit_jax.published import locate; print(locate.weight_file(sys.argv[1]))"
NEEDS_HUB = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of one model, as the hub does: its commit, its size, and the hash as ETag.

    The hash is SHA-256 of weights, which lie in LFS, and Git's SHA-1 of everything else.
    """

    files: dict[str, bytes]
    commits: dict[str, str]  # the newest when a file was asked for; "0" * 40 unless given
    damaged = False
    failing = None  # the name of a file that the hub has trouble with

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        content = self.files.get(name)
        if name == self.failing:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None or not self.path.startswith("/owner/bit/"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/owner/bit/" in self.path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        asked = self.path.split("/")[-2]
        self.send_header("X-Repo-Commit", self.commits.get(name, "0" * 40) if asked == "main" else asked)
        in_git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest() if name in hub.WEIGHTS else in_git}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(
                content[:-1] + bytes([content[-1] ^ 1]) if self.damaged and name in hub.WEIGHTS else content
            )

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path):
    convert.converted("embedded", tmp_path / "model", checked=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    handler = type("Served", (Handler,), {"files": files, "commits": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, handler
    server.shutdown()
    server.server_close()
    thread.join()


def left_of_weights(cache):
    """Returns what is in a cache of the size of weights, under whatever name."""
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


def fetched(server, tmp_path, name="hf:owner/bit"):
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    code = f"import sys\nfrom input_pipeline.exits import exit_code\nsys.exit(exit_code(lambda: exec({FETCH!r}, {{}})))"
    return subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, env=env, capture_output=True, text=True)


@NEEDS_HUB
@pytest.mark.slow
def test_a_model_is_fetched_once_and_read(served, tmp_path):
    server, handler = served
    done = fetched(server, tmp_path)
    assert done.returncode == 0, done.stderr
    place = done.stdout.strip()
    for file, content in handler.files.items():
        with open(f"{place}/{file}", "rb") as kept:
            assert kept.read() == content
    server.shutdown()
    again = fetched(server, tmp_path)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr


@NEEDS_HUB
@pytest.mark.slow
def test_what_the_hub_did_not_announce_is_not_kept(served, tmp_path):
    server, handler = served
    handler.damaged = True
    done = fetched(server, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is not what the hub announced" in done.stderr
    assert left_of_weights(tmp_path / "cache") == []


@NEEDS_HUB
@pytest.mark.slow
def test_a_config_that_cannot_be_fetched_is_a_problem(served, tmp_path):
    """Weights without it have neither class names nor a size; only the hub may say that there is none."""
    server, handler = served
    handler.failing = "config.json"
    done = fetched(server, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot fetch hf:owner/bit (LocalEntryNotFoundError" in done.stderr
    assert left_of_weights(tmp_path / "cache") == []
    handler.failing = None
    del handler.files["config.json"]
    done = fetched(server, tmp_path)
    assert done.returncode == 0, done.stderr


@NEEDS_HUB
@pytest.mark.slow
def test_config_and_weights_are_of_one_commit(served, tmp_path):
    server, handler = served
    handler.commits |= {"model.safetensors": "1" * 40}  # made after config.json has been fetched
    done = fetched(server, tmp_path)
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.strip())
    assert place.name == "1" * 40
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]


@NEEDS_HUB
@pytest.mark.slow
def test_a_model_that_is_not_there(served, tmp_path):
    done = fetched(served[0], tmp_path, "hf:owner/other")
    assert done.returncode == 2
    assert "cannot fetch hf:owner/other" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["hf:bit", "hf:/bit", "hf:a/b/c"])
def test_a_name_of_another_form(name):
    with pytest.raises(RequestError, match="write hf:OWNER/NAME"):
        locate.weight_file(name)


def test_without_the_library_it_says_what_to_fetch(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequestError, match=r"fetch config\.json and model\.safetensors of https://huggingface"):
        hub.directory("hf:google/bit-50")
