"""An evaluation as one HTML file that needs nothing else: numbers, pictures, and the images worth a look."""

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from model.contract import InterflowError
from model.explain import contribution_maps, density, fused_map, spread
from model.panels import limit_of, overlay
from training.evaluation import Evaluation
from training.report_plots import pictures, stage_colours

TEMPLATE = "report.html.j2"
PICTURE_SIDE = 144
"""Pixels of a panel's pictures."""
CLASSES_LISTED = 30
"""Up to so many classes their table is open."""


class Table(NamedTuple):
    """Rows of a benchmark, as they are shown."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Explanations(NamedTuple):
    """What `benchmarks/explanations.py` found: its JSON, and what of it is shown."""

    figures: dict[str, Any]
    tables: list[Table]
    picture: str | None
    """A data URL."""


def load_explanations(path: Path, picture: Path | None = None) -> Explanations:
    """Read the JSON of `benchmarks/explanations.py`: a table for each part of it, a row for each method.

    Args:
        path: of the JSON.
        picture: a PNG that belongs to it.

    Raises:
        InterflowError: they cannot be read, or are something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        methods: dict[str, dict[str, Any]] = found["methods"]
        parts = dict.fromkeys(
            part for method in methods.values() for part, row in method.items() if isinstance(row, dict)
        )
        tables = [
            _table(part, {name: method[part] for name, method in methods.items() if part in method}) for part in parts
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InterflowError(f"--explanations {path}: not the JSON of benchmarks/explanations.py ({error}).") from error
    if picture and picture.suffix.lower() != ".png":
        raise InterflowError(f"--explanations {path} {picture}: expected a PNG as the second file.")
    encoded = base64.b64encode(picture.read_bytes()).decode() if picture else None
    return Explanations(found, tables, f"data:image/png;base64,{encoded}" if encoded else None)


def _table(part: str, methods: dict[str, dict[str, Any]]) -> Table:
    """Numbers by method and metric; those of three values are a mean and its confidence interval."""
    columns = list(dict.fromkeys(name for row in methods.values() for name in row))
    rows = [[method, *(_number(row.get(name)) for name in columns)] for method, row in methods.items()]
    return Table(part, ["method", *(name.replace("_", " ") for name in columns)], rows)


def _number(value: float | str | list[float] | None) -> str:
    if isinstance(value, list):
        mean, low, high = value
        return f"{mean:.3f} ({low:.3f} to {high:.3f})"
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}"


def render(evaluation: Evaluation, figures: dict[str, Any], explanations: Explanations | None = None) -> str:
    """The report's page.

    Args:
        evaluation: gives the panels' images and maps.
        figures: its numbers, as `training.evaluation.figures` has them.
        explanations: what `load_explanations` gave.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "count": _count}
    subject, card = evaluation.subject, evaluation.subject.card
    classes = card.classes
    kinds = ("disagreements", "errors")
    return environment.get_template(TEMPLATE).render(
        f=figures,
        card=card,
        subject=f"{card.name}, version {card.version}," if subject.kind == "artefact" else f"Run {subject.folder.name}",
        colours=stage_colours(len(figures["stages"])),
        pictures={name: Markup(svg) for name, svg in pictures(figures).items()},  # noqa: S704 - matplotlib's, escaped
        panels={
            kind: [
                _panel(evaluation, classes.index(e["answer"]), classes.index(e["rival"]), e["index"])
                for e in figures[kind]
            ]
            for kind in kinds
        },
        classes_listed=CLASSES_LISTED,
        explanations=explanations,
    )


def _panel(evaluation: Evaluation, answer: int, rival: int, index: int) -> list[str]:
    """The image, each stage's map of what spoke for the answer and not for its rival, and the fused one: data URLs."""
    images, _ = next(evaluation.data.images.batches([torch.tensor([index])], workers=0))
    outputs = evaluation.subject.forward(images.numpy())
    differences = [
        maps[0, answer] - maps[0, rival] for maps in contribution_maps(outputs.branch_maps, outputs.branch_weights)
    ]
    pixels = images[0].squeeze(-1).numpy()
    height, width = pixels.shape[:2]
    scale = PICTURE_SIDE / max(height, width)
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    picture = Image.fromarray(pixels).convert("RGB").resize(size[::-1], resample)
    seen = [density(spread(values, size)) for values in differences] + [density(fused_map(differences, size))]
    limit = limit_of(seen)
    return [_data_url(picture), *(_data_url(overlay(picture, values, limit)) for values in seen)]


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _points(value: float | None, base: float) -> str:
    """A fraction's distance from another, in percentage points."""
    return "–" if value is None else f"{100 * (value - base):+.2f}"


def _count(value: int) -> str:
    return f"{value:,}"
