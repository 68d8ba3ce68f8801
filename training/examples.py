"""Save test images as PNG files, for the server's page and for trying it: `python training/examples.py --help`."""

import argparse
from pathlib import Path

from PIL import Image

from training import cli
from training.data import load_data
from training.recipe import resolve_recipe


def main(arguments: list[str] | None = None) -> int:
    """Write one test image of each class, as the network sees it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Save a test image of each class as <data>-<class>.png.")
    parser.add_argument("--data", default="digits", help="as in training/train.py; default: digits")
    parser.add_argument("--out", type=Path, default=Path("app/static/examples"), help="default: app/static/examples")
    options = parser.parse_args(arguments)

    data = load_data(resolve_recipe(None, {"data": options.data}))
    options.out.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(data.classes):
        first = (data.test.labels == label).nonzero()[0]
        images, _ = next(data.test.batches([first], workers=0))
        path = options.out / f"{data.name}-{name.replace('/', '-')}.png"
        Image.fromarray(images[0].squeeze(-1).numpy()).save(path)
        print(path)
    return 0


if __name__ == "__main__":
    cli.run(main)
