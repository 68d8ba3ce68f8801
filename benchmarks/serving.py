"""This server against others that do the same job, on the same machine: `python benchmarks/serving.py --help`.

    apt-get install wrk && python benchmarks/serving.py

In one run, interleaved, several rounds, medians; requests and good answers per second, latency and errors at 1, 32 and
128 connections, of 32x32 JPEGs and of JPEGs of a megapixel, as multipart forms:

- ours: `python -m app`, which also says what every stage of the network believed;
- by hand: FastAPI and onnxruntime (`peers/by_hand.py`), by one process and by two;
- LitServe and BentoML (`peers/`), with batching; installed by uv into environments of their own;
- the least (`peers/least.py`): our decoder and batches in uvicorn without all the rest, for what more could be had.

Beside them what nobody can exceed: bare onnxruntime in a loop, without HTTP or decoding, and how near our route for
binary tensors (Open Inference Protocol, batches of 64) comes to it.

Each server is started anew for each kind of load in each round, alone, waited for, asked for the right class of several
images, and warmed up before each figure: a pool of 40 threads that has answered small images holds its memory in so
many pieces that the handler by hand answered a third fewer large ones after them. Servers and wrk share the CPUs. What
was measured is written after each server, so that a run that was cut off goes on with `--resume` and its id.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import onnxruntime

from app.cpus import usable_cpus
from benchmarks import wrk
from benchmarks.material import ROOT, Images, find_model, make_images, open_session, read_card, tensor_request
from benchmarks.servers import HOST, Running, ServerError, free_port, ours, running, workspace
from benchmarks.serving_report import LEAST, draw, table
from model.contract import IMAGE, LOGITS, MODEL_FILE, InterflowError
from training.files import replacing, write_text

PEERS = Path(__file__).parent / "peers"
LITSERVE, BENTOML = "litserve==0.2.19", "bentoml==1.4.39"
SIDES = {32: 16, 1024: 8}
"""Of the images in pixels, and how many different ones."""
TENSOR_BATCH, TENSOR_CONNECTIONS = 64, 4
BARE_BATCHES = (1, 32)
BARE = "bare onnxruntime"
ROUTE = "binary tensors"
CHECKED_IMAGES = 4
"""Of each size: every server has to name their classes."""


@dataclass(frozen=True)
class Contender:
    """A server that is measured.

    Attributes:
        name: for tables.
        start: of a port and a log, what `servers.running` takes.
        path: that images are posted to.
        field: of the form, that holds the image.
        label_of: the class in an answer.
    """

    name: str
    start: Callable[[int, Path], tuple[list[str], dict[str, str], int, str, Path]]
    path: str = "/predict"
    field: str = "image"
    label_of: Callable[[Any], str] = lambda answer: answer["label"]


def contenders(model: Path, exports: Path, peers: Path) -> dict[str, Contender]:
    """All of them, by the names of `--only`.

    Args:
        model: the artefact that they serve.
        exports: a repository that holds it alone.
        peers: folder of the environments of LitServe and BentoML.
    """
    cpus = usable_cpus()
    name = read_card(model).name

    def of_ours(workers: int) -> Contender:
        return Contender(
            "ours" if workers == 1 else f"ours, {workers} processes",
            lambda port, log: ours(exports, name, port, log, {"workers": workers}),
            label_of=lambda answer: answer["prediction"]["label"],
        )

    def by_hand(processes: int, threads: int) -> Contender:
        command = [
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(PEERS), "by_hand:app", "--host", HOST),
            *("--workers", str(processes), "--no-access-log", "--log-level", "warning"),
        ]
        settings = {"MODEL": str(model), "THREADS": str(threads)}
        return Contender(
            f"by hand, {processes} process{'es' * (processes > 1)} of {threads} thread{'s' * (threads > 1)}",
            lambda port, log: ([*command, "--port", str(port)], settings, port, "/health", log),
        )

    def litserve(port: int, log: Path) -> tuple[list[str], dict[str, str], int, str, Path]:
        command = [str(environment(LITSERVE, peers) / "python"), str(PEERS / "litserve_app.py")]
        settings = {"MODEL": str(model), "THREADS": "1", "WORKERS": str(cpus), "PORT": str(port)}
        return command, settings, port, "/health", log

    def bentoml(port: int, log: Path) -> tuple[list[str], dict[str, str], int, str, Path]:
        folder = environment(BENTOML, peers)
        command = [
            *(str(folder / "python"), "-m", "bentoml", "serve", "bentoml_app:Classifier"),
            *("--working-dir", str(PEERS), "--host", HOST, "--port", str(port)),
        ]
        settings = {
            "MODEL": str(model),
            "THREADS": str(cpus),
            "BENTOML_DO_NOT_TRACK": "true",
            "BENTOML_HOME": str(log.parent / "bentoml"),
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        }
        return command, settings, port, "/readyz", log

    def least(port: int, log: Path) -> tuple[list[str], dict[str, str], int, str, Path]:
        command = [sys.executable, "-m", "benchmarks.peers.least"]
        return command, {"MODEL": str(model), "PORT": str(port)}, port, "/health", log

    return {
        "ours": of_ours(1),
        "by-hand": by_hand(1, cpus),
        "by-hand-1": by_hand(1, 1),
        "by-hand-2": by_hand(2, max(1, cpus // 2)),
        "litserve": Contender("LitServe", litserve, field="request"),
        "bentoml": Contender("BentoML", bentoml, field="images", label_of=_label_of_first),
        "least": Contender(LEAST, least),
        "ours-2": of_ours(2),
    }


def _label_of_first(answer: list[dict[str, str]]) -> str:
    return answer[0]["label"]


def environment(requirement: str, peers: Path) -> Path:
    """The `bin` of an environment that holds a peer and our versions of what it uses; made where it is missing.

    Raises:
        ServerError: it could not be installed.
    """
    ours_too = [f"{name}=={version(name)}" for name in (_runtime(), "numpy", "pillow", "python-multipart")]
    digest = hashlib.sha256(" ".join([requirement, *ours_too, sys.version]).encode()).hexdigest()[:8]
    folder = peers / f"{requirement.replace('==', '-')}-{digest}"
    if not (folder / "complete").exists():
        print(f"installing {requirement} into {folder}", flush=True)
        for command in (
            ["venv", "--clear", "--python", sys.executable, str(folder)],
            ["pip", "install", "--python", str(folder / "bin" / "python"), requirement, *ours_too],
        ):
            try:
                # without our configuration, whose constraints are not the peer's
                subprocess.run(  # noqa: S603 - the peers are listed in this project
                    ["uv", "--quiet", "--no-config", *command],  # noqa: S607 - whichever uv the user has
                    check=True,
                    capture_output=True,
                    text=True,
                )
            except FileNotFoundError as error:
                raise ServerError("uv is not installed; pip install uv.") from error
            except subprocess.CalledProcessError as error:
                raise ServerError(
                    f"{requirement} cannot be installed: {' '.join(error.stderr.split())[-500:]}"
                ) from error
        (folder / "complete").touch()
    return folder / "bin"


def _runtime() -> str:
    """Which of its packages gives our onnxruntime."""
    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return "onnxruntime"
    return "onnxruntime-gpu"


def bare_rate(model: Path, pixels: np.ndarray, batch: int, seconds: float) -> float:
    """Images per second of onnxruntime alone: the better of one session with a thread per CPU and a session per CPU."""
    cpus = usable_cpus()
    images = np.resize(pixels, (batch, *pixels.shape[1:]))
    return max(
        _rate([open_session(model, threads) for _ in range(sessions)], images, seconds)
        for sessions, threads in {(1, cpus), (cpus, 1)}
    )


def _rate(sessions: Sequence[onnxruntime.InferenceSession], images: np.ndarray, seconds: float) -> float:
    counts = [0] * len(sessions)

    def run(place: int) -> None:
        sessions[place].run([LOGITS], {IMAGE: images})
        start.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            sessions[place].run([LOGITS], {IMAGE: images})
            counts[place] += 1

    start = threading.Barrier(len(sessions) + 1)
    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(sessions))]
    for thread in threads:
        thread.start()
    start.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) * len(images) / (time.perf_counter() - started)


class Measurement:
    """One run: its conditions, and a record of each figure of each round, kept in a file.

    Args:
        conditions: which a run that goes on must share.
        file: where it is kept; None: nowhere.
        resume: id of the run that goes on; None: a new one.

    Raises:
        InterflowError: that run is not in the file, or its conditions were others.
    """

    def __init__(self, conditions: dict[str, Any], file: Path | None, resume: str | None) -> None:
        now = datetime.now().astimezone()
        self.file = file
        self.run: dict[str, Any] = {
            "id": f"{now:%Y%m%d-%H%M%S}",
            "started": f"{now:%Y-%m-%d %H:%M %z}",
            "conditions": json.loads(json.dumps(conditions)),
            "records": [],
            "failures": {},
        }
        if resume is not None:
            if file is None or not file.exists():
                raise InterflowError(f"--resume {resume}: there is no {file} to go on with.")
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["id"] != resume:
                raise InterflowError(f"--resume {resume}: {file} holds the run {before['id']}.")
            for name, value in self.run["conditions"].items():
                if before["conditions"].get(name) != value:
                    raise InterflowError(
                        f"--resume {resume}: its {name} was {before['conditions'].get(name)}, and is {value} now; "
                        "figures of different conditions are not put together. Start anew, without --resume."
                    )
            self.run = before

    def has(self, server: str, round_: int) -> bool:
        """Whether a server was measured in a round."""
        return any(record["server"] == server and record["round"] == round_ for record in self.run["records"])

    def add(self, server: str, round_: int, records: Sequence[dict[str, Any]]) -> None:
        """Keep what was measured of a server in a round."""
        self.run["records"] += [{"server": server, "round": round_, **record} for record in records]
        self.run["failures"].pop(server, None)
        self._save()

    def fail(self, server: str, reason: str) -> None:
        """Keep why a server could not be measured."""
        self.run["failures"][server] = reason
        self._save()

    def _save(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(self.run, indent=1) + "\n")


def measure(
    contender: Contender, images: Sequence[Images], options: argparse.Namespace, folder: Path, tensors: str | None
) -> list[dict[str, Any]]:
    """Start a server for each kind of load, hold its answers against the model's, and load it.

    Args:
        contender: which.
        images: of each size.
        options: connections, seconds and warm-up.
        folder: for its log.
        tensors: name of the model, where the route for binary tensors is to be measured as well.

    Raises:
        InterflowError: it does not start, or does not say what the model says.
    """
    records = []
    for group in images:
        with running(*contender.start(free_port(), folder / "server.log")) as server:
            _check(contender, server, group)
            for connections in options.connections:
                load = _load(contender, server, group, connections, options.warm_up)
                load = _load(contender, server, group, connections, options.seconds)
                records.append({"images": group.name, "connections": connections, **asdict(load)})
                _say(contender.name, f"{group.name}, {connections} connections", load)
    if tensors is not None:
        with running(*contender.start(free_port(), folder / "server.log")) as server:
            body, json_bytes = tensor_request(images[0].pixels, TENSOR_BATCH)
            headers = ["Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {json_bytes}"]
            url = server.url(f"/v2/models/{tensors}/infer")
            for seconds in (options.warm_up, options.seconds):
                load = wrk.load(url, [body], headers, connections=TENSOR_CONNECTIONS, seconds=seconds)
            records.append({"images": ROUTE, "connections": TENSOR_CONNECTIONS, "batch": TENSOR_BATCH, **asdict(load)})
            _say(contender.name, f"{ROUTE} in batches of {TENSOR_BATCH}, {TENSOR_CONNECTIONS} connections", load)
    return records


def _load(contender: Contender, server: Running, group: Images, connections: int, seconds: int) -> wrk.Load:
    return wrk.load_images(
        server.url(contender.path), group.files, contender.field, connections=connections, seconds=seconds
    )


def _check(contender: Contender, server: Running, group: Images) -> None:
    """All servers must do the same work.

    Raises:
        ServerError: one that names another class than the model does.
    """
    for file, label in list(zip(group.files, group.labels, strict=True))[:CHECKED_IMAGES]:
        said = contender.label_of(server.classify(contender.path, file, contender.field))
        if said != label:
            raise ServerError(f"it says {said!r} of {file.name}, where the model says {label!r}.")


def _say(server: str, what: str, load: wrk.Load) -> None:
    errors = f", {load.errors} errors" if load.errors else ""
    print(
        f"  {server}: {what}: {load.per_second:,.1f} req/s, p50 {load.p50_ms:.1f} ms, p99 {load.p99_ms:.1f} ms{errors}",
        flush=True,
    )


def conditions(model: Path, images: Sequence[Images], options: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for figures to be put together, and what a reader has to know."""
    card = read_card(model)
    packages = (_runtime(), "fastapi", "uvicorn", "uvloop", "httptools", "numpy", "pillow")
    return {
        "cpu": _cpu(),
        "usable CPUs": usable_cpus(),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "versions": {name: version(name) for name in packages} | {"wrk": wrk.version()},
        "peers": [LITSERVE, BENTOML],
        "model": {
            "name": card.name,
            "backbone": f"{card.backbone.name} {card.method.name} x{card.backbone.width:g}",
            "sha256": hashlib.sha256((model / MODEL_FILE).read_bytes()).hexdigest(),
        },
        "images": {
            group.name: {
                "count": len(group.files),
                "mean_bytes": round(statistics.fmean(file.stat().st_size for file in group.files)),
            }
            for group in images
        },
        "connections": options.connections,
        "seconds": options.seconds,
        "warm-up seconds": options.warm_up,
        "rounds": options.rounds,
        "wrk command": (
            f"wrk --threads 1 --connections N --duration {options.seconds}s --timeout {wrk.TIMEOUT_S}s --latency "
            "--script benchmarks/wrk.lua"
        ),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Measure; print the table, and write it, the records and a picture."""
    options = _arguments()
    try:
        wrk.require_wrk()
        with workspace() as folder:
            model = find_model(options.model, folder / "exports")
            images = [make_images(model, folder, side, count) for side, count in SIDES.items()]
            exports = folder / "measured"
            (exports / model.parent.name).mkdir(parents=True)
            (exports / model.parent.name / model.name).symlink_to(model)
            out = options.out and options.out / "serving.json"
            measurement = Measurement(conditions(model, images, options), out, options.resume)
            print(f"run {measurement.run['id']}; cut off, it goes on with --resume {measurement.run['id']}", flush=True)
            everyone = contenders(model, exports, options.peers_dir)
            chosen = {name: everyone[name] for name in options.only}
            _rounds(measurement, chosen, model=model, images=images, options=options, folder=folder)
        text = table(measurement.run)
        print(f"\n{text}")
        if out:
            write_text(out.with_suffix(".md"), text)
            with replacing(options.picture) as temporary:
                draw(measurement.run, temporary)
            print(f"written: {out}, {out.with_suffix('.md')}, {options.picture}")
    except InterflowError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; no server is left.")


def _rounds(
    measurement: Measurement,
    chosen: dict[str, Contender],
    *,
    model: Path,
    images: Sequence[Images],
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """Every server once a round, in the same order."""
    turns = [(round_, name) for round_ in range(1, options.rounds + 1) for name in (BARE, *chosen)]
    for number, (round_, name) in enumerate(turns, 1):
        title = chosen[name].name if name in chosen else name
        print(f"[{number}/{len(turns)}] round {round_} of {options.rounds}: {title}", flush=True)
        if measurement.has(title, round_):
            print("  measured already")
        elif name == BARE:
            seconds = max(1, options.seconds / 4)
            rates = {batch: bare_rate(model, images[0].pixels, batch, seconds) for batch in BARE_BATCHES}
            print("  " + ", ".join(f"{rate:,.0f} images/s in batches of {batch}" for batch, rate in rates.items()))
            measurement.add(name, round_, [{"batch": batch, "per_second": rate} for batch, rate in rates.items()])
        else:
            try:
                tensors = read_card(model).name if name == "ours" else None
                measurement.add(title, round_, measure(chosen[name], images, options, folder, tensors))
            except (InterflowError, OSError) as error:  # the others can be measured all the same
                print(f"  failed: {error}", flush=True)
                measurement.fail(title, str(error))


def _arguments() -> argparse.Namespace:
    names = ["ours", "by-hand", "by-hand-2", "litserve", "bentoml", "least"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interflow" / "peers"
    parser = argparse.ArgumentParser(description="Requests per second and latency of this server and of its peers.")
    parser.add_argument("--model", type=Path, help="an artefact; default: exports/cifar10/1, else random weights")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*names, "by-hand-1", "ours-2"],
        default=names,
        help="servers to measure (default: all but by-hand-1, a session of one thread, and ours-2, two processes)",
    )
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--seconds", type=int, default=8, help="per figure (default: 8)")
    parser.add_argument("--warm-up", type=int, default=2, help="seconds before each figure (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one round of 1 s, written only with --out")
    parser.add_argument("--resume", metavar="ID", help="measure what this run in --out lacks, under its conditions")
    parser.add_argument("--peers-dir", type=Path, default=cache, help=f"environments of the peers (default: {cache})")
    parser.add_argument("--out", type=Path, help="folder for serving.json and serving.md (default: benchmarks/results)")
    parser.add_argument("--picture", type=Path, help="default: docs/serving.png; with --out, serving.png there")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.warm_up, options.rounds = 1, 1, 1
    elif options.out is None:
        options.out = ROOT / "benchmarks" / "results"
        options.picture = options.picture or ROOT / "docs" / "serving.png"
    if options.out is not None:
        options.picture = options.picture or options.out / "serving.png"
    return options


if __name__ == "__main__":
    main()
