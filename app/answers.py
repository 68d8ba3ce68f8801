"""From one image's outputs to what people read: the answer, what each stage said and counted, what layers drew on."""

import numpy as np

from app.errors import InferenceError
from app.inference import Outputs
from app.schemas import Interpretation, LayerAttention, Prediction, StageAnswer
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LAYER_ATTENTION, LOGITS, ModelCard
from model.explain import contributions, shares, softmax


class Interpreter:
    """Reads a model's outputs by its card.

    Args:
        card: classes, stages, blocks with attention, reading scales and temperature.
    """

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._scales = np.concatenate([np.full((1, len(card.classes)), 1 / card.temperature), card.reading_scales])

    def wanted(self, layers: bool = False) -> list[str]:
        """Names of the outputs that `interpret` reads."""
        return [LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS, *([LAYER_ATTENTION] if layers else [])]

    def interpret(self, outputs: Outputs, image: int, top_k: int) -> Interpretation:
        """Read one image's outputs.

        Args:
            outputs: those `wanted`, of a batch; with those of layers, the answer says what the blocks drew on, too.
            image: its place in the batch.
            top_k: how many classes to list; all where there are fewer.

        Raises:
            InferenceError: the outputs are not finite.
        """
        branch_logits, weights = outputs[BRANCH_LOGITS][image], outputs[BRANCH_WEIGHTS][image]
        # the fused answer and the stages' readings are softmaxes over the same classes: one of all, fused first
        logits = np.concatenate([outputs[LOGITS][image : image + 1], branch_logits])
        _require_finite(logits)
        rankings = _rank(softmax(self._scales * logits), self._card.classes, top_k)
        answer = rankings[0][0]["index"]
        added = contributions(branch_logits, weights)
        share = shares(added[np.newaxis], np.array([answer]))[0]
        stages = [
            StageAnswer(
                name=stage.name,
                depth=stage.depth,
                prediction=ranking[0],
                top_k=ranking,
                weight=weight,
                contribution=contribution,
                share=stage_share,
                agrees=ranking[0]["index"] == answer,
                evaluated=True,
            )
            for stage, ranking, weight, contribution, stage_share in zip(
                self._card.stages,
                rankings[1:],
                weights[:, answer].tolist(),
                added[:, answer].tolist(),
                share.tolist(),
                strict=True,
            )
        ]
        interpretation = Interpretation(
            prediction=rankings[0][0],
            top_k=rankings[0],
            stages=stages,
            agreement=sum(stage["agrees"] for stage in stages) / len(stages),
        )
        if LAYER_ATTENTION in outputs:
            interpretation["layer_attention"] = self._layer_attention(outputs[LAYER_ATTENTION][image])
        return interpretation

    def _layer_attention(self, weights: np.ndarray) -> list[LayerAttention]:
        """One image's rows (L, S), named by the card."""
        _require_finite(weights)
        return [
            LayerAttention(
                block=row.block,
                module=row.module,
                kind=row.kind,
                sources=[
                    {"name": name, "weight": weight}
                    for name, weight in zip(row.sources, of_row, strict=False)  # a row is padded beyond its sources
                ],
            )
            for row, of_row in zip(self._card.layer_attention, weights.tolist(), strict=True)
        ]


def _require_finite(array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise InferenceError("the network gave numbers that are not finite for this image.")


def _rank(probabilities: np.ndarray, classes: tuple[str, ...], top_k: int) -> list[list[Prediction]]:
    """The best classes of each row (R, K)."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    confidences = np.take_along_axis(probabilities, best, axis=1)
    return [
        [
            Prediction(label=classes[index], index=index, confidence=confidence)
            for index, confidence in zip(*row, strict=True)
        ]
        for row in zip(best.tolist(), confidences.tolist(), strict=True)
    ]
