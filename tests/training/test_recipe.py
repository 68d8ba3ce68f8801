"""Recipes: YAML, then the data set's part, then the command line; nothing unknown passes."""

import argparse

import pytest
import yaml

from model.contract import InterflowError
from training.recipe import RECIPES, SEVERAL, Recipe, add_recipe_options, load_recipe, resolve_recipe


def test_the_papers_recipe_is_the_papers():
    cifar, mnist = (resolve_recipe("paper", {"data": data}) for data in ("cifar10", "mnist"))
    assert (cifar.epochs, mnist.epochs) == (100, 40)
    assert (cifar.crop_padding, cifar.flip) == (4, 0.5)
    assert (mnist.crop_padding, mnist.flip) == (0, 0)
    for recipe in (cifar, mnist):
        assert (recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay) == (64, 1e-3, 0.95, 5e-4)
        assert (recipe.schedule, recipe.drop_epochs, recipe.nesterov) == ("step", 20, False)
        assert (recipe.val_fraction, recipe.auxiliary_loss, recipe.width) == (0, 0, 1)


def test_without_a_name_digits_get_theirs_and_all_else_the_papers():
    assert resolve_recipe(None, {}) == resolve_recipe("digits", {})
    assert resolve_recipe(None, {"data": "cifar100"}) == resolve_recipe("paper", {"data": "cifar100"})


def test_the_command_line_wins_over_the_sets_part_and_that_over_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nlr: 0.5\nwidth: 0.5\nby_data: {mnist: {lr: 0.25, width: 0.25}}\n")
    recipe = resolve_recipe(str(file), {"data": "mnist", "width": "0.125"})
    assert (recipe.epochs, recipe.lr, recipe.width) == (3, 0.25, 0.125)
    assert resolve_recipe(str(file), {"data": "kmnist"}).lr == 0.5


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    recipe = resolve_recipe("digits", {"seed": "7", "taps": ["7", "13"], "channels": "3"})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert (recipe.taps, recipe.channels) == ((7, 13), 3)


def test_every_setting_is_an_option_of_the_command_line():
    parser = argparse.ArgumentParser()
    add_recipe_options(parser)
    assert vars(parser.parse_args([])) == {}
    arguments, expected = [], {}
    for name, field in Recipe.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            arguments.append(flag)
            expected[name] = True
        else:
            arguments += [flag, "1"]
            expected[name] = ["1"] if name in SEVERAL else "1"
    assert vars(parser.parse_args(arguments)) == expected


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_recipes_hold_for_every_set_they_name(path):
    for data in [None, *yaml.safe_load(path.read_text()).get("by_data", {})]:
        assert resolve_recipe(path.stem, {"data": data} if data else {}).data == (data or "digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"lr": "nan"}, "lr is 'nan'"),
        ({"mean": ["33"], "std": ["10"]}, "mean is '33'.*less than or equal to 1"),
        ({"mean": ["-0.1"], "std": ["10"]}, "mean is '-0.1'"),
        ({"mean": ["nan"], "std": ["10"]}, "mean is 'nan'"),
        ({"mean": ["0.5"], "std": ["0"]}, "std is '0'"),
        ({"epochs": "0"}, "epochs is '0'"),
        ({"batch_size": "1"}, "batch_size"),
        ({"resize": "zoom"}, "resize is 'zoom'.*crop"),
        ({"channels": "2"}, "channels"),
        ({"val_fraction": "1"}, "val_fraction"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"colour": "red"}, "no setting 'colour'"),
        ({"taps": [7.5]}, "taps"),
        ({"options": ["stages"]}, "options.*name=value"),
        ({"options": ["stages=[1"]}, "options.*YAML"),
    ],
)
def test_a_bad_setting_is_named(options, message):
    with pytest.raises(InterflowError, match=message):
        resolve_recipe("digits", options)


@pytest.mark.parametrize("content", ["[1, 2]", "a: b: c", "just text", "\x00", "by_data: 3", "by_data: {mnist: 1}"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(InterflowError, match="recipe"):
        resolve_recipe(str(file), {})
    with pytest.raises(InterflowError, match="not one of digits, fast, paper"):
        resolve_recipe("papre", {})
