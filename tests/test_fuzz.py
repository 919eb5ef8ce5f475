"""The fuzz's doors, which docs/testing.md has run by hand, still lead into the program."""

import fuzz
import pytest


@pytest.mark.parametrize("doors", [fuzz.weight_doors, fuzz.side_doors, fuzz.image_doors])
def test_each_door_reads_what_is_whole_and_refuses_what_is_no_such_file(doors, tmp_path):
    read = 0
    for door in doors(tmp_path):
        assert {fuzz.judged(door, tmp_path, content) for content in door.good} == {"read"}, door.name
        outcome = fuzz.judged(door, tmp_path, b"no such file")
        assert outcome in ("read", "refused"), door.name
        read += outcome == "read"
    assert (
        read <= 4
    )  # logs, whose damaged lines are left out; claims; a manifest, of which it is said that it is damaged
