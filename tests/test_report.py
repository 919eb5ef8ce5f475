"""`python -m bit_jax.report`: a row for each run, FlagPerf's card, and a sentence for what is no run."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from bit_jax.accounts.starts import Line
from bit_jax.report import __main__ as report
from bit_jax.report import card, curves
from bit_jax.report.record import read
from input_pipeline.exits import exit_code

STORED = ROOT / "bit_jax" / "assets" / "fashion-mnist-R14x0.5"


@pytest.fixture
def reported(monkeypatch, capsys):
    """(arguments) -> (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        code = exit_code(report.main)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def flagperfs(result: dict | None = None, config: dict | None = None) -> dict[str, dict]:
    """The files of a run of FlagPerf's 1x8 case, as FlagPerf's own row has its figures."""
    schedule = {"base_lr": 0.003, "warmup_steps": 500, "decay_steps": [3000, 6000, 9000, 10000], "steps": 40000}
    recipe = {"resize_to": 512, "crop": 480, "mixup": 0.1, "schedule": schedule}
    flags = {"model.model": "BiT-M-R152x2", "optimizer.momentum": 0.9, "data.flip": True, "run.target_acc1": 0.83}
    figures = {"e2e_time": 5869.4, "p_whole": 222.3, "p_train": 224.9, "p_core": 228.1, "final_acc1": 0.841917}
    known = {"model": "BiT-M-R152x2", "architecture": "R152x2 with 1000 classes", "dataset": "imagenet2012/train"}
    machine = {"precision": "tf32", "device_kind": "NVIDIA A100-SXM4-40GB", "hosts": 1, "devices": 8}
    memory = {"batch_per_device": 16.0, "mem_gib": 31.42, "mem_of": "device", "mem_total_gib": 40.0}
    whole = known | machine | memory | figures | (result or {})
    return {"config": {"config": flags, "recipe": recipe | (config or {})}, "result": whole}


def written(folder, files: dict[str, dict]):
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def cells(workdir) -> list[str]:
    return list(card.row(read(workdir)).values())


def test_the_stored_run_has_its_row(reported):
    code, out, _ = reported(STORED)
    assert code == 0
    assert "R14x0.5 on fashion-mnist/train" in out
    for cell in ("1x1", "fp32", "128", "985.4", "394.7", "409.4", "413.4", "0.89360", "1.11", "3000"):
        assert cell in out


def test_a_directory_of_any_name_is_shown_as_it_is(tmp_path, reported, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path that is longer than its column is broken anywhere
    code, out, _ = reported(written(Path("[red]\x1b[31m"), flagperfs()))
    assert code == 0
    assert "[red]" in out
    assert "\x1b" not in out


def test_the_card_of_flagperfs_own_case_is_flagperfs_row(tmp_path):
    """But for the precision, which FlagPerf calls fp32."""
    row = ["A100单机8卡(1x8)", "tf32", "/", "5869", "222", "225", "228", "0.84192", "31.4/40.0"]
    assert cells(written(tmp_path / "run", flagperfs())) == row


@pytest.mark.parametrize(
    ("result", "place", "cell"),
    [
        ({"batch_per_device": 20.0}, 2, "bs=20"),
        ({"hosts": 2, "devices": 16}, 0, "A100两机8卡(2x8)"),
        ({"devices": 1, "p_core": 29.84}, 0, "A100单机单卡(1x1)"),
        ({"devices": 1, "p_core": 29.84}, 6, "29.8"),
        ({"device_kind": "NVIDIA H100 80GB HBM3", "mem_total_gib": None}, 8, "31.4/79.1"),
        ({"device_kind": "NVIDIA B1", "mem_total_gib": None}, 8, "31.4/?"),
        ({"mem_of": "process"}, 8, "/"),
        ({"p_core": None}, 6, "/"),
        ({"architecture": "R50x1 with 1000 classes"}, 2, "model=R50x1"),
        ({"device_kind": "NVIDIA "}, 0, "NVIDIA 单机8卡(1x8)"),
    ],
)
def test_a_cell_of_the_card(tmp_path, result, place, cell):
    assert cells(written(tmp_path / "run", flagperfs(result)))[place] == cell


def test_the_card_says_another_recipe_and_the_switches(tmp_path, reported):
    compat = {"flagperf_compat": ["accuracy", "p_core", "schedule"], "schedule_restarts_every": 10010}
    compat |= {"rank0_acc1": 0.84016, "rank0_examples": 6250, "p_core_unsynchronized": 2345.6}
    schedule = {"base_lr": 0.01, "warmup_steps": 500, "decay_steps": [3000], "steps": 40000, "restart_every": 10010}
    files = flagperfs(compat, {"schedule": schedule})
    files["config"]["config"]["additions.weight_decay"] = 0.1
    run = written(tmp_path / "run", files)
    _, out, _ = reported(run, "--flagperf")
    table, notes = out.split("\n\n")
    assert table.splitlines()[0] == f"| {' | '.join(card.COLUMNS)} |"
    assert "| lr=0.01, lr_steps=[3000], weight_decay=0.1 |" in table
    assert "0.84192" in table  # the accuracy of all examples stays the card's
    for said in ("`--flagperf-compat accuracy p_core schedule`", "0.84016 (6,250 examples)", "every 10,010", "2346"):
        assert said in notes


@pytest.mark.parametrize(
    ("flag", "value", "cell"),
    [
        ("data.examples_per_class", 5, "examples_per_class=5"),
        ("model.init", "random", "init=random"),
        ("data.resize", "tf", "resize=tf"),
        ("data.flip", False, "flip=False"),
        ("run.target_acc1", None, "target_acc1=none"),
        ("optimizer.mixup", None, "/"),  # the recipe has what it came to
        ("run.seed", 3, "/"),
        ("additions.train", "block4|head", "train=block4|head"),
    ],
)
def test_any_flag_that_is_not_the_cases_is_on_the_card(tmp_path, flag, value, cell):
    files = flagperfs()
    files["config"]["config"][flag] = value
    assert cells(written(tmp_path / "run", files))[2] == cell


def test_a_bar_in_a_cell_ends_no_cell(tmp_path, reported):
    files = flagperfs()
    files["config"]["config"]["additions.train"] = "block4|head"
    _, out, _ = reported(written(tmp_path / "run", files), "--flagperf")
    rows = out.split("\n\n")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(card.COLUMNS) + 1}
    assert r"train=block4\|head" in rows[-1]


def test_a_run_under_way_is_in_the_table_and_has_no_figures_on_the_card(tmp_path, reported):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(STORED / name, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:6]
    damaged = ["damaged", f'{{"step": 1{"0" * 400}}}']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*damaged, *lines, '{"step": 600, "lo']))
    code, out, err = reported(tmp_path / "run", STORED, "--json", tmp_path / "report.json")
    assert code == 0
    assert "500 of 3000" in out
    assert "0.83150" in out  # of its newest evaluation
    assert "2 damaged line(s) left out" in err
    unfinished, finished = json.loads((tmp_path / "report.json").read_text())
    assert (unfinished["finished"], unfinished["result"], unfinished["last"]["step"]) == (False, None, 500)
    assert finished["result"]["final_acc1"] == 0.8936
    _, out, _ = reported(tmp_path / "run", "--flagperf")
    assert "| / | fp32 |" in out
    assert "| / | / | / | / | / | / |" in out
    assert "not finished, 500 of 3000 steps" in out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("result", "{", "result.json is damaged"),
        ("result", "[]", "it holds a list, not a dict"),
        ("result", '{"p_whole": "fast"}', "p_whole is 'fast', not a number"),
        ("config", '{"recipe": 3}', "recipe is no object"),
        ("config", '{"recipe": {"schedule": []}}', "schedule is no object"),
        ("config", '{"config": {"model.precision": ["fp32"]}}', "model.precision is ['fp32'], not a text"),
        ("result", '{"precision": ["fp32"]}', "precision is ['fp32'], not a text"),
        ("result", '{"precision": 32}', "precision is 32, not a text"),
        ("result", '{"architecture": " "}', "architecture is ' ', not a text"),
        ("result", '{"versions": ["jax"]}', "versions is no object"),
        ("result", '{"flagperf_compat": 3, "rank0_acc1": 0.5}', "flagperf_compat is 3, not a list of texts"),
        ("result", '{"flagperf_compat": [3], "rank0_acc1": 0.5}', "flagperf_compat is [3], not a list of texts"),
        ("result", f'{{"e2e_time": 1{"0" * 400}}}', "not a number"),
        ("result", '{"final_acc1": NaN}', "final_acc1 is nan, not a number"),
    ],
)
@pytest.mark.parametrize("form", [(), ("--flagperf",)])
def test_a_damaged_file_ends_in_a_sentence(tmp_path, reported, form, name, text, said):
    (tmp_path / f"{name}.json").write_text(text)
    code, out, err = reported(tmp_path, *form)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_what_is_no_run_ends_in_a_sentence(tmp_path, reported):
    assert reported(tmp_path)[::2] == (
        2,
        f"error: {tmp_path} holds neither config.json nor result.json, so there is no run to report; "
        "name the --workdir of one\n",
    )
    assert "is no directory" in reported(tmp_path / "nowhere")[2]
    assert "no run to report; name the --workdir of at least one" in reported()[2]
    code, out, err = reported(STORED, "--json", tmp_path)
    assert (code, out) == (2, "")
    assert "is a directory" in err


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_report_never_takes_the_place_of_its_run(tmp_path, reported, name):
    run = written(tmp_path / "run", flagperfs())
    (run / "metrics.jsonl").write_text("")
    before = (run / name).read_bytes()
    code, out, err = reported(run, "--json", run / name)
    assert (code, out) == (2, "")
    assert "and --json both name" in err
    assert (run / name).read_bytes() == before


def started(folder, **changes):
    """Writes a starts.jsonl of one start, a minute long."""
    line = Line(
        1e9, 60.0, {"compilation": 20.0, "steps": 40.0}, "other", 0.0, 2, 16, 128, start=0, step=1000, trains=20.0
    )
    (folder / "starts.jsonl").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(line, **changes))) + "\n")
    return folder


def test_the_page_compares_runs(tmp_path, reported):
    """Curves, results, where the time went, and only those flags that differ."""
    runs = {name: written(tmp_path / name, flagperfs()) for name in ("first", "second")}
    (runs["second"] / "config.json").write_text(json.dumps(flagperfs(config={"mixup": 0.2})["config"]))
    (runs["first"] / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0, "watch/new": 7}\n')
    (runs["second"] / "metrics.jsonl").write_text('{"step": 1, "loss": 2.25}\n')
    started(runs["second"], ended="lost host", why="host 1 <is> gone", since=10.0, activity="steps")
    page = tmp_path / "page.html"
    code, out, _ = reported(*runs.values(), "--html", page)
    assert code == 0
    assert "standing still" in out
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", text), "the page fetches something"
    assert "host 1 &lt;is&gt; gone" in text
    differing = text[text.index('id="what-differs"') : text.index("</section>", text.index('id="what-differs"'))]
    assert re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", differing)[3:] == ["recipe.mixup", "0.1", "0.2"]
    assert re.findall(r"<h2>(.*?)</h2>", text)[4:] == ["loss", "watch/new"]
    assert text.count("<svg") == 2
    assert "optimizer.momentum" in text[text.index("<details>") :]


def section(page: str, name: str) -> str:
    return page[page.index(f'id="{name}"') : page.index("</section>", page.index(f'id="{name}"'))]


def test_a_directory_of_any_name_is_on_the_page_as_it_is(tmp_path, reported, monkeypatch):
    """The names are a formula, one that a legend leaves out, one that no terminal shows, and a title of a table."""
    monkeypatch.chdir(tmp_path)
    names = ("$x^$", "_run", "\u4e2d\x1b\udce9<b>", "watched", "over all starts")
    for name in names:
        folder = started(written(Path(name), flagperfs()))
        watched = {"watch/grad_norm": 1.5, "watch/update_ratio": 0.1, "watch/dead_relus/block1/unit01": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5} | watched) + "\n")
    code, out, err = reported(*names, "--html", "page.html")
    assert (code, err) == (0, "")
    page = Path("page.html").read_text()
    for name in ("$x^$", "_run", "\u4e2d\\x1b\\xe9&lt;b&gt;", "watched"):
        for where in ("results", "where-the-time-went-over-all-starts", "watched", "starts"):
            assert f">{name}</th>" in section(page, where)
        assert re.search(rf"<text[^>]*>{re.escape(name)}</text>", page), name
    assert ">gradient norm</th>" in section(page, "watched")
    assert ">training that counts</th>" in section(page, "where-the-time-went-over-all-starts")
    assert "gradient norm" in out
    assert "training that counts" in out


def test_a_page_is_read_aloud_by_its_titles(tmp_path, reported):
    """Every table's rows and columns have headers, and a plot is an image with a name."""
    folder = started(written(tmp_path / "run", flagperfs()))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert reported(folder, "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<th(?! scope=\"(row|col)\")[ >]|<th [^>]*></th>", page)
    assert all(re.search(r"<th scope=\"row\">", row) for row in re.findall(r"<tr>.*?</tr>", page) if "<td>" in row[8:])
    assert re.findall(r"<svg[^>]*", page) == re.findall(r'<svg role="img" aria-label="loss\. Loss of [^>]*', page)


def test_values_that_differ_far_from_their_beginning_differ(tmp_path, reported):
    """The names of a thousand classes are such values; what is shown begins a little before the difference."""
    names = [f"class{number}" for number in range(1000)]
    for run, last in (("first", "a"), ("second", "b")):
        files = flagperfs()
        files["config"]["class_names"] = [*names[:-1], last]
        written(tmp_path / run, files)
    assert reported(tmp_path / "first", tmp_path / "second", "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<td>\.\.\.[^<]*class998&#34;, &#34;(.)&#34;\] \([\d,]+ characters\)</td>", page) == ["a", "b"]
    assert "class_names" not in page[page.index("<details>") :]


def test_a_long_run_is_a_small_page_on_which_one_high_loss_is_seen():
    losses = [{"step": step, "loss": 2.0 + step % 7 / 100} for step in range(1, 50_001)]
    losses[31_234]["loss"] = 90.0
    steps, values = curves.curves_of(losses)["loss"]
    assert len(steps) <= 2 * curves.STRETCHES
    assert (np.diff(steps) > 0).all()
    assert (steps[values.argmax()], values.max(), values.min()) == (31_235, 90.0, 2.0)
    steps, values = curves.curves_of(losses[:2000])["loss"]
    assert list(steps) == [entry["step"] for entry in losses[:2000]]


def test_of_watched_numbers_the_page_has_those_of_the_whole_model(tmp_path, reported):
    """A deep model has more than a hundred others. One that is not finite, and so is not there, is said."""
    watched = {
        "watch/update_ratio": 0.5,
        "watch/largest_activation/block1/unit01": 2.0,
        "watch/update_ratio/head": 0.25,
    }
    folder = written(tmp_path / "run", flagperfs())
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1} | watched) + "\n")
    assert reported(folder, "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"aria-label=\"([^. ]*)", page) == ["watch/update_ratio"]
    assert "TensorBoard shows it for each part" in page
    body = section(page, "watched").partition("<tbody>")[2]
    assert re.findall(r"<td>(.*?)</td>", body) == ["1", "not finite", "0.5", "not finite", "", "0"]


def test_the_table_says_in_which_part_of_the_model_a_number_is_largest(tmp_path, reported):
    watched = {"watch/largest_activation": 3.25, "watch/dead_relus": 0.005}
    parts = {f"{name}/{part}": of_part for name in watched for part, of_part in (("block1/unit01", 0.02), ("head", 0))}
    folder = written(tmp_path / "run", flagperfs())
    entry = {"step": 1} | watched | parts | {"watch/largest_activation/group_norm": 3.25}
    (folder / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    _, out, _ = reported(folder)
    assert "3.25 in group_norm " in out
    assert "0.50%; most in block1/unit01: 2.00% " in out


def test_a_start_without_an_end_was_killed_unless_it_is_the_last(tmp_path, reported):
    folder = started(written(tmp_path / "run", flagperfs()))
    first = (folder / "starts.jsonl").read_text()
    (folder / "starts.jsonl").write_text(first + first.replace("1000000000.0", "1000000100.0"))
    assert reported(folder, "--html", tmp_path / "page.html")[0] == 0
    rows = section((tmp_path / "page.html").read_text(), "starts").split("<tr>")[2:]
    assert [re.findall("under way or killed|killed", row) for row in rows] == [["killed"], ["under way or killed"]]


def test_where_the_time_went_is_in_the_json(tmp_path, reported):
    folder = started(written(tmp_path / "run", flagperfs()))
    assert reported(folder, "--json", tmp_path / "all.json")[0] == 0
    (content,) = json.loads((tmp_path / "all.json").read_text())
    assert content["over_all_starts"]["seconds"] == {"compilation": 20.0, "training that counts": 40.0}
    assert content["over_all_starts"]["p_whole"] == 128_000 / 40


def test_a_page_does_not_take_the_place_of_what_it_is_of(tmp_path, reported):
    folder = started(written(tmp_path / "run", flagperfs()))
    code, _, said = reported(folder, "--html", folder / "starts.jsonl")
    assert code == 2
    assert "starts.jsonl" in said
    code, _, said = reported(folder, "--html", tmp_path / "both", "--json", tmp_path / "both")
    assert code == 2
    assert "--json and --html" in said
