"""One part: from the listing to its two tables. The same in a local process and in an actor of a cluster."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from app.answers import READ_OUTPUTS, Interpreter, ReadNetwork, not_finite
from app.bulk.addresses import Output
from app.bulk.listing import read_part
from app.bulk.plan import Counts, Plan
from app.bulk.reading import Decoded, Listed, Unreadable, ahead, chunks, decode, images_of
from app.bulk.tables import Answers, counts_in, to_parquet, unreadable_table
from app.session import ModelError, Session, read_card
from app.settings import Settings
from model.contract import LOGITS

BATCH_PIXELS = 2**18
"""Of the images in a batch, unless INTERFLOW_MAX_BATCH says otherwise. Nobody waits for the first of them, and where
decoding is done between batches large ones pay: 1,425 us an image in batches of 256, 1,520 in 32 (CIFAR-10, CPU)."""
LEAST_BATCH, MOST_BATCH = 16, 256


class Scorer:
    """A loaded model that finishes parts of a plan.

    Args:
        plan: its listing is finished.
        output: where the listing is, and the tables go.
        settings: provider, CUDA's, largest batch, and the workers that share its GPU's memory; the session has one lane
            of one thread.
        threads: that fetch and decode images while the network runs; none: both take turns.

    Raises:
        ModelError, CardError: the model is broken, or no longer the plan's.
    """

    def __init__(self, plan: Plan, output: Output, settings: Settings, threads: int) -> None:
        self._plan = plan
        self._output = output
        folder = Path(plan.model.folder)
        spec = read_card(folder).input
        fitting = min(max(BATCH_PIXELS // (spec.height * spec.width), LEAST_BATCH), MOST_BATCH)
        self._batch = settings.max_batch or fitting
        own = {"lanes": 1, "threads": 1, "niceness": 0, "max_batch": self._batch}
        self._session = Session(folder, settings.model_copy(update=own))
        self._card = self._session.card
        if self._card.provenance.weights_sha256 != plan.model.sha256:
            raise ModelError(
                f"{plan.model.folder} was changed while it was used. Put back what was there, or begin anew."
            )
        self._network = ReadNetwork(self._session, Interpreter(self._card))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode") if threads else None

    def finish(self, part: int) -> tuple[Counts, bool]:
        """Make a part's tables, unless they are there; gives its counts, and whether it had to be made.

        Raises:
            InferenceError: onnxruntime failed.
            InterflowError: a file of OUT cannot be read or written.
        """
        file = self._output.open(f"predictions/{_name(part)}")
        if file is not None:
            with file:
                counts = counts_in(file)
            if counts is not None:
                return counts, False
        return self._make(part), True

    def _make(self, part: int) -> Counts:
        card, options = self._card, self._plan.options
        decoding = partial(decode, spec=card.input, max_bytes=options.max_bytes, max_pixels=options.max_pixels)
        listed = chunks(images_of(read_part(self._output, part), self._plan.column))
        made = ahead(decoding, listed, self._pool, 2 * self._threads) if self._pool else map(decoding, listed)
        images = chain.from_iterable(made)
        answers = Answers(card, options.top_k)
        reasons: list[tuple[Listed, Unreadable]] = []
        while some := list(islice(images, self._batch)):
            reasons += self._answer(some, answers)
        counts = Counts(
            predictions=len(answers.images),
            unreadable=dict(sorted(Counter(why.code for _, why in reasons).items())),
            classes=answers.by_class(),
        )
        for folder, table in (
            ("unreadable", unreadable_table(self._plan, reasons)),
            ("predictions", answers.table(self._plan)),  # last: it says that the part is done
        ):
            self._output.write(f"{folder}/{_name(part)}", to_parquet(table, self._plan, counts))
        return counts

    def _answer(self, images: Sequence[Decoded], answers: Answers) -> list[tuple[Listed, Unreadable]]:
        """Add the answers to those that can be answered; gives the others, in order."""
        readable = [(place, pixels) for place, (_, pixels) in enumerate(images) if not isinstance(pixels, Unreadable)]
        reasons = {place: said for place, (_, said) in enumerate(images) if isinstance(said, Unreadable)}
        if readable:
            outputs = self._network.run(np.stack([pixels for _, pixels in readable]), [*READ_OUTPUTS, LOGITS])
            known = answers.add([images[place][0] for place, _ in readable], outputs)
            broken = Unreadable.of(not_finite())
            reasons |= {place: broken for (place, _), finite in zip(readable, known, strict=True) if not finite}
        return [(images[place][0], why) for place, why in sorted(reasons.items())]


def _name(part: int) -> str:
    return f"part-{part:06d}.parquet"
