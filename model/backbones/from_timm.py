"""Any network of timm as a backbone (Wightman, PyTorch Image Models)."""

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from model.backbones.backbone import Backbone, Features, Normalization, Stage
from model.backbones.library import BUILD_ERRORS, PATIENCE_S, download, for_channels, require_maps, unknown
from model.backbones.weights import few, misfit, missing, read_weights
from model.contract import InterflowError

DECIDED = {"num_classes", "in_chans", "img_size", "features_only", "out_indices", "global_pool"}
"""Arguments of timm's networks that are not for options to set, beside all of `timm.create_model` itself."""


class TimmNetwork(Backbone):
    """A network of timm without its classifier.

    The points are the feature stages that timm knows, which are all blocks of a transformer; maps are as these leave
    them, before a final norm.

    Args:
        name: timm's, with the tag of its weights or without, such as "resnet18.a1_in1k".
        in_channels: of the image.
        image_size: height and width; networks that are made for one size have timm's where None, others ignore it.
        pretrained: True for the weights that timm downloads; or a file that holds them, or others of this network.
        options: further arguments of timm's network, such as drop_path_rate.

    Raises:
        InterflowError: no such network, option or size, or weights that cannot be had or do not fit.
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
        import timm  # noqa: PLC0415 - takes seconds

        config = _config(name)
        for option in options:
            if option in DECIDED or option in inspect.signature(timm.create_model).parameters:
                raise InterflowError(f"timm/{name} has no option {option!r}; leave it out.")
        arguments = options | {"in_chans": in_channels}
        if image_size and config.fixed_input_size:
            arguments["img_size"] = image_size
        if isinstance(pretrained, Path):
            network = _from_file(name, config, pretrained, arguments)
        elif pretrained:
            network = _downloaded(name, config, arguments)
        else:
            network = _create(name, num_classes=0, **arguments)
        super().__init__(_points(network.feature_info))
        self.name, self.in_channels, self.image_size = name, in_channels, image_size or config.input_size[1:]
        self.network = network
        self.indices = list(range(len(self.points)))
        _prune(network, self.indices)
        if pretrained:
            self.normalization = for_channels(Normalization(tuple(config.mean), tuple(config.std)), in_channels)

    @staticmethod
    def names() -> list[str]:
        """All networks of timm, without the tags of their weights."""
        import timm  # noqa: PLC0415 - takes seconds

        return timm.list_models()

    def keep(self) -> None:
        """As `Backbone.keep`."""
        self.indices = [self.points.index(stage) for stage in self.stages]
        _prune(self.network, self.indices)
        require_maps(self, f"timm/{self.name}", self.in_channels, self.image_size)

    def forward(self, x: Tensor) -> Features:
        """As `Backbone.forward`."""
        maps = self.network.forward_intermediates(
            x, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return Features(maps, [])


def _config(name: str) -> Any:
    """timm's own description of a network's input and weights."""
    import timm  # noqa: PLC0415 - takes seconds

    architecture, _ = timm.models.split_model_name_tag(name)
    if not timm.is_model(architecture):
        raise unknown("timm", name, TimmNetwork.names())
    try:
        return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError:  # no such tag
        raise unknown("timm", name, timm.list_pretrained(f"{architecture}.*")) from None


def _create(name: str, **arguments: Any) -> Any:
    import timm  # noqa: PLC0415 - takes seconds

    try:
        network = timm.create_model(name, **arguments)
    except BUILD_ERRORS as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InterflowError(f"timm/{name} cannot be built with {given} ({' '.join(str(error).split())}).") from error
    if not all(
        hasattr(network, part) for part in ("feature_info", "forward_intermediates", "prune_intermediate_layers")
    ):
        raise InterflowError(f"timm/{name}: timm gives no feature maps of this network; choose another.")
    return network


def _points(info: list[dict[str, Any]]) -> list[Stage]:
    """timm's records of its feature stages; a stage of the architecture ends where width or resolution change."""
    sizes = [(entry["num_chs"], entry["reduction"]) for entry in info]
    seen: Counter[str] = Counter()
    points = []
    for i, entry in enumerate(info):
        name = entry["module"] or "stem"  # TResNet's has no name
        seen[name] += 1
        if seen[name] > 1:  # the parallel paths of CrossViT and CoaT
            name = f"{name}#{seen[name]}"
        points.append(Stage(name, i + 1, sizes[i][0], end=i + 1 == len(info) or sizes[i] != sizes[i + 1]))
    return points


def _prune(network: Any, indices: list[int]) -> None:
    """Drop the classifier, the final norm and what lies behind the last of these feature stages."""
    network.prune_intermediate_layers(indices, prune_norm=True)


def _downloaded(name: str, config: Any, arguments: dict[str, Any]) -> Any:
    if not config.has_weights:
        raise InterflowError(f"timm/{name} has no weights to download; bring a file, or leave pretrained off.")
    source = f"huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    with _offline_where_the_hub_is_out_of_reach():
        return download(f"timm/{name}", source, lambda: _create(name, pretrained=True, **arguments))


@contextmanager
def _offline_where_the_hub_is_out_of_reach() -> Iterator[None]:
    """The hub's client finds what is in its cache, and does not ask for the rest again and again, for a minute."""
    from huggingface_hub import constants, get_session  # noqa: PLC0415 - as timm, which brings it

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception:  # the client's many have no class in common
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _from_file(name: str, config: Any, path: Path, arguments: dict[str, Any]) -> Any:
    """Through timm's own loader, which knows older names, position embeddings of other sizes, and grey input."""
    import timm  # noqa: PLC0415 - takes seconds

    tensors = read_weights(path)
    classifiers = [config.classifier] if isinstance(config.classifier, str) else config.classifier or []
    # As many classes as the file has: were it another number, timm would let any tensor be missing.
    classes = next((len(tensors[key]) for head in classifiers if (key := f"{head}.weight") in tensors), 0)
    arguments = arguments | {"num_classes": classes}
    expected = _create(name, **arguments).state_dict()
    overlay = {"file": str(path), "num_classes": classes, "label_offset": 0}
    try:
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except BUILD_ERRORS as error:
        reason = misfit(expected, tensors) or " ".join(str(error).split())
        raise InterflowError(f"{path} for timm/{name}: {reason}.") from error
    _prune(network, list(range(len(network.feature_info))))
    # Some networks let any tensor be missing even so; which, shows where the file has the network's own names.
    if tensors.keys() <= expected.keys() and (names := missing(network.state_dict(), tensors)):
        raise InterflowError(f"{path} for timm/{name}: missing: {few(names)}.")
    return network
