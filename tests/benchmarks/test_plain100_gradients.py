"""What the study of plain100 says of its gradients holds on other real images, at a smaller width."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.plain100_gradients import study


@pytest.fixture(scope="module")
def batch():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images[:64].astype(np.float32)).view(-1, 1, 8, 8) / 16
    pixels = nn.functional.interpolate(pixels, (32, 32))
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(labels[:64])


@pytest.fixture(scope="module")
def studies(batch):
    return {m: study(m, *batch, layers=100, width=0.0625, lr=1e-3, steps=40) for m in ("normal", "S1")}


@pytest.mark.slow
def test_the_gradient_explodes_at_the_start_in_both(studies):
    for found in studies.values():
        assert len(found.before) == len(found.after) == 100
        assert found.before[0] > 1e4 * found.before[-1]


@pytest.mark.slow
def test_after_40_steps_it_no_longer_reaches_the_first_layers_of_normal_but_those_of_s1(studies):
    reach = {method: found.after[0] / found.after[-1] for method, found in studies.items()}
    assert reach["normal"] < 1e-3
    assert reach["S1"] > 10 * reach["normal"]
