"""Is a confidence a probability, and what is worth doubting? `python benchmarks/calibration.py --help`.

    uv run --extra train python benchmarks/calibration.py --run runs/<run> --foreign data/cifar100/test data/mnist/test

On a trained run with its own data; all fits are made on its held-out images and measured on test:

- calibration of the fused answer and of every stage's reading, before and after: NLL and ECE (15 bins of equal width,
  and of equally many images);
- the fits that were tried for the fused confidence, none of which changes the ranking of an image's classes, compared
  by cross-validation on held-out images;
- measures of doubt: AUROC for finding wrong answers, and images of other data sets, of which no class is the network's.
  Foreign images enter no fit.

It takes some four minutes on a CPU thread of a busy machine.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize
from tqdm import tqdm

from benchmarks.calibration_report import draw, page
from benchmarks.doubt_measures import FOLDS, SEED, Outputs, Scores, ahead, areas, entropy, lead, measures
from model.contract import InterflowError
from model.explain import fused_confidences, readings, softmax
from training import calibration, cli
from training.calibration import Predictions
from training.data import load_data
from training.doubt import fit_doubt
from training.files import replacing, write_text
from training.finish import open_finished
from training.loop import predict
from training.recipe import load_recipe
from training.run import Run, newest_finished

RESULTS = Path("benchmarks/results")
PICTURE = Path("docs/calibration.png")


# Fits of the fused confidence: parameters, all 0 for a plain softmax, and logits (M, K) to probabilities.

Fit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _mixture(at: np.ndarray, logits: np.ndarray) -> np.ndarray:
    uniform = 0.1 * min(at[1] ** 2, 1)
    return (1 - uniform) * softmax(logits * np.exp(at[0])) + uniform / logits.shape[1]


FITS: dict[str, tuple[int, Fit]] = {
    "temperature": (1, lambda at, logits: softmax(logits * np.exp(at[0]))),
    "temperature, mixed with uniform": (2, _mixture),
    "temperature by the image's lead": (
        2,
        lambda at, logits: softmax(logits * np.exp(at[0] + at[1] * np.log1p(lead(logits)))[:, None]),
    ),
    "temperature by the image's entropy": (
        2,
        lambda at, logits: softmax(logits * np.exp(at[0] + at[1] * entropy(softmax(logits)))[:, None]),
    ),
    "temperature and power": (
        2,  # without the prior that few images would need
        lambda at, logits: fused_confidences(logits, np.exp(-at[0]), np.exp(at[1].clip(-1, 1))),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the table, its numbers and the picture."""
    parser = argparse.ArgumentParser(description="Calibration and doubt of a run, on its own test images and others.")
    parser.add_argument("--run", type=Path, help="default: the newest finished one")
    parser.add_argument(
        "--foreign", type=Path, nargs="*", default=[], help="folders of class folders: images of other classes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of calibration.md and calibration.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)

    found, scores = measure(Run(options.run) if options.run else newest_finished(), options.foreign)
    for folder in (options.out, options.picture.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "calibration.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    with replacing(options.picture) as temporary:
        draw(found, scores, temporary)
    text = page(found)
    write_text(options.out / "calibration.md", text)
    print(text)
    return 0


def measure(run: Run, foreign: list[Path]) -> tuple[dict[str, Any], Scores]:
    """All numbers, as JSON has them; and each measure of doubt by image, for the picture.

    Raises:
        InterflowError: no finished run, nothing was held out, or as `load_data`.
    """
    card, network = open_finished(run)
    recipe = load_recipe(run.recipe)
    data = load_data(recipe)
    if data.val is None:
        raise InterflowError(f"{run.folder}: nothing was held out to fit on; train a run with --val-fraction 0.1.")
    with tqdm(total=2 + len(foreign), desc="predicting", unit="set", disable=None) as bar:
        sets = {}
        for name, split in (("held out", data.val), ("test", data.test)):
            sets[name] = predict(network, data, split, recipe)
            bar.update()
        for folder in foreign:
            other = load_data(
                recipe.model_copy(
                    update={
                        "data": str(folder),
                        "image_size": card.input.height,
                        "channels": card.input.channels,
                        "mean": card.input.mean,
                        "std": card.input.std,
                        "val_fraction": 0.0,
                    }
                )
            )
            # an undivided folder was divided: all of it counts
            parts = [predict(network, other, split, recipe) for split in (other.train, other.test)]
            sets[str(folder)] = Predictions(
                np.concatenate([part.branch_logits for part in parts]),
                parts[0].branch_weights,
                np.concatenate([part.labels for part in parts]),
            )
            bar.update()

    held_out, test = sets["held out"], sets["test"]
    scales = calibration.fit_reading_scales(held_out, per_class=card.method.attention == "class")
    temperature, power = calibration.fit_confidence(held_out)
    outputs = {
        name: Outputs(
            part,
            fused_confidences(part.logits, temperature, power),
            readings(part.branch_logits, scales),
        )
        for name, part in sets.items()
    }
    doubt = fit_doubt(held_out, test, scales, temperature, power)
    scores = measures(outputs, doubt.coefficients if doubt else None)
    found = {
        "conditions": {
            "run": str(run.folder),
            "model": f"{card.name}, {card.backbone.name} {card.method.name}, width {card.backbone.width:g}",
            "weights_sha256": card.provenance.weights_sha256,
            "images": {name: len(part.labels) for name, part in sets.items()},
            "accuracy": calibration.fused_accuracy(test),
            "label_smoothing": recipe.label_smoothing,
        },
        "fused": {
            "temperature": temperature,
            "power": power,
            "before": _figures(softmax(test.logits), test.labels),
            "after": _figures(outputs["test"].fused, test.labels),
            "ece_by_chance": _ece_by_chance(outputs["test"].fused),
            "reliability": {
                "before": _bins(softmax(test.logits), test.labels),
                "temperature": _bins(softmax(test.logits / calibration.fit_temperature(held_out)), test.labels),
                "after": _bins(outputs["test"].fused, test.labels),
            },
        },
        "stages": _stages(held_out, test, scales, [stage.name for stage in card.stages]),
        "fits": [_fit(name, held_out, test) for name in FITS],
        "doubt": {
            "fitted": doubt.model_dump(mode="json") if doubt else None,
            "figures": _doubt_figures(outputs, scores["doubt"]) if doubt else None,
            "measures": {name: areas(outputs, by_set) for name, by_set in scores.items()},
            "ahead": ahead(outputs, scores["doubt"], scores["1 - confidence"]) if doubt else None,
            "beyond_threshold": {
                name: float((by_image > doubt.threshold).mean()) for name, by_image in scores["doubt"].items()
            }
            if doubt
            else None,
        },
    }
    wrong = outputs["test"].wrong
    for by_set in scores.values():
        by_set["wrong answers"] = by_set["test"][wrong]
    return found, scores


def _figures(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "ece": calibration.ece(probabilities, labels),
        "ece_adaptive": calibration.adaptive_ece(probabilities, labels),
        "nll": _nll(probabilities, labels),
    }


def _bins(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Of a reliability diagram with equally many images in each."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    return [
        {"confidence": float(confidence[rows].mean()), "accuracy": float(right[rows].mean())}
        for rows in np.array_split(np.argsort(confidence, kind="stable"), calibration.ECE_BINS)
    ]


def _ece_by_chance(probabilities: np.ndarray) -> float:
    """Mean ECE where labels are drawn from these very probabilities: what calibrated ones have in so few images."""
    random = np.random.default_rng(SEED)
    drawn = ((probabilities.cumsum(axis=1) > random.random((len(probabilities), 1))).argmax(axis=1) for _ in range(20))
    return float(np.mean([calibration.ece(probabilities, labels) for labels in drawn]))


def _stages(held_out: Predictions, test: Predictions, scales: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    before, after = softmax(test.contributions), readings(test.branch_logits, scales)
    accuracy = calibration.branch_accuracy(test, scales)
    rows = []
    for stage, name in enumerate(names):
        # the reading with a power of its own, as the fused confidence has one
        alone, alone_on_test = (
            Predictions((scales * part.branch_logits)[:, [stage]], np.ones((1, scales.shape[1])), part.labels)
            for part in (held_out, test)
        )
        with_power = fused_confidences(alone_on_test.logits, *calibration.fit_confidence(alone))
        rows.append(
            {
                "name": name,
                "accuracy": accuracy[stage],
                "before": _figures(before[:, stage], test.labels),
                "after": _figures(after[:, stage], test.labels),
                "with_power": _figures(with_power, test.labels),
                "reliability": {
                    "before": _bins(before[:, stage], test.labels),
                    "after": _bins(after[:, stage], test.labels),
                },
            }
        )
    return rows


def _fit(name: str, held_out: Predictions, test: Predictions) -> dict[str, Any]:
    """One of `FITS`, by its NLL over folds of the held-out images, and on test fitted on all of these."""
    parameters, probabilities = FITS[name]

    def fitted(rows: np.ndarray) -> np.ndarray:
        def loss(at: np.ndarray) -> float:
            return _nll(probabilities(at, held_out.logits[rows]), held_out.labels[rows])

        options = {"maxiter": 200, "xatol": 1e-4, "fatol": 1e-7, "initial_simplex": _simplex(parameters)}
        return minimize(loss, np.zeros(parameters), method="Nelder-Mead", options=options).x

    folds = np.random.default_rng(SEED).permutation(len(held_out.labels)) % FOLDS
    across = np.mean(
        [
            _nll(
                probabilities(fitted(np.flatnonzero(folds != fold)), held_out.logits[folds == fold]),
                held_out.labels[folds == fold],
            )
            for fold in range(FOLDS)
        ]
    )
    on_test = probabilities(fitted(np.arange(len(folds))), test.logits)
    return {"name": name, "held_out_nll": float(across), "test": _figures(on_test, test.labels)}


def _nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean())


def _simplex(parameters: int) -> np.ndarray:
    return np.concatenate([np.zeros((1, parameters)), 0.3 * np.eye(parameters)])


def _doubt_figures(outputs: dict[str, Outputs], doubt: dict[str, np.ndarray]) -> dict[str, float]:
    """How well doubt is a probability, on test: mean, share of wrong answers, ECE in bins of equal width and images."""
    wrong, by_image = outputs["test"].wrong, doubt["test"]
    rows = np.minimum((by_image * calibration.ECE_BINS).astype(int), calibration.ECE_BINS - 1)
    gaps = np.abs(np.bincount(rows, wrong - by_image))
    adaptive = np.array_split(np.argsort(by_image, kind="stable"), calibration.ECE_BINS)
    return {
        "mean": float(by_image.mean()),
        "wrong": float(wrong.mean()),
        "ece": float(gaps.sum() / len(wrong)),
        "ece_adaptive": float(sum(abs((wrong - by_image)[rows].sum()) for rows in adaptive) / len(wrong)),
    }


if __name__ == "__main__":
    cli.run(main)
