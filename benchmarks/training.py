"""How fast a recipe trains, against the loop that one writes first: `python benchmarks/training.py --help`.

In one run, interleaved, several rounds, medians:

- plain: a `DataLoader` with torchvision's transforms on Pillow images, and an eager step;
- eager: this project's step as it is written (`training/step.py`), images on the device;
- compiled: the same through `torch.compile`;
- graph, n graphs: on a GPU, the step as one CUDA graph, and several runs of it that take turns, a stream each.

The share of the chip is the network's arithmetic per second over that of a large matrix product on the same device in
the same precision, measured beside it.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # as a script: `training` below would be this file
    del sys.path[0]

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

from model.interflow import Interflow
from training.augment import draw_epoch
from training.data import ImageData, load_data
from training.loop import choose_device
from training.recipe import Recipe, resolve_recipe
from training.step import Step, training_loss
from training.train import build_network

MATRIX = 4096
"""Side of the matrices that the chip's rate is measured with; a quarter of it on a CPU."""


@dataclass
class Variant:
    """A way to train. Calling `run` with a number of steps trains them in each of `runs` networks, and waits."""

    name: str
    runs: int
    run: Callable[[int], None]


class Photographs(Dataset[tuple[torch.Tensor, int]]):
    """Images as most loops read them: one Pillow image at a time, through torchvision's transforms."""

    def __init__(self, data: ImageData, recipe: Recipe) -> None:
        images = data.train.images
        assert isinstance(images, torch.Tensor)  # noqa: S101 - sets of small images
        self.images = [
            Image.fromarray(image.squeeze(2).numpy() if image.shape[2] == 1 else image.numpy()) for image in images
        ]
        self.labels = data.train.labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(data.size, padding=recipe.crop_padding or None),
                v2.RandomHorizontalFlip(recipe.flip),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.spec.mean, data.spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def plain(data: ImageData, recipe: Recipe, device: torch.device) -> Variant:
    """The loop that one writes first."""
    network = build_network(recipe, len(data.classes), data.spec).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    loader = DataLoader(
        Photographs(data, recipe), recipe.batch_size, shuffle=True, num_workers=recipe.workers, drop_last=True,
        persistent_workers=recipe.workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip

    def endless() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def run(steps: int) -> None:
        for _ in range(steps):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                loss = training_loss(network(images), labels, recipe)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _wait(device)

    network.train()
    return Variant("plain", 1, run)


def ours(name: str, data: ImageData, recipe: Recipe, device: torch.device, runs: int = 1) -> Variant:
    """This project's step, of several runs that take turns."""
    streams = [torch.cuda.Stream() if device.type == "cuda" else None for _ in range(runs)]
    states, position = [], 0
    for seed in range(runs):
        seeded = recipe.model_copy(update={"seed": seed})
        network = build_network(seeded, len(data.classes), data.spec).to(device)
        if recipe.channels_last:
            network.to(memory_format=torch.channels_last)
        network.train()
        states.append(Step(network, data, seeded, 10**6, device))
    steps_of_epoch = len(data.train) // recipe.batch_size
    rates = torch.full((steps_of_epoch + 1,), 1e-3)
    _wait(device)

    def run(steps: int) -> None:
        nonlocal position
        for _ in range(steps):
            here = position % steps_of_epoch
            for state, stream in zip(states, streams, strict=True):
                with torch.cuda.stream(stream):
                    if here == 0:
                        epoch = position // steps_of_epoch
                        state.begin_epoch(draw_epoch(data.train.labels, data.size, state.recipe, epoch), rates, 0)
                    state.take(here)
            position += 1
        _wait(device)

    return Variant(name, runs, run)


def flops_per_image(data: ImageData, recipe: Recipe) -> float:
    """Of forward and backward pass, two for a multiplication with its addition; convolutions and matrices only."""
    network: Interflow = build_network(recipe, len(data.classes), data.spec)
    images = torch.zeros(2, data.spec.channels, *data.size)
    with FlopCounterMode(display=False) as counter:
        training_loss(network(images), torch.zeros(2, dtype=torch.long), recipe).backward()
    return counter.get_total_flops() / 2


def matrix_rate(recipe: Recipe, device: torch.device, seconds: float) -> float:
    """Floating-point operations per second of a large matrix product in the recipe's precision."""
    side = MATRIX if device.type == "cuda" else MATRIX // 4
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    a @ b
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        _wait(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        _wait(device)
        rates.append(10 * 2 * side**3 / (time.perf_counter() - started))
    return statistics.median(rates)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(variants: list[Variant], warm_up: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every variant, one value a round; the variants take turns within a round."""
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with tqdm(total=len(variants) * (rounds + 1), unit="round", disable=None) as bar:
        for round_ in range(rounds + 1):
            for variant in variants:
                bar.set_description(variant.name)
                count = steps if round_ else warm_up
                started = time.perf_counter()
                variant.run(count)
                if round_:
                    seconds[variant.name].append((time.perf_counter() - started) / count)
                bar.update()
    return seconds


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description="Images and steps per second of a recipe, against a plain loop.")
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--width", help="multiplier of the channels; the recipe's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20, help="per round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (default: 5)")
    parser.add_argument("--together", type=int, nargs="+", default=[4, 8], help="runs in flight on a GPU")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too; it takes a minute")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()

    given = {name: getattr(options, name) for name in ("data", "device", "width") if getattr(options, name)}
    recipe = resolve_recipe(options.recipe, given)
    device = choose_device(recipe.device)
    data = load_data(recipe)
    here = data.to(device)
    eager, compiled = (recipe.model_copy(update={"cuda_graph": False, "compile": c}) for c in (False, True))
    variants = [plain(data, recipe, device), ours("eager", here, eager, device)]
    if options.compile:
        variants.append(ours("compiled", here, compiled, device))
    if device.type == "cuda":
        variants.append(ours("graph", here, recipe, device))
        if options.compile:
            variants.append(ours("compiled graph", here, recipe.model_copy(update={"compile": True}), device))
        variants += [ours(f"{count} graphs", here, recipe, device, count) for count in options.together]
    seconds = measure(variants, warm_up=max(5, options.steps // 4), steps=options.steps, rounds=options.rounds)
    work, chip = flops_per_image(data, recipe), matrix_rate(recipe, device, seconds=3)

    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    conditions = (
        f"{recipe.backbone} {recipe.method} x{recipe.width:g}, batch {recipe.batch_size}, {recipe.precision}, "
        f"{recipe.data}; {name}, {torch.get_num_threads()} threads, {recipe.workers} loader processes, torch "
        f"{torch.__version__}; medians of {options.rounds} rounds of {options.steps} steps; "
        f"{work / 1e9:.2f} GFLOP an image, matrices at {chip / 1e12:.2f} TFLOP/s"
    )
    rows, baseline = [], statistics.median(seconds["plain"])
    for variant in variants:
        median = statistics.median(seconds[variant.name])
        rate = variant.runs * recipe.batch_size / median
        rows.append(
            {
                "variant": variant.name,
                "images_per_second": round(rate, 1),
                "steps_per_second": round(variant.runs / median, 2),
                "speed_up": round(variant.runs * baseline / median, 2),
                "share_of_chip": round(rate * work / chip, 4),
                "seconds_per_step": seconds[variant.name],
            }
        )
    print(f"{conditions}\n\n| variant | images/s | steps/s | against plain | of the chip |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['variant']} | {row['images_per_second']:,.0f} | {row['steps_per_second']:,.1f} | "
            f"{row['speed_up']:.2f} x | {row['share_of_chip']:.1%} |"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
