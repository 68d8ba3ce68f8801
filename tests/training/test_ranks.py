"""Training by several processes: what one trains, and all end together. In float64, as `together.py` says."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from training import cli, ranks
from training import step as step_module
from training.train import main

ROOT = Path(__file__).parents[2]
TOGETHER = Path(__file__).with_name("together.py")
EPOCHS, STEPS = 2, 5
"""Of the run: batches of 15 and, last, 7 images."""


def torchrun(count, *arguments, script=TOGETHER, **environment):
    """(status, stdout, stderr) of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", count]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [str(part) for part in (*command, script, *arguments)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            out, err = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # and with it the others
            raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def settings(tmp_path_factory, photographs):
    """Two classes of unequal size, everything in the loss that there is, and figures on held-out images."""
    root = tmp_path_factory.mktemp("images")
    for name, count in (("astronaut", 64), ("chelsea", 29)):
        (root / "set" / name).mkdir(parents=True)
        with Image.open(photographs[f"{name}.png"]) as image:
            for i in range(count):
                image.crop((3 * i, 2 * i, 3 * i + 64, 2 * i + 64)).save(root / "set" / name / f"{i}.png")
    text = f"--data {root}/set --data-dir {root} --no-cache --image-size 32 --width 0.06 --taps 4 13 --device cpu"
    text += (
        f" --workers 2 --epochs {EPOCHS} --batch-size 15 --lr 0.02 --drop-epochs 1 --val-fraction 0.1 --balance loss"
    )
    text += " --auxiliary-loss 2 --label-smoothing 0.1 --ema 0.3 --crop-padding 4 --flip 0.5"
    return text.split()


def alone(*arguments):
    """One process, this one, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert alone(*settings, "--out", folder) == 0
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def assert_the_same_end(folder, unbroken):
    """Weights, batch norm's statistics, momentum, averages and every figure of every epoch, to rounding in float64."""
    ours, one = (load_file(run / "checkpoint.safetensors") for run in (folder, unbroken))
    assert ours.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text)
    assert [list(row) for row in rows(folder)] == [list(row) for row in rows(unbroken)]
    for ours, one in zip(rows(folder), rows(unbroken), strict=True):
        assert ours == pytest.approx(one, rel=1e-6)
    assert (folder / "card.json").is_file()


def test_two_processes_that_stream_files_train_what_one_does_from_memory(settings, unbroken, tmp_path):
    status, out, err = torchrun(2, *settings, "--out", tmp_path / "run", STREAMED="1")
    assert status == 0, err
    assert_the_same_end(tmp_path / "run", unbroken)
    assert re.search(r"\b67 images to train on, .* on cpu, 2 processes", out)
    for once in ("epochs: 2", "epoch 1/2: ", "epoch 2/2: ", "test: ", "finished: "):
        assert out.count(once) == 1, out
    assert "Warning" not in err
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_what_one_began_two_go_on_with(settings, unbroken, tmp_path, monkeypatch):
    """Stopped within the first epoch; images in memory."""
    whole, steps = step_module.Step.take, 0

    def interrupted(self, *arguments):
        nonlocal steps
        whole(self, *arguments)
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(step_module.Step, "take", interrupted)
        assert alone(*settings, "--out", tmp_path / "run") == cli.INTERRUPTED
    status, out, err = torchrun(2, "--resume", tmp_path / "run")
    assert status == 0, err
    assert out.count("at epoch 1, step 4") == 1
    assert_the_same_end(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("mishap", "said", "resumed_at"),
    [
        ("stopped", "stopped; the state is saved. Go on with: python training/train.py --resume", "epoch 2, step [45]"),
        # torchrun may notice before the other process does, and end it
        (
            "killed",
            r"error: another process of this run has ended; go on from its last saved state|SIGTERM\) received by PID",
            "epoch 2, step 1",
        ),
        pytest.param(
            "unreadable", r"error: .*\.png: cannot be read any more", "epoch 2, step 1", marks=pytest.mark.slow
        ),
        pytest.param("broken", "ValueError: a defect of the code", "epoch 2, step 1", marks=pytest.mark.slow),
    ],
)
def test_all_end_when_one_does_and_one_goes_on(settings, unbroken, tmp_path, capfd, mishap, said, resumed_at):
    folder = tmp_path / "run"
    environment = {"MISHAP": mishap} | ({"STREAMED": "1"} if mishap == "unreadable" else {})
    status, out, err = torchrun(2, *settings, "--out", folder, **environment)
    assert status == 1
    assert len(re.findall(said, out + err)) == 1, out + err
    assert not (folder / "card.json").exists()
    capfd.readouterr()
    assert alone("--resume", folder) == 0
    assert re.search(f"resuming .* at {resumed_at}", capfd.readouterr().out)
    assert_the_same_end(folder, unbroken)


@pytest.mark.slow
def test_a_refusal_is_said_once(settings, unbroken):
    status, out, err = torchrun(2, *settings, "--out", unbroken)
    assert status == 1
    assert (out + err).count("error: ") == 1
    assert re.search(r"^error: .* is there already; give --out another folder", err, re.MULTILINE)


@pytest.mark.slow
def test_three_processes_with_a_last_batch_of_two_images(settings, tmp_path):
    """Of which one has none."""
    settings = [*settings, "--batch-size", "13", "--balance", "sampler"]
    assert alone(*settings, "--out", tmp_path / "alone") == 0
    status, _, err = torchrun(3, *settings, "--out", tmp_path / "run")
    assert status == 0, err
    assert_the_same_end(tmp_path / "run", tmp_path / "alone")


def test_the_last_batch_may_leave_one_image_for_a_process_where_maps_are_fused(settings, tmp_path):
    """AFF's batch norms are over the whole batch, as all others are."""
    settings = [*settings, "--batch-size", "65", "--neck", "aff", "--depth", "4", "--taps", "2", "4", "--epochs", "1"]
    assert alone(*settings, "--out", tmp_path / "alone") == 0
    status, _, err = torchrun(2, *settings, "--out", tmp_path / "run")
    assert status == 0, err
    assert_the_same_end(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train.py", ["--batch-size", "2", "--epochs", "1"], "batch_size 2 for 3 processes"),
        ("train.py", ["--lr"], "argument --lr: expected one argument"),
        ("export.py", [], "torchrun is for training/train.py; start this with python"),
    ],
)
def test_what_cannot_be_done_together_is_said_once(script, arguments, said, tmp_path):
    out = ["--out", tmp_path / "run"] if script == "train.py" else []
    status, out, err = torchrun(3, *out, *arguments, script=ROOT / "training" / script)
    assert status == 1
    assert (out + err).count(said) == 1


def test_shares_cover_a_batch_in_order_and_differ_by_one_at_most(monkeypatch):
    monkeypatch.setattr(ranks, "several", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 3)
    for count in (0, 1, 2, 3, 64, 65, 66):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
            shares.append(ranks.share(torch.arange(count)))
        assert torch.cat(shares).tolist() == list(range(count))
        assert np.ptp([len(share) for share in shares]) <= 1


def test_a_process_alone_is_all_there_is():
    rows = torch.arange(3)
    network = torch.nn.Linear(2, 2)
    assert ranks.size() == 1
    assert ranks.first()
    assert ranks.share(rows) is ranks.summed(rows) is ranks.put_together(rows, 3) is rows
    assert ranks.data_parallel(network, torch.device("cpu")) is network
    assert ranks.workers(5) == 5
