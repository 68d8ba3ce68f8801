"""When an image can stop early: thresholds on the stages' readings that keep a promise on accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from model.contract import ExitPolicy
from model.explain import fused_confidences, readings
from training.calibration import Predictions

PROMISES = (0.001, 0.0025, 0.005, 0.01, 0.02)
"""Losses of accuracy that thresholds are fitted to."""

CUT = 0.02
"""Cost of asking whether to stop, in units of the whole network's work: a layer's numbers have to leave the runtime and
come back. Of the CIFAR-10 model, float32 on a CPU: 0.02 to 0.03 for one image, 0.02 for 32."""

PRICES = np.geomspace(0.3, 1e4, 46)
"""Of a unit of loss, in units of the whole network's work: tried in turn, from cheap to dear."""
SWEEPS = 10
"""Over the stages, at most; it takes two or three until nothing changes."""


def fit_exits(
    held_out: Predictions,
    test: Predictions,
    reading_scales: np.ndarray,
    temperature: float,
    *,
    work: Sequence[float],
    power: float = 1,
) -> tuple[ExitPolicy, ...]:
    """Thresholds for each of the `PROMISES`: fitted on held-out images, measured on test.

    The loss of an image is counted without its label, as the belief of the fused answer that is given up: nothing
    where the stage gives the same answer, else the fused confidence of the full answer less that of the stage's. Where
    the fused confidence is calibrated, its mean is the loss of accuracy, with a fraction of the noise that counting
    right and wrong answers would have. This is ours.

    Args:
        held_out, test: outputs of the same network.
        reading_scales: (B, K), fitted.
        temperature, power: of the fused confidence.
        work: B shares, 1 for the last stage.

    Returns:
        By rising `max_loss`; none where no stage can answer before the others (with a top-down path none can).
    """
    if len(work) < 2 or any(shallow >= deep for shallow, deep in pairwise(work)):
        return ()
    beliefs = readings(held_out.branch_logits, reading_scales)[:, :-1]
    fused = fused_confidences(held_out.logits, temperature, power)
    kept = np.take_along_axis(fused, beliefs.argmax(axis=2), axis=1)
    loss = fused.max(axis=1, keepdims=True) - kept
    thresholds = _where_it_pays(beliefs.max(axis=2), loss, work)
    return tuple(
        _measured(limits, promise, test, reading_scales, work)
        for limits, promise in zip(thresholds, PROMISES, strict=True)
    )


def _where_it_pays(confidence: np.ndarray, loss: np.ndarray, work: Sequence[float]) -> list[tuple[float | None, ...]]:
    """As `fit_thresholds`, for all promises, at those stages where asking saves more than it costs.

    For the strictest promise, the stage that is best left out is, until none is: the others follow.
    """

    def fit(stages: list[int], promises: Sequence[float]) -> tuple[list[tuple[float | None, ...]], float]:
        """Thresholds at these stages alone, and the mean cost of the first promise."""
        costs = [work[stage] + CUT * (place + 1) for place, stage in enumerate(stages)]
        costs.append(work[-1] + CUT * len(stages))
        found = fit_thresholds(confidence[:, stages], loss[:, stages], costs, promises)
        limits = np.array([np.inf if limit is None else limit for limit in found[0]])
        return found, float(np.take(costs, stopping_stages(confidence[:, stages], limits)).mean())

    stages = list(range(confidence.shape[1]))
    least = fit(stages, PROMISES[:1])[1]
    while stages:
        cost, shorter = min(
            (fit(fewer, PROMISES[:1])[1], fewer)
            for fewer in ([stage for stage in stages if stage != left_out] for left_out in stages)
        )
        if cost > least:
            break
        stages, least = shorter, cost
    found, _ = fit(stages, PROMISES)
    places = {stage: place for place, stage in enumerate(stages)}
    return [
        tuple(limits[places[stage]] if stage in places else None for stage in range(confidence.shape[1]))
        for limits in found
    ]


def fit_thresholds(
    confidence: np.ndarray, loss: np.ndarray, work: Sequence[float], promises: Sequence[float]
) -> list[tuple[float | None, ...]]:
    """For each promise the thresholds of least mean work, or nearly so, whose mean loss is no more than that.

    The best threshold of one stage, given those of the others, is found exactly: one sort. For each price of loss
    stages are taken in turn, from the deepest, until nothing changes; then once more to spend what a promise leaves.
    The best of all these ends is kept.

    Args:
        confidence: (M, B - 1), of each stage's reading but the last's.
        loss: (M, B - 1), what stopping there costs an image, 0 or more.
        work: B rising shares.
        promises: largest mean losses over the images.
    """
    losses = np.append(loss, np.zeros((len(loss), 1)), axis=1)
    works = np.broadcast_to(work, losses.shape)
    never = np.full(confidence.shape[1], np.inf)
    best, least = [never] * len(promises), [np.inf] * len(promises)
    for price in PRICES:
        start = _settled(confidence, losses, works, price)
        for place, promise in enumerate(promises):
            if _total(start, confidence, losses) <= promise * len(losses):
                spent = _sweep(start, confidence, losses, works, _Within(promise * len(losses)))
                total = _total(spent, confidence, works)
                if total < least[place]:
                    best[place], least[place] = spent, total
    return [tuple(float(limit) if np.isfinite(limit) else None for limit in thresholds) for thresholds in best]


def stopping_stages(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Index of the stage that answers each image, (M,): B - 1 where none but the last does.

    Args:
        confidence: (M, B - 1), of the readings.
        thresholds: (B - 1,), infinite where no image stops.
    """
    sure = np.append(confidence >= thresholds, np.ones((len(confidence), 1), bool), axis=1)
    return sure.argmax(axis=1)


Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of the work and the loss of all images together: what is to be least."""


@dataclass(frozen=True)
class _Priced:
    price: float

    def __call__(self, work: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return work + self.price * loss


@dataclass(frozen=True)
class _Within:
    budget: float

    def __call__(self, work: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return np.where(loss <= self.budget, work, np.inf)


def _settled(confidence: np.ndarray, losses: np.ndarray, works: np.ndarray, price: float) -> np.ndarray:
    """Thresholds of which none can be moved for the better while loss has that price."""
    thresholds = np.full(confidence.shape[1], np.inf)
    for _ in range(SWEEPS):
        before, thresholds = thresholds, _sweep(thresholds, confidence, losses, works, _Priced(price))
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _sweep(
    thresholds: np.ndarray, confidence: np.ndarray, losses: np.ndarray, works: np.ndarray, cost: Cost
) -> np.ndarray:
    """Each stage's threshold, from the deepest on, moved to where the cost is least; never is one of its places."""
    thresholds = thresholds.copy()
    for stage in reversed(range(len(thresholds))):
        thresholds[stage] = np.inf
        stops = stopping_stages(confidence, thresholds)
        comes = np.flatnonzero(stops > stage)
        order = comes[np.argsort(-confidence[comes, stage], kind="stable")]
        ordered = confidence[order, stage]
        # of all images, with the first 0, 1, 2 ... of these stopping here
        worked, lost = (
            _total(thresholds, confidence, values)
            + np.append(0, np.cumsum(values[order, stage] - values[order, stops[order]]))
            for values in (works, losses)
        )
        apart = np.append(
            True, np.append(ordered[1:] < ordered[:-1], [True] * bool(len(order)))
        )  # equals stop together
        first = int(np.where(apart, cost(worked, lost), np.inf).argmin())
        if first:
            thresholds[stage] = (ordered[first - 1] + ordered[min(first, len(ordered) - 1)]) / 2
    return thresholds


def _total(thresholds: np.ndarray, confidence: np.ndarray, values: np.ndarray) -> float:
    """Sum over the images of the value (M, B) at the stage that each stops at."""
    return float(values[np.arange(len(values)), stopping_stages(confidence, thresholds)].sum())


def _measured(
    thresholds: tuple[float | None, ...],
    promise: float,
    test: Predictions,
    reading_scales: np.ndarray,
    work: Sequence[float],
) -> ExitPolicy:
    beliefs = readings(test.branch_logits, reading_scales)[:, :-1]
    limits = np.array([np.inf if threshold is None else threshold for threshold in thresholds])
    stops = stopping_stages(beliefs.max(axis=2), limits)
    answers = np.append(beliefs.argmax(axis=2), test.logits.argmax(axis=1)[:, np.newaxis], axis=1)
    right = np.take_along_axis(answers, stops[:, np.newaxis], axis=1)[:, 0] == test.labels
    return ExitPolicy(
        max_loss=promise,
        thresholds=thresholds,
        accuracy=float(right.mean()),
        work=float(np.asarray(work)[stops].mean()),
        stops=tuple((np.bincount(stops, minlength=len(work)) / len(stops)).tolist()),
    )
