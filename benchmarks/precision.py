"""What fewer bits give and cost: `python benchmarks/precision.py exports/cifar10/1 exports/cifar10-int8/1 ...`.

The artefacts of one network, float32 first (`training/export.py --run R`, and the same with `--precision int8` and
`float16`). Times are medians over rounds in which the artefacts take turns, in bare onnxruntime on the CPU, all outputs
computed; the images are noise, which costs what photographs cost. "Cut" is the graph in the segments that adaptive
depth runs, one after another, all images to the end. Accuracy and agreement are those of the cards, of all test images.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: `training` below would be this folder's
    del sys.path[0]

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from tqdm import tqdm

from model.contract import CARD_FILE, IMAGE, MODEL_FILE, InterflowError, ModelCard
from model.cpu import cpu_features
from model.cut import CutError, cut
from training import cli
from training.files import write_text

THREADS = (1, 2)
BATCHES = (1, 32)
IMAGES_A_TURN = 64
"""And once at least: long enough to be timed, short enough to take turns often."""


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description="Speed, size, accuracy and agreement of a network in fewer bits.")
    parser.add_argument("folders", type=Path, nargs="+", help="exports/<model>/<version>, that in float32 first")
    parser.add_argument("--rounds", type=int, default=31, help="default: 31")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and the time that it computed: near what a quiet machine would take, on one that is busy",
    )
    parser.add_argument("--out", type=Path, help="a Markdown file to write, and a JSON file of the same name")
    options = parser.parse_args()

    cards = [ModelCard.from_json((folder / CARD_FILE).read_bytes(), folder) for folder in options.folders]
    if cards[0].precision != "float32" or any(card.outputs != cards[0].outputs for card in cards):
        raise InterflowError("expected artefacts of one network, that in float32 first.")
    rows: list[dict[str, Any]] = [
        {
            "model": card.name,
            "precision": card.precision,
            "megabytes": (folder / MODEL_FILE).stat().st_size / 1e6,
            "accuracy": card.metrics.accuracy,
            "branch_accuracy": card.metrics.branch_accuracy,
            "against_float32": card.against_float32 and card.against_float32.model_dump(mode="json"),
            "times": [],
        }
        for folder, card in zip(options.folders, cards, strict=True)
    ]
    counts = THREADS[:1] if options.cpu_time else THREADS
    clock = time.process_time if options.cpu_time else time.perf_counter
    with tqdm(total=len(counts) * len(BATCHES) * options.rounds, unit="round", disable=None) as bar:
        for threads in counts:
            for batch in BATCHES:
                timed = measure(
                    options.folders, cards[0], threads=threads, batch=batch, rounds=options.rounds, clock=clock, bar=bar
                )
                for row, (whole, pieces) in zip(rows, timed, strict=True):
                    row["times"].append(
                        {"threads": threads, "batch": batch, "milliseconds": whole, "milliseconds_cut": pieces}
                    )
    of_what = "CPU time" if options.cpu_time else "time"
    conditions = (
        f"{of_what} in onnxruntime {onnxruntime.__version__} on {platform.system()}, CPU: {', '.join(cpu_features())}; "
        f"medians of {options.rounds} rounds; {cards[0].metrics.images} test images of {cards[0].metrics.data}"
    )
    text = table(rows, conditions)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, text)
        write_text(
            options.out.with_suffix(".json"), json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"
        )


def measure(
    folders: list[Path],
    card: ModelCard,
    *,
    threads: int,
    batch: int,
    rounds: int,
    clock: Callable[[], float],
    bar: tqdm,
) -> list[tuple[float, float | None]]:
    """Milliseconds a batch of every artefact, whole and cut (None: it cannot be), medians; they take turns."""
    spec = card.input
    images = np.random.default_rng(0).integers(0, 256, (batch, spec.height, spec.width, spec.channels), np.uint8)
    ways = [way for folder in folders for way in (_whole(folder, threads), _in_pieces(folder, card, threads))]
    taken: list[list[float]] = [[] for _ in ways]
    turns = max(1, IMAGES_A_TURN // batch)
    for round_ in range(rounds + 1):  # the first is to warm up
        for seconds, run in zip(taken, ways, strict=True):
            if run is None:
                continue
            started = clock()
            for _ in range(turns):
                run(images)
            if round_:
                seconds.append((clock() - started) / turns)
        bar.update(bool(round_))
    medians = [1e3 * statistics.median(seconds) if seconds else None for seconds in taken]
    return [(whole or 0.0, pieces) for whole, pieces in zip(medians[::2], medians[1::2], strict=True)]


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the server does
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _whole(folder: Path, threads: int) -> Callable[[np.ndarray], object]:
    session = _session((folder / MODEL_FILE).read_bytes(), threads)
    return lambda images: session.run(None, {IMAGE: images})


def _in_pieces(folder: Path, card: ModelCard, threads: int) -> Callable[[np.ndarray], object] | None:
    try:
        segments = cut(onnx.load_model(folder / MODEL_FILE), len(card.stages))
    except CutError:
        return None
    sessions = [_session(segment.model, threads) for segment in segments]

    def run(images: np.ndarray) -> None:
        values = {IMAGE: images}
        for segment, session in zip(segments, sessions, strict=True):
            made = session.run(list(segment.outputs), {name: values[name] for name in segment.inputs})
            values |= dict(zip(segment.outputs, made, strict=True))

    return run


def table(rows: list[dict[str, Any]], conditions: str) -> str:
    """Two tables in Markdown: what it gives, and what it costs."""
    lines = [
        "# Fewer bits",
        "",
        f"By `benchmarks/precision.py`; {conditions}.",
        "",
        "| precision | MB | threads | batch | ms a batch | images/s | against float32 | cut, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for place, first in enumerate(rows[0]["times"]):
        for row in rows:
            found = row["times"][place]
            took, pieces = found["milliseconds"], found["milliseconds_cut"]
            lines.append(
                f"| {row['precision']} | {row['megabytes']:.1f} | {found['threads']} | {found['batch']} | "
                f"{took:.3f} | {1e3 * found['batch'] / took:,.0f} | "
                f"{first['milliseconds'] / took:.2f} x | {'-' if pieces is None else f'{pieces:.3f}'} |"
            )
    lines += [
        "",
        "| precision | accuracy | in float32 | same answer | readings of the stages | same readings | sums exact to |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        against = row["against_float32"]
        readings = " / ".join(f"{value:.2%}" for value in row["branch_accuracy"])
        same = "-" if against is None else " / ".join(f"{value:.2%}" for value in against["branch_agreement"])
        others = ["-"] * 2 if against is None else [f"{against[name]:.2%}" for name in ("accuracy", "agreement")]
        residual = "-" if against is None else f"{against['residual']:.1e}"
        lines.append(
            f"| {row['precision']} | {row['accuracy']:.2%} | {others[0]} | {others[1]} | {readings} | {same} | "
            f"{residual} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
