"""This server on a GPU, against what nobody can exceed there and what one would write first, in one run:

    python benchmarks/accelerator.py --provider cuda

For the shipped CIFAR-10 model and for a ResNet-50 at 224 pixels (random weights, which cost the same), in float32 by
TF32, in float32 itself and in float16:

- limits: the chip's matrix rate in each precision and its memory's rate, by large products and copies in PyTorch;
- bare: onnxruntime alone, by `run`, by IO binding and by CUDA graphs, channels first and last;
- torch: the same network in PyTorch, eager and by `torch.compile`, with and without CUDA graphs ("reduce-overhead");
- same: every output and both identities on the GPU against the CPU, of photographs;
- tensors: this server, binary tensors in batches over /v2/models/<m>/infer;
- images: this server, single JPEGs over HTTP with 1 to 16 processes, and where their time goes: the server's own
  seconds of decoding, waiting, network and interpretation, the share of the CPUs, and the GPU's busy share.

All begin with images in the CPU's memory and end with the fused logits there. The load comes from Python processes on
the same CPUs. What a row measured is kept at once, so that the same command goes on where it was; `--minutes` ends a
call in good order. `--tiny` makes all small enough to be tried without a GPU, and then keeps no figure as one of a GPU.

Several processes feed one GPU with a session each here (INTERFLOW_WORKERS): nothing is shared but the GPU, which takes
their work in turns. The other way, one process that runs the network for all over shared memory, would save the copies
of the weights and fill larger batches. Whether it could gain anything, `images` says: where the rate grows with the
processes while the GPU is idle half of the time, HTTP and decoding are the limit, which both ways share; only where the
GPU is busy and batches are small would larger ones help. `--settings batch_wait_us=500` shows what those would give.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm

from app import cuda
from app.cpus import usable_cpus
from app.session import TOLERANCE
from app.settings import Settings
from benchmarks import accelerator_models as models
from benchmarks.accelerator_report import table
from benchmarks.accelerator_served import images, tensors
from benchmarks.material import ROOT, SHIPPED, read_card
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, IMAGE, LOGITS, MODEL_FILE, InterflowError, branch_map_name
from model.explain import contributions
from training import cli
from training.files import write_text

PARTS = ("limits", "bare", "torch", "same", "tensors", "images")
BATCHES = (1, 64)
TENSOR_BATCH = 64
PROCESSES = (1, 2, 4, 8, 16)
LARGE_SIDE = 224
PRECISIONS = ("tf32", "float32", "float16")
LAYOUTS = ("nchw", "nhwc")
AGREE = {"tf32": 5e-3, "float32": 1e-4, "float16": 2e-2}
"""Largest difference of an output on the GPU from the CPU's, over its largest magnitude there: a few roundings of 11,
24 and 11 bits, each of a sum over thousands of products; float16 also overflows to fewer bits near 0."""
COMPARED = 32

Row = dict[str, Any]


class NoTimeError(InterflowError):
    """The minutes of this call are over; the next goes on."""


class Measurement:
    """Rows by what they measure, kept in a file after each."""

    def __init__(self, file: Path, conditions: Row, until: float) -> None:
        self._file = file
        self._until = until
        self.run: Row = {"conditions": json.loads(json.dumps(conditions)), "rows": []}
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["conditions"] != self.run["conditions"]:
                raise InterflowError(
                    f"{file} holds a run under other conditions; figures of both are not put together. Move it away, "
                    "or give another --out."
                )
            self.run = before

    def row(self, what: Row, measure: Callable[[], Row]) -> None:
        """Measure it, unless that was done; a failure is kept with its reason, and the next call tries again."""
        kept = [row for row in self.run["rows"] if not what.items() <= row.items() or "failure" not in row]
        if any(what.items() <= row.items() for row in kept):
            return
        if time.monotonic() > self._until:
            raise NoTimeError("the time is up; the same command goes on from here.")
        started = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # whatever it is, the other rows can be measured all the same
            found = {"failure": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}
        self.run["rows"] = [*kept, what | found | {"took_s": round(time.monotonic() - started, 1)}]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps(self.run, indent=1) + "\n")
        tqdm.write(f"{' '.join(map(str, what.values()))}: {json.dumps(found)[:200]}")


def timed(call: Callable[[], object], batch: int, seconds: float) -> Row:
    """Images per second of a call that waits for its result, and its latency, after a fifth of the time to warm up."""
    taken: list[float] = []
    for share in (0.2, 1.0):
        taken.clear()
        end = time.perf_counter() + share * seconds
        while not taken or time.perf_counter() < end:
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    p50, p99 = np.percentile(taken, [50, 99])
    return {"per_second": batch * len(taken) / sum(taken), "p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


def limits(precision: str, device: torch.device, side: int, seconds: float) -> Row:
    """Operations a second of a product of square matrices, and bytes a second of a copy, read and written."""
    dtype = torch.float16 if precision == "float16" else torch.float32
    with tf32(precision == "tf32"):
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        source = torch.empty(side**2 * 8, dtype=torch.float32, device=device)
        product = timed(partial(_done, device, lambda: a @ b), 1, seconds)
        copy = timed(partial(_done, device, source.clone), 1, seconds)
    return {"flops": 2 * side**3 * product["per_second"], "bytes": 8 * source.numel() * copy["per_second"]}


class tf32:  # noqa: N801 - a context manager, named like a function
    """PyTorch's float32 by TF32, or not."""

    def __init__(self, allowed: bool) -> None:
        self._precision = "high" if allowed else "highest"
        self._allowed = allowed

    def __enter__(self) -> None:
        torch.set_float32_matmul_precision(self._precision)
        torch.backends.cudnn.allow_tf32 = self._allowed

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision("highest")


def _done(device: torch.device, work: Callable[[], object]) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()


def open_session(folder: Path, precision: str, provider: str, **options: str) -> onnxruntime.InferenceSession:
    """Bare onnxruntime; on CUDA with the server's options and these."""
    settings = Settings(cuda_tf32=precision == "tf32")
    asked = cuda.provider_options(settings, graphs=False) | options
    providers = [(cuda.CUDA, asked)] if provider == "cuda" else []
    told = onnxruntime.SessionOptions()
    told.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / MODEL_FILE, told, [*providers, "CPUExecutionProvider"])
    if provider == "cuda" and session.get_providers()[0] != cuda.CUDA:
        raise InterflowError("onnxruntime did not take CUDA; its message above says why.")
    return session


def bare(folder: Path, precision: str, provider: str, way: str, layout: str, batch: int, seconds: float) -> Row:  # noqa: PLR0917
    """Onnxruntime without a server: plain `run`, or IO binding to memory of the GPU, or that as a CUDA graph."""
    graph = way == "CUDA graph"
    options = {"enable_cuda_graph": str(int(graph)), "prefer_nhwc": str(int(layout == "nhwc"))}
    session = open_session(folder, precision, provider, **options)
    card = read_card(folder)
    spec = card.input
    shape = (batch, spec.height, spec.width, spec.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if way == "run":
        return timed(lambda: session.run([LOGITS], {IMAGE: pixels}), batch, seconds)
    place = "cuda" if provider == "cuda" else "cpu"
    binding = session.io_binding()
    image = onnxruntime.OrtValue.ortvalue_from_numpy(pixels, place)
    binding.bind_ortvalue_input(IMAGE, image)
    held = {}
    for name, output in card.outputs.items():
        size = (batch, *output.shape[1:])
        held[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(size, np.float32, place)
        binding.bind_ortvalue_output(name, held[name])

    def call() -> np.ndarray:
        image.update_inplace(pixels)
        session.run_with_iobinding(binding)
        return held[LOGITS].numpy()

    return timed(call, batch, seconds)


def by_torch(folder: Path, precision: str, device: torch.device, way: str, batch: int, seconds: float) -> Row:  # noqa: PLR0917
    """PyTorch, eager or compiled."""
    mode = {"eager": None, "compiled": "default", "compiled, CUDA graph": "reduce-overhead"}[way]
    spec = read_card(folder).input
    with tf32(precision == "tf32"):
        call = models.torch_call(read_card(folder), half=precision == "float16", compiled=mode, device=device)
        pixels = torch.randint(0, 256, (batch, spec.height, spec.width, spec.channels), dtype=torch.uint8)
        pixels = pixels.pin_memory() if device.type == "cuda" else pixels
        started = time.perf_counter()
        call(pixels)
        return {"first_s": round(time.perf_counter() - started, 1)} | timed(partial(call, pixels), batch, seconds)


def same(folder: Path, precision: str, provider: str) -> Row:
    """How far the GPU's outputs are from the CPU's, how far from exact their sums, and whether both are near enough."""
    card = read_card(folder)
    _, pixels = models.photographs(card.input, COMPARED)
    names = list(card.outputs)
    there, here = (
        dict(zip(names, open_session(folder, precision, where).run(names, {IMAGE: pixels}), strict=True))
        for where in (provider, "cpu")
    )
    far = {name: float(np.abs(there[name] - here[name]).max() / np.abs(here[name]).max()) for name in names}
    summands = contributions(there[BRANCH_LOGITS], there[BRANCH_WEIGHTS])
    residuals = [_off(there[LOGITS], summands.sum(axis=1), summands)]
    for branch in range(len(card.stages)):
        maps = there[branch_map_name(branch)]
        residuals.append(_off(maps.mean(axis=(2, 3)), there[BRANCH_LOGITS][:, branch], maps))
    return {
        "outputs": far,
        "tolerance": AGREE[precision],
        "identities": max(residuals),
        "identities_tolerance": TOLERANCE,
        "same_answer": float((there[LOGITS].argmax(axis=1) == here[LOGITS].argmax(axis=1)).mean()),
        "passed": max(far.values()) <= AGREE[precision] and max(residuals) <= TOLERANCE,
    }


def _off(got: np.ndarray, expected: np.ndarray, summands: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(summands).max())


def work(folder: Path) -> Row:
    """Operations of an image, and bytes of an image and of a batch, as `accelerator_models` counts them."""
    return {"flops": models.flops_per_image(read_card(folder)), "bytes": models.traffic(folder)}


def plan(options: argparse.Namespace, folders: dict[str, dict[str, Path]]) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Everything that is measured, in order: what it is, and how."""
    device, provider, seconds = torch.device(options.provider), options.provider, options.seconds
    graphs = [] if provider == "cpu" else ["CUDA graph"]
    by_torch_too = ("tf32", "float16") if provider == "cuda" else ("tf32",)  # on a CPU, float16 is no way to run it
    compiled = [] if options.tiny else ["compiled", *(["compiled, CUDA graph"] if provider == "cuda" else [])]
    for precision in PRECISIONS:
        side = 256 if options.tiny else 8192
        yield {"part": "limits", "precision": precision}, partial(limits, precision, device, side, seconds)
    for name, by_precision in folders.items():
        for precision, folder in by_precision.items():
            of = {"model": name, "precision": precision}
            yield {"part": "work", **of}, partial(work, folder)
            for batch in BATCHES:
                ways = [("run", "nchw")]
                if precision != "float32":  # the plain way says what TF32 gives
                    ways += [("IO binding", "nchw"), *((graph, layout) for graph in graphs for layout in LAYOUTS)]
                for way, layout in ways:
                    run = partial(bare, folder, precision, provider, way, layout, batch, seconds)
                    yield {"part": "bare", **of, "way": way, "layout": layout, "batch": batch}, run
                for way in ["eager", *compiled] if precision in by_torch_too else []:
                    run = partial(by_torch, folder, precision, device, way, batch, seconds)
                    yield {"part": "torch", **of, "way": way, "batch": batch}, run
            yield {"part": "same", **of}, partial(same, folder, precision, provider)
            if precision == "float32":
                continue
            served = {"provider": provider, "cuda_tf32": precision == "tf32"} | options.settings
            for workers in options.processes[:3]:
                run = partial(tensors, folder, served, workers, TENSOR_BATCH, seconds)
                yield {"part": "tensors", **of, "processes": workers, "batch": TENSOR_BATCH}, run
            for workers in options.processes:
                run = partial(images, folder, served, workers, seconds)
                yield {"part": "images", **of, "processes": workers}, run


def artefacts(exports: Path, tiny: bool) -> dict[str, dict[str, Path]]:
    """Both networks in each precision, made where they are missing."""
    large = exports / "resnet50" / "1"
    if not large.exists():
        # a small shape of the same network where all is tiny
        models.make_large(exports, *((64, 0.25) if tiny else (LARGE_SIDE, 1.0)))
    folders = {}
    for folder in (SHIPPED, large):
        half = exports / f"{folder.parent.name}-fp16" / "1"
        if not half.exists():
            models.make_half(folder, exports)
        folders[folder.parent.name] = {"tf32": folder, "float32": folder, "float16": half}
    return folders


def conditions(options: argparse.Namespace) -> Row:
    """What has to be the same for rows to be put together, and what a reader has to know."""
    on_gpu = options.provider == "cuda"
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return {
        "provider": options.provider,
        "GPU": subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() if on_gpu else None,  # noqa: S603
        "CPUs": usable_cpus(),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "its CUDA": onnxruntime.cuda_version,
            "torch": torch.__version__,
            "its CUDA ": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version() if on_gpu else None,
            "numpy": np.__version__,
        },
        "seconds": options.seconds,
        "tiny": options.tiny,
        "settings": options.settings,
    }


def main() -> None:
    """Measure what is missing, and write the table of all there is."""
    options = _arguments()
    if options.provider == "cuda":
        if reason := cuda.obstacle():
            raise InterflowError(f"--provider cuda: {reason}.")
        onnxruntime.preload_dlls()
    file = options.out / "accelerator.json"
    measurement = Measurement(file, conditions(options), time.monotonic() + 60 * options.minutes)
    try:
        with tempfile.TemporaryDirectory(prefix="interflow-benchmark-") as temporary:
            folders = artefacts(options.work or Path(temporary), options.tiny)
            rows = [row for row in plan(options, folders) if row[0]["part"] in (*options.parts, "work")]
            for what, measure in tqdm(rows, unit="row", disable=None):
                measurement.row(what, measure)
    except NoTimeError as error:
        print(error)
    finally:
        text = table(measurement.run)
        write_text(file.with_suffix(".md"), text)
        print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="This server on a GPU, against bare onnxruntime and PyTorch.")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda", help="cpu: to try it; default: cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, help="of the server, for single images")
    parser.add_argument("--seconds", type=float, default=2, help="per row (default: 2)")
    parser.add_argument("--minutes", type=float, default=9, help="after which no row is begun (default: 9)")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="of the server, in lower case")
    parser.add_argument("--tiny", action="store_true", help="a small network and small matrices, to try it")
    parser.add_argument("--work", type=Path, help="folder for the artefacts, so that the next call need not make them")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="default: benchmarks/results")
    options = parser.parse_args()
    options.settings = dict(setting.split("=", 1) for setting in options.settings)
    if options.provider == "cpu" and options.out == parser.get_default("out"):
        parser.error("--provider cpu needs an --out: no figure of a CPU is kept beside those of a GPU")
    return options


if __name__ == "__main__":
    cli.run(main)
