"""What each stage said and how much it counted: exact, from the outputs of one forward pass. No torch here.

Arrays are (images N, branches B, classes K), maps (N, K, h, w) for each stage. Why a stage is never judged by its raw
logits or raw weight: the pairs (w, z) and (-w, -z), or (s w, z / s), are the same network. Every quantity below is
unchanged by such a flip or rescaling.
"""

from collections.abc import Sequence

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def below_highest(logits: np.ndarray, temperature: float, power: float) -> np.ndarray:
    """Fused logits whose softmax is the confidence: minus (how far a class lies below the highest / temperature)^power.

    At power 1 these are logits over the temperature, less a constant. The ranking of the classes is that of the logits
    at any power, which says how much faster than its distance a rival is ruled out: networks trained towards softened
    labels keep even the surest images at a middling distance, which no temperature sets right.

    Args:
        logits: (N, K).
        temperature, power: above 0, fitted on held-out data.

    Returns:
        (N, K), at most 0; NaN in a row that is not finite.
    """
    logits = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return -(((logits.max(axis=-1, keepdims=True) - logits) / temperature) ** power)


def fused_confidences(logits: np.ndarray, temperature: float, power: float) -> np.ndarray:
    """Probabilities of the fused answer: the softmax of `below_highest`. (N, K) to (N, K)."""
    return softmax(below_highest(logits, temperature, power))


def readings(branch_logits: np.ndarray, reading_scales: np.ndarray) -> np.ndarray:
    """What each stage believes: softmax(a_i * z_i), with the signed scales fitted on held-out data.

    Args:
        branch_logits: (N, B, K).
        reading_scales: (B, K).

    Returns:
        (N, B, K) probabilities.
    """
    return softmax(np.asarray(reading_scales) * branch_logits)


INDECISION_EXPONENT = 0.1
"""Of GEN (Liu et al. 2023), by its authors: so small that also the least likely classes count."""


def reasons_to_doubt(fused: np.ndarray, beliefs: np.ndarray) -> np.ndarray:
    """What says that an answer may be wrong, or the image of no known class: two numbers, large where there is doubt.

    Args:
        fused: (N, K) confidences.
        beliefs: (N, B, K), the readings. The order of the classes does not matter, in either.

    Returns:
        (N, 2): the logarithm of the probability that the confidence leaves to all other classes, and that of the
        stages' indecision: the mean over the stages of the sum over the classes of (p (1 - p)) ** 0.1 (their GEN).
    """
    left = np.maximum(1 - fused.max(axis=-1), 1e-9)  # all but certain is as sure as it gets
    indecision = ((beliefs * (1 - beliefs)).clip(0) ** INDECISION_EXPONENT).sum(axis=-1).mean(axis=-1)
    return np.log(np.stack([left, np.maximum(indecision, 1e-9)], axis=-1))


def doubts(fused: np.ndarray, beliefs: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    """Probability that an answer is wrong, (N,): logistic in `reasons_to_doubt`, by the card's three coefficients."""
    bias, *slopes = coefficients
    log_odds = bias + reasons_to_doubt(fused, beliefs) @ slopes
    return 0.5 * (1 + np.tanh(log_odds / 2))  # the logistic function, without overflow


def contributions(branch_logits: np.ndarray, branch_weights: np.ndarray) -> np.ndarray:
    """What each stage adds to the fused logits: w_i * z_i (Interflow, Sec. III-B). Sums over B to the logits.

    Args:
        branch_logits: (N, B, K).
        branch_weights: (N, B, K) or (B, K).

    Returns:
        (N, B, K).
    """
    return branch_weights * branch_logits


def evidence(stage_contributions: np.ndarray) -> np.ndarray:
    """Contributions less their mean over the classes: all of them that a softmax sees. (N, B, K) to (N, B, K)."""
    return stage_contributions - stage_contributions.mean(axis=-1, keepdims=True)


def shares(stage_contributions: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """How much each stage counted in an answer: its absolute evidence for the answer's class, over that of all stages.

    Args:
        stage_contributions: (N, B, K).
        answers: (N,) class indices.

    Returns:
        (N, B), rows summing to 1; 1 / B each where no stage has evidence.
    """
    magnitude = np.abs(evidence(np.asarray(stage_contributions, np.float64))[np.arange(len(answers)), :, answers])
    total = magnitude.sum(axis=1, keepdims=True)
    return np.divide(magnitude, total, out=np.full_like(magnitude, 1 / magnitude.shape[1]), where=total > 0)


def contribution_maps(branch_maps: Sequence[np.ndarray], branch_weights: np.ndarray) -> list[np.ndarray]:
    """Where each contribution comes from: w_i * map_i / (h * w). Sums over the positions to `contributions`, exactly.

    Args:
        branch_maps: one of (N, K, h, w) for each of the B stages; their means are the branch logits.
        branch_weights: (N, B, K) or (B, K).

    Returns:
        As `branch_maps`; the sum over stages and positions is the fused logit.
    """
    weights = np.moveaxis(np.asarray(branch_weights)[..., np.newaxis, np.newaxis], -4, 0)  # (B, [N,] K, 1, 1)
    return [
        weight * branch_map / (branch_map.shape[-2] * branch_map.shape[-1])
        for weight, branch_map in zip(weights, branch_maps, strict=True)
    ]


def evidence_maps(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Contribution maps less their mean over the classes, which sum over the positions to `evidence`.

    The difference of two classes' maps is the same before and after, and is all that they are told apart by.
    """
    return [values - values.mean(axis=-3, keepdims=True) for values in maps]


WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of a network that saw all of the image, and nothing else."""


def spread(maps: np.ndarray, size: tuple[int, int], box: Sequence[float] = WHOLE) -> np.ndarray:
    """Contribution, evidence or difference maps on the grid of an image, with what was done to its size undone.

    Exact: the result sums to what the map sums to, less what lies outside the image (where `box` reaches beyond it).
    For the eye: where within a cell's surroundings its value is put, which is where bilinear interpolation puts it.

    Args:
        maps: (..., h, w), on the grid of a stage.
        size: height and width of the result.
        box: left, top, right and bottom of what the network saw, as fractions of the image (`model.images.seen`).

    Returns:
        float64 (..., height, width); 0 where the network did not see.
    """
    left, top, right, bottom = box
    rows = _spreading(maps.shape[-2], _cell_edges(size[0], maps.shape[-2], top, bottom))
    columns = _spreading(maps.shape[-1], _cell_edges(size[1], maps.shape[-1], left, right))
    return rows @ maps @ columns.T


def fused_map(maps: Sequence[np.ndarray], size: tuple[int, int], box: Sequence[float] = WHOLE) -> np.ndarray:
    """All stages' maps on one grid, summed: as `spread`, which says what is exact."""
    return np.sum([spread(values, size, box) for values in maps], axis=0)


def density(spread_maps: np.ndarray, box: Sequence[float] = WHOLE) -> np.ndarray:
    """What a picture of a map shows: by place, what the map would sum to if all places were like this one.

    Its mean over what the network saw is what the map sums to, so that stages of any grid have one scale, in logits.

    Args:
        spread_maps: (..., height, width), as `spread` and `fused_map` gave it.
        box: the same.

    Returns:
        As `spread_maps`; NaN where the network did not see.
    """
    height, width = spread_maps.shape[-2:]
    left, top, right, bottom = box
    parts = np.outer(np.diff(_cell_edges(height, 1, top, bottom)), np.diff(_cell_edges(width, 1, left, right)))
    return np.divide(spread_maps, parts, out=np.full(spread_maps.shape, np.nan), where=parts > 0)


def _cell_edges(pixels: int, cells: int, start: float, end: float) -> np.ndarray:
    """(pixels + 1,): where the edges of pixels lie on the axis of a map that covers start..end of them, in cells."""
    return np.clip((np.linspace(0, 1, pixels + 1) - start) / (end - start), 0, 1) * cells


def _spreading(cells: int, edges: np.ndarray) -> np.ndarray:
    """(P, cells): the part of each cell's value that each of P intervals gets; a whole cell's parts sum to 1.

    They are the integrals of bilinear interpolation, whose hat around a cell's middle has area 1. At the ends it goes
    on as the outermost cell has it, as if there were one more of the same.
    """
    middles = np.arange(-1, cells + 1) + 0.5
    distance = np.clip(edges[:, np.newaxis] - middles, -1, 1)
    below = 0.5 + distance - np.sign(distance) * distance**2 / 2  # area of the hat up to there
    parts = np.diff(below, axis=0)
    parts[:, 1] += parts[:, 0]
    parts[:, -2] += parts[:, -1]
    return parts[:, 1:-1]
