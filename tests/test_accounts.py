"""Every second since a run first started is accounted for, once, whatever became of its starts."""

import contextlib
import dataclasses
import json
import threading
import time

import pytest

from bit_jax.accounts import goodput, starts
from bit_jax.accounts.goodput import DOWN, KEPT, LOST, STILL
from bit_jax.accounts.starts import Line, Start
from bit_jax.accounts.timeline import OTHER, STARTING, Timeline
from bit_jax.process import reporter
from input_pipeline.errors import RequestError, RunFailed, Stopped


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; a test sets its only entry, in seconds."""
    now = [100.0]
    monkeypatch.setattr("bit_jax.accounts.timeline.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("bit_jax.accounts.timeline.time.time", lambda: now[0])
    return now


def test_each_moment_counts_once_for_the_innermost_activity(clock):
    timeline = Timeline(before=3.0)
    clock[0] += 1  # outside of all
    with timeline("whole"):
        clock[0] += 2
        with timeline("steps"):
            clock[0] += 4
            with timeline("dispatch"):
                clock[0] += 8
            clock[0] += 16
        with timeline("reading"):
            clock[0] += 32
        timeline.part("input", 5.0, of="reading")
        own, activity, since = timeline.own()
        assert (activity, since) == ("whole", 0.0)
        clock[0] += 64
    wanted = {STARTING: 3, OTHER: 1, "whole": 66, "steps": 20, "dispatch": 8, "reading": 27, "input": 5}
    assert timeline.own()[0] == wanted
    assert sum(wanted.values()) == clock[0] - 97  # all the time since the process began
    assert timeline["whole"] == 126  # with what is within it
    assert own["whole"] == 2  # a copy, which does not go on


def test_an_activity_that_fails_is_counted_too(clock):
    timeline = Timeline()
    with contextlib.suppress(KeyError), timeline("steps"):
        clock[0] += 2
        raise KeyError
    clock[0] += 1
    assert timeline.own()[0] == {"steps": 2, OTHER: 1}


def line(began=0.0, elapsed=0.0, start=None, step=0, **changes) -> Line:
    """A line of one host with two devices; what its seconds do not say was spent on steps."""
    seconds = dict(changes.pop("seconds", {}))
    seconds["steps"] = elapsed - sum(seconds.values())
    known = {"activity": "steps", "since": 0.0, "hosts": 1, "devices": 2, "global_batch": 10}
    return Line(began, elapsed, seconds, start=start, step=step, **known | changes)


def test_training_after_the_step_that_is_continued_from_is_lost():
    """Killed after step 130 or more, of which 100 are kept; then continued to the end."""
    first = [
        line(1000, 20, seconds={"compilation": 20}, start=0),
        line(1000, 120, seconds={"compilation": 20}, start=0, step=100, trains=20),
        line(1000, 150, seconds={"compilation": 20}, start=0, step=130, trains=20),
    ]
    second = [
        line(1200, 10, seconds={"restore": 10}, start=100, step=100),
        line(1200, 112, seconds={"restore": 10, "input": 2}, start=100, step=200, trains=10, ended="finished"),
    ]
    account = goodput.of([first, second])
    seconds = {row: taken for row, taken in account.seconds.items() if taken}
    wanted = {"compilation": 20, "restore": 10, "waiting for input": 2, KEPT: 200, LOST: 30, DOWN: 50}
    assert seconds == wanted
    assert account.wall == 312  # from 1000 to 1312
    assert account.goodput == 200 / 312
    # 2,000 images; the clock starts at 1020
    assert account.figures["raw_train_time"] == 292
    assert account.figures["p_whole"] == 2000 / 292
    assert account.figures["p_core"] == 2000 / 290


@pytest.mark.parametrize(("continued", "kept"), [(0, 0), (50, 50), (100, 100), (115, 115), (130, 130), (131, 130)])
def test_the_time_up_to_a_step_without_a_line_is_interpolated(continued, kept):
    """At a second a step; 131 is a step that no line has, as where a copy is newer than the last line."""
    first = [line(0, 0, start=0), line(0, 100, start=0, step=100), line(0, 130, start=0, step=130)]
    second = [line(135, 0, start=continued, step=continued)]
    account = goodput.of([first, second])
    assert (account.seconds[KEPT], account.seconds[LOST], account.seconds[DOWN]) == (kept, 130 - kept, 5)


def test_an_older_checkpoint_loses_the_training_of_several_starts():
    """The third start finds a damaged checkpoint and goes back behind the second."""
    runs = [
        [line(0, 50, start=0, step=50), line(0, 100, start=0, step=100, ended="stopped")],
        [line(100, 40, start=100, step=140, ended="stopped")],
        [line(140, 150, start=50, step=200, ended="finished")],
    ]
    account = goodput.of(runs)
    assert (account.seconds[KEPT], account.seconds[LOST]) == (200, 90)


def test_the_time_that_waits_for_a_dead_host_is_neither_training_nor_lost_training():
    first = [
        line(0, 100, start=0, step=100),
        line(0, 160, start=0, step=100, since=60.0, ended="lost host", why="host 1 is not heard any more"),
    ]
    second = [line(170, 100, start=100, step=200, ended="finished")]
    account = goodput.of([first, second])
    seconds = {row: taken for row, taken in account.seconds.items() if taken}
    assert seconds == {KEPT: 200, STILL: 60, DOWN: 10}


@pytest.mark.parametrize("continued", [100, 115, 130])
def test_waiting_for_a_dead_host_takes_nothing_from_the_training_that_is_done_again(continued):
    """The hosts that are left have local copies of the steps after the last checkpoint; the first host waited for 30 s,
    and wrote a line meanwhile."""
    first = [
        line(0, 100, start=0, step=100),
        line(0, 140, start=0, step=130, since=10.0),
        line(0, 160, start=0, step=130, since=30.0, ended="lost host"),
    ]
    account = goodput.of([first, [line(170, 10, start=continued, step=continued + 10, ended="finished")]])
    seconds = {row: taken for row, taken in account.seconds.items() if taken}
    interpolated = 100 + (continued - 100) / 30 * 40  # between the first two lines, 10 s of which waited
    assert seconds.pop(LOST, 0) == pytest.approx(130 - min(interpolated, 130))
    assert seconds == pytest.approx({KEPT: 10 + min(interpolated, 130), STILL: 30, DOWN: 10})
    assert account.wall == 180


def test_a_newest_start_that_does_not_train_yet_takes_nothing_from_the_figures():
    """It compiles still, or was refused."""
    trained = [line(0, 100, start=0, step=100, trains=0), line(0, 130, start=0, step=130, trains=0)]
    compiles = [line(130, 70, seconds={"compilation": 70}, activity="compilation")]
    account = goodput.of([trained, compiles])
    assert account.figures["p_whole"] == 130 * 10 / 200
    assert account.seconds[KEPT] == 130


def test_images_are_counted_from_the_earliest_step_that_training_is_known_to_have_begun_from():
    """A run that was begun without starts.jsonl, and then fell back behind the first start that has lines."""
    first = [line(0, 40, start=100, step=140, trains=0)]
    second = [line(40, 150, start=50, step=200, trains=0, trained=150, ended="finished")]
    account = goodput.of([first, second])
    assert account.figures["p_whole"] == 150 * 10 / 190
    assert (account.seconds[KEPT], account.seconds[LOST]) == (150, 40)


def test_an_evaluation_before_training_is_in_no_span_whichever_start_began_it():
    killed = [line(0, 30, start=0, seconds={"evaluation before training": 30})]
    own = {"evaluation before training": 20}
    trains = [
        line(50, 20, start=0, trains=20, seconds=own),
        line(50, 180, 0, 100, seconds=own | {"evaluation": 50, "saving": 10}, trains=20, trained=170),
    ]
    figures = goodput.of([killed, trains]).figures
    assert figures["raw_train_time"] == 150
    assert figures["p_train"] == 1000 / 100


def test_the_starts_are_in_the_order_of_the_file_whatever_their_clocks_say(tmp_path):
    """The second start is on a host whose clock is an hour behind; it began after the first one ended."""
    first = line(7200, 100, start=0, step=100, trains=0, ended="stopped")
    second = line(3600, 50, start=100, step=150, trains=0, trained=50, ended="finished")
    path = tmp_path / starts.NAME
    path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in (first, second)))
    account = goodput.read(path)
    assert account is not None
    assert [start.step for start in account.starts] == [100, 150]
    assert account.figures["raw_train_time"] == account.wall == 150
    assert account.figures["p_whole"] == 1500 / 150
    assert account.seconds[LOST] == 0


def test_a_clock_that_is_set_while_a_start_goes_on_changes_no_duration(clock, monkeypatch):
    set_by = [0.0]
    monkeypatch.setattr("bit_jax.accounts.starts.time.time", lambda: clock[0] + set_by[0])
    timeline = Timeline(before=3.0)
    start = Start(None, timeline, hosts=1, devices=1, global_batch=10)
    clock[0] += 10
    set_by[0] = 3600.0
    with timeline("whole"):
        clock[0] += 5
    made = start.line()
    assert (made.trains, made.trained, made.elapsed) == (13, 18, 18)


def test_an_account_without_any_time_has_no_share():
    assert goodput.of([[line()]]).described()["goodput"] == 0


def test_what_never_trained_has_no_rates():
    account = goodput.of([[line(0, 30, seconds={"compilation": 30}, activity="compilation")]])
    assert account.seconds["compilation"] == 30
    assert account.figures == {"e2e_time": 30, "raw_train_time": None, "p_whole": None, "p_train": None, "p_core": None}


def written(folder, error=None, *, within=lambda start: None):
    """The lines of all starts in a folder after one more has been made, which raises the error, if any."""
    path = folder / starts.NAME
    start = Start(path, Timeline(before=1.0), hosts=1, devices=2, global_batch=10)
    with contextlib.suppress(Stopped, RunFailed, RequestError, ZeroDivisionError), start:
        start.continues_from(5)
        within(start)
        if error is not None:
            raise error
    return starts.read(path)


@pytest.mark.parametrize(
    ("error", "ended", "why"),
    [
        (None, "finished", ""),
        (Stopped(15, "ended by a signal\nand more"), "stopped", "ended by a signal"),
        (RunFailed("the loss is nan"), "failed", "the loss is nan"),
        (RequestError("no"), "refused", "no"),
        (ZeroDivisionError(), "defect", "ZeroDivisionError"),
    ],
)
def test_a_start_says_how_it_ended(tmp_path, error, ended, why):
    (lines,) = written(tmp_path, error)
    assert (lines[-1].ended, lines[-1].why, lines[-1].start, lines[-1].step) == (ended, why, 5, 5)
    assert lines[-1].elapsed == pytest.approx(sum(lines[-1].seconds.values()))


def test_a_lost_host_is_said_once_and_last(tmp_path):
    (lines,) = written(tmp_path, ZeroDivisionError(), within=lambda start: start.end("lost host", "host 1 is gone"))
    assert [made.ended for made in lines] == [None, None, "lost host"]


def test_a_line_that_a_kill_cut_off_harms_no_other(tmp_path):
    path = tmp_path / starts.NAME
    whole = json.dumps(dataclasses.asdict(line(10, 5, start=0, step=3)))
    path.write_text(f"{whole}\n{whole[:40]}")
    earlier, own = written(tmp_path)
    assert [made.step for made in earlier] == [3]
    assert own[-1].ended == "finished"


@pytest.mark.parametrize(
    "damage",
    [
        {"began": "x"},
        {"elapsed": float("nan")},
        {"elapsed": 50},  # other than the sum of its seconds
        {"elapsed": -5, "seconds": {"steps": -5}},
        {"began": 1e300},
        {"seconds": {"steps": "1"}},
        {"seconds": []},
        {"ended": "somehow"},
        {"start": []},
        {"why": 3},
        {"unknown": 1},
    ],
)
def test_a_damaged_line_is_left_out(tmp_path, damage):
    path = tmp_path / starts.NAME
    good = dataclasses.asdict(line(10, 5))
    path.write_text(json.dumps(good | damage) + "\n" + json.dumps(good) + "\n[]\n\n")
    assert starts.read(path) == [[line(10, 5)]]


def test_a_disk_that_takes_nothing_ends_nothing(tmp_path):
    folder = tmp_path / starts.NAME
    folder.mkdir()  # a file of that name cannot be opened
    start = Start(folder, Timeline(), hosts=1, devices=1, global_batch=1)
    with start:
        start.mark()
    assert "Is a directory" in start.failure
    assert start.earlier is None  # so result.json says nothing of all starts, instead of something wrong


def test_a_disk_that_has_room_again_has_the_whole_account(tmp_path):
    path = tmp_path / starts.NAME
    path.mkdir()
    with Start(path, Timeline(), hosts=1, devices=1, global_batch=1) as start:
        while not start.failure:  # a thread writes
            time.sleep(0.001)
        path.rmdir()
        path.write_text('{"began"')  # what a full disk had room for
    assert not start.failure
    ((last,),) = starts.read(path)
    assert last.ended == "finished"


def test_a_disk_that_is_stuck_blocks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(reporter, "PATIENCE", 0.05)
    stuck = threading.Event()
    monkeypatch.setattr(Start, "_append", lambda *_: stuck.wait())
    with Start(tmp_path / starts.NAME, Timeline(), hosts=1, devices=1, global_batch=1) as start:
        start.mark()
    stuck.set()


@pytest.mark.parametrize(("age", "lines"), [(1.0, 20), (1e6, 0)])
def test_lines_become_rarer(tmp_path, monkeypatch, clock, age, lines):
    """Within 20 beats: one each of a young start, none of one whose next is due after half an hour."""
    start = Start(tmp_path / starts.NAME, Timeline(before=age), hosts=1, devices=1, global_batch=1)
    beats = iter([False] * 20 + [True])

    def wait(seconds: float) -> bool:
        clock[0] += seconds
        return next(beats)

    start.mark()
    monkeypatch.setattr(start._ended, "wait", wait)
    start._beat()
    start.end("finished", "")
    (made,) = starts.read(tmp_path / starts.NAME)
    assert len(made) == 2 + lines
