"""What is left with a finished run."""

from types import SimpleNamespace

import numpy as np
import torch

from training.finish import _samples
from training.splits import Split


class OnDevice(torch.Tensor):
    """As a tensor on a GPU, which numpy cannot read."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_samples_are_of_the_whole_split_also_where_the_images_lie_on_a_device():
    images = torch.arange(96, dtype=torch.uint8).reshape(96, 1, 1, 1)
    for lying in (images, images.as_subclass(OnDevice)):
        samples = _samples(SimpleNamespace(test=Split(lying, torch.zeros(96, dtype=torch.long))))
        np.testing.assert_array_equal(samples.ravel(), np.arange(20) * 5)
