"""Laws of multi-head recurrent layer attention."""

import pytest
import torch
from torch.nn import functional

from model.contract import InterflowError
from model.layers.mrla import KeyValue, MRLABase, MRLALight, Projections, kernel_length

EXACT = {"atol": 1e-12, "rtol": 1e-12}  # float64
CHANNELS, PER_HEAD = 12, 4
HEADS = CHANNELS // PER_HEAD


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps(count):
    return list(2 * torch.randn(count, 2, CHANNELS, 5, 4, dtype=torch.float64))


def light(**settings):
    return MRLALight(CHANNELS, PER_HEAD, **settings).double()


def retrieve(layers, xs):
    """Layers of one stage, one after another: their outputs and attentions, and the entries that they leave."""
    outs, attentions, earlier = [], [], []
    for layer, x in zip(layers, xs, strict=True):
        out, attention, mine = layer(x, earlier)
        outs, attentions, earlier = [*outs, out], [*attentions, attention], [*earlier, mine]
    return outs, attentions, earlier


def stage(count):
    return [MRLABase(CHANNELS, PER_HEAD).double() for _ in range(count)]


@pytest.mark.parametrize(
    ("channels", "length"),
    [(16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7), (127, 3), (2047, 5), (1, 1)],
)
def test_kernel_length_is_the_papers(channels, length):
    assert kernel_length(channels) == length
    assert Projections(channels, 1).query.weight.shape == Projections(channels, 1).key.weight.shape == (1, 1, length)


@pytest.mark.parametrize("channels", [64, 256, 2048])
def test_parameters_are_9c_and_two_kernels_and_lights_lambda(channels):
    projections = 9 * channels + 2 * kernel_length(channels)
    for layer, expected in (
        (MRLABase(channels), projections),
        (MRLALight(channels), projections + channels),
        (MRLALight(channels, gelu=True), projections + channels),
    ):
        assert sum(p.numel() for p in layer.parameters()) == expected


def test_heads_have_32_channels_in_light_and_16_in_base():
    x = torch.randn(1, 64, 2, 2)
    assert MRLALight(64)(x, x)[1].shape == (1, 2)
    assert MRLABase(64)(x, [])[1].shape == (1, 4, 1)


@pytest.mark.parametrize("kind", [MRLALight, MRLABase])
def test_heads_that_do_not_divide_the_channels_are_refused(kind):
    with pytest.raises(InterflowError, match="heads of 5 channels, which do not divide 12"):
        kind(12, 5)


def test_query_and_key_slide_a_kernel_over_the_means_of_neighbouring_channels():
    projections = Projections(CHANNELS, PER_HEAD, kernel=3).double()
    (x,) = maps(1)
    means = x.mean(dim=(2, 3))
    with torch.no_grad():
        projections.query.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 1, 3))
        projections.key.weight.copy_(torch.tensor([0, 0, 1.0]).view(1, 1, 3))
    query, key, _ = projections(x)
    assert query.shape == key.shape == (2, HEADS, PER_HEAD)
    torch.testing.assert_close(query.flatten(1), functional.pad(means, (1, 0))[:, :-1], **EXACT)
    torch.testing.assert_close(key.flatten(1), functional.pad(means, (0, 1))[:, 1:], **EXACT)


def test_a_value_is_its_own_channels_3x3_neighbourhood():
    projections = Projections(CHANNELS, PER_HEAD).double()
    (x,) = maps(1)
    value = projections(x)[2]
    assert value.shape == (2, HEADS, PER_HEAD, 5, 4)
    changed = x.clone()
    changed[:, 6, 0, 0] += 1
    touched = (projections(changed)[2].flatten(1, 2) != value.flatten(1, 2)).any(dim=0)
    assert touched.nonzero().tolist() == [[6, 0, 0], [6, 0, 1], [6, 1, 0], [6, 1, 1]]


def attention_of_light(projections, x, _earlier):
    layer = light()
    layer.projections = projections
    return layer(x, torch.zeros_like(x))[1]


def attention_of_base(projections, x, earlier):
    layer = MRLABase(CHANNELS, PER_HEAD).double()
    layer.projections = projections
    return layer(x, earlier)[1]


@pytest.mark.parametrize("attention_of", [attention_of_light, attention_of_base])
@pytest.mark.parametrize("head", range(HEADS))
def test_heads_are_contiguous_groups_that_do_not_see_one_another(attention_of, head):
    projections = Projections(CHANNELS, PER_HEAD, kernel=1).double()  # longer ones reach over the border
    x, y = maps(2)
    earlier = [KeyValue(*projections(y)[1:])]
    changed = x.clone()
    changed[:, head * PER_HEAD : (head + 1) * PER_HEAD] += 1
    before, after = (attention_of(projections, a, earlier) for a in (x, changed))
    differs = (before != after).reshape(2, HEADS, -1).any(dim=2)
    assert differs.tolist() == 2 * [[other == head for other in range(HEADS)]]


def test_light_gates_lie_between_0_and_1_and_scale_each_heads_value():
    layer = light()
    x, previous = maps(2)
    out, gate = layer(x, previous)
    assert gate.shape == (2, HEADS)
    assert ((gate > 0) & (gate < 1)).all()
    value = layer.projections(x)[2]
    drawn = torch.cat([gate[:, i, None, None, None] * value[:, i] for i in range(HEADS)], dim=1)
    torch.testing.assert_close(out, drawn + layer.lam[:, None, None] * previous, **EXACT)


def test_light_gate_is_the_scaled_product_of_query_and_key():
    layer = light()
    (x,) = maps(1)
    query, key, _ = layer.projections(x)
    by_hand = (torch.einsum("bhd,bhd->bh", query, key) / 2).sigmoid()  # d = 4
    torch.testing.assert_close(layer(x, x)[1], by_hand, **EXACT)


@pytest.mark.parametrize("gelu", [False, True])
def test_light_without_a_query_takes_half_of_the_value(gelu):
    layer = light(gelu=gelu)
    layer.projections.query.weight.data.zero_()
    x, previous = maps(2)
    out, gate = layer(x, previous)
    assert (gate == 0.5).all()
    value = layer.projections(x)[2].flatten(1, 2)
    value = functional.gelu(value) if gelu else value
    torch.testing.assert_close(out, value / 2 + layer.lam[:, None, None] * previous, **EXACT)


def test_lambda_is_drawn_per_channel_from_a_standard_normal():
    lam = MRLALight(4096).lam
    assert lam.shape == (4096,)
    assert abs(lam.mean()) < 0.05
    assert abs(lam.std() - 1) < 0.05


def test_the_first_layers_output_is_its_value():
    (x,) = maps(1)
    layer = MRLABase(CHANNELS, PER_HEAD).double()
    out, attention, mine = layer(x, [])
    assert (attention == 1).all()
    query, key, value = layer.projections(x)
    assert torch.equal(out, value.flatten(1, 2))
    assert torch.equal(mine.key, key)
    assert torch.equal(mine.value, value)
    assert not torch.equal(mine.key, query)


def test_attention_over_the_layers_sums_to_one_per_head():
    _, attentions, _ = retrieve(stage(4), maps(4))
    for t, attention in enumerate(attentions, start=1):
        assert attention.shape == (2, HEADS, t)
        assert (attention > 0).all()
        torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, HEADS, dtype=torch.float64), **EXACT)


def test_an_output_is_the_attended_sum_of_the_values_own_query_against_all_keys():
    layers, xs = stage(3), maps(3)
    outs, attentions, entries = retrieve(layers, xs)
    query = layers[2].projections(xs[2])[0]
    products = torch.stack([(query * entry.key).sum(dim=2) for entry in entries], dim=2) / 2  # d = 4
    torch.testing.assert_close(attentions[2], products.softmax(dim=2), **EXACT)
    values = torch.stack([entry.value for entry in entries], dim=2)
    by_hand = torch.einsum("bht,bhtdij->bhdij", attentions[2], values).flatten(1, 2)
    torch.testing.assert_close(outs[2], by_hand, **EXACT)


def test_base_without_a_query_averages_the_values():
    layers, xs = stage(3), maps(3)
    layers[2].projections.query.weight.data.zero_()
    outs, _, entries = retrieve(layers, xs)
    mean = torch.stack([entry.value for entry in entries]).mean(dim=0).flatten(1, 2)
    torch.testing.assert_close(outs[2], mean, **EXACT)


def test_the_order_of_earlier_layers_does_not_matter_and_is_kept():
    layer, xs = MRLABase(CHANNELS, PER_HEAD).double(), maps(4)
    _, _, earlier = retrieve(stage(3), xs[:3])
    given = list(earlier)
    out, attention, _ = layer(xs[3], earlier)
    assert all(a is b for a, b in zip(given, earlier, strict=True))
    again, permuted, _ = layer(xs[3], [earlier[i] for i in (2, 0, 1)])
    torch.testing.assert_close(again, out, **EXACT)
    torch.testing.assert_close(permuted, attention[:, :, [2, 0, 1, 3]], **EXACT)


def test_later_losses_reach_the_keys_and_values_of_earlier_layers():
    layers = stage(3)
    outs, _, _ = retrieve(layers, maps(3))
    outs[2].square().sum().backward()
    for layer in layers:
        for part in (layer.projections.key, layer.projections.value):
            assert part.weight.grad.abs().max() > 1e-6
    assert layers[0].projections.query.weight.grad is None  # asked by nobody after its own layer
    assert layers[2].projections.query.weight.grad.abs().max() > 1e-6
