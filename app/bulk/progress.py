"""How far a run is, and what came of it, in words."""

import sys
import time

from tqdm import tqdm

from app.bulk.plan import Counts, Plan

LINE_S = 10
"""Seconds between two lines where there is no terminal for a bar."""
MOST_CLASSES = 20


class Progress:
    """A bar on a terminal's stderr; elsewhere a line every `LINE_S` seconds.

    Args:
        what: is done to the images.
        total: images; None: not known yet.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what = what
        self._bar = tqdm(desc=what, total=total, unit=" images", unit_scale=True, disable=None, file=sys.stderr)
        self._total = total
        self._images = self._fresh = 0
        self._began = self._said = time.monotonic()

    def add(self, images: int, fresh: bool = True) -> None:
        """So many more are done; unless `fresh`, they were before, and count in no rate."""
        self._images += images
        if fresh:
            self._fresh += images
            self._bar.update(images)
        elif not self._bar.disable:
            self._bar.initial += images  # its rates are of what came since
            self._bar.n += images
            self._bar.last_print_n += images
            self._bar.update(0)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= LINE_S:
            of_all = "" if self._total is None else f" of {self._total}"
            rate = self._fresh / (now - self._began)
            print(f"{self._what}: {self._images}{of_all} images, {rate:,.0f} images/s", file=sys.stderr, flush=True)
            self._said = now

    def close(self) -> None:
        """The bar stays as it is."""
        self._bar.close()


def summary(plan: Plan, done: Counts, made: int, seconds: float) -> str:
    """What came of a run.

    Args:
        plan: its listing is finished.
        done: of all parts.
        made: images whose tables this process' run made.
        seconds: that it took.
    """
    assert plan.listed is not None, "the listing is finished"  # noqa: S101 - the run is
    lines = [
        f"{done.images:,} images by {plan.model.name}, version {plan.model.version}: {done.predictions:,} predictions, "
        f"{sum(done.unreadable.values()):,} unreadable."
    ]
    if done.unreadable:
        lines.append("unreadable: " + ", ".join(f"{code} {count:,}" for code, count in done.unreadable.items()) + ".")
    if done.classes:
        most = sorted(done.classes.items(), key=lambda row: -row[1])
        more = f", and {len(most) - MOST_CLASSES} classes more" if len(most) > MOST_CLASSES else ""
        lines.append("answers: " + ", ".join(f"{label} {count:,}" for label, count in most[:MOST_CLASSES]) + more + ".")
    if plan.listed.left_out:
        kind = "Parquet files" if plan.listed.parquet else "images"
        lines.append(f"left out: {plan.listed.left_out:,} other files, whose names do not end as those of {kind} do.")
    before = done.images - made
    rate = f"{made:,} images in {seconds:.1f} s, {made / max(seconds, 1e-9):,.0f} images/s" if made else "nothing to do"
    lines.append(f"{rate}; {before:,} images were done before." if before else f"{rate}.")
    return "\n".join(lines)
