"""Runs as users start them: whole, stopped, killed and resumed, and refused."""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.contract import InterflowError, ModelCard
from training import cli, finish, folders, loop, train
from training import step as step_module
from training.data import load_data
from training.recipe import load_recipe
from training.train import main, summary

ROOT = Path(__file__).parents[2]
SMALL = ["--epochs", "2", "--width", "0.06", "--taps", "4", "13", "--ema", "0.2", "--device", "cpu"]


def start(*arguments, **options):
    """`python training/train.py` as a process of its own."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(*arguments):
    """Run to the end: (status, stdout, stderr)."""
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_the_same_end(folder, unbroken):
    """Checkpoints of the same bytes, and the same history but for the speed."""
    assert (folder / "checkpoint.safetensors").read_bytes() == (unbroken / "checkpoint.safetensors").read_bytes()
    histories = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(f)] for f in (folder, unbroken)
    ]
    assert histories[0] == histories[1]
    assert (folder / "card.json").is_file()


def test_a_run_leaves_everything_it_promises(unbroken):
    card = ModelCard.from_json((unbroken / "card.json").read_bytes(), "card")
    assert [stage.name for stage in card.stages] == ["conv4", "conv13"]
    assert card.metrics.images == 359
    assert "held out of train" in card.fitted_on
    assert load_recipe(unbroken / "recipe.yaml").width == 0.06
    for name in ("accuracy.png", "weights.png", "confusion.png"):
        assert (unbroken / name).read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(unbroken / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("val_accuracy/conv13")] == [1, 2]
    assert "weight/conv4/7" in board.Tags()["scalars"]
    samples = np.load(unbroken / "samples.npy")
    assert (samples.shape, samples.dtype) == ((20, 32, 32, 1), np.uint8)


def test_the_card_has_figures_by_class_that_fit_the_accuracy(unbroken):
    metrics = ModelCard.from_json((unbroken / "card.json").read_bytes(), "card").metrics
    images = np.array(metrics.class_images)
    assert images.tolist() == np.bincount(load_data(load_recipe(unbroken / "recipe.yaml")).test.labels).tolist()
    assert np.array(metrics.class_recall) @ images / 359 == pytest.approx(metrics.accuracy)
    assert metrics.auroc > 0.6  # two epochs see something
    assert 0 < metrics.macro_f1 < 1


def test_the_summary_names_the_classes_of_lowest_recall(bundled):
    card = ModelCard.from_json((bundled / "model.json").read_bytes(), "card")
    recall = tuple(i / 14 for i in (3, 1, 2, 0, *range(4, 14)))
    figures = {"macro_f1": 0.25, "auroc": 0.125, "class_recall": recall, "class_images": tuple(range(1, 15))}
    metrics = card.metrics.model_copy(update=figures)
    names = tuple(f"a class called {letter}" for letter in "abcdefghijklmn")
    lines = summary(card.model_copy(update={"classes": names, "metrics": metrics})).splitlines()
    assert lines[0].endswith("macro-F1 25.00%, AUROC 0.1250")
    assert [line.rsplit(maxsplit=2) for line in lines[7:11]] == [
        ["a class called d", "0.00%", "4"],
        ["a class called b", "7.14%", "2"],
        ["a class called c", "14.29%", "3"],
        ["a class called a", "21.43%", "1"],
    ]
    assert len(lines[7:]) == 11
    assert lines[-1] == "and 4 classes of higher or equal recall"
    few = {"class_recall": recall[:3], "class_images": (1, 2, 3)}
    metrics = card.metrics.model_copy(update=figures | few)
    lines = summary(card.model_copy(update={"classes": names[:3], "metrics": metrics})).splitlines()
    assert [line.split()[3] for line in lines[7:]] == ["b", "c", "a"]


def test_the_history_has_accuracies_and_every_learned_weight(unbroken):
    history = rows(unbroken)
    assert [row["epoch"] for row in history] == ["1", "2"]
    columns = set(history[0])
    assert {"val_accuracy", "val_accuracy/conv4", "val_accuracy/conv13", "train_accuracy/conv4", "lr"} <= columns
    weights = [float(history[-1][f"weight/{stage}/{digit}"]) for stage in ("conv4", "conv13") for digit in range(10)]
    saved = load_file(unbroken / "checkpoint.safetensors")["network.attention.weight"]
    np.testing.assert_allclose(weights, saved.flatten(), rtol=1e-6)


def test_another_seed_is_another_network(unbroken, tmp_path):
    assert main([*SMALL, "--epochs", "1", "--seed", "1", "--out", str(tmp_path / "run")]) == 0
    one, other = (load_file(folder / "checkpoint.safetensors") for folder in (unbroken, tmp_path / "run"))
    assert not torch.equal(one["network.attention.weight"], other["network.attention.weight"])


def test_killed_it_goes_on_and_ends_as_if_unbroken(unbroken, tmp_path):
    """kill -9 from outside, in the first epoch that is not saved yet."""
    folder = tmp_path / "killed"
    process = start(*SMALL, "--out", folder)
    while not (folder / "checkpoint.safetensors").is_file():  # the first epoch is saved
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "card.json").exists()
    status, out, err = finished("--resume", folder)
    assert status == 0, err
    assert "resuming" in out
    assert_the_same_end(folder, unbroken)


def test_images_in_memory_in_files_and_in_the_cache_train_alike(tmp_path, photographs, monkeypatch):
    """To the same bytes: the source of the images changes nothing."""
    for name in ("astronaut.png", "chelsea.png"):
        with Image.open(photographs[name]) as image:
            for i in range(40):
                path = tmp_path / "set" / name.partition(".")[0] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((2 * i, i, 2 * i + 64, i + 64)).save(path)
    settings = ["--data", str(tmp_path / "set"), "--data-dir", str(tmp_path), "--epochs", "2", "--width", "0.06"]
    settings += ["--image-size", "32", "--batch-size", "16", "--lr", "0.01", "--crop-padding", "4", "--flip", "0.5"]
    main([*settings, "--out", str(tmp_path / "decoded")])
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_Checked", None)  # nothing is decoded
        main([*settings, "--out", str(tmp_path / "cached")])
    monkeypatch.setattr(folders, "IN_MEMORY_BYTES", 0)
    main([*settings, "--out", str(tmp_path / "streamed")])
    checkpoints = [
        (tmp_path / run / "checkpoint.safetensors").read_bytes() for run in ("decoded", "cached", "streamed")
    ]
    assert checkpoints[0] == checkpoints[1] == checkpoints[2]


class Killed(BaseException):
    """The process ends here; nothing is caught, nothing cleaned up."""


def killed_at(monkeypatch, owner, name, call, before=True):
    """Let the `call`-th call of a function end the process, before or after its work."""
    whole, calls = getattr(owner, name), 0

    def deadly(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call and before:
            raise Killed
        result = whole(*arguments, **options)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)


@pytest.mark.parametrize(
    ("owner", "name", "call", "before"),
    [
        (step_module.Step, "take", 1, True),
        (step_module.Step, "take", 10, False),
        (step_module.Step, "take", 42, False),  # the last step of all
        (loop, "predict", 2, True),
        (loop, "save_checkpoint", 2, True),  # the history is a row ahead of the checkpoint
        (loop, "save_checkpoint", 2, False),
        (finish, "predict", 1, True),
        (finish, "plot_weights", 1, True),
        (finish, "write_text", 1, True),
    ],
)
def test_wherever_it_dies_it_goes_on_and_ends_as_if_unbroken(
    unbroken, tmp_path, monkeypatch, owner, name, call, before
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, owner, name, call, before)
        with pytest.raises(Killed):
            main([*SMALL, "--out", str(folder)])
    assert main(["--resume", str(folder)]) == 0
    assert_the_same_end(folder, unbroken)


@pytest.mark.parametrize("step", [1, 20, 21, 30])  # an epoch has 21
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(unbroken, tmp_path, monkeypatch, capsys, step):
    folder = tmp_path / "run"
    whole, steps = step_module.Step.take, 0

    def interrupted(self, *arguments):
        nonlocal steps
        whole(self, *arguments)
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(step_module.Step, "take", interrupted)
    assert main([*SMALL, "--out", str(folder)]) == 130
    assert f"Go on with: python training/train.py --resume {folder}" in capsys.readouterr().out
    assert steps == step
    assert main(["--resume", str(folder)]) == 0
    assert steps == 2 * 21
    assert_the_same_end(folder, unbroken)
    assert all(float(row["images_per_second"]) >= 0 for row in rows(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_its_processes_stops_it_in_good_order(tmp_path, photographs, number):
    """As a terminal, systemd or Slurm sends it, while worker processes read a folder's images."""
    for name in ("astronaut.png", "chelsea.png"):
        with Image.open(photographs[name]) as image:
            for i in range(60):
                path = tmp_path / "set" / name.partition(".")[0] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((i, i, i + 64, i + 64)).save(path)
    streaming = "from training import folders, train, cli; folders.IN_MEMORY_BYTES = 0; cli.run(train.main)"
    settings = ["--data", tmp_path / "set", "--epochs", "100", "--width", "0.06", "--batch-size", "8", "--workers", "2"]
    command = [sys.executable, "-c", streaming, *map(str, settings), "--out", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **pipes
    )
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*children, process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Go on with: python training/train.py --resume" in out
    assert "Traceback" not in err


def test_a_finished_run_is_left_alone(unbroken, capsys):
    before = (unbroken / "card.json").read_bytes()
    assert main(["--resume", str(unbroken)]) == 0
    assert "finished already" in capsys.readouterr().out
    assert (unbroken / "card.json").read_bytes() == before


def test_a_loss_that_is_no_number_stops_with_advice_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    good = step_module.training_loss
    calls = 0

    def diverging(*arguments):
        nonlocal calls
        calls += 1
        return good(*arguments) * (float("nan") if calls > 25 else 1)

    monkeypatch.setattr(step_module, "training_loss", diverging)
    with pytest.raises(InterflowError, match=r"no longer a finite number in epoch 2.*lower --lr"):
        main([*SMALL, "--out", str(folder)])
    assert all(
        t.isfinite().all() for t in load_file(folder / "checkpoint.safetensors").values() if t.is_floating_point()
    )
    assert len(rows(folder)) == 1


@pytest.mark.parametrize("content", ["", "epoch,lr\n1,x\n2,y\n", "\x00\xff", "epoch,lr\n1,0.1\n"])
def test_a_damaged_history_is_refused_in_a_sentence(tmp_path, unbroken, content):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "card.json").unlink()
    (folder / "metrics.csv").write_text(content)
    with pytest.raises(InterflowError, match=r"not (the|a whole) history"):
        main(["--resume", str(folder)])


def test_a_run_of_classes_with_odd_names_is_drawn(tmp_path, photographs):
    for name in ("$x_{$", "_b", "猫"):
        for i in range(4):
            path = tmp_path / "odd" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(list(photographs.values())[i % 2], path)
    settings = ["--data", str(tmp_path / "odd"), "--image-size", "16", "--epochs", "1", "--width", "0.06"]
    assert main([*settings, "--val-fraction", "0.3", "--out", str(tmp_path / "run")]) == 0
    card = ModelCard.from_json((tmp_path / "run" / "card.json").read_bytes(), "card")
    assert card.classes == ("$x_{$", "_b", "猫")


def test_too_little_memory_is_one_sentence(monkeypatch, capsys):
    def hungry():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(SystemExit, match=r"error: out of memory; lower --batch-size"):
        cli.run(hungry)


def test_two_processes_cannot_train_one_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    process = start(*SMALL, "--epochs", "500", "--out", folder)
    try:
        while not (folder / "recipe.yaml").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        with pytest.raises(InterflowError, match="another process"):
            main(["--resume", str(folder)])
    finally:
        process.kill()
        process.communicate()


def test_changed_images_are_noticed_on_resuming(tmp_path, monkeypatch, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "card.json").unlink()
    monkeypatch.setattr(train, "load_data", lambda recipe: replace(load_data(recipe), fingerprint="another"))
    with pytest.raises(InterflowError, match="not those the run began with"):
        main(["--resume", str(folder)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/folder"], "no such folder"),
        (["--depth", "9"], "tap 10 is not a point of this network; .* 9 conv9"),
        (["--method", "S11"], "S11"),
        (["--taps", "4", "7"], "ending with the last one"),
        (["--recipe", "none.yaml"], "recipe none.yaml"),
        (["--resume", "no/such/run"], "not a run's folder"),
        (["--lr", "much"], "lr is 'much'"),
        (["--mean", "33", "--std", "10"], "mean is '33'"),
        (["--options", "depth=3", "num_classes=4"], "options depth, num_classes: .*--depth"),
    ],
)
def test_refusals_are_one_sentence_and_leave_no_run(arguments, message, tmp_path):
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    status, _, err = finished(*arguments, *out)
    assert status == 1
    assert re.search(message, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_taken_is_not_overwritten(unbroken):
    with pytest.raises(InterflowError, match="is there already; give --out another"):
        main([*SMALL, "--out", str(unbroken)])


@pytest.mark.parametrize("method", ["normal", "S0", "S1", "S9"])
def test_other_methods_train_and_say_what_they_are(method, tmp_path):
    settings = ["--recipe", "paper", "--data", "digits", "--image-size", "32", "--epochs", "1", "--width", "0.125"]
    assert main([*settings, "--precision", "bfloat16", "--method", method, "--out", str(tmp_path / "run")]) == 0
    card = ModelCard.from_json((tmp_path / "run" / "card.json").read_bytes(), "card")
    assert card.method.name == method
    assert "the 1438 training images themselves" in card.fitted_on
    assert len(card.stages) == {"normal": 1, "S0": 4, "S1": 4, "S9": 7}[method]
