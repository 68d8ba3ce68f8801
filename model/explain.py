"""What each stage said and how much it counted: exact, from the outputs of one forward pass. No torch here.

Arrays are (images N, branches B, classes K). Why a stage is never judged by its raw logits or raw weight: the pairs
(w, z) and (-w, -z), or (s w, z / s), are the same network. Every quantity below is unchanged by such a flip or
rescaling.
"""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def readings(branch_logits: np.ndarray, reading_scales: np.ndarray) -> np.ndarray:
    """What each stage believes: softmax(a_i * z_i), with the signed scales fitted on held-out data.

    Args:
        branch_logits: (N, B, K).
        reading_scales: (B, K).

    Returns:
        (N, B, K) probabilities.
    """
    return softmax(np.asarray(reading_scales) * branch_logits)


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
