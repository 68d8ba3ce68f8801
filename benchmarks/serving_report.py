"""What `benchmarks/serving.py` recorded, as medians, a Markdown table, the issue's ratios and a picture."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SMALL, LARGE, ROUTE = "32x32 JPEG", "1024x1024 JPEG", "binary tensors"
BARE, OURS, LITSERVE, BY_HAND, LEAST = "bare onnxruntime", "ours", "LitServe", "by hand", "the least"
BARE_BATCH = 32
"""Of the rate that ours is held against."""

Run = dict[str, Any]


class Figure(NamedTuple):
    """Medians over the rounds of one server, one kind of load.

    Attributes:
        per_second: good answers.
        spread: lowest and highest of the rounds.
        errors: of all rounds together, and of how many requests.
    """

    per_second: float
    spread: tuple[float, float]
    p50_ms: float
    p99_ms: float
    errors: int
    requests: int


class Ratio(NamedTuple):
    """One thing that was to be reached."""

    what: str
    value: float | None
    """None: not measured."""
    limit: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """In one word."""
        if self.value is None:
            return "not measured"
        return "yes" if (self.value <= self.limit if self.at_most else self.value >= self.limit) else "no"


def figure(run: Run, server: str, images: str, connections: int) -> Figure | None:
    """Medians over the rounds; None where there is no record."""
    found = [
        record
        for record in run["records"]
        if (record["server"], record.get("images"), record.get("connections")) == (server, images, connections)
    ]
    if not found:
        return None
    rates = [good_per_second(record) for record in found]
    return Figure(
        statistics.median(rates),
        (min(rates), max(rates)),
        statistics.median(record["p50_ms"] for record in found),
        statistics.median(record["p99_ms"] for record in found),
        sum(record["refused"] + record["broken"] for record in found),
        sum(record["requests"] + record["broken"] for record in found),
    )


def good_per_second(record: dict[str, Any]) -> float:
    """Answers per second whose status is below 400."""
    return (record["requests"] - record["refused"]) / record["seconds"]


def bare(run: Run, batch: int = BARE_BATCH) -> float | None:
    """Images per second of onnxruntime alone."""
    rates = [r["per_second"] for r in run["records"] if r["server"] == BARE and r["batch"] == batch]
    return statistics.median(rates) if rates else None


def servers(run: Run) -> list[str]:
    """Those with records: ours, then the others in the order of their first."""
    found = dict.fromkeys(record["server"] for record in run["records"] if record["server"] != BARE)
    return sorted(found, key=lambda name: name != OURS)


def ratios(run: Run) -> list[Ratio]:
    """What issue 5 asks for."""
    hands = [name for name in servers(run) if name.startswith(BY_HAND)]

    def rate(server: str, images: str, connections: int) -> float | None:
        found = figure(run, server, images, connections)
        return None if found is None else found.per_second

    def best_by_hand(images: str, connections: int) -> float | None:
        return max((rate(name, images, connections) or 0 for name in hands), default=0) or None

    def of(value: float | None, other: float | None) -> float | None:
        return value / other if value is not None and other else None

    rows = []
    for connections in (32, 128):
        mine = rate(OURS, SMALL, connections)
        at = f"{SMALL}, {connections} connections"
        rows += [
            Ratio(f"ours / {BARE} in batches of {BARE_BATCH}; {at}", of(mine, bare(run)), 0.6),
            Ratio(f"ours / LitServe; {at}", of(mine, rate(LITSERVE, SMALL, connections)), 2.5),
            Ratio(f"ours / best by hand; {at}", of(mine, best_by_hand(SMALL, connections)), 1.5),
        ]
    mine = rate(OURS, SMALL, 1)
    rows.append(Ratio(f"ours / best by hand; {SMALL}, 1 connection", of(mine, best_by_hand(SMALL, 1)), 1))
    at_32 = figure(run, OURS, SMALL, 32)
    rows.append(Ratio(f"p99 of ours, ms; {SMALL}, 32 connections", at_32 and at_32.p99_ms, 45, at_most=True))
    for connections in run["conditions"]["connections"]:
        value = of(rate(OURS, LARGE, connections), best_by_hand(LARGE, connections))
        rows.append(Ratio(f"ours / best by hand; {LARGE}, {_connections(connections)}", value, 4))
    tensors = next((r for r in run["records"] if r.get("images") == ROUTE), None)
    found = tensors and figure(run, OURS, ROUTE, tensors["connections"])
    images = tensors["batch"] * found.per_second if tensors and found else None
    what = f"images/s of {ROUTE}" + (f" in batches of {tensors['batch']}" if tensors else "")
    rows.append(Ratio(f"{what} / {BARE} in batches of {BARE_BATCH}", of(images, bare(run)), 0.9))
    return rows


def table(run: Run) -> str:
    """Markdown: conditions, figures, ratios."""
    given = run["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in given["versions"].items())
    images = "; ".join(
        f"{group['count']} {name}s of {group['mean_bytes'] / 1000:.1f} kB in the mean"
        for name, group in given["images"].items()
    )
    lines = [
        "# Serving, side by side",
        "",
        f"Run {run['id']}, {run['started']}: `python benchmarks/serving.py`. {given['cpu']}, {given['usable CPUs']} "
        f"usable CPUs, shared with the load generator; {given['system']}, Python {given['Python']}; "
        f"{versions}; {', '.join(given['peers'])}. Model {given['model']['name']} ({given['model']['backbone']}), "
        f"sha256 {given['model']['sha256'][:12]}. Multipart forms; {images}, in turn. Medians of {given['rounds']} "
        f"rounds of {given['seconds']} s after {given['warm-up seconds']} s of the same load, servers in turn, each "
        f"started anew for each kind of load. `{given['wrk command']}`; its percentiles are of all answers and count "
        "waiting that it was kept from. Ours decodes a large JPEG at a smaller scale, the peers as a whole; each image "
        "has one class by both, and every server named it before it was measured. The least is our decoder and batches "
        "in uvicorn without all the rest, answering a label.",
        "",
        "| server | images | connections | req/s | lowest to highest | p50 ms | p99 ms | errors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *_rows(run),
        "",
    ]
    for batch in dict.fromkeys(r["batch"] for r in run["records"] if r["server"] == BARE):
        lines.append(f"Bare onnxruntime, no HTTP, no decoding: {bare(run, batch):,.0f} images/s in batches of {batch}.")
    lines += [f"{server} was not measured: {reason}" for server, reason in run["failures"].items()]
    lines += ["", "| what was asked | measured | to reach | reached |", "| --- | --- | --- | --- |"]
    for ratio in ratios(run):
        value = "" if ratio.value is None else f"{ratio.value:.3g}"
        sign = "at most" if ratio.at_most else "at least"
        lines.append(f"| {ratio.what} | {value} | {sign} {ratio.limit:g} | {ratio.verdict} |")
    return "\n".join(lines) + "\n"


def _rows(run: Run) -> Iterator[str]:
    for images in dict.fromkeys(record["images"] for record in run["records"] if "images" in record):
        for connections in sorted({r["connections"] for r in run["records"] if r.get("images") == images}):
            for server in servers(run):
                found = figure(run, server, images, connections)
                if found is not None:
                    low, high = found.spread
                    yield (
                        f"| {server} | {images} | {connections} | {found.per_second:,.1f} | "
                        f"{low:,.1f} to {high:,.1f} | {found.p50_ms:.1f} | {found.p99_ms:.1f} | "
                        f"{found.errors} of {found.requests:,} |"
                    )


def _connections(count: int) -> str:
    return f"{count} connection{'s' if count > 1 else ''}"


def draw(run: Run, path: Path) -> None:
    """Bars: good answers per second and p99 by connections, one colour a server, but for the least; small images left,
    large right."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - the tests of the figures need none

    names, connections = servers(run), run["conditions"]["connections"]
    drawn = [images for images in (SMALL, LARGE) if any(r.get("images") == images for r in run["records"])]
    panels, axes = plt.subplots(2, len(drawn), figsize=(5.5 * len(drawn), 7), squeeze=False, layout="constrained")
    width = 0.8 / max(1, len(names))
    for column, images in enumerate(drawn):
        rates, latencies = axes[:, column]
        for place, name in enumerate(names):
            found = [figure(run, name, images, count) for count in connections]
            spots = [group + (place - (len(names) - 1) / 2) * width for group in range(len(connections))]
            for axis, values in (
                (rates, [f.per_second if f else 0 for f in found]),
                (latencies, [f.p99_ms if f else 0 for f in found]),
            ):
                # no server that anybody would use, so no colour
                plain = {"color": "white", "edgecolor": "grey", "hatch": "///"} if name == LEAST else {}
                bars = axis.bar(spots, values, width, label=name, **plain)
                axis.bar_label(bars, [f"{v:,.0f}" if v else "" for v in values], fontsize=6, rotation=90, padding=2)
        ceiling = bare(run)
        if ceiling and images == SMALL:
            rates.axhline(ceiling, color="black", linestyle="--", linewidth=1)
            rates.annotate(f"{BARE}, batches of {BARE_BATCH}", (-0.45, ceiling), fontsize=7, va="bottom")
        rates.set_title(images, fontsize="medium")
        latencies.set_yscale("log")
        for axis in (rates, latencies):
            axis.margins(y=0.2)
            axis.set_xticks(range(len(connections)), map(_connections, connections))
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("good answers per second")
    axes[1][0].set_ylabel("p99 of the latency, ms")
    panels.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    given = run["conditions"]
    panels.suptitle(
        f"{given['model']['backbone']}, multipart forms; {given['cpu']}, {given['usable CPUs']} CPUs shared with wrk; "
        f"medians of {given['rounds']} rounds, {run['started'][:10]}",
        fontsize="small",
    )
    panels.savefig(path, dpi=120)
    plt.close(panels)
