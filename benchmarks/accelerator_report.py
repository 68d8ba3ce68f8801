"""What `benchmarks/accelerator.py` recorded, as Markdown; what was not measured on a GPU says so."""

from collections.abc import Sequence
from typing import Any

MODELS = {"cifar10": "CIFAR-10 (shipped, 32 pixels)", "resnet50": "ResNet-50 (random weights, 224 pixels)"}
NOT_RUN = "not run"
BINARY_AT_LEAST, LATENCY_AT_LEAST = 0.85, 1.3

Row = dict[str, Any]


def table(run: Row) -> str:
    """All tables. Rows of a run without a GPU are named as what they are: a trial of the program."""
    lines = ["# On a GPU", "", f"By `benchmarks/accelerator.py`; {_conditions(run)}."]
    if run["rows"] and run["conditions"]["provider"] == "cpu":
        lines += ["", "**A trial of the program on a CPU: none of these figures is one of a GPU.**"]
    for model, title in MODELS.items():
        lines += ["", f"## {title}", ""]
        lines += _rates(run, model)
        lines += ["", *_served(run, model), "", *_sameness(run, model), "", *_verdicts(run, model)]
    failures = [row for row in run["rows"] if "failure" in row]
    if failures:
        lines += ["", "## Failed", ""]
        lines += [
            f"- {', '.join(str(row[key]) for key in row if key in _NAMING)}: {row['failure']}" for row in failures
        ]
    return "\n".join(lines) + "\n"


_NAMING = ("part", "model", "precision", "way", "layout", "batch", "processes")


def _conditions(run: Row) -> str:
    if not run["rows"]:
        return f"{NOT_RUN} yet: `benchmarks/on_gpu.sh OUT MINUTES serve` measures it where there is a GPU"
    found = run["conditions"]
    versions = ", ".join(f"{name.strip()} {value}" for name, value in found["versions"].items() if value)
    return (
        f"{found['GPU'] or 'no GPU'}; {found['CPUs']} CPUs, Python {found['Python']}, {versions}; "
        f"{found['seconds']:g} s a row"
    )


def find(run: Row, **what: object) -> Row | None:
    """The row of these, if it was measured."""
    return next((row for row in run["rows"] if "failure" not in row and what.items() <= row.items()), None)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [list(row) for row in rows] or [[NOT_RUN, *[""] * (len(head) - 1)]]
    return ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *body]]


def _rates(run: Row, model: str) -> list[str]:
    """Bare onnxruntime and PyTorch, and what share of the chip they had."""
    rows = []
    for row in run["rows"]:
        if row["part"] in ("bare", "torch") and row["model"] == model and "failure" not in row:
            layout = ", channels last" if row.get("layout") == "nhwc" else ""
            name = f"{'onnxruntime' if row['part'] == 'bare' else 'PyTorch'}, {row['way']}{layout}"
            figures = [f"{row['per_second']:,.0f}", f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}"]
            rows.append([name, row["precision"], str(row["batch"]), *figures, *_shares(run, row)])
    head = ("", "precision", "batch", "images/s", "p50, ms", "p99, ms", "of the matrix rate", "of the memory's rate")
    return _table(head, rows)


def _shares(run: Row, row: Row) -> list[str]:
    work = find(run, part="work", model=row["model"], precision=row["precision"])
    chip = find(run, part="limits", precision=row["precision"])
    if work is None or chip is None:
        return [NOT_RUN] * 2
    of_image, of_batch = work["bytes"]
    moved = row["per_second"] * (of_image + of_batch / row["batch"])
    return [f"{row['per_second'] * work['flops'] / chip['flops']:.1%}", f"{moved / chip['bytes']:.1%}"]


def _served(run: Row, model: str) -> list[str]:
    rows = []
    for row in run["rows"]:
        if row["part"] in ("tensors", "images") and row["model"] == model and "failure" not in row:
            steps = row["step_ms"]
            rows.append(
                [
                    f"batches of {row['batch']}" if row["part"] == "tensors" else "single JPEGs",
                    row["precision"],
                    str(row["processes"]),
                    f"{row['per_second']:,.0f}",
                    f"{row['p50_ms']:.1f}",
                    f"{row['p99_ms']:.1f}",
                    *(f"{steps[step]:.2f}" if step in steps else "-" for step in STEPS),
                    "-" if row["images_a_batch"] is None else f"{row['images_a_batch']:.1f}",
                    f"{row['cpu_share']:.0%}",
                    "-" if row["gpu_busy"] is None else f"{row['gpu_busy']:.0%}",
                ]
            )
    head = ("this server", "precision", "processes", "images/s", "p50, ms", "p99, ms")
    return _table((*head, *(f"{step}, ms" for step in STEPS), "images a batch", "CPUs", "GPU busy"), rows)


STEPS = ("decode", "queue", "inference", "interpret")


def _sameness(run: Row, model: str) -> list[str]:
    rows = [
        [
            row["precision"],
            f"{max(row['outputs'].values()):.1e} ({max(row['outputs'], key=row['outputs'].get)})",
            f"{row['tolerance']:g}",
            f"{row['identities']:.1e}",
            f"{row['identities_tolerance']:g}",
            f"{row['same_answer']:.1%}",
            "yes" if row["passed"] else "no",
        ]
        for row in run["rows"]
        if row["part"] == "same" and row["model"] == model and "failure" not in row
    ]
    head = ("GPU against CPU", "furthest output", "allowed", "identities off by", "allowed", "same answer", "passed")
    return _table(head, rows)


def _verdicts(run: Row, model: str) -> list[str]:
    """The issue's two ratios; of whatever precision and number of processes does best."""
    of = {"model": model}
    served = [
        (row["per_second"] / bare["per_second"], row["precision"])
        for row in run["rows"]
        if row["part"] == "tensors" and row["model"] == model and "failure" not in row
        if (bare := find(run, part="bare", **of, precision=row["precision"], way="run", batch=row["batch"]))
    ]
    compiled = _least(run, part="torch", **of, precision="float16", batch=1, ways=("compiled", "compiled, CUDA graph"))
    graph = _least(run, part="bare", **of, precision="float16", batch=1, ways=("CUDA graph",))
    faster = compiled / graph if compiled and graph else None
    return [
        _verdict("binary batches, of bare onnxruntime", max(served, default=(None, ""))[0], BINARY_AT_LEAST),
        _verdict("bare fp16 CUDA graph at batch 1, times as fast as torch.compile", faster, LATENCY_AT_LEAST),
    ]


def _least(run: Row, ways: Sequence[str], **what: object) -> float | None:
    found = [
        row["p50_ms"]
        for row in run["rows"]
        if what.items() <= row.items() and row.get("way") in ways and "failure" not in row
    ]
    return min(found, default=None)


def _verdict(what: str, value: float | None, limit: float) -> str:
    if value is None:
        return f"- {what}: {NOT_RUN} (to reach: {limit:g})"
    return f"- {what}: {value:.2f} (to reach: {limit:g}; {'reached' if value >= limit else 'not reached'})"
