"""The loop's own arithmetic, and the device it runs on."""

import pytest
import torch

from model.contract import InterflowError
from training.loop import choose_device, steps_per_epoch


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(InterflowError, match="no CUDA device; give --device cpu"):
            choose_device("cuda")


@pytest.mark.parametrize(("images", "steps"), [(2, 1), (64, 1), (65, 1), (66, 2), (128, 2), (129, 2), (50000, 782)])
def test_a_last_batch_of_one_image_is_left_out(images, steps):
    assert steps_per_epoch(images, 64) == steps
