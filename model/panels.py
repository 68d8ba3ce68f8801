"""Maps as pictures: one over its image, alone, or all stages side by side on one scale. No torch here.

Values are those of `model.explain.density`, float (height, width) of the picture: positive pushed towards the class,
negative against it, NaN is what the network did not see. Colours are symmetric about zero, which is neutral grey; red
and blue of equal lightness stay apart for the colour-blind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.contract import ModelCard
from model.explain import WHOLE, contribution_maps, density, fused_confidences, fused_map, readings

TOWARDS, NEUTRAL, AGAINST = (190, 24, 38), (244, 244, 242), (14, 92, 173)
_PALE_TOWARDS, _PALE_AGAINST = (242, 148, 116), (120, 178, 226)
_RAMP = np.array([AGAINST, _PALE_AGAINST, NEUTRAL, _PALE_TOWARDS, TOWARDS], np.float32)
"""Colours at -1, -1/2, 0, 1/2 and 1 times the limit; between them they are mixed."""

_INK, _FAINT, _PAPER = (28, 30, 34), (98, 102, 110), (255, 255, 255)
_STRIPES = 208, 240
_DARKEST = 0.55
"""Of an image under a map: black shows this much of the map's colour."""
_MOST_COLUMNS = 6
_LEAST_WIDTH, _LEAST_TEXT = 150, 11
"""Of a tile, so that words fit under a narrow image; pixels."""


class Question(NamedTuple):
    """What is explained: why a class, or why a class and not another."""

    target: int
    """Class index."""
    versus: int | None = None
    """Of the other class; without, all classes' mean is what the target's evidence is held against."""
    raw: bool = False
    """Contributions as they are; of two classes the difference is the same."""

    def maps(self, maps: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The answer: of each stage's contribution maps (..., K, h, w) the one (..., h, w) that is asked for."""
        if self.versus is not None:
            return [values[..., self.target, :, :] - values[..., self.versus, :, :] for values in maps]
        if self.raw:
            return [values[..., self.target, :, :] for values in maps]
        return [values[..., self.target, :, :] - values.mean(axis=-3) for values in maps]

    @property
    def kind(self) -> str:
        """What a map sums to."""
        return "difference" if self.versus is not None else "contribution" if self.raw else "evidence"

    def words(self, classes: Sequence[str]) -> tuple[str, str, str]:
        """The question itself, what positive values pushed towards, and what negative ones did."""
        target = classes[self.target]
        if self.versus is not None:
            other = classes[self.versus]
            return f"Why {target} and not {other}?", f"for {target}", f"for {other}"
        return f"Why {target}?", f"for {target}", f"against {target}"


class Tile(NamedTuple):
    """One map of a panel, and what is written under it."""

    title: str
    lines: Sequence[str]
    values: np.ndarray


def heat_map(values: np.ndarray, limit: float) -> Image.Image:
    """A map alone: RGB, of its size.

    Args:
        values: as this module has them.
        limit: of the colour scale, which goes from -limit to limit; what exceeds it has the colour of the limit.
    """
    return _hatched(_colours(_scaled(values, limit)), values)


def overlay(image: Image.Image, values: np.ndarray, limit: float) -> Image.Image:
    """A map on its image, as if the image were printed in grey and the map painted over it in transparent ink.

    Args:
        image: of the values' size.
        values: as this module has them.
        limit: as for `heat_map`.
    """
    ink = np.asarray(image.convert("L"), np.float32)[..., np.newaxis] / 255
    return _hatched(_colours(_scaled(values, limit)) * (_DARKEST + (1 - _DARKEST) * ink), values)


def panel(
    image: Image.Image, tiles: Sequence[Tile], *, heading: str, towards: str, against: str, note: str = ""
) -> Image.Image:
    """An image and its maps side by side, on one signed scale whose limits are written under it.

    Args:
        image: RGB, of the size of all values.
        tiles: from left to right.
        heading: what is explained.
        towards: what positive values pushed towards.
        against: what negative ones did.
        note: written under the scale.
    """
    limit = limit_of([tile.values for tile in tiles])
    pictures = [image, *(overlay(image, tile.values, limit) for tile in tiles)]
    titles = ["image", *(tile.title for tile in tiles)]
    words: list[Sequence[str]] = [(), *(tile.lines for tile in tiles)]
    rows = -(-len(pictures) // _MOST_COLUMNS)
    columns = -(-len(pictures) // rows)

    tile_width = max(image.width, _LEAST_WIDTH)
    text = max(_LEAST_TEXT, tile_width // 16)
    font, large = ImageFont.load_default(text), ImageFont.load_default(1.4 * text)  # made anew: threads share none
    gap, line = round(1.2 * text), round(1.4 * text)
    tile_height = image.height + line * (1 + max(map(len, words))) + line // 2
    width = columns * (tile_width + gap) + gap
    first_row = 2 * gap + 2 * text
    scale_top = first_row + rows * (tile_height + gap)
    page = Image.new("RGB", (width, scale_top + 3 * line + gap), _PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (gap, gap), heading, large, width - 2 * gap)
    for place, (picture, title, lines) in enumerate(zip(pictures, titles, words, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (tile_width + gap), first_row + row * (tile_height + gap)
        _write(draw, (left, top), title, font, tile_width)
        page.paste(picture, (left, top + line))
        for number, written in enumerate(lines, 1):
            under = top + image.height + line * number + line // 3
            _write(draw, (left, under), written, font, tile_width, colour=_INK if number == 1 else _FAINT)

    bar_width = min(width - 2 * gap, 3 * tile_width)
    ramp = np.broadcast_to(np.linspace(-limit, limit, bar_width), (line, bar_width))
    page.paste(heat_map(ramp, limit), (gap, scale_top))
    under, half = scale_top + line + line // 4, bar_width // 2 - text
    _write(draw, (gap, under), f"{-limit:+.3g}  {against}", font, half)
    draw.text((gap + bar_width // 2, under), "0", _INK, font, "ma")
    _write(draw, (gap + bar_width, under), f"{towards}  {limit:+.3g}", font, half, anchor="ra")
    _write(draw, (gap, under + line), note, font, width - 2 * gap, colour=_FAINT)
    return page


def explained(
    image: Image.Image,
    card: ModelCard,
    branch_maps: Sequence[np.ndarray],
    branch_weights: np.ndarray,
    question: Question,
    *,
    box: Sequence[float] = WHOLE,
) -> Image.Image:
    """The panel of one image: every stage and the fused map, with what each said, its weight and what its map sums to.

    Args:
        image: upright, RGB, as it is to be shown.
        card: of the network.
        branch_maps: its outputs for the image, one of (K, h, w) for each of B stages.
        branch_weights: (B, K).
        question: what is explained.
        box: what of the image the network saw (`model.images.seen`).
    """
    maps = contribution_maps(branch_maps, branch_weights)
    logits = np.sum([values.sum(axis=(1, 2), dtype=np.float64) for values in maps], axis=0)
    branch_logits = np.stack([values.mean(axis=(1, 2), dtype=np.float64) for values in branch_maps])
    beliefs = readings(branch_logits, np.asarray(card.reading_scales))
    fused = fused_confidences(logits, card.temperature, card.power)
    asked = question.maps(maps)
    of_classes = [question.target] if question.versus is None else [question.target, question.versus]

    def tile(title: str, belief: np.ndarray, shown: Sequence[np.ndarray], *more: str) -> Tile:
        total = sum(float(values.sum(dtype=np.float64)) for values in shown)
        says = f"says {card.classes[belief.argmax()]}, {belief.max():.1%}"
        values = density(fused_map(shown, (image.height, image.width), box), box)
        return Tile(title, [says, f"{question.kind} {total:+.3g}", *more], values)

    tiles = [
        tile(stage.name, belief, [values], f"weight {', '.join(f'{weight:.3g}' for weight in weights[of_classes])}")
        for stage, belief, values, weights in zip(card.stages, beliefs, asked, branch_weights, strict=True)
    ]
    tiles.append(tile("fused", fused, asked))
    heading, towards, against = question.words(card.classes)
    note = f"{card.name} {card.version}; in logits: over what the network saw, the mean of a map is the number under it"
    return panel(image, tiles, heading=heading, towards=towards, against=against, note=note)


def limit_of(values: Sequence[np.ndarray]) -> float:
    """The limit of a scale that all these share: the most that any is away from zero; 1 where all are zero."""
    most = max((float(np.nanmax(np.abs(array), initial=0)) for array in values), default=0.0)
    return most if most > 0 else 1.0


def _scaled(values: np.ndarray, limit: float) -> np.ndarray:
    """In -1..1; 0 where the network did not see."""
    return np.clip(np.nan_to_num(values) / limit, -1, 1).astype(np.float32)


def _colours(scaled: np.ndarray) -> np.ndarray:
    """(height, width) in -1..1 to float (height, width, 3) in 0..255."""
    steps = np.linspace(-1, 1, len(_RAMP))
    return np.stack([np.interp(scaled, steps, channel) for channel in _RAMP.T], axis=-1)


def _hatched(colours: np.ndarray, values: np.ndarray) -> Image.Image:
    """Colours as an image; what the network did not see is pale and striped."""
    unseen = np.isnan(values)
    if unseen.any():
        period = max(8, max(values.shape) // 32)
        diagonals = np.add.outer(*(np.arange(side) for side in values.shape)) % period
        stripes = np.where(diagonals < period // 3, *_STRIPES)[..., np.newaxis]
        colours = np.where(unseen[..., np.newaxis], stripes + (colours - stripes) * 0.2, colours)
    return Image.fromarray(colours.round().astype(np.uint8))


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    *,
    colour: tuple[int, int, int] = _INK,
    anchor: str = "la",
) -> None:
    """One line, cut where it is too long."""
    text = " ".join(text.split())[:200]
    shown = text
    while shown and draw.textlength(shown, font) > width:
        text = text[:-1]
        shown = f"{text.rstrip()}…"
    draw.text(place, shown, colour, font, anchor)
