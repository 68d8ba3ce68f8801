"""How likely an answer is wrong, from its confidence and from how undecided the stages are."""

import numpy as np
import torch
from torch.nn import functional

from model.contract import DoubtInfo
from model.explain import doubts, fused_confidences, readings, reasons_to_doubt
from training.calibration import Predictions, minimize

WEIGHTS = np.linspace(0, 1, 21)
"""Of the stages' indecision beside the confidence, both in units of their deviation."""
AUROC_SPENT = 0.001
"""What that weight may cost in finding wrong answers among held-out images."""
LEAST_WRONG = 20
"""Held-out answers that must be wrong, for anything to be learnt from them."""
LEAST_DEVIATION = 1e-6
"""Of a reason to doubt that says anything."""
DOUBTED = 0.1
"""Share of the held-out answers that the threshold parts from the others."""


def fit_doubt(
    held_out: Predictions, test: Predictions, reading_scales: np.ndarray, temperature: float, power: float
) -> DoubtInfo | None:
    """Coefficients and a threshold from held-out images, measured on test; None where there is nothing to learn from.

    Confidence is hard to beat at finding wrong answers. At finding images of no class that the network knows, the
    stages' indecision is better, but nothing that is held out tells how much it should count there. So it counts as
    much as it can without finding fewer wrong answers: the largest of `WEIGHTS` that costs at most `AUROC_SPENT` of the
    confidence's own AUROC. What results is brought to a probability by Platt's scaling (1999). The rule is ours.

    Args:
        held_out, test: outputs of the same network.
        reading_scales: (B, K), fitted.
        temperature, power: of the fused confidence, fitted.
    """
    wrong, reasons = _wrong(held_out), reasons_to_doubt(*_beliefs(held_out, reading_scales, temperature, power))
    deviations = reasons.std(axis=0)
    if wrong.sum() < LEAST_WRONG or wrong.all() or deviations.min() < LEAST_DEVIATION:
        return None
    scores = [reasons / deviations @ (1, weight) for weight in WEIGHTS]
    areas = np.array([auroc(score, wrong) for score in scores])
    if areas[0] <= 0.5:  # nor does the confidence tell anything
        return None
    chosen = np.flatnonzero(areas >= areas[0] - AUROC_SPENT)[-1]
    weight, (slope, bias) = WEIGHTS[chosen], _platt(scores[chosen], wrong)
    of_confidence, of_stages = (slope * np.array([1, weight]) / deviations).tolist()
    coefficients = bias, of_confidence, of_stages
    of_held_out, of_test = (
        doubts(*_beliefs(part, reading_scales, temperature, power), coefficients) for part in (held_out, test)
    )
    threshold = float(np.quantile(of_held_out, 1 - DOUBTED))
    doubted, wrong = of_test > threshold, _wrong(test)
    return DoubtInfo(
        coefficients=coefficients,
        threshold=threshold,
        share=float(doubted.mean()),
        share_of_wrong=float(doubted[wrong].mean()) if wrong.any() else 0.0,
    )


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half; (M,) each, of both kinds."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - takes a second, and only this needs it

    return float(roc_auc_score(positive, scores))


def _beliefs(
    predictions: Predictions, reading_scales: np.ndarray, temperature: float, power: float
) -> tuple[np.ndarray, np.ndarray]:
    fused = fused_confidences(predictions.logits, temperature, power)
    return fused, readings(predictions.branch_logits, reading_scales)


def _wrong(predictions: Predictions) -> np.ndarray:
    return predictions.logits.argmax(axis=1) != predictions.labels


def _platt(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Slope and bias that make sigmoid(slope * score + bias) the chance of a positive, by Platt's targets."""
    middle, deviation = scores.mean(), scores.std()
    unit = torch.from_numpy((scores - middle) / deviation)
    count = int(positive.sum())
    targets = torch.from_numpy(np.where(positive, (count + 1) / (count + 2), 1 / (len(positive) - count + 2)))
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    minimize(lambda: functional.binary_cross_entropy_with_logits(line[0] * unit + line[1], targets), line)
    steepness, height = line.detach().tolist()
    slope = float(steepness / deviation)
    return slope, float(height - slope * middle)
