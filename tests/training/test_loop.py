"""The loop's own arithmetic: rates, losses, and the device it runs on."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.contract import InterflowError
from model.interflow import InterflowOutput
from model.registry import create_model
from training.loop import choose_device, learning_rate, trained_groups, training_loss
from training.recipe import Recipe, resolve_recipe


def test_the_papers_rate_drops_to_a_tenth_for_the_last_twenty_epochs():
    recipe = resolve_recipe("paper", {"data": "cifar10"})
    rates = [learning_rate(recipe, epoch, 0, 10) for epoch in range(100)]
    assert rates[:80] == [1e-3] * 80
    assert rates[80:] == pytest.approx([1e-4] * 20)


def test_one_cycle_rises_in_a_line_and_falls_to_nothing():
    recipe = Recipe(epochs=10, lr=0.4, schedule="one_cycle", warmup=0.2)
    rates = np.array([learning_rate(recipe, epoch, step, 5) for epoch in range(10) for step in range(5)])
    np.testing.assert_allclose(rates[:10], 0.04 * np.arange(1, 11))
    assert rates.argmax() == 9
    assert (np.diff(rates[9:]) < 0).all()
    assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_one_cycle_holds_at_its_extremes(warmup):
    recipe = Recipe(epochs=2, lr=1, schedule="one_cycle", warmup=warmup)
    rates = [learning_rate(recipe, epoch, step, 4) for epoch in range(2) for step in range(4)]
    assert all(0 <= rate <= 1 for rate in rates)


def test_the_auxiliary_loss_judges_contributions_never_raw_branch_logits():
    z = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    w = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    output = InterflowOutput((w * z).sum(1), z, w, (), ())
    labels = torch.tensor([0])
    fused = functional.cross_entropy(torch.tensor([[3.0, -2.0]]), labels)
    stages = functional.cross_entropy(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(training_loss(output, labels, 0), fused)
    torch.testing.assert_close(training_loss(output, labels, 0.3), fused + 0.3 * stages)


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(InterflowError, match="no CUDA device; give --device cpu"):
            choose_device("cuda")


def test_the_optimiser_gets_every_parameter_once_and_none_that_is_frozen():
    network = create_model("vgg16", width=0.05, neck="aff")
    backbone, all_of_it = set(network.backbone.parameters()), set(network.parameters())
    frozen = trained_groups(network, Recipe(freeze="backbone", init="weights.safetensors"))
    assert [set(group["params"]) for group in frozen] == [all_of_it - backbone]
    rest, slow = trained_groups(network, Recipe(backbone_lr=0.1))
    assert (set(rest["params"]), set(slow["params"])) == (all_of_it - backbone, backbone)
    assert (rest["factor"], slow["factor"]) == (1, 0.1)
    assert all(parameter.requires_grad for parameter in all_of_it)
