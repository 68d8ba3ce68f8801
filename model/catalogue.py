"""Every registered backbone, and what its paper says of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from model.backbones.afi import with_afi
from model.backbones.backbone import Backbone
from model.backbones.deit import DeiT
from model.backbones.mobilenetv2 import MobileNetV2
from model.backbones.preact import PreActResNet, preact_with_fusion
from model.backbones.resnet import (
    RESNET50,
    RESNET101,
    RESNET152,
    ResNet,
    cifar_resnet,
    cifar_resnext,
    imagenet_resnet,
    imagenet_resnext50,
    with_fusion,
    with_mrla_base,
    with_mrla_light,
)
from model.backbones.shufflenetv2 import ShuffleNetV2
from model.backbones.vgg import PLAIN_BRANCHES, VGG16, PlainNet


@dataclass(frozen=True)
class Entry:
    """A registered backbone.

    Attributes:
        build: takes `in_channels`, `width` and the backbone's own options.
        accuracy: the paper's, top-1 in %, in words; empty where the papers give none.
        image_size: pixels a side that it was published at.
        classes: it was published with.
    """

    build: Callable[..., Backbone]
    accuracy: str = ""
    image_size: int = 32
    classes: int = 100


def _imagenet(build: Callable[..., Backbone], accuracy: str = "") -> Entry:
    return Entry(build, accuracy, 224, 1000)


def _resnet(layers: int) -> Callable[..., ResNet]:
    return partial(ResNet, layout=cifar_resnet(layers))


def _imagenet_resnet(blocks: tuple[int, ...]) -> Callable[..., ResNet]:
    return partial(ResNet, layout=imagenet_resnet(blocks))


_RESNEXT29 = partial(ResNet, layout=cifar_resnext(29))
_RESNET50_D = imagenet_resnet(RESNET50, "deep", pooled=True)
_ALL = (1, 2, 3)
_LAST_TWO = (3, 4)

_TABLE_VI = {
    40: "Normal 91.03, S1 91.60",
    50: "Normal 82.21, S1 91.55",
    60: "Normal 31.48, S1 90.39",
    70: "Normal 29.88, S1 90.36",
    80: "Normal 35.29, S1 88.05",
    90: "Normal 10.00, S1 87.55",
    100: "Normal 10.01, S1 85.91",
}

BACKBONES: dict[str, Entry] = {
    # Interflow
    "vgg16": Entry(VGG16, "CIFAR-10: Normal 91.12, S3 92.12", classes=10),
    **{
        f"plain{layers}": Entry(partial(PlainNet, layers=layers), f"CIFAR-10: {_TABLE_VI[layers]}", classes=10)
        for layers in PLAIN_BRANCHES
    },
    # AFINets, CIFAR-100 (Table 4)
    "resnet20": Entry(_resnet(20)),
    "resnet32": Entry(_resnet(32), "CIFAR-100: 71.16"),
    "afi_resnet32": Entry(with_afi(_resnet(32), expanded=False, reduction=4), "CIFAR-100: 71.09"),
    "afi_resnet32_b": Entry(with_afi(_resnet(32), expanded=True, reduction=16), "CIFAR-100: 72.57"),
    "resnet56": Entry(_resnet(56)),
    "resnet110": Entry(_resnet(110), "CIFAR-100: 73.73"),
    "afi_resnet110": Entry(with_afi(_resnet(110), expanded=False, reduction=4), "CIFAR-100: 74.03"),
    "afi_resnet110_b": Entry(with_afi(_resnet(110), expanded=True, reduction=16), "CIFAR-100: 75.69"),
    "shufflenetv2": Entry(ShuffleNetV2, "CIFAR-100: 70.71, of another variant"),
    "afi_shufflenetv2": Entry(
        with_afi(ShuffleNetV2, expanded=False, reduction=4), "CIFAR-100: 72.06, of another variant"
    ),
    "afi_shufflenetv2_b": Entry(
        with_afi(ShuffleNetV2, expanded=True, reduction=16), "CIFAR-100: 72.24, of another variant"
    ),
    # The paper's text has r = 4 and 16; the published parameters of two networks say 16 and 8.
    "mobilenetv2": Entry(MobileNetV2, "CIFAR-100: 75.20"),
    "afi_mobilenetv2": Entry(with_afi(MobileNetV2, expanded=False, reduction=16), "CIFAR-100: 75.94"),
    "afi_mobilenetv2_b": Entry(with_afi(MobileNetV2, expanded=True, reduction=16), "CIFAR-100: 77.08"),
    "resnext29_32x4d": Entry(_RESNEXT29, "CIFAR-100: 78.44"),
    "afi_resnext29_32x4d": Entry(with_afi(_RESNEXT29, expanded=False, reduction=4), "CIFAR-100: 79.37"),
    "afi_resnext29_32x4d_b": Entry(with_afi(_RESNEXT29, expanded=True, reduction=8), "CIFAR-100: 79.85"),
    # AFINets, ImageNet (Table 5)
    "resnet50": _imagenet(_imagenet_resnet(RESNET50), "ImageNet: 75.3"),
    "afi_resnet50": _imagenet(with_afi(_imagenet_resnet(RESNET50), expanded=False, reduction=4), "ImageNet: 76.19"),
    "afi_resnet50_b": _imagenet(with_afi(_imagenet_resnet(RESNET50), expanded=True, reduction=16), "ImageNet: 77.02"),
    "se_resnet50": _imagenet(partial(ResNet, layout=imagenet_resnet(RESNET50), se=True), "ImageNet: 76.71"),
    "resnet101": _imagenet(_imagenet_resnet(RESNET101)),
    "resnet152": _imagenet(_imagenet_resnet(RESNET152), "ImageNet: 77.0"),
    "afi_resnet152": _imagenet(with_afi(_imagenet_resnet(RESNET152), expanded=False, reduction=4), "ImageNet: 78.24"),
    "se_resnet152": _imagenet(partial(ResNet, layout=imagenet_resnet(RESNET152), se=True), "ImageNet: 78.43"),
    # AFF. The authors' 90 % figures on CIFAR-100 are of its 20 coarse classes; these are of the 100.
    "preact_resnet32": Entry(partial(PreActResNet, layers=32, times=4)),
    "aff_resnet32": Entry(preact_with_fusion("aff", 32), "CIFAR-100: 83.57"),
    "iaff_resnet32": Entry(preact_with_fusion("iaff", 32)),
    "aff_resnext38_32x4d": Entry(with_fusion(cifar_resnext(38, "3x3", pooled=True), "aff", stages=_ALL, reduction=16)),
    "aff_resnext47_32x4d": Entry(
        with_fusion(cifar_resnext(47, "3x3", pooled=True), "aff", stages=_ALL, reduction=16), "CIFAR-100: 85.38"
    ),
    "resnet50_d": _imagenet(partial(ResNet, layout=_RESNET50_D)),
    "aff_resnet50": _imagenet(with_fusion(_RESNET50_D, "aff", stages=_LAST_TWO, reduction=16), "ImageNet: 79.7"),
    "iaff_resnet50": _imagenet(with_fusion(_RESNET50_D, "iaff", stages=_LAST_TWO, reduction=16), "ImageNet: 79.8"),
    "aff_resnext50_32x4d": _imagenet(
        with_fusion(imagenet_resnext50(), "aff", stages=_LAST_TWO, reduction=16), "ImageNet: 79.72"
    ),
    "iaff_resnext50_32x4d": _imagenet(
        with_fusion(imagenet_resnext50(), "iaff", stages=_LAST_TWO, reduction=16), "ImageNet: 80.22"
    ),
    # MRLA. The authors' base file has the deep stem; the published 0.16 M more parameters fit the plain one.
    "mrla_light_resnet50": _imagenet(with_mrla_light(RESNET50), "ImageNet: 77.75"),
    "mrla_light_resnet101": _imagenet(with_mrla_light(RESNET101)),
    "mrla_base_resnet50": _imagenet(with_mrla_base(RESNET50, "7x7")),
    "mrla_base_resnet50_d": _imagenet(with_mrla_base(RESNET50, "deep")),
    "mrla_base_resnet101_d": _imagenet(with_mrla_base(RESNET101, "deep")),
    "mrla_light_deit_tiny": _imagenet(partial(DeiT, base=False)),
    "mrla_base_deit_tiny": _imagenet(partial(DeiT, base=True)),
}
