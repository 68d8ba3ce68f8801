"""Laws of the network: exact sums, and what they do not depend on."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from model.contract import InterflowError
from model.interflow import Normalize
from model.methods import METHODS
from model.registry import create_model, list_models

# float32 sums of some hundred products, in another order
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def network(method="S3", **settings):
    """A narrow VGG whose batch norm has seen data, so that features are not all alike."""
    torch.manual_seed(0)
    net = create_model("vgg16", method=method, **{"width": 0.1, "num_classes": 7} | settings)
    for _ in range(3):
        net(torch.randn(16, net.backbone.blocks[0].layers[0].in_channels, 32, 32))
    return net.eval()


@pytest.fixture
def images():
    return torch.randn(5, 3, 40, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
def test_fused_logits_are_an_exact_sum_over_stages_and_positions(method, images):
    net = network(method)
    output = net(images)
    branches = METHODS[method].branches
    assert output.branch_logits.shape == output.branch_weights.shape == (5, branches, 7)
    over_stages = (output.branch_weights * output.branch_logits).sum(dim=1)
    torch.testing.assert_close(output.logits, over_stages, **TOLERANCE)
    total = torch.zeros_like(output.logits)
    for i, branch_map in enumerate(output.branch_maps):
        total += (output.branch_weights[:, i, :, None, None] * branch_map).mean(dim=(2, 3))
    torch.testing.assert_close(output.logits, total, **TOLERANCE)


@pytest.mark.parametrize("shared", [True, False])
def test_a_branch_is_pooling_and_one_linear_layer(shared, images):
    net = network(shared_heads=shared)
    output = net(images)
    for i, (name, feature) in enumerate(zip(net.head_names, net.backbone(images).maps, strict=True)):
        head = net.heads[name]
        by_hand = functional.linear(feature.mean(dim=(2, 3)), head.weight.flatten(1), head.bias)
        torch.testing.assert_close(output.branch_logits[:, i], by_hand, **TOLERANCE)


def test_heads_are_shared_by_width_or_not_at_all():
    assert len(create_model("vgg16", width=0.1).heads) == 2  # conv 7, and conv 9, 11, 13
    assert len(create_model("vgg16", width=0.1, shared_heads=False).heads) == 4
    assert len(create_model("vgg16", width=0.1, method="S8", shared_heads=False).heads) == 7


@pytest.mark.parametrize(
    ("method", "learned"),
    [("normal", 0), ("S0", 0), ("S1", 4), ("S2", 4), ("S3", 40), ("S4", 40), ("S5", 0), ("S6", 7), ("S8", 70)],
)
def test_attention_learns_as_many_weights_as_the_paper_counts(method, learned):
    attention = create_model("vgg16", method=method, width=0.1).attention
    assert sum(p.numel() for p in attention.parameters()) == learned


def test_weights_start_as_table_ii_says():
    hard = create_model("vgg16", method="S0", width=0.1).attention.matrix()
    torch.testing.assert_close(hard, torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None].expand(4, 10))
    assert torch.equal(create_model("vgg16", method="S4", width=0.1).attention.matrix(), hard)
    torch.manual_seed(0)
    drawn = torch.cat([create_model("vgg16", method="S3", width=0.01).attention.weight.flatten() for _ in range(25)])
    bound = math.sqrt(3 / 4)
    assert drawn.abs().max() <= bound
    assert drawn.abs().max() > 0.95 * bound
    assert abs(drawn.mean()) < 0.1 * bound


def test_xavier_convolutions_and_zero_biases():
    net = create_model("vgg16", width=0.5)
    for convolution in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        weight = convolution.weight
        fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < weight.abs().max() <= bound
        assert convolution.bias is None or not convolution.bias.any()


def test_a_batch_equals_its_single_images_and_permutes_with_them(images):
    net = network()
    together = net(images).logits
    one_by_one = torch.cat([net(image[None]).logits for image in images])
    torch.testing.assert_close(together, one_by_one, **TOLERANCE)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(images[order]).logits, together[order], **TOLERANCE)


def test_every_parameter_learns(images):
    net = network().train()
    net(images).logits.square().sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_hard_attention_is_saved_but_not_trained():
    net = create_model("vgg16", method="S0", width=0.1)
    assert "attention.weight" in net.state_dict()
    assert "attention.weight" not in dict(net.named_parameters())


def test_normalize_scales_shifts_and_puts_channels_first():
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    out = Normalize((0.5, 0.0, 0.2), (0.5, 1.0, 0.1))(pixels)
    assert out.shape == (1, 3, 1, 1)
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vgg61"}, "choose one of .*vgg16"),
        ({"method": "S11"}, "S11"),
        ({"num_classes": 1}, "at least 2"),
        ({"in_channels": 4}, r"1 \(grey\) or 3"),
        ({"pretrained": True}, "no weights to download"),
        ({"width": 0}, "positive"),
        ({"width": float("nan")}, "positive"),
        ({"colour": "red"}, "no option 'colour'; it has none"),
        ({"neck": "fpn"}, "choose one of aff, iaff"),
        ({"neck": "aff", "method": "normal"}, "tap 2 stages"),
        ({"method": "S0", "taps": (4, 13)}, "S0 starts from 4 weights, but 2 branches"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(InterflowError, match=message):
        create_model(**{"name": "vgg16", "width": 0.1} | settings)


def test_list_models_takes_a_wildcard():
    assert "vgg16" in list_models()
    assert list_models("vgg*") == ["vgg16"]
    assert list_models("nothing*") == []
