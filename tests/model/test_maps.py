"""Class maps of real networks: each is its stage's own explanation, and together they are the fused logits."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.explain import contribution_maps, contributions, evidence, evidence_maps
from model.interflow import Normalize
from model.registry import create_model

CLASSES = 10


@pytest.fixture(scope="module")
def photograph(photographs):
    """A real photograph as the networks take it, (1, 3, 48, 48)."""
    with Image.open(photographs["chelsea.png"]) as image:
        pixels = np.asarray(image.convert("RGB").crop((60, 0, 360, 300)).resize((48, 48)))
    return Normalize((0.5,) * 3, (0.25,) * 3)(torch.from_numpy(pixels.copy())[None])


def network(method, **options):
    """A narrow VGG whose batch norm has seen data, and whose biases are not zero, as they are at the start."""
    torch.manual_seed(0)
    built = create_model("vgg16", method=method, num_classes=CLASSES, width=0.125, **options)
    with torch.no_grad():
        for _ in range(3):
            built(torch.randn(16, 3, 32, 32))
        for head in built.heads.values():
            head.bias.uniform_(-0.5, 0.5)
    return built.eval()


@pytest.mark.parametrize("method", ["S1", "S3", "S4", "S9"])
def test_maps_of_all_stages_and_nothing_else_are_the_fused_logits(photograph, method):
    output = network(method)(photograph)
    weights, branch_logits = output.branch_weights.detach().numpy(), output.branch_logits.detach().numpy()
    maps = contribution_maps([values.detach().numpy() for values in output.branch_maps], weights)
    sums = np.stack([values.sum(axis=(2, 3), dtype=np.float64) for values in maps], axis=1)
    scale = np.abs(sums).max()
    np.testing.assert_allclose(sums.sum(axis=1), output.logits.detach().numpy(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(sums, contributions(branch_logits, weights), rtol=0, atol=1e-5 * scale)
    evident = np.stack([values.sum(axis=(2, 3), dtype=np.float64) for values in evidence_maps(maps)], axis=1)
    np.testing.assert_allclose(evident, evidence(sums), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("options", [{}, {"shared_heads": False}, {"taps": [2, 5, 13]}])
def test_a_map_is_the_hirescam_of_its_stages_own_branch(monkeypatch, photograph, options):
    """HiResCAM sums gradient times activation over the channels, and leaves out the bias, which ours spreads evenly."""
    built = network("S3", **options)
    features = built.features(photograph)
    monkeypatch.setattr(built, "features", lambda _: features)
    output = built(photograph)
    weights = output.branch_weights.detach().numpy()
    maps = contribution_maps([values.detach().numpy() for values in output.branch_maps], weights)
    for stage, (name, activation) in enumerate(zip(built.head_names, features.maps, strict=True)):
        for target in range(CLASSES):
            summand = output.branch_weights[0, stage, target] * output.branch_logits[0, stage, target]
            (gradient,) = torch.autograd.grad(summand, activation, retain_graph=True)
            hirescam = (gradient * activation).sum(dim=1)[0].detach().numpy()
            bias = weights[0, stage, target] * built.heads[name].bias[target].item() / hirescam.size
            scale = np.abs(hirescam).max()
            np.testing.assert_allclose(maps[stage][0, target], hirescam + bias, rtol=0, atol=1e-5 * scale)
