"""Every registered network becomes an artefact that all checks of export let through, and that the server opens."""

import numpy as np
import pytest
import torch

from app.session import Session
from app.settings import Settings
from model.catalogue import BACKBONES
from model.contract import LAYER_ATTENTION, LOGITS, BackboneInfo, LayerAttentionInfo, ModelCard, StageInfo
from model.images import read_input
from model.interflow import Normalize
from model.registry import create_model
from training import artefact
from training.verify import verify

QUICK = {"vgg16", "afi_resnet32_b", "aff_resnext38_32x4d", "iaff_resnet50", "mrla_light_deit_tiny"}
"""One of each family; the others take many minutes together."""
LIBRARY = ["timm/resnet18", "timm/vit_tiny_patch16_224", "torchvision/mobilenet_v3_small"]
"""Modules, tokens with position embeddings, and a traced graph; each is exported in its own way."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(BACKBONES)] + LIBRARY,
)
@pytest.mark.timeout(1200)
def test_every_network_is_exported_with_all_checks(name, exported, photographs, tmp_path):
    """S3, at full width; the sums, the comparison with PyTorch, the server's warm-up, and its answer to two images."""
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
    model = artefact.to_onnx(network, card)
    assert verify(model, card, network, network.state_dict(), samples) < 1e-4
    rebuilt = artefact.network_of(card)  # the card is enough to build the network again
    rebuilt.load_state_dict(network.state_dict())

    folder = artefact.write_artefact(tmp_path, card, model)
    served = Session(folder, Settings(provider="cpu", threads=1)).run(samples[:2], list(card.outputs))
    np.testing.assert_allclose(served[LOGITS], output.logits, atol=1e-4 * max(1, float(output.logits.abs().max())))
    assert (LAYER_ATTENTION in served) == bool(output.layer_attention)
    if output.layer_attention:
        np.testing.assert_allclose(served[LAYER_ATTENTION], output.stacked_layer_attention(), atol=1e-4)
