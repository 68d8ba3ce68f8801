"""Every registered network: the published parameters and multiply-adds to the unit, forward, backward, taps."""

import re

import pytest
import torch
from torch import nn

from model.catalogue import BACKBONES
from model.contract import InterflowError
from model.registry import create_model, list_models

PUBLISHED = [
    # AFINets, Table 4 (CIFAR-100); feature-fusion notes, Sec. 1.3 and 1.4
    ("resnet32", {}, 472_756),
    ("afi_resnet32", {}, 378_228),
    ("afi_resnet32_b", {}, 668_980),
    ("resnet110", {}, 1_736_564),
    ("afi_resnet110", {}, 1_334_820),
    ("afi_resnet110_b", {}, 2_570_516),
    ("mobilenetv2", {}, 2_412_212),
    ("afi_mobilenetv2", {}, 2_248_868),
    ("afi_mobilenetv2", {"reduction": 4}, 2_534_276),
    ("afi_mobilenetv2_b", {}, 2_835_428),
    ("resnext29_32x4d", {}, 4_866_468),
    ("afi_resnext29_32x4d", {}, 4_262_564),
    ("afi_resnext29_32x4d_b", {}, 5_232_036),
    ("afi_resnext29_32x4d_b", {"reduction": 16}, 5_146_020),
    ("shufflenetv2", {}, 1_356_104),
    ("afi_shufflenetv2", {}, 1_254_314),
    ("afi_shufflenetv2_b", {}, 1_403_142),
    # AFI in one stage only (Table 1)
    ("afi_resnet32", {"stages": [1]}, 468_212),
    ("afi_resnet32", {"stages": [2]}, 454_708),
    ("afi_resnet32", {"stages": [3]}, 400_820),
    # Table 5 (ImageNet)
    ("resnet50", {}, 25_557_032),
    ("afi_resnet50", {}, 23_849_256),
    ("afi_resnet50_b", {}, 33_854_504),
    ("resnet152", {}, 60_192_808),
    ("afi_resnet152", {}, 54_667_560),
    ("se_resnet50", {}, 28_071_976),
    ("se_resnet152", {}, 66_770_984),
    # AFF
    ("aff_resnet32", {}, 7_897_156),
    ("aff_resnet32", {"times": 1}, 503_644),
    ("iaff_resnet32", {}, 8_344_036),
    ("preact_resnet32", {}, 7_450_276),
    ("aff_resnext38_32x4d", {}, 7_770_148),
    ("aff_resnext47_32x4d", {}, 9_605_828),
    ("resnet50_d", {}, 25_576_264),
    ("aff_resnet50", {}, 30_373_192),
    ("iaff_resnet50", {}, 35_170_120),
    ("aff_resnext50_32x4d", {}, 29_953_704),
    ("iaff_resnext50_32x4d", {}, 34_750_632),
    # MRLA
    ("mrla_light_resnet50", {}, 25_738_452),
    ("mrla_light_resnet101", {}, 44_939_646),
    ("mrla_base_resnet50", {}, 25_723_348),
    ("mrla_base_resnet50", {"stem": "deep"}, 25_742_580),
    ("mrla_base_resnet50_d", {}, 25_742_580),
    ("mrla_base_resnet101_d", {}, 44_926_366),
]

MULTIPLY_ADDS = {
    "resnet32": 69_130_496,
    "afi_resnet32": 54_974_720,
    "afi_resnet32_b": 97_442_048,
    "resnet110": 253_155_584,
    "afi_resnet110": 192_993_536,
    "afi_resnet110_b": 373_479_680,
    "resnet50": 4_089_184_256,
    "afi_resnet50": 3_780_902_912,
    "afi_resnet50_b": 5_476_450_304,
    "afi_resnet152": 10_331_881_472,
    "afi_mobilenetv2": 79_571_968,
    "afi_resnext29_32x4d": 671_911_936,
}
"""Of all convolutions, and of the classifier as a linear layer; one image."""


BIG = re.compile("101|110|152|plain[5-9]0|plain100")


def plain(name, **options):
    """The classifier without branches, as it was published; no numbers in its tensors."""
    entry = BACKBONES[name]
    with torch.device("meta"):
        return create_model(name, method="normal", num_classes=entry.classes, **options).eval(), entry


def size_for(name):
    return 32 if BACKBONES[name].image_size == 32 else 64


def with_statistics_of(network, images):
    """Batch norms as in training: where they know no images, random weights make numbers that grow without bound."""
    with torch.no_grad():
        for _ in range(10):
            network.train()(images)
    network.eval()


@pytest.mark.parametrize(("name", "options", "parameters"), PUBLISHED)
def test_the_plain_classifier_has_the_published_parameters(name, options, parameters):
    network, _ = plain(name, **options)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(("name", "expected"), MULTIPLY_ADDS.items())
def test_the_plain_classifier_has_the_published_multiply_adds(name, expected):
    network, entry = plain(name)
    total = entry.classes * network.stages[-1].channels  # the paper's linear layer; ours makes maps

    def count(convolution: nn.Conv2d, _inputs, output):
        nonlocal total
        total += output[0].numel() * convolution.weight[0].numel()

    for module in network.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network.backbone(torch.zeros(1, 3, entry.image_size, entry.image_size, device="meta"))
    assert total == expected


@pytest.mark.parametrize("method", ["normal", "S1", "S3"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if BIG.search(name) else ()) for name in list_models()]
)
def test_every_network_learns_from_its_input(name, method, pixels):
    size = size_for(name)
    torch.manual_seed(0)
    network = create_model(name, method=method, num_classes=5, image_size=(size, size)).train()
    images = nn.functional.interpolate(pixels, (size, size))
    output = network(images)
    assert output.logits.shape == (2, 5)
    assert [m.shape[:2] for m in output.branch_maps] == [(2, 5)] * len(network.stages)
    nn.functional.cross_entropy(output.logits, torch.tensor([1, 3])).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for row in output.layer_attention:
        assert row.weights.shape == (2, len(row.sources)), row.block
        assert (row.weights >= 0).all()
        assert (row.weights <= 1).all()
        if row.kind == "share":
            torch.testing.assert_close(row.weights.sum(dim=1), torch.ones(2))


@pytest.fixture(scope="module")
def pixels(photographs):
    import numpy as np

    from model.contract import InputSpec
    from model.images import read_input

    spec = InputSpec(height=64, width=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, resize="crop")
    images = np.stack([read_input(photographs[name], spec) for name in ("astronaut.png", "chelsea.png")])
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


@pytest.mark.parametrize(
    ("name", "method", "stages"),
    [
        # 3 stages of the architecture are too few for 4 branches: evenly over the blocks
        ("resnet32", "S3", ["stage1.block4", "stage2.block3", "stage3.block1", "stage3.block5"]),
        ("resnet50", "S3", ["stage1.block3", "stage2.block4", "stage3.block6", "stage4.block3"]),
        ("resnet50", "normal", ["stage4.block3"]),
        ("mobilenetv2", "S3", ["stage4.block4", "stage5.block3", "stage6.block3", "stage7.conv"]),
        ("plain40", "S1", ["conv8", "conv16", "conv24", "conv32", "conv40"]),  # Table VI: 5 branches
        ("plain40", "S0", ["conv10", "conv20", "conv30", "conv40"]),  # four fixed weights, four branches
    ],
)
def test_where_branches_are_tapped_unless_told(name, method, stages):
    with torch.device("meta"):
        network = create_model(name, method=method)
    assert [stage.name for stage in network.stages] == stages


def test_very_deep_networks_have_the_branches_of_table_vi():
    with torch.device("meta"):
        found = {d: len(create_model(f"plain{d}", method="S1").stages) for d in (40, 50, 60, 70, 80, 90, 100)}
    assert found == {40: 5, 50: 7, 60: 9, 70: 11, 80: 13, 90: 15, 100: 15}


@pytest.mark.parametrize("taps", [(2, 5, 9), ("stage1.block2", "stage1.block5", "stage2.block4"), ("2", 5, "9")])
def test_taps_by_name_or_number_cut_at_a_depth(taps):
    network = create_model("afi_resnet32", taps=taps, depth=19)
    assert [(s.name, s.depth) for s in network.stages] == [
        ("stage1.block2", 5),
        ("stage1.block5", 11),
        ("stage2.block4", 19),
    ]
    assert len(network.backbone.blocks) == 9


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet32", {"taps": ("stage1.block9",)}, r"'stage1.block9' is not .* 1 stage1.block1, .* 15 stage3.block5"),
        ("resnet32", {"taps": (16,)}, "tap 16 is not"),
        ("resnet32", {"taps": (-1,)}, "tap -1 is not"),
        ("resnet32", {"taps": (3, 9)}, r"ending with the last one \(stage3.block5\)"),
        ("resnet32", {"depth": 4}, "can be cut after layer 3, 5, 7"),
        ("afi_resnet32", {"reduction": 0}, "whole number from 1"),
        ("afi_resnet32", {"attention": "sea"}, "choose one of se, ge, cbam, eca"),
        ("afi_resnet32", {"first": "half"}, "slice or own"),
        ("aff_resnet50", {"reduction": "4"}, "whole number from 1"),
        ("mrla_light_resnet50", {"drop_path": 1}, "drop_path 1"),
        ("mrla_light_resnet50", {"dim_per_head": 48}, "heads of 48 channels, which do not divide 256"),
        ("mrla_base_resnet50", {"stem": "8x8"}, "choose 7x7 or deep"),
        ("mrla_base_resnet50", {"stages": [1]}, "no option 'stages'; it has dim_per_head, drop_path, relu, stem"),
        ("afi_resnet32", {"stages": 3}, r"stages 3: expected a list of numbers from 1 to 3, such as stages=\[1\]"),
        ("afi_resnet32", {"stages": [4]}, r"stages \[4\]: expected .* from 1 to 3"),
        ("afi_resnet50", {"stages": "12"}, "stages '12': expected .* from 1 to 4"),
        ("afi_mobilenetv2", {"stages": [8]}, "from 1 to 7"),
        ("afi_shufflenetv2", {"stages": [True]}, "from 1 to 3"),
        ("aff_resnet32", {"stages": 3}, "stages 3: expected .* from 1 to 3"),
        ("aff_resnet50", {"stages": [0]}, "from 1 to 4"),
        ("aff_resnet32", {"times": 0}, "times 0: expected a whole number from 1 up"),
        ("aff_resnet50", {"zero_init": "no"}, "zero_init 'no': expected true or false"),
        ("afi_resnet32", {"interleaved": "no"}, "interleaved 'no': expected true or false"),
        ("resnet20", {"se": 1}, "se 1: expected true or false"),
        ("resnet20", {"afi": 3}, "no option 'afi'; it has se, zero_init"),
        ("mrla_base_resnet50", {"relu": "no"}, "relu 'no': expected true or false"),
        ("mrla_light_resnet50", {"dim_per_head": 0}, "dim_per_head 0: expected a whole number from 1 up"),
        ("mrla_base_resnet50", {"dim_per_head": -1}, "dim_per_head -1: expected a whole number"),
        ("mrla_light_resnet50", {"drop_path": "abc"}, "drop_path 'abc': expected a probability"),
        ("mrla_base_deit_tiny", {"drop_path": 1.5}, "drop_path 1.5: expected a probability"),
        ("mrla_light_deit_tiny", {"image_size": (64, 60)}, "64 x 60: DeiT needs multiples of 16"),
    ],
)
def test_what_a_network_does_not_have_is_refused(name, settings, message):
    with torch.device("meta"), pytest.raises(InterflowError, match=message):
        create_model(name, **settings)


def test_images_of_another_size_than_the_embeddings_are_refused():
    network = create_model("mrla_light_deit_tiny", image_size=(32, 32)).eval()
    with pytest.raises(InterflowError, match="made for 32 x 32"):
        network(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize("attention", ["se", "ge", "cbam", "eca"])
def test_channel_attention_on_the_fused_feature(attention):
    without = create_model("afi_mobilenetv2", width=0.25)
    network = create_model("afi_mobilenetv2", width=0.25, attention=attention).eval()
    more = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in without.parameters())
    assert more > 0 if attention != "ge" else more == 0  # gather-excite has no parameters of its own
    assert network(torch.randn(2, 3, 32, 32)).logits.isfinite().all()


def test_the_first_feature_is_a_slice_or_the_blocks_own():
    images = torch.randn(2, 3, 32, 32)
    sources = {}
    for first in ("slice", "own"):
        network = create_model("afi_resnet32", first=first, method="normal").eval()
        sources[first] = [row.sources for row in network(images).layer_attention[:2]]
    assert sources["slice"] == [("stage1.block1",), ("stage1.block1", "stage1.block2")]
    assert sources["own"] == [("stage1.block2",), ("stage1.block2",)]


def test_interleaving_permutes_what_the_next_convolution_reads():
    torch.manual_seed(0)
    one = create_model("afi_resnet32", method="normal", stages=[1]).eval()
    other = create_model("afi_resnet32", method="normal", stages=[1], interleaved=True).eval()
    state = one.state_dict()
    for i in range(1, 5):  # blocks 2 to 5 of stage 1 have it
        weight = state[f"backbone.blocks.{i}.rest.0.0.weight"]
        state[f"backbone.blocks.{i}.rest.0.0.weight"] = weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    images = torch.randn(2, 3, 32, 32)
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(one(images).logits, other(images).logits, atol=1e-3)
    other.load_state_dict(state)
    torch.testing.assert_close(one(images).logits, other(images).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["afi_resnet32", "aff_resnet32", "mrla_base_resnet50", "mrla_light_deit_tiny"])
def test_a_batch_equals_its_singles(name):
    torch.manual_seed(0)
    network = create_model(name, image_size=(32, 32), width=1 / 3 if "deit" in name else 0.25).eval()
    images = torch.randn(3, 3, 32, 32)
    with_statistics_of(network, images)
    together, apart = network(images), [network(image[None]) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([o.logits for o in apart]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        together.stacked_layer_attention(), torch.cat([o.stacked_layer_attention() for o in apart])
    )


def test_mrla_blocks_start_as_they_would_be_without_the_residual_branch():
    network = create_model("mrla_base_resnet50", width=0.25)
    assert all((block.rest[-1][1].weight == 0).all() for block in network.backbone.blocks)
