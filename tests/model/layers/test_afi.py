"""Laws of attentive feature integration."""

import pytest
import torch

from model.layers.afi import AFI

EXACT = {"atol": 1e-12, "rtol": 1e-12}  # float64


@pytest.fixture
def afi():
    torch.manual_seed(0)
    return AFI(12, reduction=3).double()


def features(count, *shape):
    generator = torch.Generator().manual_seed(count)
    return list(3 * torch.randn(count, *(shape or (2, 12, 5, 4)), generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_every_pixel_lies_between_the_features(afi, count):
    xs = features(count)
    fused, _ = afi(xs)
    assert (fused >= torch.stack(xs).amin(dim=0) - 1e-12).all()
    assert (fused <= torch.stack(xs).amax(dim=0) + 1e-12).all()


def test_weights_sum_to_one_per_image_and_channel_and_are_what_the_sum_is_made_with(afi):
    xs = features(4)
    fused, weights = afi(xs)
    assert weights.shape == (4, 2, 12)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 12, dtype=torch.float64), **EXACT)
    assert weights.std(dim=2).min() > 1e-3  # not one number for all channels
    torch.testing.assert_close(fused, torch.einsum("nbd,nbdhw->bdhw", weights, torch.stack(xs)), **EXACT)


def test_the_order_of_the_features_does_not_matter(afi):
    xs = features(5)
    order = [3, 0, 4, 2, 1]
    fused, weights = afi(xs)
    again, permuted = afi([xs[i] for i in order])
    torch.testing.assert_close(again, fused, **EXACT)
    torch.testing.assert_close(permuted, weights[order], **EXACT)


def test_of_one_feature_or_of_equal_ones_it_is_that_feature(afi):
    (x,) = features(1)
    torch.testing.assert_close(afi([x])[0], x, atol=0, rtol=0)
    torch.testing.assert_close(afi([x, x, x])[0], x, **EXACT)


@pytest.mark.parametrize(
    ("channels", "reduction", "expected"),
    [(16, 4, 2 * 16**2 // 4), (64, 16, 2 * 64**2 // 16), (10, 4, 2 * 10 * 2), (3, 16, 2 * 3 * 1)],
)
def test_parameters_are_two_matrices_without_bias(channels, reduction, expected):
    assert sum(p.numel() for p in AFI(channels, reduction).parameters()) == expected


def test_means_known_already_are_taken_as_they_are(afi):
    xs = features(3)
    means = [x.mean(dim=(2, 3)) for x in xs]
    for ours, theirs in zip(afi(xs, means), afi(xs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert not torch.equal(afi(xs, means[::-1])[1], afi(xs)[1])


def test_a_batch_is_its_single_images(afi):
    xs = features(3, 4, 12, 3, 6)
    fused, _ = afi(xs)
    for i in range(4):
        torch.testing.assert_close(afi([x[i : i + 1] for x in xs])[0], fused[i : i + 1], **EXACT)


def test_a_channels_weight_follows_its_mean():
    afi = AFI(4, reduction=1)
    with torch.no_grad():
        afi.squeeze.weight.copy_(torch.eye(4))
        afi.excite.weight.copy_(torch.eye(4))
    dark, bright = torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 1.5)
    _, weights = afi([dark, bright])  # scores 0 and 1.5
    torch.testing.assert_close(weights[1], torch.full((1, 4), 1.5).sigmoid())
