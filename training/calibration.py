"""What the card says beside the weights: how readings and confidences are scaled, importance, metrics.

All from the outputs of one pass over a data set, with the functions that the server uses (`model/explain.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.explain import below_highest, contributions, fused_confidences, readings, shares

ECE_BINS = 15

FACTOR_DEVIATION = 0.5
"""Of the normal prior on the logarithms of the stages' factors: where few images say otherwise, all are alike."""

POWER_DEVIATION = 0.5
"""Of the normal prior on its logarithm: where few images say otherwise, the power stays near 1."""


@dataclass(frozen=True)
class Predictions:
    """Outputs of a network over a data set of M images: B branches, K classes.

    Attributes:
        branch_logits: (M, B, K).
        branch_weights: (B, K).
        labels: (M,) class indices.
    """

    branch_logits: np.ndarray
    branch_weights: np.ndarray
    labels: np.ndarray

    @property
    def contributions(self) -> np.ndarray:
        """(M, B, K), summing over the branches to the fused logits."""
        return contributions(self.branch_logits, self.branch_weights)

    @property
    def logits(self) -> np.ndarray:
        """Fused, (M, K)."""
        return self.contributions.sum(axis=1)


def fit_stage_factors(predictions: Predictions) -> np.ndarray:
    """Positive factors of the stages' attention weights under which the fused logits are likeliest; (B,).

    Training finds the weights on images that it shows the branches, too, of which each is surer than of others, and not
    all by as much; and the weights of a network that is cut were found for a longer sum. So B numbers are fitted anew,
    on images that no branch was trained on, under Platt's targets (`_targets`) and a prior that draws the factors to
    one another. What a stage says stays as it was, and so does which of its classes count more. This is ours.

    Args:
        predictions: of data that the network was not trained on, where there is any.

    Returns:
        The factors; all 1 where the search runs away.
    """
    summands = torch.from_numpy(predictions.contributions / fit_temperature(predictions)).double()
    targets = _targets(predictions.labels, summands.shape[2])
    logarithms = torch.zeros(summands.shape[1], dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        prior = (logarithms / FACTOR_DEVIATION).square().sum() / (2 * len(summands))
        return functional.cross_entropy(torch.einsum("b,mbk->mk", logarithms.exp(), summands), targets) + prior

    minimize(loss, logarithms)
    factors = logarithms.detach().exp()
    usable = bool(factors.isfinite().all() and (factors > 0).all())
    return factors.numpy() if usable else np.ones(len(factors))


def weigh_anew(held_out: Predictions, test: Predictions) -> tuple[Predictions, Predictions]:
    """Both, with each stage's attention weights times the factor that suits the held-out images."""
    weights = held_out.branch_weights
    weights = weights * fit_stage_factors(held_out)[:, np.newaxis].astype(weights.dtype)
    return replace(held_out, branch_weights=weights), replace(test, branch_weights=weights)


def fit_reading_scales(predictions: Predictions, per_class: bool) -> np.ndarray:
    """Signed scales a_i under which softmax(a_i * z_i) is each stage's calibrated belief.

    They minimise the negative log-likelihood under Platt's targets (`_targets`), a convex problem, starting at the
    attention weights; the result does not change when (w, z) is flipped or rescaled.

    Args:
        predictions: of data that the network was not trained on, where there is any.
        per_class: one scale per branch and class (as the weights of S3, S4, S8, S9), else one per branch.

    Returns:
        (B, K); equal along a row unless `per_class`. Logits that never vary keep their weight as scale.
    """
    scales = predictions.branch_weights.astype(np.float64).copy()
    for branch, weight in enumerate(predictions.branch_weights):
        start = weight if per_class else weight[:1]
        scales[branch] = _fit_scale(predictions.branch_logits[:, branch], predictions.labels, start)
    return scales


def fit_temperature(predictions: Predictions) -> float:
    """T under which softmax(logits / T) is calibrated; positive, so it never changes the ranking.

    A network no better than chance has no such T: 1 is returned.
    """
    logits = predictions.logits
    scale = float(_fit_scale(logits, predictions.labels, np.ones(1))[0])
    return 1 / scale if scale * logits.std() > 1e-3 else 1.0


def fit_confidence(predictions: Predictions) -> tuple[float, float]:
    """Temperature and power under which `fused_confidences` are calibrated; they never change the ranking.

    The most likely ones under Platt's targets, as in `fit_reading_scales`, and a prior that draws the power to 1, the
    plain temperature. A network no better than chance gets 1 and 1; one whose gaps teach nothing of the power, so that
    the search runs away, its plain temperature and 1.
    """
    unit = fit_temperature(predictions)
    gaps = torch.from_numpy(-below_highest(predictions.logits, unit, 1))
    targets = _targets(predictions.labels, gaps.shape[1])
    if _fit_scale(-gaps.numpy(), predictions.labels, np.ones(1))[0] * float(gaps.std()) <= 1e-3:
        return 1.0, 1.0
    logarithms = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # of 1 / temperature, in units, and of power

    def loss() -> Tensor:
        factor, power = logarithms.exp()
        prior = (logarithms[1] / POWER_DEVIATION).square() / (2 * len(gaps))
        powers = factor**power * gaps**power  # apart, as (factor * 0) ** power has no slope where the power is below 1
        return functional.cross_entropy(-powers, targets) + prior

    minimize(loss, logarithms)
    factor, power = logarithms.detach().exp().tolist()
    if not (0 < factor < inf and 0 < power < inf):  # the search ran away
        return unit, 1.0
    return unit / factor, power


def importance(predictions: Predictions) -> np.ndarray:
    """Mean share of each stage in the network's answers, (B,), summing to 1."""
    return shares(predictions.contributions, predictions.logits.argmax(axis=1)).mean(axis=0)


def fused_accuracy(predictions: Predictions) -> float:
    """Share of images whose fused answer is right."""
    return float((predictions.logits.argmax(axis=1) == predictions.labels).mean())


def branch_accuracy(predictions: Predictions, reading_scales: np.ndarray) -> list[float]:
    """Share of images that each stage's reading gets right, B values."""
    answers = (reading_scales * predictions.branch_logits).argmax(axis=2)
    return [float(value) for value in (answers == predictions.labels[:, None]).mean(axis=0)]


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts of fused answers, (K, K): a row per true class, a column per answer."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # noqa: PLC0415 - as in `ece`

    return multiclass_confusion_matrix(*_answers(predictions)).numpy()


def class_recall(confusion_counts: np.ndarray) -> np.ndarray:
    """Share of each class's images whose fused answer is right, (K,); every class has some. (K, K) as `confusion`."""
    return confusion_counts.diagonal() / confusion_counts.sum(axis=1)


def macro_f1(predictions: Predictions) -> float:
    """Mean over the classes of 2 right / (images + answers of the class): a class never answered counts as 0."""
    from torchmetrics.functional.classification import multiclass_f1_score  # noqa: PLC0415 - as in `ece`

    # the mean is ours: torchmetrics sums in float32, to a little over 1 where all is right
    return float(multiclass_f1_score(*_answers(predictions), average="none").double().mean())


def fused_auroc(predictions: Predictions, temperature: float, power: float = 1) -> float:
    """Mean over the classes of the AUROC of their fused confidence, each against the rest; every class has images.

    With two classes, the AUROC of either. With more, temperature and power matter a little: they change how the
    confidences of one class in different images compare.
    """
    from torchmetrics.functional.classification import multiclass_auroc  # noqa: PLC0415 - as in `ece`

    confidence = torch.from_numpy(fused_confidences(predictions.logits, temperature, power))
    areas = multiclass_auroc(confidence, torch.from_numpy(predictions.labels), confidence.shape[1], average="none")
    return float(areas.double().clamp(max=1).mean())  # float32 steps of the curves, too


def held_out_figures(predictions: Predictions) -> dict[str, float]:
    """What an epoch's row says of held-out images beside the stages: val_accuracy, val_macro_f1 and val_auroc.

    Cheap enough for every epoch; AUROC is that at temperature 1, which is fitted only at the end.
    """
    return {
        "val_accuracy": fused_accuracy(predictions),
        "val_macro_f1": macro_f1(predictions),
        "val_auroc": fused_auroc(predictions, temperature=1.0),
    }


def fused_ece(predictions: Predictions, temperature: float, power: float = 1) -> float:
    """Expected calibration error of the fused confidence, 15 bins of equal width."""
    return ece(fused_confidences(predictions.logits, temperature, power), predictions.labels)


def branch_ece(predictions: Predictions, reading_scales: np.ndarray) -> list[float]:
    """Expected calibration error of each stage's reading, B values."""
    beliefs = readings(predictions.branch_logits, reading_scales)
    return [ece(beliefs[:, branch], predictions.labels) for branch in range(beliefs.shape[1])]


def fused_nll(predictions: Predictions, temperature: float, power: float = 1) -> float:
    """Mean negative log-likelihood of the labels under the fused confidences, in nats."""
    return nll(below_highest(predictions.logits, temperature, power), predictions.labels)


def branch_nll(predictions: Predictions, reading_scales: np.ndarray) -> list[float]:
    """Mean negative log-likelihood of the labels under each stage's reading, in nats, B values."""
    scaled = reading_scales * predictions.branch_logits
    return [nll(scaled[:, branch], predictions.labels) for branch in range(scaled.shape[1])]


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels (M,) under softmax(logits), (M, K), in nats."""
    return float(functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)))


def _answers(predictions: Predictions) -> tuple[Tensor, Tensor, int]:
    """Fused answers (M,), labels (M,) and K: what torchmetrics counts with."""
    logits = predictions.logits
    return torch.from_numpy(logits.argmax(axis=1)), torch.from_numpy(predictions.labels), logits.shape[1]


def ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error, 15 bins of equal width. (M, K) probabilities, (M,) labels."""
    # takes seconds to import, which are not for a run that refuses its data
    from torchmetrics.functional.classification import multiclass_calibration_error  # noqa: PLC0415

    error = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels), probabilities.shape[1], n_bins=ECE_BINS
    )
    return float(error)


def adaptive_ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error with bins that hold the same number of images each, 15 of them."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.array_split(np.argsort(confidence, kind="stable"), ECE_BINS)
    return float(sum(abs(right[rows].sum() - confidence[rows].sum()) for rows in bins) / len(labels))


def _fit_scale(logits: np.ndarray, labels: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Scale, (1,) or (K,), that makes softmax(scale * logits) most likely; logits (M, K)."""
    centred = torch.from_numpy(logits - logits.mean(axis=1, keepdims=True) if len(start) == 1 else logits).double()
    # Solved for logits of unit size: a small weight on large logits is as well conditioned as any.
    size = centred.square().mean(dim=None if len(start) == 1 else 0).sqrt()
    varies = size > 0
    unit = centred / size.where(varies, torch.ones_like(size))
    targets = _targets(labels, logits.shape[1])
    scale: Tensor = (torch.from_numpy(start).double() * size).requires_grad_()
    minimize(lambda: functional.cross_entropy(unit * scale, targets), scale)
    return torch.where(varies, scale.detach() / size, torch.from_numpy(start).double()).numpy()


def _targets(labels: np.ndarray, classes: int) -> Tensor:
    """Platt's (1999), (M, K): M images in M bear their label, so the next does with (M + 1) / (M + 2).

    Without that, logits that get every image right would be most likely at an infinite scale. This is ours.
    """
    smoothing = 1 / (len(labels) + 2)
    targets = torch.full((len(labels), classes), smoothing / (classes - 1), dtype=torch.float64)
    targets[torch.arange(len(labels)), torch.from_numpy(labels)] = 1 - smoothing
    return targets


def minimize(loss: Callable[[], Tensor], parameters: Tensor) -> None:
    """Move the parameters to where a smooth loss of few of them is least."""
    optimizer = torch.optim.LBFGS([parameters], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(evaluate)
