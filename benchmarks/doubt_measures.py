"""Measures of doubt, and how well each finds wrong answers and foreign images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from model.explain import doubts, evidence, reasons_to_doubt
from training.calibration import Predictions
from training.doubt import auroc

FOLDS = 5
RESAMPLES = 200
SEED = 0


@dataclass(frozen=True)
class Outputs:
    """What a network says of images, as far as calibration and doubt go; M images, B stages, K classes.

    Attributes:
        predictions: its outputs; the labels of foreign images mean nothing.
        fused: (M, K) confidences.
        beliefs: (M, B, K) readings.
    """

    predictions: Predictions
    fused: np.ndarray
    beliefs: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """(M,): the answer is."""
        return self.predictions.logits.argmax(axis=1) != self.predictions.labels


Scores = dict[str, dict[str, np.ndarray]]
"""By measure and set of images, a number for each image: the more, the more doubt."""


def measures(outputs: dict[str, Outputs], coefficients: tuple[float, ...] | None) -> Scores:
    """Every measure of doubt of every image.

    Args:
        outputs: by set; what is fitted here is fitted on "held out".
        coefficients: of the card's doubt; without, it is left out.
    """
    held_out = outputs["held out"]
    scores: dict[str, Callable[[Outputs], np.ndarray]] = {
        "1 - confidence": lambda of: 1 - of.fused.max(axis=1),
        "entropy of the confidences": lambda of: entropy(of.fused),
        "lead of the answer's logit": lambda of: -lead(of.predictions.logits),
        "energy of the logits": lambda of: -logsumexp(of.predictions.logits, axis=1),
        "stages' mean support of the answer": lambda of: 1 - _supports(of).mean(axis=1),
        "disagreement of the stages": _disagreement,
        "indecision of the stages": lambda of: reasons_to_doubt(of.fused, of.beliefs)[:, 1],
        "distance of the stages' evidence": _distance(held_out),
        "five features, logistic": _logistic(held_out),
    }
    if coefficients:
        scores["doubt"] = lambda of: doubts(of.fused, of.beliefs, coefficients)
    return {name: {part: score(of) for part, of in outputs.items()} for name, score in scores.items()}


def _supports(of: Outputs) -> np.ndarray:
    """(M, B): each stage's belief in the answer."""
    answers = of.predictions.logits.argmax(axis=1)
    return np.take_along_axis(of.beliefs, answers[:, None, None], axis=2)[:, :, 0]


def _disagreement(of: Outputs) -> np.ndarray:
    """Jensen-Shannon divergence of all stages' readings."""
    return entropy(of.beliefs.mean(axis=1)) - entropy(of.beliefs).mean(axis=1)


def _distance(fitted_on: Outputs) -> Callable[[Outputs], np.ndarray]:
    """Mahalanobis distance of an image's evidence, of all stages and classes, from that of the answer's class."""

    def points(of: Outputs) -> np.ndarray:
        # the last class of a stage is minus the sum of the others
        return evidence(of.predictions.contributions)[:, :, :-1].reshape(len(of.fused), -1).astype(np.float64)

    own, labels = points(fitted_on), fitted_on.predictions.labels
    means = np.stack([own[labels == label].mean(axis=0) for label in range(fitted_on.fused.shape[1])])
    precision = np.linalg.pinv(np.cov((own - means[labels]).T))

    def distance(of: Outputs) -> np.ndarray:
        residuals = points(of) - means[of.predictions.logits.argmax(axis=1)]
        return np.einsum("md,de,me->m", residuals, precision, residuals)

    return distance


def _logistic(fitted_on: Outputs) -> Callable[[Outputs], np.ndarray]:
    """Log-odds of a wrong answer, fitted; of a held-out image by the other folds' fit."""

    def features(of: Outputs) -> np.ndarray:
        columns = (lead(of.predictions.logits), entropy(of.fused), _supports(of).mean(axis=1), _disagreement(of))
        return np.column_stack([*columns, reasons_to_doubt(of.fused, of.beliefs)[:, 0]])

    regression = make_pipeline(StandardScaler(), LogisticRegression(C=1e3, max_iter=1000))
    own, wrong = features(fitted_on), fitted_on.wrong
    if min(wrong.sum(), (~wrong).sum()) < FOLDS:
        return lambda of: np.zeros(len(of.fused))  # nothing to learn from
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)  # or they would be classes
    across = cross_val_predict(regression, own, wrong, cv=folds, method="decision_function")
    regression.fit(own, wrong)
    return lambda of: across if of is fitted_on else regression.decision_function(features(of))


def lead(logits: np.ndarray) -> np.ndarray:
    """How far the highest logit lies above the second. (M, K) to (M,)."""
    second, first = np.sort(logits, axis=1)[:, -2:].T
    return first - second


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1))).sum(axis=-1)


def areas(outputs: dict[str, Outputs], scores: dict[str, np.ndarray]) -> dict[str, float | None]:
    """AUROC of wrong answers, held out and in test, and of each foreign set against test."""
    found: dict[str, float | None] = {}
    for name, score in scores.items():
        if name in ("held out", "test"):
            wrong = outputs[name].wrong
            found[f"wrong, {name}"] = auroc(score, wrong) if 0 < wrong.sum() < len(wrong) else None
        else:
            found[name] = _foreign_area(scores["test"], score)
    return found


def _foreign_area(test: np.ndarray, foreign: np.ndarray) -> float:
    return auroc(np.concatenate([test, foreign]), np.repeat([False, True], [len(test), len(foreign)]))


def ahead(
    outputs: dict[str, Outputs], ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, list[float]]:
    """By how much one measure's AUROC is higher than another's: mean and 95 % interval over resampled images."""
    random = np.random.default_rng(SEED)
    wrong = outputs["test"].wrong
    found = {}
    for name in [name for name in ours if name != "held out"]:
        differences = []
        for _ in range(RESAMPLES):
            rows = random.integers(0, len(wrong), len(wrong))
            if name == "test":
                if not 0 < wrong[rows].sum() < len(rows):
                    continue
                pair = [auroc(score[name][rows], wrong[rows]) for score in (ours, theirs)]
            else:
                others = random.integers(0, len(ours[name]), len(ours[name]))
                pair = [_foreign_area(score["test"][rows], score[name][others]) for score in (ours, theirs)]
            differences.append(pair[0] - pair[1])
        found[name] = [float(np.mean(differences)), *map(float, np.quantile(differences, (0.025, 0.975)))]
    return found
