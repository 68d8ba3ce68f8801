"""What must hold of the server under load, for long or at its end: `python benchmarks/soak.py MODE`.

- million: a million requests, or as many as --minutes give: no error, memory flat (docs/soak.png);
- reload: a new version of the model loaded 100 times under full load: no failed request, no wrong answer, memory flat;
- drain: SIGTERM under load: every accepted request answered, exit code 0;
- overload: 1,000 connections that ask ten times as much as the server can: 200 or 429 and nothing else, the 200s in
  bounded time, and of them no less than 80 % of the most there can be.

One line for each thing that must hold; exit code 1 where one does not. The load comes from wrk, and from a client that
checks every answer where answers may be wrong or missing. The client and wrk share the CPUs with the server.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import asyncio
import http.client
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from typing import Any

import numpy as np

from app.versions import find_versions
from benchmarks import wrk
from benchmarks.client import Check, Client
from benchmarks.material import ROOT, Images, find_model, make_images, read_card, with_version
from benchmarks.servers import MemorySampler, Running, ask, free_port, ours, running, workspace
from model.contract import InterflowError, ModelCard
from model.explain import fused_confidences, readings
from training.exits import stopping_stages
from training.files import replacing, write_text

KEY = "a-key-for-this-benchmark-alone"
PATH, FIELD = "/predict", "image"
CHUNK_S = 60
"""Of the million: one figure of wrk each."""
GROWTH = 0.05
"""Memory is flat where the median of its last fifth exceeds that of its second by no more. The first fifth is left out:
allocators fill their pools."""
OVERLOAD_CONNECTIONS, OVERLOAD_FACTOR = 1000, 10
CHECKED_CONNECTIONS = 50
"""Of those of the overload: of the client that times every answer."""
PEAK_CONNECTIONS = (32, 128)
PEAK_SHARE = 0.8
CONFIDENCE_TOLERANCE = 0.002
TEMPERATURES = (1.0, 1.5, 2.0)
"""Of the versions that are loaded in turn."""


class Verdicts:
    """What was found; prints one line each."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def add(self, what: str, holds: bool, measured: str) -> None:
        """Something that must hold."""
        self.found.append({"what": what, "holds": holds, "measured": measured})
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {measured}", flush=True)

    def add_none(self, what: str, bad: Sequence[str], of: int) -> None:
        """Something that must not have happened."""
        examples = "".join(f"; {count} x {text}" for text, count in Counter(bad).most_common(3))
        self.add(what, not bad, f"{len(bad)} of {of:,}{examples}")

    def add_flat(self, sizes: Sequence[int]) -> None:
        """Memory that must not grow: bytes, over time or over loads."""
        share = growth(sizes)
        if share is None:
            self.add("memory flat", False, f"{len(sizes)} samples are too few to say; it takes 10")
        else:
            text = f"{share:+.1%} between second and last fifth; at most {max(sizes) / 2**20:,.0f} MiB"
            self.add("memory flat", share <= GROWTH, text)


def growth(sizes: Sequence[float]) -> float | None:
    """Median of the last fifth over that of the second, less 1; None of fewer than ten."""
    fifth = len(sizes) // 5
    if fifth < 2:
        return None
    return statistics.median(sizes[-fifth:]) / statistics.median(sizes[fifth : 2 * fifth]) - 1


def checker(images: Images, card: ModelCard, temperatures: Mapping[str, float], max_loss: float | None = None) -> Check:
    """Holds an answer against the model's, by the version that it names.

    Args:
        images: in the order of their numbers.
        card: of all versions, but for the temperature.
        temperatures: of each version; more may come.
        max_loss: a promise of the card, where the answers are adaptive.
    """
    expected: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def check(number: int, body: bytes) -> str | None:
        answer = json.loads(body)
        version, said = answer["model"]["version"], answer["prediction"]
        if version not in temperatures:
            return f"version {version}, which is not there"
        if version not in expected:
            expected[version] = _expected(images, card, temperatures[version], max_loss)
        labels, confidences = (of_all[number] for of_all in expected[version])
        if said["label"] != card.classes[labels]:
            return f"{said['label']} instead of {card.classes[labels]}"
        if abs(said["confidence"] - confidences) > CONFIDENCE_TOLERANCE:
            return f"confidence {said['confidence']} instead of {confidences:.3f} in version {version}"
        return None

    return check


def _expected(
    images: Images, card: ModelCard, temperature: float, max_loss: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Class and confidence of each answer."""
    said = fused_confidences(images.logits, temperature, card.power)
    if max_loss is not None:
        policy = next(policy for policy in card.exits if policy.max_loss == max_loss)
        limits = np.array([np.inf if limit is None else limit for limit in policy.thresholds])
        beliefs = readings(images.branch_logits, np.asarray(card.reading_scales))
        stops = stopping_stages(beliefs[:, :-1].max(axis=2), limits)
        early = np.flatnonzero(stops < len(limits))
        said[early] = beliefs[early, stops[early]]
    return said.argmax(axis=1), said.max(axis=1)


class Soak:
    """One mode's run.

    Args:
        model: the artefact that is served.
        images: what is asked.
        folder: for the repository and the logs.
        options: of the command line.
    """

    def __init__(self, model: Path, images: Images, folder: Path, options: argparse.Namespace) -> None:
        self.verdicts = Verdicts()
        self.options = options
        self._model = model
        self._card = read_card(model)
        self._images = images
        self._folder = folder
        self._exports = folder / "served"
        shutil.copytree(model, self._exports / self._card.name / model.name)
        self._path = PATH if options.adaptive is None else f"{PATH}?mode=adaptive&max_loss={options.adaptive}"
        self._temperatures = {self._card.version: self._card.temperature}
        self._check = checker(images, self._card, self._temperatures, options.adaptive)

    def server(self) -> AbstractContextManager[Running]:
        """This project's, with what --set says."""
        settings = {"management_key": KEY, **dict(text.split("=", 1) for text in self.options.set)}
        return running(*ours(self._exports, self._card.name, free_port(), self._folder / "server.log", settings))

    def client(self, server: Running) -> Client:
        """One that checks every answer."""
        bodies = [wrk.multipart(file, FIELD) for file in self._images.files]
        return Client(server.port, self._path, bodies, self._check)

    def load(self, server: Running, connections: int, seconds: int, pause_s: float = 0) -> wrk.Load:
        """By wrk."""
        return wrk.load_images(
            server.url(self._path), self._images.files, FIELD, connections=connections, seconds=seconds, pause_s=pause_s
        )

    def million(self) -> dict[str, Any]:
        """Many requests, one after the other."""
        loads: list[wrk.Load] = []
        with self.server() as server, MemorySampler(server) as memory:
            end = time.monotonic() + 60 * self.options.minutes
            while (left := end - time.monotonic()) >= 1 and sum(
                load.requests for load in loads
            ) < self.options.requests:
                loads.append(self.load(server, self.options.connections, round(min(left, CHUNK_S))))
                print(
                    f"{sum(load.requests for load in loads):>9,} requests; {loads[-1].per_second:,.0f} req/s, p99 "
                    f"{loads[-1].p99_ms:.0f} ms, {server.memory_bytes() / 2**20:,.0f} MiB",
                    flush=True,
                )
        requests, errors = sum(load.requests for load in loads), sum(load.errors for load in loads)
        self.verdicts.add("no error", errors == 0, f"{errors} of {requests:,}")
        self.verdicts.add_flat([size for _, size in memory.samples])
        draw(loads, memory, self.options)
        return {"loads": [asdict(load) for load in loads], "memory": memory.samples}

    def reload(self) -> dict[str, Any]:
        """New versions, one after the other, while others ask."""
        with self.server() as server, MemorySampler(server) as memory:
            client = self.client(server)
            seconds, sizes = asyncio.run(self._reload(server, client))
        tally = client.tally
        bad = [f"status {status}" for status, count in tally.statuses.items() if status != 200 for _ in range(count)]
        self.verdicts.add_none("no failed request", bad + tally.lost, tally.answered + len(tally.lost))
        self.verdicts.add_none("no wrong answer", tally.wrong, tally.statuses[200])
        self.verdicts.add("loads", len(seconds) == self.options.times, f"{len(seconds)} of {self.options.times}")
        self.verdicts.add_flat(sizes)
        return {"statuses": tally.statuses, "load_seconds": seconds, "sizes": sizes, "memory": memory.samples}

    async def _reload(self, server: Running, client: Client) -> tuple[list[float], list[int]]:
        """Seconds that each load took, and bytes of memory after it."""
        load = asyncio.create_task(client.keep_asking(self.options.connections))
        seconds: list[float] = []
        sizes: list[int] = []
        name, first = self._card.name, int(self._card.version)
        try:
            for version in range(first + 1, first + 1 + self.options.times):
                temperature = TEMPERATURES[version % len(TEMPERATURES)]
                self._temperatures[str(version)] = temperature
                await asyncio.to_thread(with_version, self._model, version, temperature, self._exports)
                asked = time.monotonic()
                path, headers = f"/v2/repository/models/{name}/load", {"Authorization": f"Bearer {KEY}"}
                await asyncio.to_thread(server.ask, "POST", path, None, headers)
                seconds.append(time.monotonic() - asked)
                answer = await asyncio.to_thread(server.classify, PATH, self._images.files[0], FIELD)
                if answer["model"]["version"] != str(version):
                    client.tally.wrong.append(f"version {answer['model']['version']} after another was loaded")
                sizes.append(server.memory_bytes())
                for old in find_versions(self._exports)[name][:-2]:
                    shutil.rmtree(old.folder)
                if len(seconds) % 10 == 0:
                    print(
                        f"{len(seconds):>4} loads, {client.tally.answered:,} answers, {sizes[-1] / 2**20:,.0f} MiB",
                        flush=True,
                    )
        finally:
            client.stopping = True
            await load
        return seconds, sizes

    def drain(self) -> dict[str, Any]:
        """SIGTERM while others ask, several times."""
        found = []
        for _ in range(self.options.times):
            with self.server() as server:
                client = self.client(server)
                found.append(asyncio.run(self._drain(server, client)) | {"statuses": client.tally.statuses})
            tally = client.tally
            bad = [
                f"status {status}" for status, count in tally.statuses.items() if status != 200 for _ in range(count)
            ]
            self.verdicts.add_none("every request answered", bad + tally.lost, tally.answered + len(tally.lost))
            self.verdicts.add_none("no wrong answer", tally.wrong, tally.statuses[200])
            self.verdicts.add("not ready before it closed", found[-1]["not_ready"], f"{found[-1]['probes']} looks")
            text = f"{found[-1]['exit']}, {found[-1]['seconds']:.1f} s after SIGTERM"
            self.verdicts.add("exit code 0", found[-1]["exit"] == 0, text)
        return {"drains": found}

    async def _drain(self, server: Running, client: Client) -> dict[str, Any]:
        load = asyncio.create_task(client.keep_asking(self.options.connections))
        await asyncio.sleep(self.options.seconds)
        client.may_be_refused = True
        server.process.terminate()
        signalled = time.monotonic()
        statuses = await asyncio.to_thread(_look_until_refused, server.port)
        code = await asyncio.to_thread(server.process.wait, 60)
        ended = time.monotonic()
        await load
        return {
            "exit": code,
            "seconds": ended - signalled,
            "not_ready": http.client.SERVICE_UNAVAILABLE in statuses,
            "probes": len(statuses),
        }

    def overload(self) -> dict[str, Any]:
        """More than the server can, at a time."""
        seconds = self.options.seconds
        with self.server() as server:
            for connections in PEAK_CONNECTIONS:
                self.load(server, connections, 2)
            peak = max(self.load(server, connections, seconds).per_second for connections in PEAK_CONNECTIONS)
            pause_s = OVERLOAD_CONNECTIONS / (OVERLOAD_FACTOR * peak)
            print(
                f"peak: {peak:,.0f} req/s; now {OVERLOAD_CONNECTIONS} connections, each again {1e3 * pause_s:.0f} ms "
                f"after its answer: {OVERLOAD_FACTOR} times the peak, were they answered at once",
                flush=True,
            )
            client = self.client(server)
            flood = asyncio.run(self._overload(server, client, pause_s))
            status, _ = ask(server.port, "GET", "/readyz")
        tally = client.tally
        statuses = Counter({int(code): count for code, count in flood.statuses.items()}) + tally.statuses
        odd = [f"status {code}" for code, count in statuses.items() if code not in (200, 429) for _ in range(count)]
        self.verdicts.add_none("answers are 200 or 429", odd, statuses.total())
        broken = [*tally.lost, *["counted by wrk"] * flood.broken]
        self.verdicts.add_none("no connection failed", broken, statuses.total() + len(broken))
        self.verdicts.add_none("no wrong answer", tally.wrong, tally.statuses[200])
        p99_ms = float(np.percentile(tally.latencies_ms, 99)) if tally.latencies_ms else float("inf")
        text = f"{p99_ms:,.0f} ms of {len(tally.latencies_ms):,}; allowed are {self.options.p99_ms:,}"
        self.verdicts.add("p99 of the 200s", p99_ms <= self.options.p99_ms, text)
        rate = statuses[200] / flood.seconds
        text = (
            f"{rate:,.0f} req/s, {rate / peak:.0%} of the peak, beside {statuses[429] / flood.seconds:,.0f} refusals/s"
        )
        self.verdicts.add("throughput", rate >= PEAK_SHARE * peak, text)
        self.verdicts.add("ready afterwards", status == http.client.OK, f"/readyz {status}")
        return {"peak": peak, "statuses": statuses, "p99_ms": p99_ms, "per_second": rate}

    async def _overload(self, server: Running, client: Client, pause_s: float) -> wrk.Load:
        checked = asyncio.create_task(client.keep_asking(CHECKED_CONNECTIONS, pause_s))
        try:
            connections = OVERLOAD_CONNECTIONS - CHECKED_CONNECTIONS
            return await asyncio.to_thread(self.load, server, connections, self.options.seconds, pause_s)
        finally:
            client.stopping = True
            await checked


def _look_until_refused(port: int) -> list[int]:
    """Statuses of /readyz until no connection is to be had."""
    statuses = []
    while True:
        try:
            statuses.append(ask(port, "GET", "/readyz")[0])
        except (OSError, http.client.HTTPException):
            return statuses
        time.sleep(0.02)


def draw(loads: Sequence[wrk.Load], memory: MemorySampler, options: argparse.Namespace) -> None:
    """Memory, and what wrk measured, over time."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - for one mode

    figure, (sizes, rates) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), layout="constrained")
    sizes.plot([second / 60 for second, _ in memory.samples], [size / 2**20 for _, size in memory.samples])
    sizes.set_ylabel("resident memory, MiB")
    ends = np.cumsum([load.seconds for load in loads]) / 60
    rates.stairs([load.per_second for load in loads], [0, *ends], color="tab:green")
    rates.set_ylabel("requests per second")
    rates.set_xlabel("minutes")
    for axis in (sizes, rates):
        axis.set_ylim(0, 1.15 * axis.dataLim.ymax)
        axis.spines[["top", "right"]].set_visible(False)
    requests, errors = sum(load.requests for load in loads), sum(load.errors for load in loads)
    figure.suptitle(f"{requests:,} requests over {options.connections} connections, {errors} errors", fontsize="medium")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.picture) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run one mode; exit code 1 where something does not hold."""
    options = _arguments()
    try:
        wrk.require_wrk()
        with workspace() as folder:
            model = find_model(options.model, folder / "exports")
            soak = Soak(model, make_images(model, folder, 32, 16), folder, options)
            modes: dict[str, Callable[[], dict[str, Any]]] = {
                "million": soak.million,
                "reload": soak.reload,
                "drain": soak.drain,
                "overload": soak.overload,
            }
            measured = modes[options.mode]()
        given = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
        record = {"date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}", "options": given}
        out = options.out / f"soak-{options.mode}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(record | {"verdicts": soak.verdicts.found} | measured, indent=1) + "\n")
        sys.exit(0 if all(verdict["holds"] for verdict in soak.verdicts.found) else 1)
    except InterflowError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; no server is left.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What must hold of the server under load.")
    parser.add_argument("mode", choices=["million", "reload", "drain", "overload"])
    parser.add_argument("--model", type=Path, help="an artefact; default: exports/cifar10/1, else random weights")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings, such as workers=2")
    parser.add_argument("--adaptive", type=float, metavar="LOSS", help="ask for answers that keep this promise")
    parser.add_argument("--connections", type=int, default=64, help="not of overload (default: 64)")
    parser.add_argument("--minutes", type=float, default=20, help="of million, at most (default: 20)")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of million (default: 1,000,000)")
    parser.add_argument("--seconds", type=int, default=10, help="of overload and before SIGTERM (default: 10)")
    parser.add_argument("--times", type=int, help="loads of reload (default: 100), drains (default: 3)")
    parser.add_argument("--p99-ms", type=int, default=2000, help="allowed to the 200s of overload (default: 2000)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for a JSON file")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "soak.png", help="of million")
    options = parser.parse_args()
    if options.times is None:
        options.times = 100 if options.mode == "reload" else 3
    return options


if __name__ == "__main__":
    main()
