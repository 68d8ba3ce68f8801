"""From one image's outputs to what people read: the answer, what each stage said and counted, what layers drew on."""

import base64
import math
from collections.abc import Sequence

import numpy as np

from app.errors import InferenceError
from app.inference import Network, Outputs
from app.schemas import Interpretation, LayerAttention, Maps, Prediction, SeenBox, StageAnswer, StageMaps
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LAYER_ATTENTION, LOGITS, ModelCard, branch_map_name
from model.explain import contribution_maps, contributions, shares, softmax
from model.images import Seen

RANKING = "ranking"
"""int (N, 1 + B, K): classes, most confident first, of the fused answer and then of each stage's reading."""
CONFIDENCES = "confidences"
"""float64 (N, 1 + B, K): in the order of the ranking; NaN where an image's logits are not finite."""
WEIGHTS, CONTRIBUTIONS, SHARES = "weights", "contributions", "shares"
"""float64 (N, B): each stage's, for the class of the fused answer."""
READ_OUTPUTS = (RANKING, CONFIDENCES, WEIGHTS, CONTRIBUTIONS, SHARES)

ALL_CLASSES = 32
"""Up to so many, maps are sent of every class."""


class Interpreter:
    """Reads a model's outputs by its card: `read` a whole batch at once, `interpret` one image of it.

    Args:
        card: classes, stages, blocks with attention, reading scales and temperature.
    """

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._map_names = [branch_map_name(branch) for branch in range(len(card.stages))]
        self.map_values = len(card.classes) * sum(math.prod(stage.map_size) for stage in card.stages)
        """Of one image, over all stages."""
        self._scales = np.concatenate([np.full((1, len(card.classes)), 1 / card.temperature), card.reading_scales])

    def wanted(self, layers: bool = False, maps: bool = False) -> list[str]:
        """Names of the outputs that `interpret` takes and, with `maps`, `contribution_maps` and `maps`."""
        names = [*READ_OUTPUTS, *([LAYER_ATTENTION] if layers else [])]
        return [*names, BRANCH_WEIGHTS, *self._map_names] if maps else names

    def read(self, outputs: Outputs) -> Outputs:
        """`READ_OUTPUTS` of a batch, from the network's logits, branch logits and branch weights."""
        branch_logits, weights = outputs[BRANCH_LOGITS], outputs[BRANCH_WEIGHTS]
        # the fused answer and the stages' readings are softmaxes over the same classes: one of all, fused first
        logits = np.concatenate([outputs[LOGITS][:, np.newaxis], branch_logits], axis=1)
        broken = ~np.isfinite(logits).all(axis=(1, 2))
        if broken.any():
            logits[broken], branch_logits = 0, np.where(broken[:, np.newaxis, np.newaxis], 0, branch_logits)
        confidences = softmax(self._scales * logits)
        ranking = np.argsort(-confidences, axis=2, kind="stable")
        confidences = np.take_along_axis(confidences, ranking, axis=2)
        confidences[broken] = np.nan
        images, answers = np.arange(len(logits)), ranking[:, 0, 0]
        added = contributions(branch_logits, weights)
        return {
            RANKING: ranking,
            CONFIDENCES: confidences,
            WEIGHTS: weights[images, :, answers],
            CONTRIBUTIONS: added[images, :, answers],
            SHARES: shares(added, answers),
        }

    def interpret(self, outputs: Outputs, image: int, top_k: int) -> Interpretation:
        """Put one image's outputs into words.

        Args:
            outputs: those `wanted`, of a batch; with those of layers, the answer says what the blocks drew on, too.
            image: its place in the batch.
            top_k: how many classes to list; all where there are fewer.

        Raises:
            InferenceError: the network's outputs are not finite.
        """
        classes = self._card.classes
        rankings = [
            [
                Prediction(label=classes[index], index=index, confidence=confidence)
                for index, confidence in zip(indices.tolist(), confidences.tolist(), strict=True)
            ]
            for indices, confidences in zip(
                outputs[RANKING][image, :, :top_k], outputs[CONFIDENCES][image, :, :top_k], strict=True
            )
        ]
        fused, *readings = rankings
        if math.isnan(fused[0]["confidence"]):
            raise _not_finite()
        answer = fused[0]["index"]
        stages = [
            StageAnswer(
                name=stage.name,
                depth=stage.depth,
                prediction=reading[0],
                top_k=reading,
                weight=weight,
                contribution=contribution,
                share=share,
                agrees=reading[0]["index"] == answer,
                evaluated=True,
            )
            for stage, reading, weight, contribution, share in zip(
                self._card.stages,
                readings,
                outputs[WEIGHTS][image].tolist(),
                outputs[CONTRIBUTIONS][image].tolist(),
                outputs[SHARES][image].tolist(),
                strict=True,
            )
        ]
        interpretation = Interpretation(
            prediction=fused[0],
            top_k=fused,
            stages=stages,
            agreement=sum(stage["agrees"] for stage in stages) / len(stages),
        )
        if LAYER_ATTENTION in outputs:
            interpretation["layer_attention"] = self._layer_attention(outputs[LAYER_ATTENTION][image])
        return interpretation

    def contribution_maps(self, outputs: Outputs, image: int) -> list[np.ndarray]:
        """Of one image: for each stage (K, h, w), as `model.explain.contribution_maps`."""
        return contribution_maps([outputs[name][image] for name in self._map_names], outputs[BRANCH_WEIGHTS][image])

    def maps(self, outputs: Outputs, image: int, said: Interpretation, box: Seen) -> Maps:
        """One image's contribution maps as they are sent.

        Args:
            outputs: those `wanted`, of a batch.
            image: its place in the batch.
            said: what `interpret` made of the image; of a model of many classes, only the listed ones are sent.
            box: what of the upright image the network saw.
        """
        classes = list(range(len(self._card.classes)))
        if len(classes) > ALL_CLASSES:
            listed = [said["top_k"], *(stage["top_k"] for stage in said["stages"])]
            classes = sorted({prediction["index"] for top_k in listed for prediction in top_k})
        stages = []
        for stage, values in zip(self._card.stages, self.contribution_maps(outputs, image), strict=True):
            planes = np.concatenate([values[classes], values.mean(axis=0, keepdims=True)]).astype("<f4", copy=False)
            text = base64.b64encode(planes.tobytes()).decode("ascii")
            stages.append(StageMaps(name=stage.name, shape=list(planes.shape), values=text))
        return Maps(
            box=SeenBox(left=box.left, top=box.top, right=box.right, bottom=box.bottom), classes=classes, stages=stages
        )

    def _layer_attention(self, weights: np.ndarray) -> list[LayerAttention]:
        """One image's rows (L, S), named by the card."""
        if not np.isfinite(weights).all():
            raise _not_finite()
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


class ReadNetwork:
    """A network that gives `READ_OUTPUTS`, too: once for a batch, by the lane that ran it, which costs an image less
    than half of what it would in the event loop by itself.

    Args:
        network: to run.
        interpreter: by its card.
    """

    def __init__(self, network: Network, interpreter: Interpreter) -> None:
        self._network = network
        self._interpreter = interpreter

    def run(self, images: np.ndarray, names: Sequence[str]) -> Outputs:
        """As `Network.run`."""
        own = [name for name in names if name not in READ_OUTPUTS]
        if len(own) == len(names):
            return self._network.run(images, names)
        outputs = self._network.run(images, list(dict.fromkeys([*own, LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS])))
        return {**outputs, **self._interpreter.read(outputs)}


def _not_finite() -> InferenceError:
    return InferenceError("the network gave numbers that are not finite for this image.")
