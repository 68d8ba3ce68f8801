"""The tables of a part: their columns, and how they are filled and written."""

import io
import itertools
import json
import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.answers import CONFIDENCES, CONTRIBUTIONS, DOUBTS, RANKING, SHARES, WEIGHTS, Interpreter
from app.bulk.plan import Counts, Plan
from app.bulk.reading import Listed, Unreadable
from app.inference import Outputs
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LOGITS, ModelCard

METADATA_KEY = b"interflow"
"""Of the Parquet files' metadata: format version, model, and the part's counts, as JSON."""

LABEL = pa.dictionary(pa.int32(), pa.string())


def predictions_schema(card: ModelCard, plan: Plan) -> pa.Schema:
    """Columns of the predictions.

    `image`, of rows also `path`; `label`, `index`, `confidence`, `doubt` (null where the card has none), `agreement`
    and `logit`, the fused logit of the answer; `top_k_labels` and `top_k_confidences`; then of each stage, by its name:
    its reading's label, index and confidence, and its weight, contribution and share for the answer. The contributions
    of all stages sum to `logit`. Numbers are those of POST /predict in float32.
    """
    real = pa.float32()
    fields = [
        *_identity(plan),
        ("label", LABEL),
        ("index", pa.int32()),
        *((name, real) for name in ("confidence", "doubt", "agreement", "logit")),
        ("top_k_labels", pa.list_(pa.string())),
        ("top_k_confidences", pa.list_(real)),
    ]
    for stage in stage_names(card):
        fields += [
            (f"{stage}_label", LABEL),
            (f"{stage}_index", pa.int32()),
            *((f"{stage}_{name}", real) for name in ("confidence", "weight", "contribution", "share")),
        ]
    return pa.schema(fields)


def unreadable_schema(plan: Plan) -> pa.Schema:
    """Columns of the images without an answer: `image`, of rows also `path`, and `code` and `detail` of the reason."""
    return pa.schema([*_identity(plan), ("code", pa.string()), ("detail", pa.string())])


def _identity(plan: Plan) -> list[tuple[str, pa.DataType]]:
    in_rows = plan.listed is not None and plan.listed.parquet
    return [("image", pa.string()), ("path", pa.string())] if in_rows else [("image", pa.string())]


def stage_names(card: ModelCard) -> list[str]:
    """Of the card's stages, as columns begin: without marks that SQL would ask to quote."""
    plain = [re.sub(r"\W", "_", stage.name) for stage in card.stages]
    return [f"{name}_{place}" if plain.count(name) > 1 else name for place, name in enumerate(plain)]


class Answers:
    """What the network said of images, batch after batch, until it is made a table.

    Args:
        card: classes and stages.
        top_k: classes kept of each ranking; all where there are fewer.
    """

    def __init__(self, card: ModelCard, top_k: int) -> None:
        self._card = card
        self._top_k = min(top_k, len(card.classes))
        self.images: list[Listed] = []
        nothing = np.empty((0, len(card.stages), len(card.classes)), np.float32)
        outputs = {LOGITS: nothing[:, 0], BRANCH_LOGITS: nothing, BRANCH_WEIGHTS: nothing}
        self._batches: list[dict[str, np.ndarray]] = []
        self.add([], outputs | dict(Interpreter(card).read(outputs)))  # a part may hold no image that can be read

    def add(self, images: Sequence[Listed], outputs: Outputs) -> np.ndarray:
        """Keep what is said of N images, but for those whose numbers are not finite: gives bool (N,), which are.

        Args:
            images: N.
            outputs: `app.answers.READ_OUTPUTS`, and the fused logits.
        """
        finite = ~np.isnan(outputs[CONFIDENCES][:, 0, 0])
        self.images += itertools.compress(images, finite)
        kept = {name: outputs[name][finite] for name in (WEIGHTS, CONTRIBUTIONS, SHARES, DOUBTS)}
        kept |= {name: outputs[name][:, :, : self._top_k][finite] for name in (RANKING, CONFIDENCES)}
        answers = kept[RANKING][:, 0, 0]
        kept[LOGITS] = outputs[LOGITS][finite][np.arange(len(answers)), answers]
        self._batches.append(kept)
        return finite

    def by_class(self) -> dict[str, int]:
        """Answers by label; labels that no answer is are left out."""
        answers = np.concatenate([batch[RANKING][:, 0, 0] for batch in self._batches])
        counts = np.bincount(answers, minlength=len(self._card.classes)).tolist()
        return {label: count for label, count in zip(self._card.classes, counts, strict=True) if count}

    def table(self, plan: Plan) -> pa.Table:
        """One row for each image, of `predictions_schema`."""
        said = {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}
        classes = pa.array(self._card.classes, pa.string())
        ranking, confidences = said[RANKING], said[CONFIDENCES]
        answers = ranking[:, 0, 0]
        starts = pa.array(np.arange(len(answers) + 1, dtype=np.int32) * self._top_k)

        def labels(indices: np.ndarray) -> pa.Array:
            return pa.DictionaryArray.from_arrays(indices.astype(np.int32), classes)

        columns = {
            "image": pa.array([listed.image for listed in self.images], pa.string()),
            "path": pa.array([listed.path for listed in self.images], pa.string()),
            "label": labels(answers),
            "index": pa.array(answers.astype(np.int32)),
            "confidence": _real(confidences[:, 0, 0]),
            "doubt": _real(said[DOUBTS]),
            "agreement": _real((ranking[:, 1:, 0] == answers[:, np.newaxis]).mean(axis=1)),
            "logit": _real(said[LOGITS]),
            "top_k_labels": pa.ListArray.from_arrays(starts, classes.take(pa.array(ranking[:, 0].ravel()))),
            "top_k_confidences": pa.ListArray.from_arrays(starts, _real(confidences[:, 0].ravel())),
        }
        for place, stage in enumerate(stage_names(self._card)):
            reading = ranking[:, 1 + place, 0]
            columns |= {
                f"{stage}_label": labels(reading),
                f"{stage}_index": pa.array(reading.astype(np.int32)),
                f"{stage}_confidence": _real(confidences[:, 1 + place, 0]),
                f"{stage}_weight": _real(said[WEIGHTS][:, place]),
                f"{stage}_contribution": _real(said[CONTRIBUTIONS][:, place]),
                f"{stage}_share": _real(said[SHARES][:, place]),
            }
        schema = predictions_schema(self._card, plan)
        return pa.table([columns[name] for name in schema.names], schema=schema)


def _real(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.float32), from_pandas=True)  # NaN as null: the doubt of a card without one


def unreadable_table(plan: Plan, images: Sequence[tuple[Listed, Unreadable]]) -> pa.Table:
    """The images without an answer, and why."""
    columns = {
        "image": [listed.image for listed, _ in images],
        "path": [listed.path for listed, _ in images],
        "code": [why.code for _, why in images],
        "detail": [why.detail for _, why in images],
    }
    schema = unreadable_schema(plan)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def to_parquet(table: pa.Table, plan: Plan, counts: Counts) -> bytes:
    """A table as a file, which says what made it."""
    about = {
        "format_version": plan.format_version,
        "model": plan.model.model_dump(exclude={"folder"}),
        "counts": counts.model_dump(),
    }
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), buffer, compression="zstd")
    return buffer.getvalue()


def counts_in(file: BinaryIO) -> Counts | None:
    """The counts of a part from the file of its predictions; None where that is not whole."""
    try:
        about = json.loads((pq.read_metadata(file).metadata or {})[METADATA_KEY])
        return Counts.model_validate(about["counts"])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
