"""Grids as users run them: whole, cut short, killed, side by side; and the tables that come of them."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, variance

import pytest
import torch
from filelock import FileLock

from model.backbones.vgg import PLAIN_BRANCHES
from model.contract import InterflowError
from model.methods import METHODS
from training import finish, grid, published
from training.data import input_spec
from training.grid import Cell, Grid
from training.loop import NotFiniteError, Training
from training.paper_tables import TABLES, Row
from training.published import Published
from training.reproduce import UNFINISHED, main, table_recipe
from training.results import Results, Summary
from training.run import Run
from training.train import build_network

ROOT = Path(__file__).parents[2]
VARIANT = "width0.05-epochs2-lr0.02-drop_epochs1"
SMALL = ["--data", "digits", "--epochs", "2", "--width", "0.05", "--lr", "0.02", "--device", "cpu"]
TWO = ["table3", *SMALL, "--methods", "normal", "s1"]
OF_ITS_RUN = ("seconds", "jobs")
"""Columns of the CSV that say how a cell was trained, not what came of it."""


@pytest.fixture(autouse=True, scope="module")
def _no_revision():
    """Someone may commit while a grid is compared with an earlier one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", os.devnull)
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_pictures_of_runs():
    """They take longer than these runs, and `test_train.py` looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_accuracy", "plot_weights", "plot_confusion"):
            patch.setattr(finish, name, lambda *_: None)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A grid of Normal and S1, two seeds each, trained one after the other."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert reproduce(folder, *TWO, "--seeds", "2", "--jobs", "1") == 0
    return folder


def reproduce(folder, *arguments):
    return main([*arguments, "--runs", str(folder / "runs"), "--out", str(folder / "out")])


def cells(folder):
    return sorted(path.name for path in (folder / "runs" / "digits").glob("*/"))


def lines(folder, table="table3"):
    with (folder / "out" / f"{table}-digits-{VARIANT}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(folder, table="table3"):
    return (folder / "out" / f"{table}-digits-{VARIANT}.md").read_text()


def assert_the_same_table(folder, unbroken):
    """To the byte, but for what depends on how the cells were trained."""
    stem = f"table3-digits-{VARIANT}"
    for suffix in (".md", ".png"):
        one, other = ((f / "out" / f"{stem}{suffix}").read_bytes() for f in (folder, unbroken))
        assert one == other, suffix
    one, other = (
        [{name: value for name, value in line.items() if name not in OF_ITS_RUN} for line in lines(f)]
        for f in (folder, unbroken)
    )
    assert one == other
    assert sum(line["status"] == "finished" for line in one) == 4


@pytest.fixture
def steps_taken(monkeypatch):
    """Folders' names of the cells that take a step, one entry a step."""
    taken, whole = [], Training.steps

    def counted(self):
        for step in whole(self):
            taken.append(self.run.folder.name)
            yield step

    monkeypatch.setattr(Training, "steps", counted)
    return taken


def test_a_grid_leaves_a_run_per_cell_and_a_table(unbroken):
    assert cells(unbroken) == [f"{method}-{VARIANT}-seed{seed}" for method in ("S1", "normal") for seed in (0, 1)]
    cell = unbroken / "runs" / "digits" / f"S1-{VARIANT}-seed1"
    names = {path.name for path in cell.iterdir()}
    assert {"card.json", "metrics.csv", "recipe.yaml"} <= names
    assert "checkpoint.safetensors" not in names
    by_row = {(line["row"], line["seed"]): line for line in lines(unbroken)}
    assert len(by_row) == 22
    line = by_row["S1", "1"]
    assert line["command"] == (
        "python training/train.py --recipe paper --data digits --method S1 --width 0.05 --epochs 2 --lr 0.02 "
        "--drop-epochs 1 --seed 1"
    )
    assert float(line["seconds"]) > 0
    assert line["hardware"]
    assert len(line["branch_accuracy"].split()) == 4
    accuracies = [float(by_row["S1", seed]["accuracy"]) for seed in ("0", "1")]
    assert min(accuracies) > 15  # it learns something
    page = markdown(unbroken)
    assert f"| S1 | {fmean(accuracies):.2f} |" in page
    assert "**Not the paper's setting**: width 0.05 instead of 1.0, epochs 2 instead of 40, lr 0.02" in page
    assert "within the spread" not in page


def test_a_cells_own_command_gives_its_figures(unbroken, tmp_path):
    from training import train

    (line,) = [line for line in lines(unbroken) if (line["row"], line["seed"]) == ("S1", "1")]
    command = line["command"].split()[2:]
    assert train.main([*command, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    card = train.Run(tmp_path / "run").finished_card()
    assert f"{100 * card.metrics.accuracy:.4f}" == line["accuracy"]


def test_an_epoch_that_was_stopped_after_its_last_step_has_no_part_in_the_seconds(unbroken, tmp_path):
    """What is left of it when it goes on is no image, in no time."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path / "runs" / "digits" / f"S1-{VARIANT}-seed1")
    for rate in (0.0, -40.0):
        history = run.history()
        history[0]["images_per_second"] = rate
        run.save_history(history)
        run.card.touch()
        assert reproduce(tmp_path, *TWO, "--seeds", "2") == 0
        seconds = [
            next(float(line["seconds"]) for line in lines(folder) if (line["row"], line["seed"]) == ("S1", "1"))
            for folder in (tmp_path, unbroken)
        ]
        assert 0 < seconds[0] < seconds[1]


def test_what_is_not_run_says_so(unbroken):
    assert "| S0 | not run |  | 0 of 2 |" in markdown(unbroken)
    missing = [line for line in lines(unbroken) if line["row"] == "S0"]
    assert [(line["status"], line["accuracy"], line["seconds"]) for line in missing] == [("not run", "", "")] * 2


def test_finished_cells_are_not_trained_again_and_tables_share_them(unbroken, tmp_path, steps_taken, monkeypatch):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    assert reproduce(tmp_path, *TWO, "--seeds", "2") == 0
    assert steps_taken == []
    assert_the_same_table(tmp_path, unbroken)
    assert reproduce(tmp_path, "table4", *SMALL, "--seeds", "2") == 0
    assert reproduce(tmp_path, "fig4", *SMALL, "--seeds", "1") == 0
    assert steps_taken == []
    assert [line["accuracy"] for line in lines(tmp_path, "table4")] == [
        line["accuracy"] for line in lines(unbroken) if line["row"] == "S1"
    ]
    assert [len(line["weights"].split()) for line in lines(tmp_path, "fig4")] == [4, 4]  # seed 1 is there: it counts
    assert reproduce(tmp_path, *TWO, "--seeds", "3", "--methods", "S1") == 0
    assert set(steps_taken) == {f"S1-{VARIANT}-seed2"}
    assert "| S1 | " in markdown(tmp_path)
    assert " | 2 of 3 | " in markdown(tmp_path)  # Normal


def test_cells_side_by_side_give_the_same_table(unbroken, tmp_path, steps_taken):
    assert reproduce(tmp_path, *TWO, "--seeds", "2", "--jobs", "3") == 0
    assert_the_same_table(tmp_path, unbroken)
    order = [f"{method}-{VARIANT}-seed{seed}" for seed in (0, 1) for method in ("normal", "S1")]
    assert steps_taken[:6] == order[:3] * 2  # seed by seed, in turns


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_table(unbroken, tmp_path, steps_taken):
    """kill -9 of a process that has finished one cell at least and is training others."""
    command = [sys.executable, str(ROOT / "training" / "reproduce.py"), *TWO, "--seeds", "2", "--jobs", "2"]
    paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, *paths], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    table = tmp_path / "out" / f"table3-digits-{VARIANT}.csv"
    while not table.is_file() or "finished" not in table.read_text():  # the table is current at any moment
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list((tmp_path / "runs").glob("*/*/card.json"))
    written = {path: path.stat().st_mtime_ns for path in done}
    assert len(done) < 4
    assert reproduce(tmp_path, *TWO, "--seeds", "2", "--jobs", "2") == 0
    assert_the_same_table(tmp_path, unbroken)
    assert {path: path.stat().st_mtime_ns for path in done} == written
    assert not {path.parent.name for path in done} & set(steps_taken)


def test_ctrl_c_saves_all_that_was_begun_and_says_how_to_go_on(unbroken, tmp_path, monkeypatch, capsys, steps_taken):
    with monkeypatch.context() as patch:
        counted, taken = Training.steps, 0

        def interrupted(self):
            nonlocal taken
            for step in counted(self):
                taken += 1
                if taken == 30:
                    os.kill(os.getpid(), signal.SIGINT)
                yield step

        patch.setattr(Training, "steps", interrupted)
        assert reproduce(tmp_path, *TWO, "--seeds", "2", "--jobs", "2") == 130
    assert "4 of 4 cells are left; what was begun is saved. Go on with: python training/reproduce.py table3" in (
        capsys.readouterr().out
    )
    assert len(list((tmp_path / "runs").glob("*/*/checkpoint.safetensors"))) == 2
    assert 30 <= len(steps_taken) <= 32
    assert reproduce(tmp_path, *TWO, "--seeds", "2", "--jobs", "2") == 0
    assert_the_same_table(tmp_path, unbroken)
    assert len(steps_taken) <= 4 * 46 + 2  # 23 steps an epoch; the two that were interrupted are not counted twice


def test_no_time_writes_the_table_and_trains_nothing(tmp_path, steps_taken, capsys):
    for table in TABLES:
        assert reproduce(tmp_path, table, *SMALL, "--limit-minutes", "0", "--seeds", "1") == UNFINISHED
        assert "No cell is finished yet" in markdown(tmp_path, table)
        assert (tmp_path / "out" / f"{table}-digits-{VARIANT}.png").read_bytes().startswith(b"\x89PNG")
    assert steps_taken == []
    assert not (tmp_path / "runs" / "digits").exists()


def test_when_the_time_is_up_it_stops_in_good_order(unbroken, tmp_path, monkeypatch, capsys):
    whole = Grid._train_cell

    def hurried(self, cell, run):
        for number, step in enumerate(whole(self, cell, run)):
            if number == 5:
                self.until = time.monotonic()
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "_train_cell", hurried)
        assert reproduce(tmp_path, *TWO, "--seeds", "2", "--limit-minutes", "10") == UNFINISHED
    assert "4 of 4 cells are left" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("*/*/checkpoint.safetensors"))) == 1


def test_a_cell_that_another_process_has_is_left_to_it(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    held, free = (tmp_path / "runs" / "digits" / f"normal-{VARIANT}-seed{seed}" for seed in (0, 1))
    for folder in (held, free):
        (folder / "card.json").unlink()
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    with FileLock(held / ".lock"):
        assert reproduce(tmp_path, *TWO, "--seeds", "2", "--jobs", "2") == UNFINISHED
    assert "1 of 4 cells are left" in capsys.readouterr().out
    assert (free / "card.json").is_file()
    assert not (held / "card.json").exists()
    assert " | 1 of 2 | " in markdown(tmp_path)


def test_a_network_that_cannot_be_trained_is_a_result_and_stops_no_other(unbroken, tmp_path, monkeypatch, steps_taken):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    broken, sound = (tmp_path / "runs" / "digits" / f"{method}-{VARIANT}-seed0" for method in ("normal", "S1"))
    for folder in (broken, sound):
        (folder / "card.json").unlink()
    monkeypatch.setattr(Training, "_row", _diverging(broken, Training._row))
    assert reproduce(tmp_path, *TWO, "--seeds", "2", "--jobs", "2") == 0
    assert (sound / "card.json").is_file()
    assert "| normal | " in markdown(tmp_path)
    assert " | 1 of 2, 1 failed | " in markdown(tmp_path)
    assert [line["status"] for line in lines(tmp_path)[:2]] == ["failed", "finished"]
    steps_taken.clear()
    assert reproduce(tmp_path, *TWO, "--seeds", "2") == 0
    assert steps_taken == []


def _diverging(folder, whole):
    def row(self, *arguments):
        if self.run.folder == folder:
            raise NotFiniteError("the loss is no longer a finite number")
        return whole(self, *arguments)

    return row


def test_any_other_trouble_stops_the_grid_after_the_others_are_saved(tmp_path, monkeypatch):
    whole_finish, whole_steps = grid.finish, Training.steps

    def full(network, data, recipe, run):
        if recipe.method == "normal":
            raise OSError(28, "No space left on device", str(run.card))
        return whole_finish(network, data, recipe, run)

    def short(self):  # Normal is at its end while S1 is in its first epoch
        for number, step in enumerate(whole_steps(self)):
            if number == 5 and self.recipe.method == "normal":
                return
            yield step

    monkeypatch.setattr(grid, "finish", full)
    monkeypatch.setattr(Training, "steps", short)
    with pytest.raises(OSError, match="No space left"):
        reproduce(tmp_path, *TWO, "--seeds", "1", "--jobs", "2")
    (saved,) = (tmp_path / "runs").glob("*/*/checkpoint.safetensors")
    assert saved.parent.name.startswith("S1")
    assert not saved.with_name("card.json").exists()


def test_a_run_begun_with_another_recipe_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    cell = tmp_path / "runs" / "digits" / f"S1-{VARIANT}-seed0"
    (cell / "card.json").unlink()
    text = (cell / "recipe.yaml").read_text()
    (cell / "recipe.yaml").write_text(re.sub("momentum: .*", "momentum: 0.5", text))
    with pytest.raises(InterflowError, match=r"begun with another recipe \(momentum\); remove it"):
        reproduce(tmp_path, *TWO, "--seeds", "2")


def test_the_key_says_what_differs_from_the_paper_and_nothing_else(tmp_path):
    def name(**settings):
        return Cell.below(tmp_path, table_recipe(settings)).folder.relative_to(tmp_path).as_posix()

    assert name() == "cifar10/S3-seed0"
    assert name(data="mnist", seed=4, device="cpu", workers=0) == "mnist/S3-seed4"
    assert name(epochs=50, precision="bfloat16") == "cifar10/S3-epochs50-drop_epochs10-precisionbfloat16-seed0"
    assert name(backbone="plain40", method="S1") == "cifar10/plain40-S1-seed0"
    keys = {table: {results(table).cell(row, 0).folder for row in TABLES[table].rows} for table in ("table1", "table3")}
    assert {path.name for path in keys["table1"] & keys["table3"]} == {"normal-seed0"}
    assert {path.name for path in keys["table1"] - keys["table3"]} == {f"normal-depth{n}-seed0" for n in range(4, 13)}


def results(table, runs=Path("none"), **settings):
    return Results(table, TABLES[table], table_recipe(settings), 2, runs)


@pytest.mark.parametrize("data", [*published.TABLE_3, "digits"])
def test_only_the_papers_own_setting_is_compared_with_the_paper(data):
    for table, wanted in TABLES.items():
        column = results(table, data=data).published
        assert set(column) == (
            {row.name for row in wanted.rows}
            if data == "cifar10" or (table == "table3" and data != "digits")
            else set()
        )
        assert results(table, data=data, width=0.5).published == {}
        assert results(table, data=data, compile=True).published == column  # it only is faster
    page = results("table3", data=data).to_markdown(results("table3", data=data).outcomes())
    assert ("within the spread" in page) == (data != "digits")
    assert ("91.81 (mean of 30), published cell 92.04" in page) == (data == "cifar10")


def summary(accuracies, paper):
    return Summary(Row("S1", {"method": "S1"}), tuple(accuracies), 4, 0, paper)


@pytest.mark.parametrize(
    ("accuracies", "paper", "verdict"),
    [
        # mean 92, deviation 1: limit 2
        ((91.0, 92.0, 93.0), Published(90.01), "yes"),
        ((91.0, 92.0, 93.0), Published(94.01), "no"),
        # limit 2 sqrt(1/3 + 3/9) = 1.633
        ((91.0, 92.0, 93.0), Published(90.38, variance=3.0, runs=9), "yes"),
        ((91.0, 92.0, 93.0), Published(90.36, variance=3.0, runs=9), "no"),
        ((92.0,), Published(92.0), "one run"),
        ((), Published(92.0), ""),
        ((91.0, 92.0), None, ""),
    ],
)
def test_the_verdict_follows_the_rule_that_the_page_states(accuracies, paper, verdict):
    assert summary(accuracies, paper).verdict == verdict


def test_mean_deviation_and_difference_are_those_of_a_sample():
    found = summary((90.0, 92.0, 97.0), Published(91.5))
    assert found.mean == pytest.approx(93)
    assert found.deviation == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2
    assert found.difference == pytest.approx(1.5)
    assert summary((90.0,), None).deviation is None


def test_the_papers_figures_agree_with_one_another():
    assert {len(column) for column in published.TABLE_3.values()} == {11}
    assert [*published.TABLE_3["cifar10"]] == [*METHODS]
    assert published.TABLE_1[13] == published.TABLE_3["cifar10"]["normal"] == 91.12
    assert max(published.TABLE_7) == published.TABLE_3["cifar10"]["S3"] == 92.12
    assert round(fmean(published.TABLE_7), 2) == published.S3_RUNS.accuracy
    assert round(variance(published.TABLE_7), 2) == published.S3_RUNS.variance
    assert len(published.TABLE_7) == published.S3_RUNS.runs
    assert {n: len(deep.weights) for n, deep in published.TABLE_6.items()} == PLAIN_BRANCHES


def test_the_papers_figures_are_those_it_prints():
    """Spot checks, one at least of every table and of every column of Table III."""
    assert (published.TABLE_1[4], published.TABLE_1[12]) == (83.21, 90.40)
    table = published.TABLE_3
    assert (table["cifar10"]["S9"], table["cifar100"]["S4"], table["svhn"]["S6"]) == (91.81, 69.05, 94.34)
    assert (table["mnist"]["S2"], table["kmnist"]["S4"], table["fashion_mnist"]["S4"]) == (99.58, 97.17, 93.64)
    assert published.S1_RUNS == (91.81, 0.020, 30, None)
    assert published.TABLE_4_WEIGHTS == (-0.6881, 0.6791, 0.1978, 2.3720)
    assert (published.TABLE_6[60].normal, published.TABLE_6[100].interflow) == (31.48, 85.91)
    assert (published.TABLE_6[80].weights[-1], published.TABLE_6[90].weights[-2]) == (0.7578, -2.0337)


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_the_network_it_says(table):
    for row in TABLES[table].rows:
        recipe = results(table, width=0.05).cell(row, 0).recipe
        with torch.device("meta"):
            network = build_network(recipe, 10, input_spec(recipe))
        if table == "table1":
            assert network.backbone.depth == int(row.x)
        elif table == "table6":
            assert network.backbone.depth == int(row.x)
            assert len(network.stages) == (1 if row.series == "Normal" else len(row.weights))
        else:
            assert network.method.name == row.name
            assert not row.weights or len(network.stages) == len(row.weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "S11"], "S11: table3 has no such row; choose from normal, S0"),
        (["--data", "photos"], "--data photos: choose one of cifar10"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(tmp_path, arguments, message):
    with pytest.raises(InterflowError, match=message):
        reproduce(tmp_path, "table3", *arguments)


@pytest.mark.parametrize("arguments", [["--seed", "3"], ["--method", "S1"], ["--seeds", "0"]])
def test_what_the_table_decides_is_no_option(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        reproduce(tmp_path, "table3", *arguments)
    assert re.search("the table decides that|expected 1 or more", capsys.readouterr().err)
