"""POST /explain: pictures of what the network's own numbers say, with the bundled networks on real images."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.main import create_app
from app.routes import explain as route
from app.settings import Settings
from model.contract import BRANCH_WEIGHTS, LOGITS, ModelCard, branch_map_name
from model.images import read_input
from model.panels import heat_map

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "app" / "static" / "examples"
MODELS = ["cifar10", "digits"]
STAGES = ["conv4", "conv7", "conv10", "conv13"]
STYLES = ["overlay", "map", "panel"]


@pytest.fixture(scope="module")
def cat(photographs):
    return photographs["chelsea.png"].read_bytes()


def encoded(image, kind="PNG", **options):
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def explained(client, content, query=""):
    """The picture, and the numbers in its headers by their names' last word."""
    answer = client.post(f"/explain?{query}", content=content)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    prefix = "x-interflow-"
    return picture, {n.removeprefix(prefix): float(v) for n, v in answer.headers.items() if n.startswith(prefix)}


def refused(client, content, query):
    answer = client.post(f"/explain?{query}", content=content)
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"], answer.json()["detail"]


def contribution_maps(client, model, content):
    """Each stage's contribution maps (K, h, w), by the Open Inference Protocol and plain numpy; and the logits."""
    path = ROOT / "exports" / model / "1" / "model.json"
    card = ModelCard.from_json(path.read_bytes(), path)
    pixels = read_input(content, card.input)[np.newaxis]
    names = [LOGITS, BRANCH_WEIGHTS, *(branch_map_name(branch) for branch in range(len(card.stages)))]
    image = {"name": "image", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.ravel().tolist()}
    body = {"inputs": [image], "outputs": [{"name": name} for name in names]}
    answer = client.post(f"/v2/models/{model}/infer", json=body).json()
    logits, weights, *maps = (np.reshape(output["data"], output["shape"])[0] for output in answer["outputs"])
    return logits, [
        weight[:, None, None] * values / values[0].size for weight, values in zip(weights, maps, strict=True)
    ]


def signed(picture):
    """-1..1: where on the colour scale each pixel of a bare map lies."""
    steps = np.linspace(-1, 1, 201)
    scale = np.asarray(heat_map(steps[np.newaxis], 1))[0].astype(int)
    red_less_blue = np.asarray(picture).astype(int)[..., 0] - np.asarray(picture)[..., 2]
    return np.interp(red_less_blue, scale[:, 0] - scale[:, 2], steps)


# What it says


@pytest.mark.parametrize("model", MODELS)
def test_the_sums_are_the_networks(both, cat, model):
    logits, maps = contribution_maps(both, model, cat)
    best, second = np.argsort(-logits)[:2]
    tolerance = 1e-4 * np.abs(logits).max()
    for stage, shown in {"fused": maps, **{name: [values] for name, values in zip(STAGES, maps, strict=True)}}.items():
        contribution = sum(values.sum(axis=(1, 2)) for values in shown)
        for query, total in {
            "": contribution[best] - contribution.mean(),
            "&values=raw": contribution[best],
            f"&class={second}": contribution[second] - contribution.mean(),
            "&versus=runner-up": contribution[best] - contribution[second],
            f"&versus={second}&values=raw": contribution[best] - contribution[second],
            f"&class={second}&versus=runner-up": contribution[second] - contribution[best],
        }.items():
            _, numbers = explained(both, cat, f"model={model}&style=map&size=64&stage={stage}{query}")
            assert numbers["sum"] == pytest.approx(total, abs=tolerance)
    assert numbers["class"] == second
    assert numbers["versus"] == best


@pytest.mark.parametrize("query", ["", "&values=raw", "&versus=runner-up"])
@pytest.mark.parametrize("model", MODELS)
def test_colours_tell_the_sign_and_place_of_every_cell(both, cat, model, query):
    """`squash`ed by hand to a square, so that all of it is seen: the middle of each cell has the sign of its number."""
    with Image.open(io.BytesIO(cat)) as image:
        content = encoded(image.convert("RGB").resize((320, 320)))
    logits, maps = contribution_maps(both, model, content)
    best, second = np.argsort(-logits)[:2]
    for stage, values in zip(STAGES, maps, strict=True):
        asked = {
            "": values[best] - values.mean(axis=0),
            "&values=raw": values[best],
            "&versus=runner-up": values[best] - values[second],
        }[query]
        picture, _ = explained(both, content, f"model={model}&style=map&stage={stage}&size=512{query}")
        rows, columns = (((np.arange(side) + 0.5) / side * 512).astype(int) for side in asked.shape)
        found = signed(picture)[np.ix_(rows, columns)]
        clear = np.abs(asked) > 0.2 * np.abs(asked).max()
        assert clear.any()
        assert (np.sign(found) == np.sign(asked))[clear].all()


def test_two_classes_held_against_each_other_are_mirror_images(both, cat):
    one, numbers = explained(both, cat, "style=map&class=cat&versus=dog")
    other, mirrored = explained(both, cat, "style=map&class=dog&versus=cat")
    assert (numbers["class"], numbers["versus"]) == (mirrored["versus"], mirrored["class"]) == (3, 5)
    assert numbers["sum"] == pytest.approx(-mirrored["sum"])
    seen = slice(200, 300)
    np.testing.assert_allclose(signed(one)[:, seen], -signed(other)[:, seen], atol=0.03)


def test_a_label_an_index_and_nothing_name_the_answers_class(both, cat):
    pictures = {both.post(f"/explain?{query}", content=cat).content for query in ("", "class=cat", "class=3")}
    assert len(pictures) == 1
    assert both.post("/explain?class=dog", content=cat).content not in pictures


def test_a_label_that_looks_like_an_index_is_a_label(serve, artefact, rewrite_card):
    """Digits whose classes are called 9 to 0."""
    rewrite_card(artefact, classes=tuple("9876543210"))
    with serve(create_app(Settings(exports=artefact.parents[1]))) as client:
        content = (EXAMPLES / "digits-7.png").read_bytes()
        assert client.post("/predict", content=content).json()["prediction"] | {"confidence": 0} == {
            "label": "2", "index": 7, "confidence": 0,
        }  # fmt: skip
        assert explained(client, content, "class=2")[1]["class"] == 7


# What it shows


@pytest.mark.parametrize("stage", ["fused", *STAGES])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model", MODELS)
def test_every_style_and_stage(both, cat, model, style, stage):
    picture, _ = explained(both, cat, f"model={model}&style={style}&stage={stage}")
    if style == "panel":
        assert picture.width > 5 * 224
    else:
        assert picture.size == (512, 341)


def test_what_the_network_did_not_see_is_grey(both, cat):
    """`cifar10` saw the middle 300 of 451 columns."""
    for style in ("overlay", "map"):
        shown = np.asarray(explained(both, cat, f"style={style}&size=902")[0]).astype(int)
        coloured = np.ptp(shown, axis=2) > 20
        assert shown.shape == (600, 902, 3)
        assert not coloured[:, :150].any()
        assert not coloured[:, -150:].any()
        assert coloured[:, 152:-152].mean() > 0.5


def test_a_turned_jpeg_gives_the_picture_of_the_upright_one(both, cat):
    with Image.open(io.BytesIO(cat)) as image:
        upright = image.convert("RGB").resize((1200, 800))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=98, exif=exif)
    for style in STYLES:
        one, _ = explained(both, encoded(upright, "JPEG", quality=98), f"style={style}&class=cat")
        other, _ = explained(both, turned, f"style={style}&class=cat")
        assert one.size == other.size
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3), (8, 8), (32, 32)])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model", MODELS)
def test_images_of_every_shape(both, cat, model, style, size):
    with Image.open(io.BytesIO(cat)) as image:
        content = encoded(image.convert("RGB").resize(size))
    picture, _ = explained(both, content, f"model={model}&style={style}")
    if style != "panel":
        assert max(picture.size) == 512
        assert picture.width * size[1] == pytest.approx(picture.height * size[0], abs=max(size))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode(both, cat, mode):
    with Image.open(io.BytesIO(cat)) as image:
        content = encoded(image.convert("RGB").convert("L" if mode == "I;16" else mode).convert(mode), "TIFF")
    for style in STYLES:
        explained(both, content, f"style={style}")


@pytest.mark.parametrize("name", [f"digits-{digit}.png" for digit in (0, 3, 7)])
def test_grey_digits(both, name):
    content = (EXAMPLES / name).read_bytes()
    for style in STYLES:
        _, numbers = explained(both, content, f"model=digits&style={style}")
        assert numbers["class"] == int(name[-5])


def test_a_huge_photograph_gives_a_small_picture(both, cat):
    with Image.open(io.BytesIO(cat)) as image:
        content = encoded(image.convert("RGB").resize((4510, 3000)), "JPEG", quality=60)
    assert explained(both, content)[0].size == (512, 341)
    assert explained(both, content, "size=1024&style=map")[0].size == (1024, 681)
    panel, _ = explained(both, content, "size=1024&style=panel")
    assert panel.width * panel.height < 6_000_000


def test_the_readmes_commands(both):
    """`curl -F image=@<file> "localhost:8000/explain?<query>"`"""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r'image=@(\S+) "localhost:8000/explain\?([^"]*)"', readme)
    assert commands
    for file, query in commands:
        explained(both, (ROOT / file).read_bytes(), query)


# What it refuses


@pytest.mark.parametrize("stage", ["conv5", "CONV4", "", "0", "all"])
def test_an_unknown_stage(both, cat, stage):
    status, code, detail = refused(both, cat, f"stage={stage}")
    assert (status, code) == (422, "invalid_question")
    assert f"no stage {stage!r}" in detail
    assert "conv4, conv7, conv10, conv13" in detail
    assert "`fused`" in detail


@pytest.mark.parametrize("name", ["catt", "Cat", "10", "-1", "1.0", "", "²", "٣", "9" * 200])
@pytest.mark.parametrize("parameter", ["class", "versus"])
def test_an_unknown_class(both, cat, parameter, name):
    status, code, detail = refused(both, cat, f"{parameter}={name}")
    assert (status, code) == (422, "invalid_question")
    assert f"no class {name[:100]!r}" in detail
    assert "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck" in detail
    assert "0 to 9" in detail


@pytest.mark.parametrize("query", ["versus=cat", "versus=3", "class=dog&versus=5"])
def test_a_class_against_itself(both, cat, query):
    status, code, detail = refused(both, cat, query)
    assert (status, code) == (422, "invalid_question")
    assert "`runner-up`" in detail


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("style=heat", "invalid_parameter"),
        ("values=both", "invalid_parameter"),
        ("size=63", "invalid_parameter"),
        ("size=1025", "invalid_parameter"),
        ("size=", "invalid_parameter"),
        ("class=" + "x" * 201, "invalid_parameter"),
        ("top_k=1", "unknown_parameter"),
        ("class_=cat", "unknown_parameter"),
    ],
)
def test_bad_parameters(both, cat, query, code):
    assert refused(both, cat, query)[:2] == (422, code)


def test_bad_images_and_models(both, cat):
    assert refused(both, b"no image", "")[:2] == (400, "invalid_image")
    assert refused(both, b"", "")[:2] == (400, "empty_image")
    assert refused(both, cat, "model=other")[:2] == (404, "model_not_found")
    answer = both.post("/explain", content=cat, headers={"X-Request-Timeout-Ms": "1"})
    assert answer.status_code == 504


def test_numbers_that_are_not_finite_are_no_picture(serve, colour_model, colour_network, cat):
    from app.repository import Repository

    class Overflowing:
        def run(self, images, names, thresholds=None, *, alone=False):
            return colour_network.run(images, names) | {LOGITS: np.full((len(images), 3), np.nan, np.float32)}

    with serve(create_app(Settings(), Repository([colour_model(Overflowing())]))) as client:
        assert refused(client, cat, "")[:2] == (500, "inference_failed")


@pytest.mark.parametrize("style", ["map", "overlay"])
def test_only_what_the_network_saw_bears_a_map(both, photographs, style):
    """Of a photograph of 600 x 400, cut to its middle: the same hatching beside it, whatever is explained."""
    content = photographs["coffee.png"].read_bytes()
    cat, ship = (
        np.asarray(explained(both, content, f"model=cifar10&style={style}&class={label}")[0], int)
        for label in ("cat", "ship")
    )
    side = cat.shape[1] // 6 - 2
    for strip in (np.s_[:, :side], np.s_[:, -side:]):
        np.testing.assert_array_equal(cat[strip], ship[strip])
        assert cat[strip].std() > 0
    assert np.abs(cat - ship)[:, side + 4 : -side - 4].max() > 30


def test_the_panel_is_told_what_the_network_saw(both, photographs, monkeypatch):
    draw, boxes = route.explained, []

    def watched(*arguments, **options):
        boxes.append(options.get("box"))
        return draw(*arguments, **options)

    monkeypatch.setattr(route, "explained", watched)
    explained(both, photographs["coffee.png"].read_bytes(), "model=cifar10&style=panel")
    assert boxes == [pytest.approx((1 / 6, 0, 5 / 6, 1))]  # of 600 x 400, cut to its middle
