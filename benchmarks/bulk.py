"""What an archive costs beside the network alone: `python benchmarks/bulk.py --help`.

    python benchmarks/bulk.py --images 10000 --many 1000000

Rounds take turns, and medians count. Bare is onnxruntime alone, on decoded arrays: one session of as many threads as
there are CPUs, and a process of one thread for each CPU, in batches of 32 and, as bulk's own are, of 256; the best one
counts. Bulk is the command `python -m app.bulk`, from files and from a Parquet file of their bytes. Of each command the
rate is that between `START_IMAGES` and all images, so that starting (imports, loading, listing the first) cancels out;
the whole time is given beside it. Then memory: the peak of the command's processes together, sampled, at `--images` and
at `--many`.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from app.cpus import usable_cpus
from app.settings import variable
from benchmarks.material import ROOT, SHIPPED
from model.contract import (
    BRANCH_LOGITS,
    BRANCH_WEIGHTS,
    CARD_FILE,
    IMAGE,
    LOGITS,
    MODEL_FILE,
    InterflowError,
    ModelCard,
)
from model.cpu import cpu_features
from model.images import read_input
from training import cli
from training.files import write_text

NAMES = [LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS]
BARE_WAYS = {
    "bare, one session, batches of 32": (1, None, 32),
    "bare, processes, batches of 32": (None, 1, 32),
    "bare, processes, batches of 256": (None, 1, 256),
}
"""Processes, threads of each and images of a batch; None: one per CPU."""
START_IMAGES = 2048
BARE_IMAGES = 6144
SAMPLE_S = 0.25
RESULTS = ROOT / "benchmarks" / "results" / "bulk.md"


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description="Rate and memory of python -m app.bulk, beside bare onnxruntime.")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "cifar10" / "test", help="a folder of images")
    parser.add_argument("--images", type=int, default=10_000, help="of a round (default: 10000)")
    parser.add_argument("--many", type=int, default=0, help="images of the second look at memory; 0: none")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Markdown; JSON beside it")
    options = parser.parse_args()
    files = sorted(path for path in options.data.rglob("*") if path.is_file())
    if len(files) < START_IMAGES or options.images <= START_IMAGES:
        raise InterflowError(f"{options.data} holds {len(files)} files; expected more than {START_IMAGES} images.")
    cpus = usable_cpus()
    card = ModelCard.from_json((SHIPPED / CARD_FILE).read_bytes(), SHIPPED)
    with tempfile.TemporaryDirectory(prefix="interflow-") as name:
        folder = Path(name)
        pixels = np.stack([read_input(path, card.input) for path in files[:BARE_IMAGES]])
        np.save(folder / "pixels.npy", pixels)
        inputs = {
            (kind, images): make(folder / f"{kind}-{images}", files, images)
            for kind, make in (("files", as_files), ("Parquet", as_parquet))
            for images in (START_IMAGES, options.images)
        }
        rates: dict[str, list[float]] = {}
        wholes: dict[str, list[float]] = {}
        peak = 0.0
        for round_ in tqdm(range(options.rounds), unit="round", disable=None):
            for way, (processes, threads, batch) in BARE_WAYS.items():
                rate = bare(folder / "pixels.npy", processes or cpus, threads or cpus, batch)
                rates.setdefault(way, []).append(rate)
            for kind in ("files", "Parquet"):
                taken = {}
                for images in (START_IMAGES, options.images):
                    taken[images], memory = bulk(inputs[kind, images], folder / f"out-{kind}-{images}-{round_}")
                    peak = max(peak, memory) if (kind, images) == ("files", options.images) else peak
                took = taken[options.images] - taken[START_IMAGES]
                rates.setdefault(f"bulk, {kind}", []).append((options.images - START_IMAGES) / took)
                wholes.setdefault(f"bulk, {kind}", []).append(options.images / taken[options.images])
        many = None
        if options.many:
            took, memory = bulk(as_files(folder / "many", files, options.many), folder / "out-many")
            many = {"images": options.many, "seconds": took, "rate": options.many / took, "megabytes": memory}
    found = {
        "conditions": f"onnxruntime {onnxruntime.__version__} on {platform.system()}, {cpus} CPUs: "
        f"{', '.join(cpu_features())}; {card.name}, version {card.version}, {card.precision}; "
        f"{files[0].suffix[1:]} of {pixels.shape[1]}x{pixels.shape[2]} pixels; medians of {options.rounds} rounds",
        "rates": rates,
        "whole_rates": wholes,
        "memory": {"images": options.images, "megabytes": peak},
        "many": many,
    }
    text = table(found)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, text)
    write_text(options.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


def as_files(folder: Path, files: list[Path], images: int) -> Path:
    """A folder of so many images: links to the files, again and again, a thousand a folder."""
    for number in range(images):
        inner = folder / f"{number // 1000:04d}"
        if number % 1000 == 0:
            inner.mkdir(parents=True)
        link, file = inner / f"{number:07d}{files[0].suffix}", files[number % len(files)]
        try:
            link.hardlink_to(file)
        except OSError:  # another disk
            link.symlink_to(file)
    return folder


def as_parquet(path: Path, files: list[Path], images: int) -> Path:
    """A Parquet file of the bytes of so many images."""
    path = path.with_suffix(".parquet")
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for first in range(0, images, 1000):
            of_group = [files[number % len(files)].read_bytes() for number in range(first, min(first + 1000, images))]
            writer.write_table(pa.table([of_group], schema))
    return path


def bulk(given: Path, out: Path) -> tuple[float, float]:
    """Seconds that the command takes, and the peak of its processes' memory together in megabytes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "app.bulk", "--model", SHIPPED.parent.name, "--version", SHIPPED.name]
    process = subprocess.Popen(  # noqa: S603 - our own
        [*command, str(given), str(out)],
        cwd=ROOT,
        env=os.environ | {variable("exports"): str(SHIPPED.parents[1]), variable("provider"): "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(_megabytes, _family(process.pid))))
        time.sleep(SAMPLE_S)
    took = time.perf_counter() - started
    if process.returncode:
        raise InterflowError((process.stderr.read() if process.stderr else b"").decode().strip())
    return took, peak


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return  # it has ended
    for child in children:
        yield from _family(int(child))


def _megabytes(pid: int) -> float:
    """Resident memory; what processes share counts for each."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def bare(pixels: Path, processes: int, threads: int, batch: int) -> float:
    """Images per second of onnxruntime alone; all processes begin when each is ready."""
    spawning = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for _ in range(processes):
        ours, theirs = spawning.Pipe()
        workers.append(spawning.Process(target=_run_bare, args=(theirs, str(pixels), threads, batch)))
        workers[-1].start()
        pipes.append(ours)
    images = sum(pipe.recv() for pipe in pipes)
    started = time.perf_counter()
    for pipe in pipes:
        pipe.send(None)
    for pipe in pipes:
        pipe.recv()
    took = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return images / took


def _run_bare(pipe: Connection, file: str, threads: int, batch: int) -> None:
    pixels = np.load(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(SHIPPED / MODEL_FILE, options, ["CPUExecutionProvider"])

    def run(images: np.ndarray) -> None:
        for first in range(0, len(images), batch):
            session.run(NAMES, {IMAGE: images[first : first + batch]})

    run(pixels[: 8 * batch])
    pipe.send(len(pixels))
    pipe.recv()
    run(pixels)
    pipe.send(None)


def table(found: dict) -> str:
    """The results in Markdown."""
    medians = {way: statistics.median(rates) for way, rates in found["rates"].items()}
    best = max(rate for way, rate in medians.items() if way.startswith("bare"))
    lines = [
        "# An archive of images",
        "",
        f"By `benchmarks/bulk.py`; {found['conditions']}. Of bulk, the rate beside what starting takes, and the whole.",
        "",
        "| | images/s | of bare | with the start |",
        "| --- | --- | --- | --- |",
    ]
    for way, rate in medians.items():
        whole = statistics.median(found["whole_rates"][way]) if way in found["whole_rates"] else None
        lines.append(f"| {way} | {rate:,.0f} | {rate / best:.1%} | {'-' if whole is None else f'{whole:,.0f}'} |")
    lines += ["", "| images | memory of all processes, MB | seconds | images/s |", "| --- | --- | --- | --- |"]
    memory, many = found["memory"], found["many"]
    lines.append(f"| {memory['images']:,} | {memory['megabytes']:,.0f} | - | - |")
    if many:
        lines.append(
            f"| {many['images']:,} | {many['megabytes']:,.0f} | {many['seconds']:,.0f} | {many['rate']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
