"""One step: its rate, its loss, what it trains, and the average it keeps."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.interflow import Interflow, InterflowOutput, Normalize
from model.registry import create_model
from training.augment import Draws, augment, draw_epoch
from training.data import load_data
from training.recipe import Recipe, resolve_recipe
from training.step import Step, class_weights, learning_rate, trained_groups, training_loss

CPU = torch.device("cpu")


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
    torch.testing.assert_close(training_loss(output, labels, Recipe()), fused)
    torch.testing.assert_close(training_loss(output, labels, Recipe(auxiliary_loss=0.3)), fused + 0.3 * stages)


def test_distillation_draws_every_stage_to_the_fused_answer_and_the_fused_answer_to_none():
    z = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = torch.tensor([0.5, 1, -2])[:, None].expand(5, 3, 4)
    labels = torch.tensor([0, 1, 2, 3, 0])

    def divergence(z, weights=None, divisor=None, shown=slice(None)):
        output = InterflowOutput((w * z).sum(1)[shown], z[shown], w[shown], (), ())
        given = labels[shown], Recipe(), weights, divisor
        without = training_loss(output, *given)
        return training_loss(output, given[0], Recipe(distillation=0.5), *given[2:]) - without

    def teacher_and_pupils():
        """The same written out, in probabilities, of each image and stage."""
        taught = (w * z).mean(1, keepdim=True).detach().softmax(2)
        return 0.5 * (taught * (taught / (w * z).softmax(2)).log()).sum(2)

    torch.testing.assert_close(divergence(z), teacher_and_pupils().mean())
    expected = torch.autograd.grad(teacher_and_pupils().mean(), z)[0]
    torch.testing.assert_close(torch.autograd.grad(divergence(z), z)[0], expected)
    of_one_mind = torch.randn(5, 1, 4) / w
    torch.testing.assert_close(divergence(of_one_mind), torch.tensor(0.0), atol=1e-5, rtol=0)

    rare = torch.tensor([1.0, 1, 1, 7])
    of_images = teacher_and_pupils().mean(1)
    torch.testing.assert_close(divergence(z, rare), (rare[labels] * of_images).sum() / rare[labels].sum())
    parts = [divergence(z, divisor=torch.tensor(5.0), shown=shown) for shown in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), divergence(z))


def test_the_optimiser_gets_every_parameter_once_and_none_that_is_frozen():
    network = create_model("vgg16", width=0.05, neck="aff")
    backbone, all_of_it = set(network.backbone.parameters()), set(network.parameters())
    frozen = trained_groups(network, Recipe(freeze="backbone", init="weights.safetensors"), CPU)
    assert [set(group["params"]) for group in frozen] == [all_of_it - backbone]
    rest, slow = trained_groups(network, Recipe(backbone_lr=0.1), CPU)
    assert (set(rest["params"]), set(slow["params"])) == (all_of_it - backbone, backbone)
    assert (rest["factor"], slow["factor"]) == (1, 0.1)
    assert all(parameter.requires_grad for parameter in all_of_it)


def test_a_balanced_loss_counts_every_class_alike():
    """Of logits that say the same of every image of a class, it is the mean over the classes of their losses."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    per_class = torch.tensor([[2.0, 0, 0], [1, 0, 0], [0, 3, 0]])
    z = per_class[labels][:, None]
    output = InterflowOutput(z[:, 0], z, torch.ones_like(z), (), ())
    weights = class_weights(labels)
    assert float(weights @ labels.bincount().float()) == pytest.approx(100)
    expected = functional.cross_entropy(per_class, torch.arange(3))
    torch.testing.assert_close(training_loss(output, labels, Recipe(), weights), expected)
    assert training_loss(output, labels, Recipe()) != expected


@pytest.fixture(scope="module")
def data():
    return load_data(resolve_recipe("digits", {}))


def digits_network(recipe) -> Interflow:
    torch.manual_seed(0)
    return create_model("vgg16", method="S3", num_classes=10, in_channels=1, width=0.06, taps=[4, 13])


def trained(data, recipe, steps):
    network = digits_network(recipe)
    state = Step(network, data, recipe, steps=10, device=CPU)
    rows = draw_epoch(data.train.labels, data.size, recipe, 0)
    state.begin_epoch(rows, torch.full((21,), recipe.lr), 0)
    network.train()
    for step in range(steps):
        state.take(step)
    return network, state, rows


def test_steps_are_those_of_a_plain_loop(data):
    """Gather, augment, normalise, forward, backward, SGD: against the same written out with torch's own optimiser."""
    recipe = resolve_recipe("digits", {"flip": "0.5", "cutout": "5", "label_smoothing": "0.1", "lr": "0.02"})
    network, state, rows = trained(data, recipe, 3)

    plain = digits_network(recipe)
    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), 0.02, 0.9, weight_decay=5e-4, nesterov=True)
    normalize, right = Normalize(data.spec.mean, data.spec.std), 0
    for batch in rows.split(64)[:3]:
        draws = Draws(*batch.unbind(1))
        fill = torch.tensor([round(255 * data.spec.mean[0])], dtype=torch.uint8)
        output = plain(normalize(augment(data.train.images[draws.image], draws, recipe, fill)))
        labels = data.train.labels[draws.image]
        optimizer.zero_grad()
        training_loss(output, labels, recipe).backward()
        optimizer.step()
        right += int((output.logits.argmax(1) == labels).sum())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert state.totals[0] == 192
    assert state.totals[2] == right


def test_the_average_is_the_moving_average_of_the_weights_and_statistics(data):
    """Over an `ema` of half the 10 steps, each new value counts a fifth."""
    recipe = resolve_recipe("digits", {"ema": "0.5", "lr": "0.02"})
    expected = None
    for steps in range(4):
        network, state, _ = trained(data, recipe, steps)
        live = {name: tensor.clone() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
        if expected is None:
            expected = live
        else:
            expected = {name: 0.8 * expected[name] + 0.2 * value for name, value in live.items()}
    with state.averaged():
        for name, value in expected.items():
            torch.testing.assert_close(network.state_dict()[name], value, msg=name)
    for name, value in live.items():
        assert torch.equal(network.state_dict()[name], value), name
    assert not torch.equal(expected["attention.weight"], live["attention.weight"])


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(data):
    """To rounding, which a narrow network amplifies on the way back: the step as a whole, not each number of it."""
    recipe = resolve_recipe("digits", {"lr": "0.02"})
    begun, eager, compiled = (
        torch.nn.utils.parameters_to_vector(network.parameters()).detach()
        for network, _, _ in (
            trained(data, recipe, 0),
            trained(data, recipe, 1),
            trained(data, recipe.model_copy(update={"compile": True}), 1),
        )
    )
    assert (compiled - eager).norm() < 0.05 * (eager - begun).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_the_same_step(data):
    """As one CUDA graph, over whole and short batches and the turn of an epoch, against the same kernels one by one."""
    device, ends = torch.device("cuda"), []
    for graph in (True, False):
        recipe = resolve_recipe("digits", {"lr": "0.02", "cuda_graph": graph})
        network = digits_network(recipe).to(device)
        with torch.cuda.stream(torch.cuda.Stream()):
            state = Step(network, data.to(device), recipe, steps=42, device=device)
            network.train()
            for epoch in range(2):
                rows = draw_epoch(data.train.labels, data.size, recipe, epoch)
                state.begin_epoch(rows, torch.full((21,), recipe.lr / (1 + epoch)), 0)
                for step in range(21):
                    state.take(step)
            torch.cuda.synchronize()
        assert (state._graph is not None) == graph
        assert state.totals[0] == 2 * len(data.train)
        ends.append({name: tensor.cpu() for name, tensor in network.state_dict().items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=2e-2, atol=2e-3, msg=name)
