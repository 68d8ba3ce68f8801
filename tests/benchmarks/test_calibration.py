"""The calibration benchmark: one command from a run to table, numbers and picture, which agree with the run's card."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.calibration import main
from benchmarks.doubt_measures import Outputs, measures
from model.contract import InterflowError, ModelCard
from training.calibration import Predictions
from training.train import main as train


@pytest.fixture(scope="module")
def foreign(photographs, tmp_path_factory):
    """Pieces of photographs: none is a digit."""
    folder = tmp_path_factory.mktemp("foreign") / "photographs"
    for name, path in list(photographs.items())[:3]:
        (folder / path.stem).mkdir(parents=True)
        with Image.open(path) as photograph:
            for row in range(4):
                for column in range(4):
                    box = (64 * column, 64 * row, 64 * column + 64, 64 * row + 64)
                    photograph.crop(box).save(folder / path.stem / f"{row}{column}-{name}")
    return folder


@pytest.fixture(scope="module")
def written(trained_run, foreign, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    picture = folder / "pictures" / "calibration.png"
    assert (
        main(["--run", str(trained_run), "--foreign", str(foreign), "--out", str(folder), "--picture", str(picture)])
        == 0
    )
    return folder


def test_the_numbers_are_those_of_the_runs_card(written, trained_run, foreign):
    found = json.loads((written / "calibration.json").read_text())
    card = ModelCard.from_json((trained_run / "card.json").read_bytes(), "card")
    fused, metrics = found["fused"], card.metrics
    assert (fused["temperature"], fused["power"]) == pytest.approx((card.temperature, card.power), rel=1e-3)
    after = fused["after"]
    assert (after["ece"], after["ece_adaptive"], after["nll"]) == pytest.approx(
        (metrics.ece, metrics.ece_adaptive, metrics.nll), abs=1e-4
    )
    assert [row["after"]["ece"] for row in found["stages"]] == pytest.approx(metrics.branch_ece, abs=1e-4)
    assert [row["after"]["nll"] for row in found["stages"]] == pytest.approx(metrics.branch_nll, abs=1e-4)
    assert found["conditions"]["images"] == {
        "held out": pytest.approx(144, abs=10), "test": metrics.images, str(foreign): 48,
    }  # fmt: skip
    for row in found["fits"]:  # better than knowing nothing, where they were not fitted, too
        assert max(row["held_out_nll"], row["test"]["nll"]) < np.log(len(card.classes)), row["name"]
    areas = found["doubt"]["measures"]["1 - confidence"]
    assert list(areas) == ["wrong, held out", "wrong, test", str(foreign)]
    assert areas["wrong, test"] > 0.6  # it has learnt something in four epochs


def test_page_and_picture_show_them(written):
    found, page = json.loads((written / "calibration.json").read_text()), (written / "calibration.md").read_text()
    assert f"{100 * found['fused']['after']['ece']:.2f}" in page
    for name in [row["name"] for row in found["stages"] + found["fits"]] + list(found["doubt"]["measures"]):
        assert f"{name} " in page
    with Image.open(written / "pictures" / "calibration.png") as picture:
        assert len(set(picture.convert("L").resize((200, 60)).tobytes())) > 20


def test_a_run_that_held_nothing_out_is_refused(tmp_path):
    run = tmp_path / "run"
    assert train(["--epochs", "1", "--width", "0.05", "--val-fraction", "0", "--out", str(run)]) == 0
    with pytest.raises(InterflowError, match="--val-fraction"):
        main(["--run", str(run), "--out", str(tmp_path), "--picture", str(tmp_path / "x.png")])


def test_every_measure_rises_with_doubt():
    """One image that all stages are sure of, the same one half as clear, and one that nothing speaks in."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    evidence = 4 * np.eye(4)[labels][:, None] + random.normal(0, 1.5, (400, 3, 4))
    images = np.eye(4)[:1][:, None] * np.array([5.0, 2.5, 0.0])[:, None, None] * np.ones((3, 3, 4))

    def outputs(logits, labels):
        powers = np.exp(logits)
        fused = np.exp(logits.sum(axis=1))
        beliefs = powers / powers.sum(axis=2, keepdims=True)
        predictions = Predictions(logits, np.ones((3, 4)), labels)
        return Outputs(predictions, fused / fused.sum(axis=1, keepdims=True), beliefs)

    found = measures(
        {"held out": outputs(evidence, labels), "test": outputs(images, np.zeros(3, int))}, (0.0, 1.0, 1.0)
    )
    for name, by_set in found.items():
        if name not in ("disagreement of the stages", "five features, logistic", "distance of the stages' evidence"):
            assert (np.diff(by_set["test"]) > 0).all(), name
    assert found["disagreement of the stages"]["test"] == pytest.approx(0, abs=1e-12)  # all stages say the same
    assert found["doubt"]["held out"].shape == (400,)
