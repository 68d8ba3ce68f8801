"""Every registered network becomes an artefact that all checks of export let through, and that the server opens."""

import numpy as np
import pytest
import torch

from app.session import Session
from app.settings import Settings
from model.catalogue import BACKBONES
from model.contract import (
    BRANCH_LOGITS,
    IMAGE,
    LAYER_ATTENTION,
    LOGITS,
    BackboneInfo,
    LayerAttentionInfo,
    ModelCard,
    StageInfo,
)
from model.images import read_input
from model.interflow import Normalize
from model.registry import create_model
from training import artefact
from training.fewer_bits import to_float16, to_int8
from training.verify import open_graph, residuals, verify

QUICK = {"vgg16", "afi_resnet32_b", "aff_resnext38_32x4d", "iaff_resnet50", "mrla_light_deit_tiny"}
"""One of each family; the others take many minutes together."""
LIBRARY = ["timm/resnet18", "timm/vit_tiny_patch16_224", "torchvision/mobilenet_v3_small"]
"""Modules, tokens with position embeddings, and a traced graph; each is exported in its own way."""


FEWER_BITS = ["resnet20"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("mobilenetv2", "aff_resnet32", "mrla_light_deit_tiny", "timm/resnet18")
]
"""Residual sums, depthwise convolutions, attention between maps, tokens, and a library's."""

ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(BACKBONES)] + LIBRARY


@pytest.fixture
def network_and_card(name, exported, photographs):
    """A network of S3 at full width, untrained but for its batch norms, a card for it, and real images."""
    size = 32 if name in BACKBONES and BACKBONES[name].image_size == 32 else 64
    template = ModelCard.from_json((exported / "digits" / "1" / "model.json").read_bytes(), "card")
    spec = template.input.model_copy(
        update={"height": size, "width": size, "channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    )
    samples = np.resize(np.stack([read_input(path, spec) for path in photographs.values()]), (20, size, size, 3))
    torch.manual_seed(0)
    network = create_model(name, num_classes=10, image_size=(size, size))
    images = Normalize(spec.mean, spec.std)(torch.from_numpy(samples))
    with torch.no_grad():
        for _ in range(10):  # batch norms must know real images, or random weights make numbers without bound
            network.train()(images[:8])
        output = network.eval()(images[:2])

    card = template.model_copy(
        update={
            "input": spec,
            "backbone": BackboneInfo(name=name, depth=network.backbone.depth, width=1),
            "exits": (),
            "stages": tuple(
                StageInfo(name=stage.name, depth=stage.depth, channels=stage.channels, map_size=branch_map.shape[2:])
                for stage, branch_map in zip(network.stages, output.branch_maps, strict=True)
            ),
            "layer_attention": tuple(
                LayerAttentionInfo(block=row.block, module=row.module, kind=row.kind, sources=row.sources)
                for row in output.layer_attention
            ),
            "branch_weights": tuple(map(tuple, network.attention.matrix().tolist())),
            "reading_scales": tuple(map(tuple, network.attention.matrix().tolist())),
            "branch_importance": (1 / len(network.stages),) * len(network.stages),
            "metrics": template.metrics.model_copy(
                update={"branch_accuracy": (0.5,) * len(network.stages), "branch_ece": (0.5,) * len(network.stages)}
            ),
        }
    )
    return network, card, samples


@pytest.mark.parametrize("name", ALL)
@pytest.mark.timeout(1200)
def test_every_network_is_exported_with_all_checks(network_and_card, tmp_path):
    """The sums, the comparison with PyTorch, the server's warm-up, and its answer to two images."""
    network, card, samples = network_and_card
    model = artefact.to_onnx(network, card)
    assert verify(model, card, network, network.state_dict(), samples) < 1e-4
    rebuilt = artefact.network_of(card)  # the card is enough to build the network again
    rebuilt.load_state_dict(network.state_dict())

    folder = artefact.write_artefact(tmp_path, card, model)
    served = Session(folder, Settings(provider="cpu", threads=1)).run(samples[:2], list(card.outputs))
    with torch.no_grad():
        output = network(Normalize(card.input.mean, card.input.std)(torch.from_numpy(samples[:2])))
    np.testing.assert_allclose(served[LOGITS], output.logits, atol=1e-4 * max(1, float(output.logits.abs().max())))
    assert (LAYER_ATTENTION in served) == bool(output.layer_attention)
    if output.layer_attention:
        np.testing.assert_allclose(served[LAYER_ATTENTION], output.stacked_layer_attention(), atol=1e-4)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("name", FEWER_BITS)
def test_networks_of_every_kind_run_in_fewer_bits(network_and_card, precision):
    """What they say stays near what they said, and the sums stay exact."""
    network, card, samples = network_and_card
    graph, stages = artefact.to_graph(network, card), len(card.stages)
    reduced = to_float16(graph, stages) if precision == "float16" else to_int8(graph, stages, samples)
    names = list(card.outputs)
    whole, smaller = (
        dict(zip(names, open_graph(model.SerializeToString()).run(names, {IMAGE: samples}), strict=True))
        for model in (graph, reduced)
    )
    found = residuals(smaller, card)
    assert max(found[LOGITS], found[BRANCH_LOGITS]) < 1e-5
    assert found.get(LAYER_ATTENTION, 0) < 1e-3
    lost = np.linalg.norm(smaller[BRANCH_LOGITS] - whole[BRANCH_LOGITS]) / np.linalg.norm(whole[BRANCH_LOGITS])
    assert 0 < lost < {"float16": 0.02, "int8": 0.25}[precision]
