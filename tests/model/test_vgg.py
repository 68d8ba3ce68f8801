"""VGG-16 as the paper uses it: layers, strides, cost, taps."""

import itertools

import pytest
import torch
from torch import nn

from model.backbones.vgg import VGG16
from model.contract import InterflowError


def vgg(branches: int = 4, **settings):
    sizes = {key: settings.pop(key) for key in ("in_channels", "width") if key in settings}
    network = VGG16(**{"in_channels": 3, "width": 1.0} | sizes)
    network.tap(branches, **settings)
    return network


def test_thirteen_convolutions_cost_313_million_multiply_adds():
    cost = 0

    def count(convolution: nn.Conv2d, _inputs, output):
        nonlocal cost
        cost += output[0].numel() * convolution.weight[0].numel()

    network = vgg().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        features = network(torch.zeros(1, 3, 32, 32)).maps
    assert round(cost / 1e6) == 313
    assert [tuple(f.shape[1:]) for f in features] == [(256, 8, 8), (512, 4, 4), (512, 2, 2), (512, 2, 2)]


def test_full_width_has_the_parameters_of_vgg16():
    # convolutions without bias, and batch norm: counted by hand from the 13 widths
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    expected = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    assert sum(p.numel() for p in vgg().parameters()) == expected


@pytest.mark.parametrize("depth", range(4, 14))  # Table I
def test_cut_after_any_convolution_it_has_that_many_and_taps_the_last(depth):
    network = vgg(branches=1, depth=depth, width=0.1)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == depth
    (stage,) = network.stages
    assert (stage.name, stage.depth) == (f"conv{depth}", depth)


def test_a_branch_sees_exactly_the_layers_up_to_its_tap():
    network = vgg(width=0.1).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        before = network(image).maps
        network.blocks[9].layers[0].weight.zero_()  # convolution 10
        after = network(image).maps
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (37, 50), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_both_channel_counts(size, channels):
    features = vgg(width=0.05, in_channels=channels).eval()(torch.randn(2, channels, *size)).maps
    expected = [size]
    for _ in range(4):  # a stride of 2 with padding 1 rounds up
        expected.append(tuple((side + 1) // 2 for side in expected[-1]))
    assert [tuple(f.shape[2:]) for f in features] == [expected[2], expected[3], expected[4], expected[4]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 3}, "4 to 13"),
        ({"depth": 14}, "4 to 13"),
        ({"depth": 11}, r"tap convolutions 7, 9, 11, 13, but the depth is 11"),
        ({"branches": 7, "depth": 9}, "the depth is 9"),
        ({"taps": (4, 7)}, r"ending with the last one \(conv13\)"),
        ({"taps": (7, 4, 13)}, "ascending"),
        ({"taps": (7, 7, 13)}, "ascending"),
        ({"taps": (0, 13)}, r"tap 0 is not .* 1 conv1, .* 13 conv13"),
        ({"taps": ("conv7", "conv14")}, r"tap 'conv14' is not .* 1 conv1, .* 13 conv13"),
        ({"taps": ()}, "none"),
    ],
)
def test_what_the_network_does_not_have_is_refused(settings, message):
    with pytest.raises(InterflowError, match=message):
        vgg(**settings)
