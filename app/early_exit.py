"""Answers that stop early: a network's stages run in turn, each on those images that no stage was sure of yet."""

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime

from app.inference import STOPS, Outputs
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, LOGITS, ModelCard, branch_map_name
from model.cut import CONFIDENCE_READ, Segment, logits_read, with_readings
from model.explain import contributions, readings


class EarlyExit:
    """A network in pieces, cut behind stages where images may stop, which give together what the whole gives.

    Args:
        card: describes the network.
        segments: of its graph, from shallow to deep.
        open_model: makes a session of a serialised graph.
    """

    def __init__(
        self,
        card: ModelCard,
        segments: Sequence[Segment],
        open_model: Callable[[bytes], onnxruntime.InferenceSession],
    ) -> None:
        reading = [with_readings(segment, card.reading_scales) for segment in segments]
        self._sessions = [open_model(segment.model) for segment in reading]
        self._inputs = [segment.inputs for segment in reading]
        self._branches = [segment.branches for segment in reading]
        maps = {branch_map_name(branch) for branch in range(len(card.stages))}
        self._fetched = [[name for name in segment.outputs if name not in maps] for segment in reading]
        self._later = [{name for inputs in self._inputs[place:] for name in inputs} for place in range(1, len(reading))]
        self._weights = np.asarray(card.branch_weights, np.float32)

    def run(self, images: np.ndarray, thresholds: np.ndarray) -> Outputs:
        """Logits, branch logits, branch weights and `STOPS` of N images, as `Network.run`; blocks.

        Args:
            images: uint8 (N, H, W, C).
            thresholds: (N, B - 1), infinite where an image is not to stop.
        """
        branch_logits = np.full((len(images), *self._weights.shape), np.nan, np.float32)
        stops = np.full(len(images), len(self._weights) - 1)
        places: slice | np.ndarray = slice(None)  # of those that go on: a slice is quicker to index by
        held = {IMAGE: images}
        for part, (session, inputs, fetched) in enumerate(
            zip(self._sessions, self._inputs, self._fetched, strict=True)
        ):
            values = session.run(fetched, {name: held[name] for name in inputs})
            held |= zip(fetched, values, strict=True)
            for branch in self._branches[part]:
                branch_logits[places, branch] = held[logits_read(branch)]
            if part == len(self._sessions) - 1:
                break
            stage = self._branches[part][-1]
            sure = held[CONFIDENCE_READ] >= thresholds[places, stage]
            if sure.any():
                going = np.arange(len(images))[places]
                stops[going[sure]] = stage
                places = going[~sure]
                if not len(places):
                    break
                held = {name: held[name][~sure] for name in self._later[part] if name in held}
        return _outputs(branch_logits, self._weights, stops)


def stopped(card: ModelCard, branch_logits: np.ndarray, thresholds: np.ndarray) -> Outputs:
    """What `EarlyExit.run` gives, of the branch logits of the whole network.

    For a GPU, which is done with all stages before the features of some had gone to the CPU and back: every image stops
    where it would have stopped, and nothing is saved by it.

    Args:
        card: describes the network.
        branch_logits: float32 (N, B, K).
        thresholds: (N, B - 1), infinite where an image is not to stop.
    """
    last = len(card.stages) - 1
    sure = readings(branch_logits[:, :last], np.asarray(card.reading_scales)[:last]).max(axis=2) >= thresholds
    stops = np.where(sure.any(axis=1), sure.argmax(axis=1), last)
    branch_logits = np.where((np.arange(last + 1) > stops[:, None])[..., None], np.float32(np.nan), branch_logits)
    return _outputs(branch_logits, np.asarray(card.branch_weights, np.float32), stops)


def _outputs(branch_logits: np.ndarray, weights: np.ndarray, stops: np.ndarray) -> Outputs:
    of_images = np.empty_like(branch_logits)
    of_images[:] = weights
    return {
        LOGITS: contributions(branch_logits, of_images).sum(axis=1),
        BRANCH_LOGITS: branch_logits,
        BRANCH_WEIGHTS: of_images,
        STOPS: stops,
    }
