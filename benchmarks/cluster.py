"""Ray Serve against the plain server, and a replica killed under load: `python benchmarks/cluster.py --help`.

    apt-get install wrk && uv sync --extra cluster && python benchmarks/cluster.py

In one run, in turn, several rounds, medians: good answers per second to 32x32 JPEGs, as multipart forms, of

- `python -m app`;
- Ray Serve of one and of two replicas, behind Ray's proxy with `app.cluster_proxy` in it, as `serve run` starts it;
- the same behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1), which hands connections to the replicas themselves.

Then two replicas of each kind under load, one of which is killed (SIGKILL), once a round, and how many requests failed.

Replicas have one CPU each, the plain server as many threads as one replica. The load generator, Ray's proxy and its
controller want CPUs of their own: with fewer than five, a second replica takes from them what it adds.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import json
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from app.cpus import usable_cpus
from benchmarks import wrk
from benchmarks.material import ROOT, Images, find_model, make_images, read_card
from benchmarks.servers import HOST, Running, ServerError, family, free_port, ours, running, workspace
from model.contract import InterflowError
from training.files import write_text

PLAIN = "python -m app"
PROXIES = {"ray": "Ray's proxy", "haproxy": "HAProxy"}
REPLICA = b"ray::ServeReplica:"
CONNECTIONS = 32
KILL_AFTER_S = 3
SETTLE_S = 20
"""After a killed replica's successor was started, until it serves as well."""
Start = Callable[[int, Path], tuple[list[str], dict[str, str], int, str, Path]]


def name_of(proxy: str, replicas: int) -> str:
    """Of a contender, for tables."""
    return f"Ray Serve, {PROXIES[proxy]}, {replicas} replica{'s' * (replicas > 1)}"


def ray_serve(exports: Path, model: str, proxy: str, replicas: int, sockets: Path) -> Start:
    """What `servers.running` takes, of a port and a log: `serve run` of a config file like deploy/serve.yaml.

    Args:
        exports: a repository that holds the model alone.
        model: its name.
        proxy: one of `PROXIES`.
        replicas: of one CPU each.
        sockets: folder for those of HAProxy, whose path must be short.
    """

    def start(port: int, log: Path) -> tuple[list[str], dict[str, str], int, str, Path]:
        config = log.with_suffix(".yaml")
        deployment = {
            "name": "Interflow",
            "num_replicas": replicas,
            "autoscaling_config": None,
            "ray_actor_options": {"num_cpus": 1},
        }
        application = {"name": "interflow", "import_path": "app.cluster:app", "deployments": [deployment]}
        access = {"enable_access_log": False}
        options = {"http_options": {"host": HOST, "port": port}, "logging_config": access}
        config.write_text(json.dumps(options | {"applications": [application]}))  # JSON is YAML
        settings = {"EXPORTS": exports, "MODEL": model, "LOG_LEVEL": "warning", "PROVIDER": "cpu"}
        environment = {f"INTERFLOW_{name}": str(value) for name, value in settings.items()}
        environment |= {
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # the environment is here already
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.cluster_proxy:middlewares",
            "RAY_worker_niceness": "0",  # as the plain server; else 15
            "RAY_raylet_start_wait_time_s": "100",
            "PYTHONPATH": str(ROOT),
        }
        if proxy == "haproxy":
            environment |= haproxy(sockets)
        return [str(Path(sys.executable).with_name("serve")), "run", str(config)], environment, port, "/readyz", log

    return start


def haproxy(folder: Path) -> dict[str, str]:
    """Variables that put HAProxy in the place of Ray's proxy."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # what a dead replica leaves unanswered is asked again, where it fits in a buffer
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(2**20),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def plain(exports: Path, model: str) -> Start:
    """The server by itself, with what one replica has."""
    settings = {"provider": "cpu", "lanes": 1, "threads": 1, "decode_workers": 1}
    return lambda port, log: ours(exports, model, port, log, settings)


def measure(start: Start, images: Images, seconds: int, folder: Path) -> dict[str, Any]:
    """Start a server, hold its answers against the model's, warm it up, and load it."""
    port = free_port()
    with running(*start(port, folder / f"{port}.log")) as server:
        check(server, images)
        load(server, images, max(1, seconds // 4))
        return asdict(load(server, images, seconds))


def kill(start: Start, images: Images, seconds: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Kill one of two replicas in each of some runs of load, with time between them for its successor to start."""
    port = free_port()
    records = []
    with running(*start(port, folder / f"{port}.log")) as server:
        check(server, images)
        for _ in range(rounds):
            victim = replicas(server)[0]
            timer = threading.Timer(KILL_AFTER_S, os.kill, (victim, signal.SIGKILL))
            timer.start()
            came = load(server, images, seconds)
            timer.join()
            records.append(asdict(came))
            print(f"  {came.requests:,} requests, {came.errors} failed", flush=True)
            _wait_for_two(server, victim)
    return records


def replicas(server: Running) -> list[int]:
    """Process ids of the replicas."""
    found = []
    for pid in family(server.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        found += [pid] if title.startswith(REPLICA) else []
    return found


def _wait_for_two(server: Running, dead: int) -> None:
    deadline = time.monotonic() + 120
    while dead in (alive := replicas(server)) or len(alive) < 2:
        if time.monotonic() > deadline:
            raise ServerError("no replica was started in the place of the one that was killed.")
        time.sleep(0.5)
    time.sleep(SETTLE_S)


def check(server: Running, images: Images) -> None:
    """Raises ServerError unless it names the classes that the model does."""
    for file, label in zip(images.files[:4], images.labels, strict=False):
        answer = server.classify("/predict", file, "image")
        if answer["prediction"]["label"] != label:
            raise ServerError(f"{file.name} is {answer['prediction']['label']}; expected {label}.")


def load(server: Running, images: Images, seconds: int) -> wrk.Load:
    """So many seconds of it."""
    return wrk.load_images(server.url("/predict"), images.files, "image", connections=CONNECTIONS, seconds=seconds)


def rate(run: dict[str, Any], name: str) -> float | None:
    """Median of good answers per second."""
    rates = [(one["requests"] - one["refused"]) / one["seconds"] for one in run["rates"].get(name, [])]
    return statistics.median(rates) if rates else None


def table(run: dict[str, Any]) -> str:
    """Markdown of what was recorded."""
    conditions = run["conditions"]
    lines = [
        "# Serving on a cluster",
        "",
        f"`benchmarks/cluster.py`, {run['date']}: model {conditions['model']}, {conditions['cpus']} CPUs "
        f"({conditions['machine']}), shared by servers, proxies and wrk; Ray {conditions['ray']}, wrk "
        f"{conditions['wrk']}; {CONNECTIONS} connections, medians of {conditions['rounds']} rounds of "
        f"{conditions['seconds']} s, in turn.",
        "",
        "| server | requests/s | lowest to highest | p50 ms | p99 ms | failed | to one replica |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, records in run["rates"].items():
        rates = [(one["requests"] - one["refused"]) / one["seconds"] for one in records]
        one_replica = rate(run, name.replace("2 replicas", "1 replica")) if name != PLAIN else None
        ratio = f"{statistics.median(rates) / one_replica:.2f} x" if one_replica and "2 replicas" in name else ""
        latencies = [statistics.median(one[key] for one in records) for key in ("p50_ms", "p99_ms")]
        failed = sum(one["refused"] + one["broken"] for one in records)
        lines.append(
            f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} | "
            f"{latencies[0]:.1f} | {latencies[1]:.1f} | {failed} | {ratio} |"
        )
    if conditions["cpus"] < 5:
        lines += [
            "",
            f"Two replicas of one CPU, a proxy, Ray's controller and wrk want five; here were {conditions['cpus']}: "
            "what a second replica adds cannot be seen.",
        ]
    lines += [
        "",
        "## A replica killed under load",
        "",
        "| proxy | kills | requests | failed |",
        "| --- | --- | --- | --- |",
    ]
    for name, records in run["kills"].items():
        requests = sum(one["requests"] + one["broken"] for one in records)
        failed = sum(one["refused"] + one["broken"] for one in records)
        lines.append(f"| {name} | {len(records)} | {requests:,} | {failed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure; print the table, and write it and the records."""
    options = _arguments()
    try:
        wrk.require_wrk()
        with workspace() as folder, tempfile.TemporaryDirectory(prefix="ha-") as sockets:
            model = find_model(options.model, folder / "exports")
            card = read_card(model)
            exports = folder / "measured"
            (exports / card.name).mkdir(parents=True)
            (exports / card.name / model.name).symlink_to(model)
            images = make_images(model, folder, 32, 16)
            run = _run(options, card.name, exports, images, folder=folder, sockets=Path(sockets))
        text = table(run)
        print(f"\n{text}")
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "cluster.json", json.dumps(run, indent=1) + "\n")
        write_text(options.out / "cluster.md", text)
        print(f"written: {options.out / 'cluster.json'}, {options.out / 'cluster.md'}")
    except InterflowError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; no server is left.")


def _run(
    options: argparse.Namespace, model: str, exports: Path, images: Images, *, folder: Path, sockets: Path
) -> dict[str, Any]:
    contenders: dict[str, Start] = {PLAIN: plain(exports, model)} if "plain" in options.only else {}
    proxies = [name for name in PROXIES if name in options.only]
    for proxy in proxies:
        contenders |= {name_of(proxy, count): ray_serve(exports, model, proxy, count, sockets) for count in (1, 2)}
    conditions = {
        "model": model,
        "cpus": usable_cpus(),
        "machine": platform.processor() or platform.machine(),
        "ray": version("ray"),
        "wrk": wrk.version(),
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    rates: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders if options.rounds}
    for round_ in range(1, options.rounds + 1):
        for name, start in contenders.items():
            print(f"round {round_} of {options.rounds}: {name}", flush=True)
            rates[name].append(measure(start, images, options.seconds, folder))
            print(f"  {rates[name][-1]['requests'] / rates[name][-1]['seconds']:,.0f} requests/s", flush=True)
    kills = {}
    for proxy in proxies if options.kills else []:
        print(f"{options.kills} kills behind {PROXIES[proxy]}", flush=True)
        start = ray_serve(exports, model, proxy, 2, sockets)
        kills[PROXIES[proxy]] = kill(start, images, options.kill_seconds, options.kills, folder)
    return {"date": time.strftime("%Y-%m-%d"), "conditions": conditions, "rates": rates, "kills": kills}


def _arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Requests per second of Ray Serve, and replicas killed under load.")
    parser.add_argument("--model", type=Path, help="an artefact; default: exports/cifar10/1, else random weights")
    choices = ["plain", *PROXIES]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="servers to measure (default: all)")
    parser.add_argument("--seconds", type=int, default=8, help="per figure (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3; 0: only the kills")
    parser.add_argument("--kills", type=int, default=3, help="of each kind of proxy (default: 3)")
    parser.add_argument("--kill-seconds", type=int, default=12, help="of load around each kill (default: 12)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="default: benchmarks/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
