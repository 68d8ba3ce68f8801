"""The measures of maps hold what they promise on networks whose right map is known, and on real photographs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.explanation_metrics import (
    bootstrap,
    build_mosaics,
    draw_mosaics,
    map_distance,
    patch_scores,
    points_inside,
    removal_curves,
    share_inside,
    shift_similarity,
)
from model.registry import create_model

PATCH, STEP = 4, 2


@pytest.fixture(scope="module")
def images(photographs):
    """Sixteen parts of photographs, 32 pixels across, their mean colour 0."""
    parts = []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        pixels = np.asarray(Image.open(photographs[name]).convert("RGB").resize((64, 64)), np.float32) / 255
        parts += [pixels[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    stacked = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)
    return stacked - stacked.mean(dim=(0, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def additive():
    """A model whose answer is the sum over pixels of weight * value, and the map that is therefore exactly right."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32))

    def answer(images):
        return (images * weight).sum(dim=(1, 2, 3)).numpy()

    def explain(images):
        return (images * weight).sum(dim=1).double().numpy()

    return answer, explain


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("vgg16", method="S3", width=0.125, taps=[4, 7, 10, 13]).eval()


def srg(answer, images, maps):
    return removal_curves(answer, images, maps, patch=PATCH, step=STEP).srg()


def test_no_map_of_an_additive_model_has_a_higher_srg_than_the_right_one(additive, images):
    answer, explain = additive
    right = srg(answer, images, explain(images))
    generator = np.random.default_rng(1)
    for noise in (0.5, 2, 100):
        maps = explain(images)
        other = maps + noise * maps.std() * generator.standard_normal(maps.shape)
        assert (srg(answer, images, other) < right).all()


def test_the_negative_of_a_map_has_the_opposite_srg_and_the_curves_swapped(additive, images):
    answer, explain = additive
    curves = removal_curves(answer, images, explain(images), patch=PATCH, step=STEP)
    swapped = removal_curves(answer, images, -explain(images), patch=PATCH, step=STEP)
    np.testing.assert_allclose(swapped.srg(), -curves.srg(), rtol=1e-5)
    np.testing.assert_allclose(swapped.most_first, curves.least_first, rtol=1e-4, atol=1e-4)


def test_random_maps_have_no_srg(additive, images):
    answer, explain = additive
    generator = np.random.default_rng(2)
    found = np.mean([srg(answer, images, generator.standard_normal((16, 32, 32))).mean() for _ in range(30)])
    assert abs(found) < 0.05 * srg(answer, images, explain(images)).mean()


def test_curves_run_from_the_whole_image_to_none_of_it(additive, images):
    answer, explain = additive
    curves = removal_curves(answer, images, explain(images), patch=PATCH, step=STEP)
    for curve in curves:
        assert curve.shape == (16, 1 + 64 // STEP)
        np.testing.assert_array_equal(curve[:, 0], answer(images))
        np.testing.assert_array_equal(curve[:, -1], 0)


def test_insertion_is_removal_of_the_least_relevant_backwards(additive, images):
    answer, explain = additive
    maps = explain(images)
    curve = removal_curves(answer, images, maps, patch=PATCH, step=STEP).least_first[0]
    scores = patch_scores(maps[:1], PATCH)[0]
    for there in (6, 20):
        kept = scores >= np.sort(scores.ravel())[-there]
        mask = torch.from_numpy(kept.repeat(PATCH, 0).repeat(PATCH, 1))
        assert curve[(64 - there) // STEP] == pytest.approx(answer(images[:1] * mask)[0], rel=1e-4, abs=1e-4)


def test_patch_scores_keep_the_sum_and_the_place():
    maps = np.zeros((1, 8, 12))
    maps[0, 5, 9] = 3
    assert patch_scores(maps, 4).tolist() == [[[0, 0, 0], [0, 0, 3]]]


def test_maps_of_unchanged_weights_have_distance_0_and_of_random_ones_not(network, images):
    from benchmarks.explanation_methods import ours
    from benchmarks.explanations import randomised

    classes = torch.arange(16) % 10
    for method in ours(network):
        before = method.explain(network, images, classes)
        np.testing.assert_allclose(map_distance(before, method.explain(randomised(network, -1), images, classes)), 0)
        assert map_distance(before, method.explain(randomised(network, 4), images, classes)).mean() > 0.3


def test_randomising_goes_from_the_top_down_and_leaves_the_network_itself_alone(network):
    from benchmarks.explanations import randomised

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for stages, first in ((0, None), (1, 10), (2, 7), (3, 4), (4, 0)):
        changed = randomised(network, stages).state_dict()
        blocks = {
            int(name.split(".")[2])
            for name, tensor in changed.items()
            if name.startswith("backbone.blocks") and tensor.ndim == 4 and not tensor.equal(before[name])
        }
        assert blocks == (set() if first is None else set(range(first, 13)))
        assert not changed["attention.weight"].equal(before["attention.weight"])
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


def test_map_distance_looks_at_the_order_alone():
    values = np.random.default_rng(3).standard_normal((5, 8, 8))
    np.testing.assert_allclose(map_distance(values, np.exp(values)), 0, atol=1e-12)
    np.testing.assert_allclose(map_distance(values, -values), 2)
    assert map_distance(values, np.zeros_like(values)).tolist() == [1] * 5  # which says nothing


def test_mosaics_have_four_classes_each_and_every_image_in_its_quadrant(images):
    labels = np.arange(16) % 5
    indices = draw_mosaics(labels, 3, seed=0)
    assert len(set(indices.ravel())) == 12
    mosaics = build_mosaics(images, indices)
    assert mosaics.shape == (3, 3, 64, 64)
    for mosaic, row in zip(mosaics, indices, strict=True):
        assert len(set(labels[row])) == 4
        corners = (mosaic[:, y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32))
        for corner, index in zip(corners, row, strict=True):
            assert corner.equal(images[index])
    with pytest.raises(ValueError, match="not 5"):
        draw_mosaics(labels, 5, seed=0)


def test_localisation_of_a_known_map():
    maps = np.zeros((4, 8, 8))
    for index, (y, x) in enumerate(((1, 1), (2, 6), (7, 0), (5, 5))):
        maps[index, y, x] = 3
        maps[index, 7 - y, 7 - x] = 1  # the quadrant across
        maps[index, y, 7 - x] = -100  # what is negative says nothing of where the class is
    np.testing.assert_allclose(share_inside(maps, [0, 1, 2, 3]), 0.75)
    np.testing.assert_allclose(share_inside(maps, [3, 2, 1, 0]), 0.25)
    assert points_inside(maps, [0, 1, 2, 3]).tolist() == [1] * 4
    assert points_inside(maps, [3, 2, 1, 0]).tolist() == [0] * 4
    assert share_inside(-np.ones((1, 8, 8)), [0]).tolist() == [0]
    np.testing.assert_allclose(share_inside(np.ones((1, 8, 8)), [2]), 0.25)


def test_a_map_that_moves_with_the_image_is_steady_and_a_random_one_is_not(images):
    def bright(images):
        return images.mean(dim=1).double().numpy()

    generator = np.random.default_rng(4)

    def random(images):
        return generator.standard_normal((len(images), 32, 32))

    def fixed(images):
        return np.tile(np.random.default_rng(5).standard_normal((32, 32)), (len(images), 1, 1))

    np.testing.assert_allclose(shift_similarity(bright, images, patch=4), 1)
    assert abs(shift_similarity(random, images, patch=4).mean()) < 0.2
    assert shift_similarity(fixed, images, patch=4).mean() < 0.9


def test_our_maps_sum_to_the_evidence_for_the_class(network, images):
    from benchmarks.explanation_methods import ours

    classes = torch.arange(16) % 10
    fused, *stages = (method.explain(network, images, classes) for method in ours(network))
    with torch.no_grad():
        logits = network(images).logits
    evidence = (logits - logits.mean(dim=1, keepdim=True))[torch.arange(16), classes].numpy()
    assert fused.shape == (16, 32, 32)
    np.testing.assert_allclose(fused.sum(axis=(1, 2)), evidence, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.sum(stages, axis=0), fused, atol=1e-9)


def test_the_bootstrap_covers_the_mean_and_keeps_images_together():
    values = np.random.default_rng(6).standard_normal(400)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    _, low_of_pairs, high_of_pairs = bootstrap(np.stack([values, values], axis=1))
    assert high_of_pairs - low_of_pairs == pytest.approx(high - low)


def test_missing_libraries_are_named_with_the_command_that_brings_them(monkeypatch):
    from benchmarks import explanation_methods
    from model.contract import InterflowError

    def missing(name):
        raise explanation_methods.PackageNotFoundError(name)

    monkeypatch.setattr(explanation_methods, "version", missing)
    with pytest.raises(InterflowError, match=r"captum is not installed; `uv run .*--group explanations"):
        explanation_methods.require_libraries()


def test_grad_cam_and_hirescam_agree_with_ours_behind_the_only_branch(images):
    """Of a network with one branch both are the class activation map, and so is our evidence."""
    pytest.importorskip("captum")
    pytest.importorskip("pytorch_grad_cam")
    from benchmarks.explanation_methods import class_activation, ours

    torch.manual_seed(0)
    network = create_model("vgg16", method="normal", width=0.125).eval()
    classes = torch.arange(16) % 10
    mine = ours(network)[0].explain(network, images, classes)
    bias = network.heads[network.head_names[0]].bias.detach()
    assert not bias.any()  # which alone would make a difference, spread evenly
    for cam in ("Grad-CAM", "HiResCAM"):
        theirs = class_activation(cam, "conv13").explain(network, images, classes)
        np.testing.assert_allclose(map_distance(mine, theirs), 0, atol=1e-3)


@pytest.mark.slow
def test_the_command_runs_on_a_small_run(tmp_path):
    pytest.importorskip("captum")
    pytest.importorskip("pytorch_grad_cam")
    root = Path(__file__).parents[2]
    train = [sys.executable, str(root / "training" / "train.py"), "--image-size", "32", "--width", "0.125"]
    train += ["--epochs", "2", "--taps", "4", "7", "10", "13", "--out", str(tmp_path / "run")]
    command = [sys.executable, str(root / "benchmarks" / "explanations.py"), "--run", str(tmp_path / "run"), "--quick"]
    command += ["--out", str(tmp_path), "--picture", str(tmp_path / "explanations.png")]
    for line in (train, command, command):  # the second time, from what was kept
        done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "faithfulness: " not in done.stdout
    found = json.loads((tmp_path / "explanations.json").read_text())
    assert {"random", "evidence, fused"} < set(found["methods"])
    assert (tmp_path / "explanations.png").stat().st_size > 10_000
