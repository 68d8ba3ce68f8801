"""Any classification network of torchvision as a backbone."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.backbone import Backbone, Features, Normalization, Stage
from model.backbones.library import IMAGENET, download, for_channels, require_maps, unknown
from model.backbones.weights import load_weights, read_weights
from model.contract import InterflowError

CLASSIFIERS = ("avgpool", "dropout", "fc", "classifier", "head", "permute", "AuxLogits", "aux1", "aux2")
"""What torchvision's networks have behind their last map, and classifiers on earlier ones."""

ELSEWHERE = {
    "maxvit_t": "maxvit_tiny_tf_224",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}
"""Networks made for one image size, which timm has for any, and with maps where the blocks hand on tokens."""

HALVES = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""What the weights of GoogLeNet and Inception expect; torchvision converts ImageNet's to it inside the network."""

PROBE_PX = 128
"""Pixels a side of the image that resolutions are found with: few, but more than any network's halvings use up."""


class TorchvisionNetwork(Backbone):
    """A network of torchvision without its classifiers.

    The points are the last maps before each change of resolution, where a module ends. `taps` may also name any other
    module, or node of the traced graph (`torchvision.models.feature_extraction`), that gives a map; it then is a point
    too, and all are numbered anew.

    Args:
        name: torchvision's, such as "mobilenet_v3_small".
        in_channels: of the image.
        image_size: height and width that it is to take.
        pretrained: True for the weights that torchvision downloads; or a file with weights of this network.
        options: none are known.

    Raises:
        InterflowError: no such network, or weights that cannot be had or do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int,
        image_size: tuple[int, int] | None = None,
        pretrained: bool | Path = False,
        **options: Any,
    ) -> None:
        if name in ELSEWHERE:
            raise InterflowError(f"torchvision/{name} is no backbone for branches; take timm/{ELSEWHERE[name]}.")
        if name not in TorchvisionNetwork.names():
            raise unknown("torchvision", name, TorchvisionNetwork.names())
        if options:
            raise InterflowError(f"torchvision/{name} has no option {next(iter(options))!r}; it has none.")
        network = _create(name, in_channels)
        normalization = _load(network, name, pretrained, in_channels) if pretrained else None
        super().__init__(_points(network, in_channels))
        self.name, self.in_channels, self.image_size = name, in_channels, image_size or (PROBE_PX, PROBE_PX)
        self.normalization = normalization
        self.network = network
        self.channels_last = _channels_last(network)
        self.freely_tapped = False

    @staticmethod
    def names() -> list[str]:
        """The classification networks of torchvision that can be a backbone."""
        from torchvision import models  # noqa: PLC0415 - takes seconds

        return [name for name in models.list_models(module=models) if name not in ELSEWHERE]

    def tap(self, branches: int, depth: int | None = None, taps: Sequence[int | str] | None = None) -> None:
        """As `Backbone.tap`; `taps` may name any module or node that gives a map."""
        points = {point.name for point in self.points}
        others = [tap for tap in taps or () if isinstance(tap, str) and not tap.isdecimal() and tap not in points]
        if others:
            self.points = _with_nodes(self.points, others, self.network, self.in_channels)
            self.freely_tapped = True
        super().tap(branches, depth, taps)

    def keep(self) -> None:
        """As `Backbone.keep`."""
        self.network = _extractor(self.network, [stage.name for stage in self.stages])
        if self.freely_tapped:
            _do_nothing_in_place(self.network)
        require_maps(self, f"torchvision/{self.name}", self.in_channels, self.image_size)

    def forward(self, x: Tensor) -> Features:
        """As `Backbone.forward`."""
        outputs = self.network(x)
        maps = [outputs[stage.name] for stage in self.stages]
        return Features([x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps, [])


def _create(name: str, in_channels: int) -> nn.Module:
    """The network without classifiers, its first convolution for images of that many channels."""
    from torchvision import models  # noqa: PLC0415 - takes seconds

    auxiliary = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, **auxiliary)
    for child, _ in list(network.named_children()):
        if child in CLASSIFIERS:
            setattr(network, child, nn.Identity())
    if in_channels != 3:
        first = _first_convolution(network)
        rgb = network.get_submodule(first)
        sizes = (rgb.out_channels, rgb.kernel_size, rgb.stride, rgb.padding)
        network.set_submodule(first, nn.Conv2d(in_channels, *sizes, bias=rgb.bias is not None))
    return network


def _first_convolution(network: nn.Module) -> str:
    return next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def _channels_last(network: nn.Module) -> bool:
    from torchvision.models import SwinTransformer  # noqa: PLC0415 - takes seconds

    return isinstance(network, SwinTransformer)


def _load(network: nn.Module, name: str, pretrained: bool | Path, in_channels: int) -> Normalization:
    """Load weights, for grey images the sum of the RGB filters as in timm; returns what they expect of the images."""
    from torchvision import models  # noqa: PLC0415 - takes seconds

    if isinstance(pretrained, Path):
        tensors, source, normalization = read_weights(pretrained), str(pretrained), IMAGENET
    else:
        weights = models.get_model_weights(name).DEFAULT
        source, transform = weights.url, weights.transforms()
        tensors = download(f"torchvision/{name}", source, lambda: models.get_model(name, weights=weights)).state_dict()
        normalization = Normalization(tuple(transform.mean), tuple(transform.std))
    # DenseNet's files are older than the rule that a module's name has no dot
    tensors = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=\d)", r"\1", key): value for key, value in tensors.items()}
    tensors = {key: value for key, value in tensors.items() if key.partition(".")[0] not in CLASSIFIERS}
    first = f"{_first_convolution(network)}.weight"
    if in_channels == 1 and first in tensors:
        tensors[first] = tensors[first].sum(dim=1, keepdim=True)
    load_weights(network, tensors, f"{source} for torchvision/{name}")
    return for_channels(HALVES if hasattr(network, "transform_input") else normalization, in_channels)


def _points(network: nn.Module, in_channels: int) -> list[Stage]:
    """The last part before each change of resolution; one that ends a child bears its name if no other part does."""
    parts: dict[str, str] = {}
    for child, module in network.named_children():
        if child not in CLASSIFIERS:
            inner = [f"{child}.{name}" for name, _ in module.named_children()]
            parts |= dict.fromkeys(inner if type(module) is nn.Sequential else [child], child)
    sizes = _sizes(network, list(parts), in_channels)
    names = list(sizes)
    ends = [
        name for name, following in zip(names, [*names[1:], None], strict=True)
        if following is None or sizes[name][1:] != sizes[following][1:]
    ]  # fmt: skip
    points_of, last_of = Counter(parts[name] for name in ends), {child: part for part, child in parts.items()}
    points = []
    for depth, name in enumerate(ends, start=1):
        child = parts[name]
        whole = points_of[child] == 1 and last_of[child] == name
        points.append(Stage(child if whole else name, depth, sizes[name][0], end=True))
    return points


def _with_nodes(points: Sequence[Stage], names: Sequence[str], network: nn.Module, in_channels: int) -> list[Stage]:
    """The points, and those of the names that give a map."""
    from torchvision.models.feature_extraction import get_graph_node_names  # noqa: PLC0415 - takes seconds

    training, evaluation = get_graph_node_names(network, suppress_diff_warning=True)
    nodes = [node for node in evaluation if node in set(training)]
    sizes = _sizes(network, nodes, in_channels)

    def last_node(name: str) -> str | None:
        return next((node for node in reversed(nodes) if f"{node}.".startswith(f"{name}.")), None)

    found = {last_node(point.name): point for point in points}
    for name in names:
        node = last_node(name)
        if node in sizes:
            found[node] = Stage(name, 1, sizes[node][0])
    return [replace(found[node], depth=i) for i, node in enumerate((n for n in nodes if n in found), start=1)]


def _sizes(network: nn.Module, names: Sequence[str], in_channels: int) -> dict[str, tuple[int, ...]]:
    """Channels, height and width of those modules and nodes that give a map, in the order of the pass."""
    with torch.no_grad():
        outputs = _extractor(network, names).eval()(torch.zeros(1, in_channels, PROBE_PX, PROBE_PX))
    shapes = {name: tuple(x.shape[1:]) for name, x in outputs.items() if isinstance(x, Tensor) and x.ndim == 4}
    if _channels_last(network):
        return {name: (channels, height, width) for name, (height, width, channels) in shapes.items()}
    return shapes


def _extractor(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A network of the same modules that returns these modules' or nodes' outputs by name, and holds no others."""
    from torchvision.models.feature_extraction import create_feature_extractor  # noqa: PLC0415 - takes seconds

    return create_feature_extractor(network, list(names), suppress_diff_warning=True)


def _do_nothing_in_place(extractor: Any) -> None:
    """Let nothing overwrite the map of a tapped node; behind the points, where modules end, nothing does anyway."""
    for module in extractor.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for graph in (extractor.train_graph, extractor.eval_graph):
        for node in graph.nodes:
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
    extractor.recompile()
