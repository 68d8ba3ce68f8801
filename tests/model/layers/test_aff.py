"""Laws of attentional feature fusion: MS-CAM, AFF, iAFF."""

import pytest
import torch
from torch import nn

from model.contract import InterflowError
from model.layers.aff import AFF, FUSIONS, IAFF, MSCAM, InceptionAFF, MultiScaleAttention, shares

EXACT = {"atol": 1e-12, "rtol": 1e-12}  # float64
CHANNELS = 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def seen(module):
    """The module with batch norms no longer at their start, ready to be asked."""
    for norm in (norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.2, 1.0)  # so that some ReLU behind it lets through
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.double().eval()


def maps(count, batch=3):
    generator = torch.Generator().manual_seed(count)
    return list(torch.randn(count, batch, CHANNELS, 5, 4, generator=generator, dtype=torch.float64))


def scale_output(module, factor, *branches):
    """Multiply what the named contexts (all of them where none is named) add to the weight's logit."""
    for attention in (m for m in module.modules() if isinstance(m, MultiScaleAttention)):
        for branch in branches or ("local_context", "global_context"):
            norm = getattr(attention, branch)[-1]
            norm.weight.data.mul_(factor)
            norm.bias.data.mul_(factor)
    return module


INPUTS = {MSCAM: 1, AFF: 2, IAFF: 2}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_weights_lie_between_0_and_1_and_differ_by_place_and_channel(kind, training):
    out, weight = seen(kind(CHANNELS)).train(training)(*maps(INPUTS[kind]))
    assert weight.shape == out.shape == (3, CHANNELS, 5, 4)
    assert ((weight > 0) & (weight < 1)).all()
    assert weight.std(dim=1).min() > 1e-3
    assert weight.flatten(2).std(dim=2).min() > 1e-3


def test_the_output_is_made_with_the_weight_that_is_told():
    x, y = maps(2)
    out, weight = seen(MSCAM(CHANNELS))(x)
    torch.testing.assert_close(out, x * weight, **EXACT)
    out, weight = seen(AFF(CHANNELS))(x, y)
    torch.testing.assert_close(out, 2 * (x * weight + y * (1 - weight)), **EXACT)
    out, weight = seen(IAFF(CHANNELS))(x, y)
    torch.testing.assert_close(out, x * weight + y * (1 - weight), **EXACT)


def test_at_weight_one_half_aff_adds_and_iaff_averages():
    x, y = maps(2)
    for kind, expected in ((AFF, x + y), (IAFF, (x + y) / 2)):
        out, weight = scale_output(seen(kind(CHANNELS)), 0)(x, y)
        assert (weight == 0.5).all()
        torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize("kind", [AFF, IAFF])
def test_swapped_inputs_are_the_same_with_the_weights_complement(kind):
    x, y = maps(2)
    module = seen(kind(CHANNELS))
    out, weight = module(x, y)
    swapped, complement = scale_output(module, -1)(y, x)
    torch.testing.assert_close(complement, 1 - weight, **EXACT)
    torch.testing.assert_close(swapped, out, **EXACT)


def test_local_context_knows_its_place_only_and_global_context_no_place():
    (u,) = maps(1)
    elsewhere = u.clone()
    elsewhere[:, :, 2:] += 1
    here = seen(MultiScaleAttention(CHANNELS))
    scale_output(here, 0, "global_context")
    assert torch.equal(here(elsewhere)[:, :, :2], here(u)[:, :, :2])
    assert (here(elsewhere)[:, :, 2:] != here(u)[:, :, 2:]).any(dim=1).all()
    everywhere = seen(MultiScaleAttention(CHANNELS))
    scale_output(everywhere, 0, "local_context")
    weight = everywhere(u)
    assert torch.equal(weight, weight[:, :, :1, :1].expand_as(weight))
    shuffled = u.flatten(2)[:, :, torch.randperm(20)].unflatten(2, (5, 4))
    torch.testing.assert_close(everywhere(shuffled), weight, **EXACT)


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(32, 4, 8), (64, 16, 4), (10, 4, 2), (3, 16, 1)])
def test_a_unit_has_4ch_plus_6_h_plus_c_parameters(channels, reduction, hidden):
    unit = 4 * channels * hidden + 6 * (hidden + channels)
    for kind, units in ((MultiScaleAttention, 1), (MSCAM, 1), (AFF, 1), (IAFF, 2)):
        assert sum(p.numel() for p in kind(channels, reduction).parameters()) == units * unit


@pytest.mark.parametrize("kind", INPUTS)
def test_one_image_is_refused_while_training_and_welcome_after(kind):
    one = maps(INPUTS[kind], batch=1)
    module = seen(kind(CHANNELS))
    with pytest.raises(InterflowError, match="batches of 2 images or more: raise the batch size"):
        module.train()(*one)
    assert module.eval()(*one)[0].isfinite().all()
    module.train()(*maps(INPUTS[kind], batch=2))


@pytest.mark.parametrize("kind", INPUTS)
def test_a_batch_is_its_single_images(kind):
    inputs = maps(INPUTS[kind])
    module = seen(kind(CHANNELS))
    out, _ = module(*inputs)
    for i in range(3):
        torch.testing.assert_close(module(*(a[i : i + 1] for a in inputs))[0], out[i : i + 1], **EXACT)


@pytest.mark.parametrize("kind", INPUTS)
def test_every_parameter_matters(kind):
    # as iAFF's second global branch does not in a third-party port
    module = seen(kind(CHANNELS))
    module(*maps(INPUTS[kind]))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_iaffs_first_fusion_only_says_where_the_second_looks():
    x, y = maps(2)
    module = seen(IAFF(CHANNELS))
    first = module.first(x + y)
    looked_at = x * first + y * (1 - first)
    torch.testing.assert_close(module(x, y)[1], module.second(looked_at), **EXACT)


def test_shares_are_the_mean_weight_and_the_rest():
    weight = torch.rand(4, CHANNELS, 3, 2)
    divided = shares(weight)
    assert divided.shape == (4, 2)
    torch.testing.assert_close(divided.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(divided[:, 0], weight.flatten(1).mean(dim=1))
    assert torch.equal(shares(torch.ones(1, 2, 3, 3)), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_inception_aff_fuses_a_narrow_and_a_wide_view_of_one_map(fusion):
    (x,) = maps(1)
    layer = seen(InceptionAFF(CHANNELS, 12, fusion, reduction=2))
    assert isinstance(layer.fuse, FUSIONS[fusion])
    out, weight = layer(x.requires_grad_())
    assert out.shape == weight.shape == (3, 12, 5, 4)
    narrow, wide = layer.narrow(x), layer.wide(x)
    factor = 2 if fusion == "aff" else 1
    torch.testing.assert_close(out, factor * (weight * narrow + (1 - weight) * wide), **EXACT)
    out.square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in (x, *layer.parameters()))


def test_inception_affs_branches_see_3x3_and_5x5():
    layer = seen(InceptionAFF(1, 1))
    for branch, side in ((layer.narrow, 3), (layer.wide, 5)):
        branch[0].weight.data.fill_(1)
        x = torch.zeros(1, 1, 9, 9, dtype=torch.float64, requires_grad=True)
        branch[0](x)[0, 0, 4, 4].backward()
        assert x.grad.sum() == side**2
