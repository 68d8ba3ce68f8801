"""Training that starts from weights: what is loaded, what is frozen, how fast the rest moves, and going on later."""

import os
import re
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from model.contract import InterflowError, ModelCard
from training import step as step_module
from training.data import input_spec, load_data
from training.export import main as export
from training.recipe import load_recipe, resolve_recipe
from training.train import build_network, main

LIBRARY = [
    *("--recipe", "paper", "--data", "digits", "--image-size", "32", "--backbone", "timm/test_resnet"),
    *("--epochs", "2", "--lr", "0.05", "--val-fraction", "0.1", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as timm's hub has it: with the classifier for ImageNet, and filters for colours."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def frozen(weights, tmp_path_factory):
    """Folder of a finished run on a frozen backbone."""
    folder = tmp_path_factory.mktemp("runs") / "frozen"
    assert main([*LIBRARY, "--init", str(weights), "--freeze", "backbone", "--out", str(folder)]) == 0
    return folder


def network_at_the_start(folder):
    recipe = load_recipe(folder / "recipe.yaml")
    return build_network(recipe, 10, input_spec(recipe)).state_dict()


def saved_network(folder):
    tensors = load_file(folder / "checkpoint.safetensors")
    return {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}


def test_a_frozen_backbone_stays_byte_for_byte_and_all_else_learns(frozen):
    before, after = network_at_the_start(frozen), saved_network(frozen)
    assert before.keys() == after.keys()
    for name, value in before.items():  # running statistics and their counters, too
        assert torch.equal(value, after[name]) == name.startswith("backbone."), name
    tensors = load_file(frozen / "checkpoint.safetensors")
    assert not any(key.startswith("optimizer.backbone.") for key in tensors)
    assert any(key.startswith("optimizer.heads.") for key in tensors)


def test_a_neck_learns_on_a_frozen_backbone(weights, tmp_path):
    arguments = ["--init", str(weights), "--freeze", "backbone", "--neck", "aff", "--epochs", "1"]
    assert main([*LIBRARY, *arguments, "--precision", "bfloat16", "--out", str(tmp_path / "run")]) == 0
    before, after = network_at_the_start(tmp_path / "run"), saved_network(tmp_path / "run")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("backbone."), name


def test_the_input_is_what_the_weights_expect_to_the_end_of_the_path(frozen, tmp_path):
    recipe = load_recipe(frozen / "recipe.yaml")
    assert (recipe.mean, recipe.std) == ((0.5,), (0.5,))  # timm's for this network, of grey images
    card = ModelCard.from_json((frozen / "card.json").read_bytes(), "card")
    assert (card.input.mean, card.input.std) == ((0.5,), (0.5,))
    assert card.backbone.name == "timm/test_resnet"
    assert card.provenance.init == "model.safetensors"
    assert export(["--run", str(frozen), "--out", str(tmp_path / "exports")]) == 0
    exported = ModelCard.from_json((tmp_path / "exports" / "digits" / "1" / "model.json").read_bytes(), "card")
    assert exported.input == card.input


def test_a_mean_that_is_given_is_kept(weights, tmp_path):
    given = ["--init", str(weights), "--epochs", "1", "--mean", "0.25", "--std", "0.5"]
    assert main([*LIBRARY, *given, "--out", str(tmp_path / "run")]) == 0
    card = ModelCard.from_json((tmp_path / "run" / "card.json").read_bytes(), "card")
    assert (card.input.mean, card.input.std) == ((0.25,), (0.5,))


@pytest.mark.parametrize(
    "settings",
    [
        ["--freeze", "backbone"],
        ["--backbone-lr", "0.1"],
        ["--backbone-lr", "0.1", "--options", "drop_path_rate=0.5"],  # draws from torch's generator
    ],
    ids=" ".join,
)
def test_stopped_it_goes_on_without_the_file_and_ends_as_if_unbroken(settings, weights, frozen, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights.read_bytes())
    arguments = [*LIBRARY, "--init", str(file), *settings]
    unbroken = tmp_path / "unbroken"
    assert main([*arguments, "--out", str(unbroken)]) == 0

    whole, steps = step_module.Step.take, 0

    def interrupted(self, *where):
        nonlocal steps
        whole(self, *where)
        steps += 1
        if steps == 25:  # in the second epoch, which has 21
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(step_module.Step, "take", interrupted)
    broken = tmp_path / "broken"
    assert main([*arguments, "--out", str(broken)]) == 130
    file.unlink()
    assert main(["--resume", str(broken)]) == 0
    assert steps == 42
    assert (broken / "checkpoint.safetensors").read_bytes() == (unbroken / "checkpoint.safetensors").read_bytes()
    inputs = [ModelCard.from_json((f / "card.json").read_bytes(), "card").input for f in (broken, unbroken)]
    assert inputs[0] == inputs[1]


def test_killed_before_its_first_checkpoint_it_begins_with_the_file_again(weights, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(*_arguments):
        raise KilledError

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(step_module.Step, "take", killed)
        with pytest.raises(KilledError):
            main([*LIBRARY, "--init", str(weights), "--freeze", "backbone", "--out", str(folder)])
    assert not (folder / "checkpoint.safetensors").exists()
    assert main(["--resume", str(folder)]) == 0
    expected = load_file(weights)["layer1.0.conv1.weight"]
    assert torch.equal(saved_network(folder)["backbone.network.layer1.0.conv1.weight"], expected)


def test_a_tenth_of_the_rate_is_a_tenth_of_the_way(tmp_path):
    """One step on all images, without momentum: the backbone goes a tenth as far, all else as far as before."""
    settings = ["--data", "digits", "--width", "0.06", "--taps", "4", "13", "--device", "cpu", "--recipe", "paper"]
    settings += ["--image-size", "32", "--epochs", "1", "--momentum", "0", "--lr", "0.1", "--batch-size", "2000"]
    moved = {}
    for factor in ("1", "0.1"):
        folder = tmp_path / factor
        assert main([*settings, "--backbone-lr", factor, "--out", str(folder)]) == 0
        start, end = network_at_the_start(folder), saved_network(folder)
        moved[factor] = {name: end[name] - start[name] for name in start if start[name].is_floating_point()}
    for name, distance in moved["1"].items():
        if "running" in name or not name.startswith("backbone."):
            assert torch.equal(moved["0.1"][name], distance), name
        else:  # up to the rounding of a weight of about 1
            torch.testing.assert_close(10 * moved["0.1"][name], distance, atol=2e-6, rtol=1e-4)
    assert all(distance.any() for distance in moved["0.1"].values())


def test_a_runs_checkpoint_starts_another_on_the_images_own_mean(trained_run, tmp_path):
    settings = ["--epochs", "1", "--width", "0.1", "--freeze", "backbone"]
    checkpoint = trained_run / "checkpoint.safetensors"
    assert main([*settings, "--init", str(checkpoint), "--out", str(tmp_path / "run")]) == 0
    mine, theirs = saved_network(tmp_path / "run"), saved_network(trained_run)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith("backbone."))
    card = ModelCard.from_json((tmp_path / "run" / "card.json").read_bytes(), "card")
    data = load_data(resolve_recipe("digits", {}))
    assert (card.input.mean, card.input.std) == (data.spec.mean, data.spec.std)


@pytest.mark.parametrize(
    ("network", "stages"),
    [
        (["torchvision/squeezenet1_1", "--taps", "features.4", "3", "--depth", "3"],
         [("features.4", 2), ("features.7", 3)]),
        (["timm/test_vit", "--taps", "blocks.2", "6"], [("blocks.2", 3), ("blocks.5", 6)]),  # made for one size
    ],
)  # fmt: skip
def test_a_librarys_network_and_its_stages_pass_through_run_and_export(network, stages, tmp_path):
    settings = ["--no-shared-heads", "--epochs", "1", "--image-size", "48", "--channels", "3", "--lr", "0.001"]
    assert main([*LIBRARY, *settings, "--backbone", *network, "--out", str(tmp_path / "run")]) == 0
    assert export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "exports")]) == 0
    card = ModelCard.from_json((tmp_path / "exports" / "digits" / "1" / "model.json").read_bytes(), "card")
    assert [(stage.name, stage.depth) for stage in card.stages] == stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "backbone"], "a frozen backbone needs weights to start from: give --init"),
        (["--freeze", "heads"], "freeze is 'heads'"),
        (["--backbone-lr", "0"], "backbone_lr is '0'"),
        (["--init", "weights.pth"], r"weights\.pth: expected a \.safetensors file"),
        (["--init", "none.safetensors"], "No such file"),
        (["--mean", "0.5"], "mean and std are given together"),
        (["--mean", "0.5", "0.5", "--std", "1", "1"], "expected 1 of each, one per channel"),
        (["--std", "0", "--mean", "0"], "std is"),
        (["--backbone", "timm/inception_v3"], "does not take images of 32x32 pixels"),
        (["--backbone", "vgg16", "--init", "pretrained"], "vgg16 has no weights to download"),
    ],
)
def test_what_cannot_start_is_refused_before_the_images_are_read(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("training.train.load_data", lambda _recipe: pytest.fail("the images were read"))
    with pytest.raises(InterflowError) as refused:
        main([*LIBRARY, *arguments, "--out", str(tmp_path / "run")])
    assert re.search(message, str(refused.value))
    assert not (tmp_path / "run").exists()
