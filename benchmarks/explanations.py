"""Are the maps right? Ours against gradients and occlusion: `python benchmarks/explanations.py --help`.

    uv run --extra train --group explanations python benchmarks/explanations.py --run runs/<run>

On a trained run and its real test images, all methods with the same images, patches and perturbation:

- faithfulness: 4x4 patches of the image turn to the mean colour, an eighth of them at a time, the most relevant first
  (deletion) or last; insertion is the latter backwards, and SRG (symmetric relevance gain) insertion less deletion;
- localisation: mosaics of four images of different classes, twice the side, each class explained in turn: the share of
  positive evidence in the class's own quadrant, and whether the highest value lies there (the pointing game);
- weights: the network is made random from the top down; a map that stays as it was did not show the network (MPRT);
- shifts: rank correlation of the maps of an image and of the same image moved by one pixel;
- time: CPU time of a map, in one process, in turn, medians; and of the exported model with and without its maps.

Grad-CAM and HiResCAM get the layer that suits them best, chosen by SRG on test images of their own; their localisation
is measured at every layer.
What was measured is kept below the run's folder: a command that was cut off goes on where it was. `--again times`
measures times anew. A whole run takes about ten minutes on one thread of a quiet machine.

Found (benchmarks/results/explanations.md has the figures of the last run):

- The fused map has the highest SRG, occlusion at 64 passes included, and more than any of its stages. In deletion,
  integrated gradients are level with it.
- Grad-CAM behind conv12 puts more of its evidence into the right quadrant, but its SRG there is 0. What our fused map
  has outside comes from the two shallow stages, whose cells see little of the image. A wider spreading of the cells (a
  Gaussian of 4 pixels, which keeps the sum) takes the share from 0.81 to 0.84 on 40 mosaics, and SRG from 0.43 to 0.42.
- Where a deep cell's value is put matters: in the middle of its part of the image, as `model.explain.spread` does, SRG
  is 0.43; at the middle of its receptive field (position times stride, for these convolutions) it was 0.26. Giving the
  deep cells' values to the places that finer stages speak for changes nothing that could be told from chance.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: this folder's modules would hide others of their names
    del sys.path[0]

import argparse
import copy
import hashlib
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.explanation_methods import (
    CAMS,
    Method,
    blocks_of,
    by_name,
    class_activation,
    evidence_of,
    grad_cam_by_hand,
    integrated_gradients,
    occlusion,
    of_nothing,
    ours,
    require_libraries,
)
from benchmarks.explanation_metrics import (
    Curves,
    Explain,
    bootstrap,
    build_mosaics,
    draw_mosaics,
    map_distance,
    patch_scores,
    points_inside,
    removal_curves,
    share_inside,
    shift_similarity,
)
from benchmarks.explanation_report import draw, page
from model.contract import IMAGE, LOGITS, MODEL_FILE, InterflowError, ModelCard
from model.explain import contribution_maps, evidence_maps, fused_confidences, spread
from model.interflow import Interflow, Normalize
from training import cli
from training.checkpoint import weights_sha256
from training.data import load_data
from training.files import replacing, write_text
from training.finish import open_finished
from training.recipe import load_recipe
from training.run import Run, newest_finished

RESULTS = Path("benchmarks/results")
PICTURE = Path("docs/explanations.png")
EXPORTS = Path("exports")
PATCHES = 8
"""Of a row and of a column."""
BATCH = 64
SEED = 0
SHOWN = 5
"""Images in the picture."""


@dataclass(frozen=True)
class Sizes:
    """How many images each part sees, and how often times are taken."""

    faithfulness: int = 200
    layers: int = 32
    mosaics: int = 40
    weights: int = 12
    shifts: int = 16
    rounds: int = 9
    served_rounds: int = 150


QUICK = Sizes(faithfulness=8, layers=4, mosaics=2, weights=2, shifts=2, rounds=2, served_rounds=3)
SECTIONS = ("layers", "faithfulness", "localisation", "weights", "shifts", "times", "served")


@dataclass(frozen=True)
class Subject:
    """What is explained.

    Attributes:
        card: of the run.
        network: trained, in evaluation mode.
        images: of the test set, normalised, in a random order that the seed fixes.
        labels: their classes.
        pixels: the same images, uint8 (N, height, width, channels).
    """

    card: ModelCard
    network: Interflow
    images: Tensor
    labels: Tensor
    pixels: Tensor

    def part(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` images from `start` on, and the class that the network finds in each: that is what is explained.

        Raises:
            InterflowError: the test set is too small.
        """
        if start + count > len(self.images):
            raise InterflowError(
                f"{len(self.images)} test images are too few, {start + count} are needed; try --quick."
            )
        images = self.images[start : start + count]
        return images, torch.cat([logits.argmax(dim=1) for logits in _logits(self.network, images)])


class Store:
    """Figures by name, each in a file of its own, so that nothing is measured twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, section: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """Arrays by name: what is kept, or else what `measure` gives, which is then kept."""
        path = self.folder / section / f"{name.replace(' ', '_').replace(',', '')}.npz"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            arrays = measure()
            with replacing(path) as temporary:
                np.savez(temporary, **arrays)
            print(f"{time.perf_counter() - self.started:6.0f} s  {section}: {name}", flush=True)
        with np.load(path) as kept:
            return dict(kept)

    def forget(self, section: str) -> None:
        """Have a section measured anew."""
        shutil.rmtree(self.folder / section, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write table, figures and picture; returns the exit status."""
    parser = argparse.ArgumentParser(description="Our evidence maps against gradients and occlusion.")
    parser.add_argument("--run", type=Path, help="folder of the run; default: the newest finished one below runs/")
    parser.add_argument(
        "--model", type=Path, help="its export, whose latency is measured; default: that below exports/"
    )
    parser.add_argument("--again", nargs="*", choices=SECTIONS, default=[], help="what to measure anew")
    parser.add_argument("--quick", action="store_true", help="a few images, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the table; default: {RESULTS}/")
    parser.add_argument("--picture", type=Path, default=PICTURE, help=f"default: {PICTURE}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the exported model is run, and so that CPU time is time
    versions = require_libraries() | {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}

    run = Run(options.run) if options.run else newest_finished()
    sizes = QUICK if options.quick else Sizes()
    subject = load_subject(run)
    sha256 = weights_sha256(subject.network)
    key = hashlib.sha256(json.dumps([asdict(sizes), SEED, sha256], sort_keys=True).encode()).hexdigest()
    store = Store(run.folder / "explanations" / key[:8])
    for section in options.again:
        store.forget(section)

    subject.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    model = options.model or _exported(sha256, subject.card)
    layers = best_layers(subject, sizes, store)
    best = {cam: max(by_layer, key=by_layer.__getitem__) for cam, by_layer in layers.items()}
    last = subject.network.stages[-1].name  # where its paper puts Grad-CAM
    methods = [
        *ours(subject.network),
        *(class_activation(cam, layer) for cam, layer in best.items()),
        *([class_activation("Grad-CAM", last)] if best["Grad-CAM"] != last else []),
        integrated_gradients(),
        occlusion(),
        *of_nothing(),
    ]
    cams = [class_activation(cam, layer) for cam, by_layer in layers.items() for layer in by_layer]
    everything = by_name([*methods, *cams])  # the best layer for one thing need not be the best for another
    found: dict[str, Any] = {
        "conditions": {
            "model": f"{subject.card.name}, {subject.card.backbone.name} {subject.card.method.name}, width "
            f"{subject.card.backbone.width:g}, taps {' '.join(stage.name for stage in subject.card.stages)}",
            "weights_sha256": sha256,
            "sizes": asdict(sizes),
            "seed": SEED,
            "versions": versions,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        },
        "layers": layers,
        "methods": {name: {"kind": method.kind} for name, method in everything.items()},
    }
    curves = faithfulness(subject, methods, sizes, store)
    parts = {
        "faithfulness": _faithfulness_rows(curves, methods),
        "localisation": localisation(subject, list(everything.values()), sizes, store),
        "weights": weights(subject, methods, sizes, store),
        "shifts": shifts(subject, methods, sizes, store),
        "times": times(subject, best["Grad-CAM"], methods, sizes, store),
    }
    for part, rows in parts.items():
        for name, row in rows.items():
            found["methods"].setdefault(name, {"kind": "clock"})[part] = row
    found["served"] = served(subject, model, sizes, store)

    options.out.mkdir(parents=True, exist_ok=True)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "explanations.json", json.dumps(found, indent=1) + "\n")
    write_text(options.out / "explanations.md", page(found))
    with replacing(options.picture) as temporary:
        kinds = {method.name: method.kind for method in methods}
        draw(temporary, *_examples(subject, methods), curves=curves, kinds=kinds)
    print(page(found))
    print(f"{options.out / 'explanations.md'}, {options.out / 'explanations.json'}, {options.picture}")
    return 0


def load_subject(run: Run) -> Subject:
    """A finished run's network and its test images.

    Raises:
        InterflowError: the run is not finished, or its data are not there or too large for this.
    """
    card, network = open_finished(run)
    data = load_data(load_recipe(run.recipe))
    if (data.size[0] % PATCHES, data.size[1] % PATCHES) != (0, 0):
        raise InterflowError(f"images of {data.size} pixels do not divide into {PATCHES}x{PATCHES} patches.")
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(SEED))[:1000]
    ((pixels, labels),) = data.test.batches([order], workers=0)
    return Subject(card, network, Normalize(card.input.mean, card.input.std)(pixels), labels, pixels)


def _logits(network: Interflow, images: Tensor) -> Iterator[Tensor]:
    with torch.no_grad():
        for batch in images.split(BATCH):
            yield network(batch.contiguous(memory_format=torch.channels_last)).logits


def explain_all(method: Method, network: Interflow, images: Tensor, classes: Tensor) -> np.ndarray:
    """A method's maps of any number of images, (N, height, width)."""
    return np.concatenate(
        [
            method.explain(network, part.contiguous(memory_format=torch.channels_last), wanted)
            for part, wanted in zip(images.split(BATCH), classes.split(BATCH), strict=True)
        ]
    )


def curves_of(subject: Subject, images: Tensor, classes: Tensor, maps: np.ndarray, step: int) -> Curves:
    """The confidence that is served in each image's class as patches go."""

    def confidence(changed: Tensor) -> np.ndarray:
        logits = torch.cat(list(_logits(subject.network, changed))).numpy()
        said = fused_confidences(logits, subject.card.temperature, subject.card.power)
        return said[np.arange(len(said)), classes.numpy()]

    return removal_curves(confidence, images, maps, patch=images.shape[-1] // PATCHES, step=step)


def best_layers(subject: Subject, sizes: Sizes, store: Store) -> dict[str, dict[str, float]]:
    """For each CAM the SRG by layer, on images none of which faithfulness is measured on."""
    images, classes = subject.part(sizes.faithfulness, sizes.layers)
    found: dict[str, dict[str, float]] = {}
    for cam in CAMS:
        for point in list(blocks_of(subject.network))[3:]:  # the first ones see 9 pixels across

            def measure(cam: str = cam, point: str = point) -> dict[str, Any]:
                maps = explain_all(class_activation(cam, point), subject.network, images, classes)
                return {"srg": curves_of(subject, images, classes, maps, step=PATCHES).srg()}

            found.setdefault(cam, {})[point] = float(store.get("layers", f"{cam} {point}", measure)["srg"].mean())
    return found


def faithfulness(subject: Subject, methods: Sequence[Method], sizes: Sizes, store: Store) -> dict[str, Curves]:
    """Removal curves by method."""
    images, classes = subject.part(0, sizes.faithfulness)
    curves = {}
    for method in methods:

        def measure(method: Method = method) -> dict[str, Any]:
            maps = explain_all(method, subject.network, images, classes)
            return curves_of(subject, images, classes, maps, step=PATCHES)._asdict()

        curves[method.name] = Curves(**store.get("faithfulness", method.name, measure))
    return curves


def _faithfulness_rows(curves: dict[str, Curves], methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    first = curves[methods[0].name].srg()
    return {
        name: {
            "srg": bootstrap(found.srg()),
            "deletion": bootstrap(found.deletion()),
            "insertion": bootstrap(found.insertion()),
            "ours_ahead": bootstrap(first - found.srg()),  # image by image
        }
        for name, found in curves.items()
    }


def localisation(subject: Subject, methods: Sequence[Method], sizes: Sizes, store: Store) -> dict[str, dict[str, Any]]:
    """Share of positive evidence in the own quadrant, and pointing game, on mosaics of images that are known well."""
    images, answers = subject.part(0, len(subject.images))
    known = (answers == subject.labels).nonzero().flatten()
    indices = draw_mosaics(subject.labels[known].numpy(), sizes.mosaics, SEED)
    mosaics = build_mosaics(images[known], indices).repeat_interleave(4, dim=0)
    classes = subject.labels[known][torch.from_numpy(indices)].flatten()
    quadrants = np.tile(np.arange(4), sizes.mosaics)
    rows = {}
    for method in methods:

        def measure(method: Method = method) -> dict[str, Any]:
            maps = explain_all(method, subject.network, mosaics, classes)
            return {"share": share_inside(maps, quadrants), "pointing": points_inside(maps, quadrants)}

        found = store.get("localisation", method.name, measure)
        rows[method.name] = {name: bootstrap(values.reshape(-1, 4)) for name, values in found.items()}
    return rows


def randomised(network: Interflow, stages: int) -> Interflow:
    """A copy with random heads and attention, and with the deepest `stages` stages random too; -1: nothing is.

    Batch norms forget their statistics with their stage.
    """
    network = copy.deepcopy(network)
    if stages < 0:
        return network
    generator_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    bound = math.sqrt(3 / len(network.stages))
    with torch.no_grad():
        network.attention.weight.uniform_(-bound, bound)
    blocks = blocks_of(network)
    names = list(blocks)
    taps = [0, *(names.index(stage.name) + 1 for stage in network.stages)]
    start = taps[len(taps) - 1 - stages]
    for part in (network.heads, *(blocks[name] for name in names[start:])):
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
    torch.set_rng_state(generator_state)
    return network.eval()


def weights(subject: Subject, methods: Sequence[Method], sizes: Sizes, store: Store) -> dict[str, dict[str, Any]]:
    """Rank correlation of the maps with those of networks that are random from the top down."""
    images, classes = subject.part(0, sizes.weights)
    patch = images.shape[-1] // PATCHES
    steps = ["heads and attention", *(f"and {stage.name}" for stage in reversed(subject.network.stages))]
    rows = {}
    for method in methods:

        def measure(method: Method = method) -> dict[str, Any]:
            trained = patch_scores(explain_all(method, subject.network, images, classes), patch)
            found = []
            for stages in range(len(steps)):
                maps = explain_all(method, randomised(subject.network, stages), images, classes)
                found.append(1 - map_distance(trained, patch_scores(maps, patch)))
            return {"similarity": np.stack(found, axis=1)}

        found = store.get("weights", method.name, measure)["similarity"]
        rows[method.name] = {step: bootstrap(column) for step, column in zip(steps, found.T, strict=True)}
    return rows


def shifts(subject: Subject, methods: Sequence[Method], sizes: Sizes, store: Store) -> dict[str, dict[str, Any]]:
    """Rank correlation of the maps of an image and of the same image moved by a pixel."""
    images, classes = subject.part(0, sizes.shifts)
    rows = {}
    for method in methods:

        def explain(images: Tensor, method: Method = method) -> np.ndarray:
            return explain_all(method, subject.network, images, classes)

        def measure(explain: Explain = explain) -> dict[str, Any]:
            return {"similarity": shift_similarity(explain, images, patch=images.shape[-1] // PATCHES)}

        rows[method.name] = {
            "similarity": bootstrap(store.get("shifts", method.name, measure)["similarity"]),
        }
    return rows


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each call in each round, one after the other, the first round not counted.

    CPU time, on one thread, is what a shared machine still tells the truth of.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                taken[name].append((time.process_time() - start) * 1e3)
    return taken


FORWARD, BY_HAND = "forward pass", "Grad-CAM by hand, one gradient"


def times(
    subject: Subject, point: str, methods: Sequence[Method], sizes: Sizes, store: Store
) -> dict[str, dict[str, Any]]:
    """Milliseconds an image in PyTorch, alone and in batches of 32: median over rounds, on one thread."""
    rows: dict[str, dict[str, Any]] = {}
    for batch in (1, 32):
        images, classes = subject.part(0, batch)
        images = images.contiguous(memory_format=torch.channels_last)
        # Those that take many passes an image take as many in a batch.
        clocked = [m for m in methods if "CAM" in m.name or (batch == 1 and m.kind in ("gradient", "occlusion"))]

        def measure(
            images: Tensor = images, classes: Tensor = classes, clocked: list[Method] = clocked
        ) -> dict[str, Any]:
            network = subject.network
            calls: dict[str, Callable[[], object]] = {
                FORWARD: lambda: list(_logits(network, images)),
                methods[0].name: lambda: methods[0].explain(network, images, classes),
                BY_HAND: lambda: grad_cam_by_hand(network, images, classes, point),
            }
            calls |= {m.name: partial(m.explain, network, images, classes) for m in clocked}
            return {name: np.array(ms) for name, ms in in_turn(calls, sizes.rounds).items()}

        for name, taken in store.get("times", f"batch {batch}", measure).items():
            rows.setdefault(name, {})[f"batch {batch}"] = float(np.median(taken)) / batch
    return rows


def served(subject: Subject, model: Path | None, sizes: Sizes, store: Store) -> dict[str, Any]:
    """What the maps cost in the exported model, and how exact their sum is; empty where there is no export of the run.

    Milliseconds a batch, in onnxruntime on one thread, without the maps, with them, and with the evidence map made.
    """
    if model is None:
        return {}
    maps = [name for name in subject.card.outputs if name.startswith("branch_map")]
    answer = [name for name in subject.card.outputs if name not in maps]
    session = _session(model)

    def fused(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        tensors = dict(zip([*answer, *maps], session.run([*answer, *maps], {IMAGE: pixels}), strict=True))
        stages = evidence_maps(contribution_maps([tensors[name] for name in maps], tensors["branch_weights"]))
        rows, classes = np.arange(len(pixels)), tensors[LOGITS].argmax(axis=1)
        return np.sum([spread(stage[rows, classes], size) for stage in stages], axis=0)

    found: dict[str, Any] = {}
    for batch in (1, 32):
        pixels = subject.pixels[:batch].numpy()

        def measure(pixels: np.ndarray = pixels) -> dict[str, Any]:
            calls: dict[str, Callable[[], object]] = {
                "without": lambda: session.run(answer, {IMAGE: pixels}),
                "with": lambda: session.run([*answer, *maps], {IMAGE: pixels}),
                "drawn": lambda: fused(pixels, (pixels.shape[1], pixels.shape[2])),
            }
            return {name: np.array(ms) for name, ms in in_turn(calls, sizes.served_rounds).items()}

        taken = store.get("served", f"batch {batch}", measure)
        found[f"batch {batch}"] = {
            **{name: float(np.median(ms)) for name, ms in taken.items()},
            # Round by round: what else the machine does meets both halves of a ratio alike.
            "more": statistics.median((taken["with"] / taken["without"]).tolist()) - 1,
            "beyond": statistics.median((taken["drawn"] - taken["without"]).tolist()),
        }
    pixels = subject.pixels[: sizes.faithfulness].numpy()
    names = [LOGITS, "branch_weights", *maps]
    tensors = [np.concatenate(parts) for parts in zip(*_batches(session, names, pixels), strict=True)]
    summed = sum(stage.sum(axis=(2, 3), dtype=np.float64) for stage in contribution_maps(tensors[2:], tensors[1]))
    found["residual"] = float(np.abs(summed - tensors[0]).max() / np.abs(tensors[0]).max())
    found["model"] = str(model)
    return found


def _session(model: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model / MODEL_FILE, options, providers=["CPUExecutionProvider"])


def _batches(session: onnxruntime.InferenceSession, names: list[str], pixels: np.ndarray) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(pixels), BATCH):
        yield session.run(names, {IMAGE: pixels[start : start + BATCH]})


def _exported(sha256: str, card: ModelCard) -> Path | None:
    """The folder below exports/ of the version that holds these weights; None: there is none."""
    for path in sorted((EXPORTS / card.name).glob("[0-9]*/model.json")):
        if ModelCard.from_json(path.read_bytes(), path).provenance.weights_sha256 == sha256:
            return path.parent
    return None


def _examples(subject: Subject, methods: Sequence[Method]) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Pixels, captions and maps by method of the first images of classes of their own, for the picture."""
    _, answers = subject.part(0, min(100, len(subject.images)))
    seen = {int(label): index for index, label in reversed(list(enumerate(answers.tolist())))}
    chosen = sorted(seen.values())[:SHOWN]
    images, classes = subject.images[chosen], answers[chosen]
    maps = {method.name: explain_all(method, subject.network, images, classes) for method in methods}
    sums = np.sum([stage.sum(axis=(1, 2)) for stage in evidence_of(subject.network, images, classes)], axis=0)
    captions = [f"{subject.card.classes[k]}\nevidence {s:+.2f}" for k, s in zip(classes.tolist(), sums, strict=True)]
    return subject.pixels[chosen].numpy(), captions, maps


if __name__ == "__main__":
    cli.run(main)
