"""What is left with a finished run."""

import shutil
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from training.calibration import fused_nll
from training.checkpoint import load_network
from training.export import main as export
from training.finish import _samples, open_finished
from training.run import Run
from training.shorten import open_trained
from training.splits import Split
from training.train import main as train


class OnDevice(torch.Tensor):
    """As a tensor on a GPU, which numpy cannot read."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_samples_are_of_the_whole_split_also_where_the_images_lie_on_a_device():
    images = torch.arange(96, dtype=torch.uint8).reshape(96, 1, 1, 1)
    for lying in (images, images.as_subclass(OnDevice)):
        samples = _samples(SimpleNamespace(test=Split(lying, torch.zeros(96, dtype=torch.long))))
        np.testing.assert_array_equal(samples.ravel(), np.arange(20) * 5)


def finished_again(run, folder, **settings):
    """A copy of a run that was trained by a recipe of these settings, and killed before it was finished."""
    copy = Run(shutil.copytree(run, folder / "runs" / "digits"))
    copy.recipe.write_text(yaml.safe_dump(yaml.safe_load(copy.recipe.read_text()) | settings))
    copy.card.unlink()
    assert train(["--resume", str(copy.folder)]) == 0
    return copy


def test_stages_are_weighed_anew_where_the_recipe_says_so(trained_run, tmp_path):
    plain = open_trained(Run(trained_run))
    run = finished_again(trained_run, tmp_path, weigh_anew=True)
    assert run.checkpoint.read_bytes() == plain.run.checkpoint.read_bytes()  # so that it may be finished once more
    anew = open_trained(run, plain.data)
    assert (plain.card.method.weighed_anew, anew.card.method.weighed_anew) == (False, True)
    factors = np.divide(anew.card.branch_weights, plain.card.branch_weights)
    np.testing.assert_allclose(factors, factors[:, :1].repeat(10, axis=1), rtol=1e-5)  # one a stage
    assert (factors > 0).all()
    assert len({round(factor, 2) for factor in factors[:, 0]}) == 4
    nll = [fused_nll(of.held_out, of.card.temperature, of.card.power) for of in (anew, plain)]
    assert nll[0] < nll[1]
    np.testing.assert_array_equal(anew.test.branch_logits, plain.test.branch_logits)
    right = anew.test.contributions.sum(axis=1).argmax(axis=1) == anew.test.labels
    assert anew.card.metrics.accuracy == pytest.approx(right.mean())

    assert export(["--run", str(run.folder), "--out", str(tmp_path)]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "digits" / "1" / "model.onnx")
    logits, branch_logits = session.run(["logits", "branch_logits"], {"image": run.load_samples()})
    np.testing.assert_allclose(logits, (anew.card.branch_weights * branch_logits).sum(axis=1), rtol=1e-4, atol=1e-4)


def test_a_run_that_is_finished_twice_is_weighed_once(trained_run, tmp_path):
    run = finished_again(trained_run, tmp_path, weigh_anew=True)
    once = run.finished_card()
    run.card.unlink()
    assert train(["--resume", str(run.folder)]) == 0
    twice = run.finished_card()
    assert twice.branch_weights == once.branch_weights
    assert twice.provenance.weights_sha256 == once.provenance.weights_sha256


@pytest.mark.parametrize("settings", [{"method": "S0"}, {"val_fraction": 0.0}])
def test_weights_that_were_given_or_that_nothing_was_held_out_for_stay(settings, tmp_path):
    short = ["--width", "0.05", "--epochs", "1", "--weigh-anew", "--out", str(tmp_path / "run")]
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert train([*short, *options]) == 0
    card, network = open_finished(Run(tmp_path / "run"))
    assert not card.method.weighed_anew
    load_network(Run(tmp_path / "run").checkpoint, network)
    np.testing.assert_array_equal(card.branch_weights, network.attention.matrix().detach())
