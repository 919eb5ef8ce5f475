"""Files are written whole or not at all, and what is no file, such as /dev/null, is never replaced by one."""

import json
import os
import threading

import pytest

from input_pipeline.errors import RequestError
from input_pipeline.files import replacing, writable, write_json


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_pipe_gets_the_content_and_stays_a_pipe(pipe):
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    writable(pipe)  # does not wait for a reader, and sends nothing
    write_json(pipe, {"a": 1})
    reader.join()
    assert read == ['{\n  "a": 1\n}\n']
    assert pipe.is_fifo()
    assert list(pipe.parent.iterdir()) == [pipe]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(file)
    for content in (1, 2):  # at first the link leads to nothing
        write_json(link, content)
        assert link.is_symlink()
        assert file.read_text() == f"{content}\n"
    assert list(file.parent.iterdir()) == [file]


def test_after_an_error_the_old_content_is_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail_halfway():
        with replacing(file) as new:
            new.write(b"half of the ne")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_could_be_written_at_the_start_is_written_at_the_end(tmp_path):
    file = tmp_path / "not" / "there" / "r.json"
    writable(file)
    assert list(tmp_path.iterdir()) == []
    write_json(file, 1)
    assert file.read_text() == "1\n"


def test_a_directory_is_no_place_for_a_file(tmp_path):
    with pytest.raises(RequestError, match="is a directory, and a file is to be written there"):
        writable(tmp_path)


def test_what_json_does_not_have_becomes_null(tmp_path):
    """Other programs than Python refuse NaN."""
    content = {"a": [1.5, float("nan"), {"b": (float("-inf"), tmp_path)}]}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None, {"b": [None, str(tmp_path)]}]
    }
