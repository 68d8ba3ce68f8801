"""Answers that stop early: a network's stages run in turn, each on those images that no stage was sure of yet."""

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime

from app.inference import STOPS, Outputs
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, ModelCard, branch_map_name
from model.cut import Segment
from model.explain import softmax


class EarlyExit:
    """A network in pieces, which give together what the whole gives.

    Args:
        card: describes the network.
        segments: of its graph, from shallow to deep.
        open_model: makes a session of a serialised graph.
        sizes: of batches, as `padded`.
    """

    def __init__(
        self,
        card: ModelCard,
        segments: Sequence[Segment],
        open_model: Callable[[bytes], onnxruntime.InferenceSession],
        sizes: Sequence[int] | None,
    ) -> None:
        self._shapes = {name: [size for size in spec.shape if size is not None] for name, spec in card.outputs.items()}
        self._sessions = [open_model(segment.model) for segment in segments]
        self._segments = [segment._replace(model=b"") for segment in segments]  # the sessions have their own copies
        self._sizes = sizes
        self._scales = np.asarray(card.reading_scales)
        self._weights = np.asarray(card.branch_weights, np.float32)
        self._crossing = [
            {name for segment in segments[place + 1 :] for name in segment.inputs} for place in range(len(segments))
        ]

    def run(self, images: np.ndarray, names: Sequence[str], thresholds: np.ndarray) -> Outputs:
        """As `Network.run`; blocks."""
        last = len(self._segments) - 1
        alive = np.arange(len(images))  # places of those that go on
        stops = np.full(len(images), last)
        outputs = {
            name: np.full((len(images), *self._shapes[name]), np.nan, np.float32) for name in {*names, BRANCH_LOGITS}
        }
        held: dict[str, np.ndarray] = {IMAGE: images}
        for stage, (segment, session) in enumerate(zip(self._segments, self._sessions, strict=True)):
            class_map = branch_map_name(stage)
            wanted = [
                name
                for name in segment.outputs
                if name in self._crossing[stage] or name in outputs or (name == class_map and stage < last)
            ]
            values = session.run(wanted, {name: padded(held[name], self._sizes) for name in segment.inputs})
            held |= {name: value[: len(alive)] for name, value in zip(wanted, values, strict=True)}
            for name in outputs.keys() & wanted:
                outputs[name][alive] = held[name]
            if stage == last:
                break
            logits = held[class_map].mean(axis=(2, 3))
            outputs[BRANCH_LOGITS][alive, stage] = logits
            sure = softmax(self._scales[stage] * logits).max(axis=1) >= thresholds[alive, stage]
            stops[alive[sure]] = stage
            alive = alive[~sure]
            if not len(alive):
                break
            crossing = {name: held[name] for name in self._crossing[stage] if name in held}
            held = {name: value[~sure] for name, value in crossing.items()} if sure.any() else crossing
        if BRANCH_WEIGHTS in outputs:  # learned constants: those of an image that stopped early, too
            outputs[BRANCH_WEIGHTS][:] = self._weights
        return {**outputs, STOPS: stops}


def padded(images: np.ndarray, sizes: Sequence[int] | None) -> np.ndarray:
    """The images, or what is held of them, and zeros up to the next of the sizes that were warmed up.

    On CUDA only, where each new size costs a search for algorithms. On the CPU a batch of n takes n times as long as
    one image, or a little less, so padding would only add work.
    """
    size = next((size for size in sizes or () if size >= len(images)), len(images))
    if size == len(images):
        return images
    return np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
