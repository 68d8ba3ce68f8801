"""`training/train.py` in float64, where any number of processes agree to many digits, and with a mishap if asked for.

In float32 a narrow network amplifies rounding in training by orders of magnitude: with two threads instead of one, the
first gradients of some layers differ by 3 %.
"""

import os
import signal

import torch

from model.contract import InterflowError
from training import cli, folders, splits, step, train

RANK = os.environ.get("RANK", "0")
MISHAP = os.environ.get("MISHAP", "")
if os.environ.get("STREAMED"):
    folders.IN_MEMORY_BYTES = 0


def mishap():
    """In the second process, at its eighth step: the third of the second epoch."""
    if MISHAP == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if MISHAP == "stopped":
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun
    if MISHAP == "broken":
        raise ValueError("a defect of the code")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    whole_take, taken = step.Step.take, 0

    def take(self, *arguments):
        global taken  # noqa: PLW0603
        taken += 1
        if RANK == "1" and taken == 8:
            mishap()
        whole_take(self, *arguments)

    step.Step.take = take
    read = splits.read_file

    def read_file(path, spec):
        if RANK == "1" and taken >= 6:
            raise InterflowError(f"{path}: cannot be read any more")
        return read(path, spec)

    if MISHAP == "unreadable":
        splits.read_file = read_file
    cli.run(train.main, together=True)
