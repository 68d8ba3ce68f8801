"""Networks of timm and torchvision as backbones: points, cuts, weights, and the libraries' own features."""

import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from model.contract import InputSpec, InterflowError
from model.images import read_input
from model.interflow import Normalize
from model.registry import create_model, list_models

PX = 64
# name: the stages that S3 taps, with their channels and pixels a side, and how many points there are
NETWORKS = {
    "timm/resnet18": ([("layer1", 64, 16), ("layer2", 128, 8), ("layer3", 256, 4), ("layer4", 512, 2)], 5),
    "timm/vit_tiny_patch16_224": ([(f"blocks.{i}", 192, 4) for i in (2, 5, 8, 11)], 12),
    "timm/swin_s3_tiny_224": ([(f"layers.{i}", 96 * 2**i, 16 // 2**i) for i in range(4)], 4),
    "timm/efficientnet_b0": (
        [("blocks.1", 24, 16), ("blocks.2", 40, 8), ("blocks.4", 112, 4), ("blocks.6", 320, 2)], 5
    ),
    "torchvision/resnet18": ([("layer1", 64, 16), ("layer2", 128, 8), ("layer3", 256, 4), ("layer4", 512, 2)], 5),
    "torchvision/mobilenet_v3_small": (
        [("features.1", 16, 16), ("features.3", 24, 8), ("features.8", 48, 4), ("features.12", 576, 2)], 5
    ),
    "torchvision/googlenet": (
        [("conv3", 192, 16), ("inception3b", 480, 8), ("inception4e", 832, 4), ("inception5b", 1024, 2)], 5
    ),
    "torchvision/swin_t": (
        [("features.1", 96, 16), ("features.3", 192, 8), ("features.5", 384, 4), ("norm", 768, 2)], 4
    ),
    "torchvision/regnet_x_400mf": ([(f"trunk_output.block{i}", c, 32 // 2**i)
                                    for i, c in enumerate((32, 64, 160, 400), start=1)], 5),
}  # fmt: skip
# float32 sums in another order
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def images(photographs):
    """(5, 3, 64, 64): real photographs, normalised."""
    spec = InputSpec(height=PX, width=PX, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, resize="crop")
    pixels = np.stack([read_input(path, spec) for path in photographs.values()])
    return Normalize(spec.mean, spec.std)(torch.from_numpy(pixels))


def network(name, **settings):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 7, "image_size": (PX, PX)} | settings)


def saved(path, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_its_stages_and_nothing_behind_them(name, images):
    stages, points = NETWORKS[name]
    net = network(name)
    assert [(stage.name, stage.channels) for stage in net.stages] == [stage[:2] for stage in stages]
    assert [point.depth for point in net.backbone.points] == list(range(1, points + 1))

    output = net.train()(images)
    maps = net.backbone(images).maps
    assert [tuple(feature.shape[1:]) for feature in maps] == [(c, px, px) for _, c, px in stages]
    output.logits.square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []

    net.eval()
    with torch.no_grad():
        together = net(images).logits
        one_by_one = torch.cat([net(image[None]).logits for image in images])
    torch.testing.assert_close(together, one_by_one, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "depth", "last"),
    [
        ("timm/resnet18", 4, "layer3"),
        ("timm/vit_tiny_patch16_224", 5, "blocks.4"),
        ("timm/test_efficientnet", 2, "blocks.1"),
        ("torchvision/resnet18", 3, "layer2"),
        ("torchvision/mobilenet_v3_small", 2, "features.1"),
    ],
)
def test_what_lies_behind_the_last_tap_is_dropped(name, depth, last, images):
    whole, cut = network(name).backbone, network(name, method="normal", depth=depth).backbone
    assert cut.stages[-1].name == last
    cut(images).maps[-1].square().sum().backward()
    assert [key for key, p in cut.named_parameters() if p.grad is None] == []
    assert cut.state_dict().keys() < whole.state_dict().keys()


def test_methods_of_seven_branches_have_one_per_stage_where_there_are_no_seven_points():
    assert len(network("timm/resnet18", method="S8").stages) == 5
    blocks = [stage.depth for stage in network("timm/vit_tiny_patch16_224", method="S8").stages]
    assert blocks == [2, 3, 5, 7, 9, 10, 12]  # evenly, for no stage of the architecture ends before the last block
    assert [stage.name for stage in network("timm/vit_tiny_patch16_224", taps=(3, "blocks.11")).stages] == [
        "blocks.2",
        "blocks.11",
    ]


# --- the libraries' own features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "test_vit", "densenet121"])
def test_a_file_of_timms_weights_gives_timms_own_features(name, tmp_path, images):
    size = {"img_size": (PX, PX)} if name == "test_vit" else {}
    theirs = timm.create_model(name, **size)
    path = saved(tmp_path / "weights.safetensors", theirs.state_dict())
    ours = network(f"timm/{name}", pretrained=path, taps=[1, 2, 3], depth=3).backbone.eval()
    reference = timm.create_model(name, features_only=True, out_indices=(0, 1, 2), **size).eval()
    loaded = {key.replace("_", "."): value for key, value in theirs.state_dict().items()}
    flat = {key: key.replace("model.", "").replace("_", ".") for key in reference.state_dict()}
    reference.load_state_dict({key: loaded[flat[key]] for key in flat})
    with torch.no_grad():
        for one, other in zip(ours(images).maps, reference(images), strict=True):
            assert torch.equal(one, other)


def test_position_embeddings_of_another_image_size_are_resampled_by_timm(tmp_path, images):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=11)
    path = saved(tmp_path / "weights.safetensors", theirs.state_dict())
    ours = network("timm/vit_tiny_patch16_224", pretrained=path).backbone
    assert ours.network.pos_embed.shape == (1, 1 + 4 * 4, 192)
    theirs.set_input_size((PX, PX))  # resamples likewise
    with torch.no_grad():
        expected = theirs.eval().forward_intermediates(images, indices=[2, 11], intermediates_only=True)
        found = ours.eval()(images).maps
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE)
    torch.testing.assert_close(found[-1], expected[1], **TOLERANCE)


def test_a_file_of_torchvisions_weights_gives_torchvisions_own_features(tmp_path, images):
    theirs = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    path = saved(tmp_path / "weights.safetensors", theirs.state_dict())
    found = network("torchvision/mobilenet_v3_small", pretrained=path).backbone.eval()
    with torch.no_grad():
        torch.testing.assert_close(found(images).maps[-1], theirs.features(images), atol=0, rtol=0)
        torch.testing.assert_close(found(images).maps[0], theirs.features[:2](images), atol=0, rtol=0)


def test_torchvisions_files_of_before_2018_are_read(tmp_path, images):
    theirs = torchvision.models.densenet121().eval()
    older = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value
        for key, value in theirs.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    path = saved(tmp_path / "weights.safetensors", older)
    found = network("torchvision/densenet121", pretrained=path, method="normal").backbone.eval()
    with torch.no_grad():
        torch.testing.assert_close(found(images).maps[0], theirs.features(images), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "first"), [("timm/resnet18", "conv1"), ("torchvision/mobilenet_v3_small", "features.0.0")]
)
def test_grey_images_get_the_sum_of_the_filters_for_colours(name, first, tmp_path):
    library, _, rest = name.partition("/")
    theirs = timm.create_model(rest) if library == "timm" else torchvision.models.get_model(rest)
    path = saved(tmp_path / "weights.safetensors", theirs.state_dict())
    ours = network(name, pretrained=path, in_channels=1).backbone
    weight = ours.network.get_submodule(first).weight
    torch.testing.assert_close(weight, theirs.get_submodule(first).weight.sum(dim=1, keepdim=True))
    assert ours.normalization == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    assert ours(torch.zeros(2, 1, PX, PX)).maps[0].shape[0] == 2


def test_weights_bring_the_mean_and_deviation_they_expect(tmp_path):
    halves, imagenet = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name, expected in (
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", halves),
        ("timm/test_resnet", halves),
        ("torchvision/googlenet", halves),  # which torchvision converts to inside the network
        ("torchvision/squeezenet1_1", imagenet),
    ):
        net = network(name).backbone
        assert net.normalization is None
        path = saved(tmp_path / "own.safetensors", {f"network.backbone.{k}": v for k, v in net.state_dict().items()})
        assert network(name, pretrained=path).backbone.normalization is None
        path = saved(tmp_path / "library.safetensors", net_of_library(name).state_dict())
        assert network(name, pretrained=path).backbone.normalization == expected


def net_of_library(name):
    library, _, rest = name.partition("/")
    if library == "timm":
        return timm.create_model(rest)
    return torchvision.models.get_model(rest, **({"init_weights": True} if rest == "googlenet" else {}))


# --- torchvision: any node ------------------------------------------------------------------------------------------


def test_any_node_of_torchvisions_graph_can_be_tapped():
    net = network("torchvision/resnet18", taps=("layer1.0.bn1", "layer2.0", "layer4"))
    assert [(stage.name, stage.depth, stage.channels) for stage in net.stages] == [
        ("layer1.0.bn1", 2, 64),
        ("layer2.0", 4, 128),
        ("layer4", 7, 512),
    ]


@pytest.mark.parametrize("training", [False, True])  # each has a graph of its own
@pytest.mark.parametrize(
    ("name", "node", "last"), [("resnet18", "layer1.0.bn1", "layer4"), ("googlenet", "conv1.bn", "inception5b")]
)
def test_a_nodes_map_is_its_own_although_relu_follows_in_place(name, node, last, training, images):
    backbone = network(f"torchvision/{name}", taps=(node, last)).backbone.train(training)
    seen = []
    backbone.network.get_submodule(node).register_forward_hook(lambda _module, _inputs, out: seen.append(out.clone()))
    maps = backbone(images).maps
    assert torch.equal(maps[0], seen[0])
    sum(feature.square().mean() for feature in maps).backward()


def test_a_node_can_be_the_last_one():
    net = network("torchvision/resnet18", method="normal", taps=("layer3.0.conv1",), depth=4)
    assert [stage.name for stage in net.stages] == ["layer3.0.conv1"]
    assert "layer3.0.conv2.weight" not in net.backbone.network.state_dict()


# --- names and options ------------------------------------------------------------------------------------------------


def test_list_models_asks_a_library_where_the_pattern_names_it():
    assert not any("/" in name for name in list_models())
    assert list_models("timm/resnet18") == ["timm/resnet18"]
    assert "torchvision/mobilenet_v3_small" in list_models("torchvision/mobilenet*")
    assert len(list_models("timm/*")) == len(timm.list_models())


def test_options_reach_timms_network():
    net = network("timm/test_vit", drop_path_rate=0.9)
    image = torch.randn(1, 3, PX, PX)
    assert torch.equal(net.eval()(image).logits, net(image).logits)
    assert len({tuple(net.train()(image).logits[0].tolist()) for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "timm/resnet81"},
            r"timm/resnet81 is unknown.* did you mean .*timm/resnet18.*list_models\('timm/\*'\)",
        ),
        ({"name": "timm/resnet18.a9_in1k"}, r"did you mean .*timm/resnet18\.a1_in1k"),
        ({"name": "timm/hf-hub:timm/resnet18"}, "is unknown"),
        ({"name": "torchvision/mobilenet_v9"}, "did you mean torchvision/mobilenet_v"),
        ({"name": "torchvision/deeplabv3_resnet50"}, "no such network"),
        ({"name": "torchvision/vit_b_16"}, "take timm/vit_base_patch16_224"),
        ({"name": "timm/test_resnet", "width": 0.5}, "width 0.5: .* leave width at 1"),
        ({"name": "torchvision/alexnet", "width": 2}, "leave width at 1"),
        ({"name": "timm/test_resnet", "colour": "red"}, "colour='red'.*unexpected keyword argument 'colour'"),
        ({"name": "timm/test_resnet", "drop_path_rate": "much"}, "drop_path_rate='much'"),
        ({"name": "timm/test_resnet", "checkpoint_path": "x.pth"}, "no option 'checkpoint_path'"),
        ({"name": "timm/test_resnet", "img_size": 32}, "no option 'img_size'"),
        ({"name": "torchvision/alexnet", "dropout": 0.1}, "no option 'dropout'"),
        ({"name": "timm/test_resnet", "taps": ("layer9",)}, "tap 'layer9' is not a point .* 1 "),
        ({"name": "torchvision/alexnet", "taps": ("features.99", "features.12")}, "tap 'features.99' is not a point"),
        ({"name": "torchvision/alexnet", "taps": ("flatten", "features.12")}, "tap 'flatten' is not a point"),
        ({"name": "timm/test_resnet", "depth": 9}, "depth 9: .* after layer 1, 2, 3, 4, 5"),
        ({"name": "timm/inception_v3"}, "does not take images of 64x64 pixels"),
        ({"name": "torchvision/alexnet", "image_size": (16, 16)}, "does not take images of 16x16 pixels"),
    ],
)
def test_what_a_library_does_not_have_is_refused(settings, message):
    with pytest.raises(InterflowError, match=message):
        network(**settings)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and empty caches of the libraries: the hub's folder, and torch's."""
    from huggingface_hub import constants

    def unreachable(*_arguments, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield tmp_path / "hub", tmp_path / "torch" / "hub" / "checkpoints"
    assert not constants.HF_HUB_OFFLINE
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/gcvit_xxtiny", "torchvision/squeezenet1_1"])
def test_without_a_network_a_download_is_refused_at_once_and_with_advice(name, offline):
    started = time.monotonic()
    with pytest.raises(InterflowError, match=r"could not be downloaded .*--init <file>\.safetensors"):
        network(name, pretrained=True, image_size=None)
    assert time.monotonic() - started < 10


def test_weights_that_were_downloaded_before_are_found_without_a_network(offline):
    hub, checkpoints = offline
    theirs = timm.create_model("test_resnet")
    folder = hub / "models--timm--test_resnet.r160_in1k"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    saved(folder / "snapshots" / "0" / "model.safetensors", theirs.state_dict())
    ours = network("timm/test_resnet", pretrained=True).backbone
    assert torch.equal(ours.network.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight)
    assert ours.normalization == ((0.5,) * 3, (0.5,) * 3)

    theirs = torchvision.models.squeezenet1_1()
    checkpoints.mkdir(parents=True)
    torch.save(theirs.state_dict(), checkpoints / "squeezenet1_1-b8a52dc0.pth")
    ours = network("torchvision/squeezenet1_1", pretrained=True).backbone
    assert torch.equal(ours.state_dict()["network.features.0.weight"], theirs.features[0].weight)
    assert ours.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_networks_without_weights_say_so():
    with pytest.raises(InterflowError, match="has no weights to download"):
        network("timm/coatnet_pico_rw_224", pretrained=True)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(1)
    return {"timm": timm.create_model("resnet18"), "torchvision": torchvision.models.resnet18()}


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("layer3.0.conv1.weight"), "missing: layer3.0.conv1.weight"),
        (lambda tensors: tensors.update({"layer1.2.conv1.weight": torch.zeros(1)}), "of another network: layer1.2"),
        (lambda tensors: tensors.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
         r"misshapen: conv1.weight \[64, 3, 3, 3\]"),
        (lambda tensors: [tensors.update({f"x.{k}": tensors.pop(k)}) for k in list(tensors)],
         "no tensor fits; there are x.bn1.bias, .* and 119 more, and expected were conv1.weight"),
        (dict.clear, "no tensor fits"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_whole(library, change, message, resnet18, tmp_path):
    tensors = dict(resnet18[library].state_dict())
    change(tensors)
    path = saved(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(InterflowError, match=rf"weights.safetensors for {library}/resnet18: {message}"):
        network(f"{library}/resnet18", pretrained=path)


def test_where_timm_would_let_tensors_be_missing_we_do_not(tmp_path):
    tensors = dict(timm.create_model("dla46_c").state_dict())
    network("timm/dla46_c", pretrained=saved(tmp_path / "whole.safetensors", tensors))
    del tensors["level2.tree1.conv1.weight"]
    with pytest.raises(InterflowError, match=r"missing: level2.tree1.conv1.weight"):
        network("timm/dla46_c", pretrained=saved(tmp_path / "half.safetensors", tensors))


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "vgg16"])
def test_only_safetensors_are_read(name, tmp_path, resnet18):
    path = tmp_path / "weights.pth"
    torch.save(resnet18["timm"].state_dict(), path)
    with pytest.raises(InterflowError, match=r"weights.pth: expected a \.safetensors file.*python -c") as refused:
        network(name, pretrained=path)
    code = re.search(r'python -c "(.*)"\.$', str(refused.value)).group(1)
    exec(code)  # the advice works
    if name == "timm/resnet18":
        network(name, pretrained=path.with_suffix(".safetensors"))
    for content in (b"", b"\xff" * 100):
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(content)
        with pytest.raises(InterflowError, match=r"bad\.safetensors: not a safetensors file"):
            network(name, pretrained=bad)
    with pytest.raises(InterflowError, match=r"none.safetensors: .*No such file"):
        network(name, pretrained=Path("none.safetensors"))


def checkpoint_of(net, path):
    return saved(path, {f"network.{key}": value for key, value in net.state_dict().items()})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vgg16", {"width": 0.1, "depth": 7, "taps": (4, 7)}),
        ("timm/test_resnet", {"depth": 3, "taps": (2, 3)}),
        ("torchvision/squeezenet1_1", {"depth": 3, "taps": (1, 3)}),
    ],
)
def test_a_checkpoint_gives_its_backbone_whole_or_cut(name, settings, tmp_path):
    shared = {"width": 0.1} if name == "vgg16" else {}
    theirs = create_model(name, num_classes=3, image_size=(PX, PX), **shared)
    path = checkpoint_of(theirs, tmp_path / "checkpoint.safetensors")
    for own in (shared, settings):
        ours = create_model(name, pretrained=path, image_size=(PX, PX), **own)
        assert ours.backbone.normalization is None
        for key, value in ours.backbone.state_dict().items():
            assert torch.equal(value, theirs.backbone.state_dict()[key])

    cut = create_model(name, image_size=(PX, PX), **settings)
    path = checkpoint_of(cut, tmp_path / "cut.safetensors")
    create_model(name, pretrained=path, image_size=(PX, PX), **settings)
    with pytest.raises(InterflowError, match=rf"cut.safetensors for {name}: missing: "):
        create_model(name, pretrained=path, image_size=(PX, PX), **shared)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = checkpoint_of(create_model("vgg16", width=0.1), tmp_path / "vgg.safetensors")
    for name, settings, message in (
        ("vgg16", {"width": 0.2}, r"misshapen: .* \[6, 3, 3, 3\] instead of \[13, 3, 3, 3\], .* and 62 more"),
        ("vgg16", {"width": 0.1, "in_channels": 1}, "misshapen: blocks.0.layers.0.weight"),
        ("plain40", {"width": 0.1}, "missing: "),
        ("timm/test_resnet", {}, "no tensor fits; there are blocks.0"),
    ):
        with pytest.raises(InterflowError, match=rf"vgg.safetensors for {name}: {message}"):
            create_model(name, pretrained=path, image_size=(PX, PX), **settings)
    deeper = create_model("vgg16", width=0.1).state_dict() | {"backbone.blocks.13.layers.0.weight": torch.zeros(1)}
    path = saved(tmp_path / "deeper.safetensors", {f"network.{key}": value for key, value in deeper.items()})
    with pytest.raises(InterflowError, match=r"of another network: blocks\.13"):
        create_model("vgg16", width=0.1, pretrained=path)
    path = saved(tmp_path / "library.safetensors", timm.create_model("test_resnet").state_dict())
    with pytest.raises(InterflowError, match=r"vgg16 takes the weights of a checkpoint.*network\.backbone.*these are"):
        create_model("vgg16", width=0.1, pretrained=path)
