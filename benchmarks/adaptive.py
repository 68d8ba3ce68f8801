"""What stopping early saves, and what it loses: `python benchmarks/adaptive.py --help`.

    apt-get install wrk && python benchmarks/adaptive.py

On the test images of the models' own data, which no threshold was fitted on, for each promise on the card (`exits`):

- accuracy, how many images stop at which stage, and whether those that go all the way have the full answer;
- images per second of the network in batches of 1 and 32, against full depth: in turn, several rounds, medians of the
  rounds' ratios;
- requests per second of the server (`python -m app`) to JPEGs of these images, full and adaptive, by wrk with 32
  connections, by default and with one lane of one thread (`THROUGHPUT`), beside bare onnxruntime, which runs the first
  model whole, without HTTP or decoding.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from tqdm import tqdm

from app.cpus import usable_cpus
from app.inference import STOPS
from app.session import Session
from app.settings import Settings
from benchmarks import wrk
from benchmarks.adaptive_report import draw, page
from benchmarks.material import ROOT, SHIPPED
from benchmarks.servers import free_port, ours, running
from benchmarks.serving import bare_rate
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LOGITS, InterflowError
from model.explain import readings
from training import cli
from training.evaluation_data import load_images
from training.files import replacing, write_text
from training.subjects import open_subject

MODELS = (SHIPPED, SHIPPED.parents[1] / "cifar10-int8" / "1")
NAMES = (LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS)
"""Outputs that an answer is made of."""
BATCHES = (1, 32)
CONNECTIONS = 32
JPEGS = 256
JPEG_QUALITY = 95
FULL = "full"
SERVED_PROMISES = 2
"""Of the strictest, over HTTP."""
THROUGHPUT = {"lanes": 1, "threads": 1}
"""Settings for requests of single images to a network that is done at once: they leave a CPU to Python, which has more
to do than the network."""


@dataclass(frozen=True)
class Material:
    """A model and the test images of its data, uint8 (N, H, W, C) with labels (N,)."""

    folder: Path
    session: Session
    images: np.ndarray
    labels: np.ndarray

    @property
    def name(self) -> str:
        """Of the model."""
        return self.session.card.name

    def thresholds(self, promise: float, count: int) -> np.ndarray:
        """(count, B - 1), of one of the card's policies."""
        policy = next(policy for policy in self.session.card.exits if policy.max_loss == promise)
        return np.tile([np.inf if limit is None else limit for limit in policy.thresholds], (count, 1))


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write table, figures and picture; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure what stopping early saves and loses.")
    parser.add_argument("--models", type=Path, nargs="+", help="artefacts; default: the shipped ones, float32 first")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the models' data lies")
    parser.add_argument("--threads", type=int, default=1, help="of the network by itself (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=int, default=6, help="per figure of the server (default: 6)")
    parser.add_argument("--images", type=int, help="test images, the first ones; default: all")
    parser.add_argument("--no-server", action="store_true", help="the networks alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of table and figures")
    parser.add_argument("--picture", type=Path, help="default: docs/adaptive.png; with --out, adaptive.png there")
    options = parser.parse_args(arguments)
    own = options.out == ROOT / "benchmarks" / "results"
    picture = options.picture or (ROOT / "docs" if own else options.out) / "adaptive.png"

    materials = [_material(folder, options) for folder in options.models or [path for path in MODELS if path.is_dir()]]
    found: dict[str, Any] = {
        "conditions": _conditions(options, materials),
        "models": {material.name: _answers(material) for material in materials},
    }
    _time(materials, options.rounds, found["models"])
    if not options.no_server:
        found["served"] = _serve(materials, options.rounds, options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "adaptive.json", json.dumps(found, indent=1) + "\n")
    write_text(options.out / "adaptive.md", page(found))
    with replacing(picture) as temporary:
        draw(found, temporary)
    print(page(found))
    return 0


def _material(folder: Path, options: argparse.Namespace) -> Material:
    session = Session(folder, Settings(provider="cpu", threads=options.threads))
    if not session.card.exits:
        raise InterflowError(f"{folder}: its card has no exits, so no image can stop early; export it again.")
    subject = open_subject(folder, torch.device("cpu"))
    split = load_images(subject, None, "test", {"data_dir": options.data_dir}).images
    batches = list(split.in_order(1000, workers=0))
    images, labels = (torch.cat(part)[: options.images].numpy() for part in zip(*batches, strict=True))
    return Material(folder, session, images, labels)


def _conditions(options: argparse.Namespace, materials: Sequence[Material]) -> dict[str, Any]:
    return {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "machine": f"{_processor()}, {usable_cpus()} usable CPUs; {platform.platform()}",
        "versions": {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
        "threads": options.threads,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "images": len(materials[0].images),
        "data": materials[0].session.card.metrics.data,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _answers(material: Material) -> dict[str, Any]:
    """Right answers, agreement with full depth, and stops, of every promise."""
    card = material.session.card
    full = _run(material, None, f"{material.name}, full depth")
    answers = full[LOGITS].argmax(axis=1)
    rows: dict[str, Any] = {
        FULL: {
            "accuracy": float((answers == material.labels).mean()),
            "branch_accuracy": [
                float((said == material.labels).mean())
                for said in readings(full[BRANCH_LOGITS], np.asarray(card.reading_scales)).argmax(axis=2).T
            ],
        }
    }
    for policy in card.exits:
        found = _run(material, policy.max_loss, f"{material.name}, at most {policy.max_loss:.2%} lost")
        stops, last = found[STOPS], len(card.stages) - 1
        beliefs = readings(found[BRANCH_LOGITS], np.asarray(card.reading_scales))
        at_stop = beliefs[np.arange(len(stops)), stops].argmax(axis=1)
        whole = stops == last
        said = np.where(whole, np.where(whole[:, np.newaxis], found[LOGITS], 0).argmax(axis=1), at_stop)
        scale = np.abs(full[LOGITS]).max()
        rows[f"{policy.max_loss:g}"] = {
            "accuracy": float((said == material.labels).mean()),
            "agreement": float((said == answers).mean()),
            "stops": (np.bincount(stops, minlength=last + 1) / len(stops)).tolist(),
            "work": float(np.take([stage.work for stage in card.stages], stops).mean()),
            "whole_differs_by": float(np.abs(found[LOGITS] - full[LOGITS])[whole].max(initial=0) / scale),
        }
    return {"stages": [stage.name for stage in card.stages], "precision": card.precision, "answers": rows}


def _run(material: Material, promise: float | None, label: str) -> dict[str, np.ndarray]:
    parts = []
    for start in tqdm(range(0, len(material.images), 32), desc=label, leave=False, disable=None):
        images = material.images[start : start + 32]
        limits = None if promise is None else material.thresholds(promise, len(images))
        parts.append(material.session.run(images, NAMES, limits))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _time(materials: Sequence[Material], rounds: int, models: dict[str, Any]) -> None:
    """Images per second of every model, batch and promise: all in turn in each round, over the same images."""
    seen: dict[tuple[str, int, str], list[float]] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for material in materials:
            for batch in BATCHES:
                images = material.images[: 256 if batch == 1 else 1024]
                for promise in (None, *(policy.max_loss for policy in material.session.card.exits)):
                    limits = None if promise is None else material.thresholds(promise, batch)
                    started = time.perf_counter()
                    for start in range(0, len(images) - batch + 1, batch):
                        material.session.run(images[start : start + batch], NAMES, limits)
                    rate = len(images) / (time.perf_counter() - started)
                    mode = FULL if promise is None else f"{promise:g}"
                    seen.setdefault((material.name, batch, mode), []).append(rate)
    for (name, batch, mode), rates in seen.items():
        of_full = seen[name, batch, FULL]
        models[name]["answers"][mode][f"batch {batch}"] = {
            "images_per_second": statistics.median(rates),
            "times_full": statistics.median(rate / full for rate, full in zip(rates, of_full, strict=True)),
        }


def _serve(materials: Sequence[Material], rounds: int, seconds: int) -> dict[str, Any]:
    """Requests per second over HTTP; all in turn in each round."""
    seen: dict[str, list[float]] = {}
    p99: dict[str, list[float]] = {}
    errors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for _ in tqdm(range(rounds), desc="rounds of the server", disable=None):
            first = materials[0]
            seen.setdefault("bare", []).append(bare_rate(first.folder, first.images[:32], 32, seconds))
            for material in materials:
                files, exports = _jpegs(material, folder), material.folder.parents[1]
                promises = [f"{policy.max_loss:g}" for policy in material.session.card.exits[:SERVED_PROMISES]]
                for settings, kind in (({}, ""), (THROUGHPUT, ", one lane")):
                    with running(*ours(exports, material.name, free_port(), folder / "log", settings)) as server:
                        for mode in (FULL, *promises):
                            url = server.url("/predict" if mode == FULL else f"/predict?mode=adaptive&max_loss={mode}")
                            for length in (1, seconds):
                                load = wrk.load_images(url, files, "image", connections=CONNECTIONS, seconds=length)
                            name = f"{material.name} {mode}{kind}"
                            seen.setdefault(name, []).append(load.per_second)
                            p99.setdefault(name, []).append(load.p99_ms)
                            errors += load.errors
    return {
        "connections": CONNECTIONS,
        "errors": errors,
        "per_second": {name: statistics.median(rates) for name, rates in seen.items()},
        "of_bare": {
            name: statistics.median(rate / bare for rate, bare in zip(rates, seen["bare"], strict=True))
            for name, rates in seen.items()
        },
        "p99_ms": {name: statistics.median(values) for name, values in p99.items()},
    }


def _jpegs(material: Material, folder: Path) -> list[Path]:
    """The first test images, as clients would send them."""
    files = []
    for place, pixels in enumerate(material.images[:JPEGS]):
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "JPEG", quality=JPEG_QUALITY)
        files.append(folder / f"{material.name}-{place}.jpg")
        files[-1].write_bytes(buffer.getvalue())
    return files


if __name__ == "__main__":
    os.chdir(ROOT)
    cli.run(main)
