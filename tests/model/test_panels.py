"""Pictures of maps: colours that say no more than the numbers, and panels that hold what they should."""

import numpy as np
import pytest
from PIL import Image

from model.contract import CARD_FILE, ModelCard
from model.explain import fused_confidences, softmax
from model.panels import AGAINST, NEUTRAL, TOWARDS, Question, Tile, explained, heat_map, limit_of, overlay, panel


@pytest.fixture(scope="module")
def cat(photographs):
    with Image.open(photographs["chelsea.png"]) as image:
        return image.convert("RGB").resize((180, 120))


def row(values, limit=1.0):
    return np.asarray(heat_map(np.array([values], float), limit))[0].astype(int)


def lightness(colour):
    """L* of CIELAB, 0..100."""
    shares = np.asarray(colour) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return 116 * (linear @ [0.2126, 0.7152, 0.0722]) ** (1 / 3) - 16


def test_zero_is_one_neutral_colour_and_the_limits_are_the_ends():
    shown = row([-1, 0, 1])
    assert [tuple(colour) for colour in shown] == [AGAINST, NEUTRAL, TOWARDS]
    assert max(NEUTRAL) - min(NEUTRAL) <= 3
    assert np.array_equal(row([-0.5, 0, 0.5], 0.5), shown)  # only what a value is of the limit counts
    assert np.array_equal(row([-9, 0, 9]), shown)  # and beyond it nothing more


def test_the_scale_is_symmetric_and_darkens_away_from_zero():
    steps = np.linspace(0, 1, 21)
    for_it, against = lightness(row(steps)), lightness(row(-steps))
    assert (np.diff(for_it) < 0).all()
    assert (np.diff(against) < 0).all()
    np.testing.assert_allclose(for_it, against, atol=2.5)


@pytest.mark.parametrize(
    "seen",  # linear RGB as those without red, without green and without blue receptors see it (Viénot 1999, Brettel)
    [
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        [[1.00000, 0.1461, -0.1461], [0, 0.8592, 0.1408], [0, 0.8592, 0.1408]],
    ],
)
def test_the_colour_blind_tell_for_from_against(seen):
    for strength in (0.25, 0.5, 1):
        both = np.array(seen) @ (row([-strength, strength]) / 255).T ** 2.2
        apart = np.abs(np.clip(both[:, 0], 0, 1) ** (1 / 2.2) - np.clip(both[:, 1], 0, 1) ** (1 / 2.2))
        assert apart.max() > 0.15


def test_a_map_over_an_image_leaves_it_grey_where_it_is_zero(cat):
    values = np.zeros((120, 180))
    shown = np.asarray(overlay(cat, values, 1)).astype(int)
    assert np.ptp(shown, axis=2).max() <= 3
    assert np.corrcoef(shown.mean(axis=2).ravel(), np.asarray(cat.convert("L")).ravel())[0, 1] > 0.999
    values[:, :60], values[:, 120:] = 1, -1
    shown = np.asarray(overlay(cat, values, 1)).astype(int)
    red, blue = shown[..., 0], shown[..., 2]
    assert (red[:, :60] > blue[:, :60]).all()
    assert (blue[:, 120:] > red[:, 120:]).all()


@pytest.mark.parametrize("over", [False, True])
def test_what_was_not_seen_is_striped_and_has_no_colour(cat, over):
    values = np.ones((120, 180))
    values[:, 90:] = np.nan
    shown = np.asarray(overlay(cat, values, 1) if over else heat_map(values, 1)).astype(int)
    assert np.ptp(shown[:, 90:], axis=2).max() <= 3
    assert np.ptp(shown[:, :90], axis=2).min() > 60
    brightness = shown[60, 90:].mean(axis=1)
    assert brightness.min() > 150
    assert np.ptp(brightness) > 15


def test_the_limit_that_maps_share():
    assert limit_of([np.array([[-3.0, 1]]), np.array([[2.0, np.nan]])]) == 3
    assert limit_of([np.zeros((2, 2))]) == limit_of([]) == limit_of([np.full((1, 1), np.nan)]) == 1


def test_a_question_is_what_its_words_say():
    maps = [np.arange(24.0).reshape(3, 2, 4) ** 2, np.ones((3, 1, 1))]
    classes = ("cat", "dog", "eel")
    (evidence, _), (raw, _), (difference, none) = (
        Question(0).maps(maps), Question(0, raw=True).maps(maps), Question(0, versus=2).maps(maps),
    )  # fmt: skip
    assert np.array_equal(raw, maps[0][0])
    assert np.array_equal(evidence, maps[0][0] - maps[0].mean(axis=0))
    assert np.array_equal(difference, maps[0][0] - maps[0][2])
    assert not none.any()
    assert np.array_equal(Question(2, versus=0).maps(maps)[0], -difference)
    assert Question(0).words(classes) == ("Why cat?", "for cat", "against cat")
    assert Question(0, 2).words(classes) == ("Why cat and not eel?", "for cat", "for eel")
    assert [question.kind for question in (Question(0), Question(0, raw=True), Question(0, 1))] == [
        "evidence", "contribution", "difference",
    ]  # fmt: skip


@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
@pytest.mark.parametrize("size", [(180, 120), (1, 200), (200, 1), (64, 64)])
def test_a_panel_holds_the_image_and_every_map_on_one_scale(cat, tiles, size):
    """Where a map stands is found by its own colours."""
    image = cat.resize(size)
    strengths = np.linspace(-1, 1, tiles) if tiles > 1 else [1.0]
    values = [np.full((size[1], size[0]), strength) for strength in strengths]
    page = np.asarray(
        panel(
            image,
            [
                Tile(f"stage{number}", ["says a very long label indeed, 99.9 %"] * 3, map_)
                for number, map_ in enumerate(values)
            ],
            heading="Why " + "x" * 300,
            towards="for it",
            against="against it",
        )
    )

    def places(part):
        windows = np.lib.stride_tricks.sliding_window_view(page, part.shape)[..., 0, :, :, :]
        corner = (windows[:, :, 0, 0] == part[0, 0]).all(axis=2) & (windows[:, :, -1, -1] == part[-1, -1]).all(axis=2)
        return [(int(y), int(x)) for y, x in np.argwhere(corner) if np.array_equal(windows[y, x], part)]

    assert places(np.asarray(image))
    previous = (-1, -1)
    if min(size) > 1:
        for map_ in values:
            (place,) = places(np.asarray(overlay(image, map_, 1)))
            assert place > previous  # from left to right, then in the next row
            previous = place


def test_what_a_panel_of_a_network_says_is_what_its_numbers_are(monkeypatch, bundled, cat):
    card = ModelCard.from_json((bundled / CARD_FILE).read_bytes(), bundled)
    random, branches, classes = np.random.default_rng(0), len(card.stages), len(card.classes)
    maps = [random.normal(size=(classes, *stage.map_size)) for stage in card.stages]
    weights = random.normal(size=(branches, classes))
    z = np.stack([values.mean(axis=(1, 2)) for values in maps])
    seen = {}
    monkeypatch.setattr("model.panels.panel", lambda image, tiles, **words: seen.update(words, tiles=tiles))
    explained(cat, card, maps, weights, Question(7, versus=2), box=(0.25, 0, 0.75, 1))
    *stages, fused = seen["tiles"]
    difference = weights[:, 7] * z[:, 7] - weights[:, 2] * z[:, 2]
    for number, (tile, stage) in enumerate(zip(stages, card.stages, strict=True)):
        says = softmax(np.asarray(card.reading_scales[number]) * z[number])
        assert tile.title == stage.name
        assert list(tile.lines) == [
            f"says {card.classes[says.argmax()]}, {says.max():.1%}",
            f"difference {difference[number]:+.3g}",
            f"weight {weights[number, 7]:.3g}, {weights[number, 2]:.3g}",
        ]
        assert np.nanmean(tile.values) == pytest.approx(difference[number])
    says = fused_confidences((weights * z).sum(axis=0), card.temperature, card.power)
    assert list(fused.lines) == [
        f"says {card.classes[says.argmax()]}, {says.max():.1%}", f"difference {difference.sum():+.3g}",
    ]  # fmt: skip
    assert np.nanmean(fused.values) == pytest.approx(difference.sum())
    assert np.isnan(fused.values[:, :45]).all()
    assert not np.isnan(fused.values[:, 45:135]).any()
    assert seen["heading"] == "Why 7 and not 2?"
