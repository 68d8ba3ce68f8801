"""Reports: a run and its artefact say the same, figures follow their definitions, and the page needs nothing else."""

import dataclasses
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from sklearn.calibration import calibration_curve

from model.contract import InterflowError, ModelCard
from model.explain import fused_confidences, softmax
from training import evaluate as command
from training.artefact import network_of
from training.calibration import adaptive_ece
from training.checkpoint import load_network
from training.data import load_data
from training.evaluate import main
from training.evaluation import class_selectivity, divergence, evaluate, figures, reliability
from training.evaluation_data import load_images
from training.recipe import load_recipe
from training.report import render
from training.subjects import open_subject
from training.train import main as train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reports(trained_run, exported, tmp_path_factory):
    """The numbers of a run's report and of its artefact's, and the first one's page."""
    folder = tmp_path_factory.mktemp("reports")
    assert main([str(trained_run), "--out", str(folder / "run.html")]) == 0
    assert main([str(exported / "digits" / "1"), "--out", str(folder / "artefact.html")]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "artefact.html", "artefact.json", "run.html", "run.json",
    ]  # fmt: skip
    numbers = [json.loads((folder / f"{kind}.json").read_text()) for kind in ("run", "artefact")]
    return *numbers, (folder / "run.html").read_text()


@pytest.fixture(scope="module")
def outputs(trained_run):
    """The network's test data, and what it says of it, asked without any of the report's code."""
    card = ModelCard.from_json((trained_run / "card.json").read_bytes(), "card")
    network = network_of(card)
    load_network(trained_run / "checkpoint.safetensors", network)
    data = load_data(load_recipe(trained_run / "recipe.yaml"))
    mean, std = torch.tensor(card.input.mean), torch.tensor(card.input.std)
    pixels = ((data.test.images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return network, data.test, pixels, network(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, photographs):
    """Colour tiles of real photographs, a folder for each of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in (("cat", "chelsea.png"), ("coffee", "coffee.png")):
        (root / label).mkdir()
        with Image.open(photographs[name]) as photo:
            for i in range(6):
                photo.crop((30 * i, 20 * i, 30 * i + 80, 20 * i + 80)).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory, outputs):
    """The digits' test images as files, a folder for each class, not divided."""
    root = tmp_path_factory.mktemp("scans")
    _, test, _, _ = outputs
    for i, (image, label) in enumerate(zip(test.images, test.labels.tolist(), strict=True)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.squeeze(-1).numpy()).save(root / str(label) / f"{i:03}.png")
    return root


def same(one, other, where=""):
    """Whether two JSON values are, numbers up to float32 through two libraries."""
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=2e-4), where
    else:
        assert one == other, where


def test_a_run_and_its_artefact_give_the_same_numbers(reports):
    run, artefact, _ = reports
    assert (run["subject"]["kind"], artefact["subject"]["kind"]) == ("run", "artefact")
    assert "torch" in run["subject"]["runtime"]
    assert "onnxruntime" in artefact["subject"]["runtime"]
    for part in run:
        if part not in ("created", "subject", "completeness", "card"):
            same(run[part], artefact[part], part)
    for report in (run, artefact):
        assert report["completeness"]["relative"] < 1e-5


def test_the_figures_are_those_of_the_card(reports):
    run, _, _ = reports
    metrics = run["card"]["metrics"]
    for name in ("accuracy", "macro_f1", "auroc", "ece"):
        assert run["fused"][name] == pytest.approx(metrics[name], abs=1e-6), name
    assert [stage["accuracy"] for stage in run["stages"]] == pytest.approx(metrics["branch_accuracy"])
    assert [row["recall"] for row in run["classes"]] == pytest.approx(metrics["class_recall"])
    assert sum(stage["importance"] for stage in run["stages"]) == pytest.approx(1)


def test_without_a_stage_is_what_the_network_says_with_its_weight_at_zero(reports, outputs):
    network, test, pixels, _ = outputs
    for i, stage in enumerate(reports[0]["stages"]):
        saved = network.attention.weight.detach().clone()
        with torch.inference_mode():
            network.attention.weight[i] = 0
            answers = network(pixels).logits.argmax(dim=1)
            network.attention.weight.copy_(saved)
        expected = float((answers == test.labels).double().mean())
        assert stage["accuracy_without"] == pytest.approx(expected, abs=1.5 / len(test))  # a tie may fall either way


def test_selectivity_is_that_of_the_tapped_features(reports, outputs):
    """Of each channel, class by class, by the definition of Morcos et al.; in a run and in an artefact."""
    network, test, pixels, _ = outputs
    with torch.inference_mode():
        maps = network.features(pixels).maps
    for i, feature in enumerate(maps):
        means = torch.stack([feature[test.labels == label].mean(dim=(0, 2, 3)) for label in range(10)]).double()
        expected = []
        for channel in means.T[means.any(dim=0)]:
            best = int(channel.argmax())
            rest = torch.cat([channel[:best], channel[best + 1 :]]).mean()
            expected.append(float((channel[best] - rest) / (channel[best] + rest)))
        for report in reports[:2]:
            stage = report["stages"][i]["selectivity"]
            np.testing.assert_allclose(stage["channels"], expected, atol=2e-4)
            assert len(stage["channels"]) + stage["silent_channels"] == feature.shape[1]


def test_selectivity_is_1_for_one_class_alone_and_0_for_all_alike_whatever_the_scale():
    activity = np.array([[3.0, 5.0, 0.0, 2.0], [0.0, 5.0, 0.0, 1.0], [0.0, 5.0, 0.0, 0.0]])
    assert class_selectivity(activity) == pytest.approx([1, 0, 0.6])  # the third is never active
    assert class_selectivity(7 * activity) == pytest.approx(class_selectivity(activity))


def test_divergence_is_jensen_and_shannons():
    beliefs = softmax(np.random.default_rng(0).normal(0, 4, (2, 50, 10)))
    expected = jensenshannon(*beliefs, base=2, axis=1) ** 2
    assert divergence(*beliefs) == pytest.approx(expected)
    certain = np.eye(3)
    assert divergence(certain, certain) == pytest.approx([0, 0, 0])
    assert divergence(certain, certain[[1, 2, 0]]) == pytest.approx([1, 1, 1])


def test_disagreements_and_errors_are_the_most_extreme_ones(reports, outputs, trained_run):
    run, _, _ = reports
    card = ModelCard.from_json((trained_run / "card.json").read_bytes(), "card")
    _, test, _, said = outputs
    z, labels = said.branch_logits.double().numpy(), test.labels.numpy()
    readings = softmax(np.array(card.reading_scales) * z)
    bits = jensenshannon(readings[:, 0], readings[:, -1], base=2, axis=1) ** 2
    shown = run["disagreements"]
    assert [entry["divergence_bits"] for entry in shown] == pytest.approx(np.sort(bits)[::-1][: len(shown)], abs=1e-4)
    confidence = fused_confidences(said.logits.double().numpy(), card.temperature, card.power)
    wrong = np.sort(confidence.max(axis=1)[confidence.argmax(axis=1) != labels])[::-1]
    assert len(run["errors"]) == min(12, len(wrong)) > 0
    assert [entry["confidence"] for entry in run["errors"]] == pytest.approx(wrong[:12], abs=1e-4)
    for entry in run["errors"] + shown:
        logits = said.logits[entry["index"]].tolist()
        answer, rival = (card.classes.index(entry[name]) for name in ("answer", "rival"))
        assert logits[answer] == max(logits)
        assert entry["difference"] == pytest.approx(logits[answer] - logits[rival], abs=1e-3)
        assert sum(stage["difference"] for stage in entry["stages"]) == pytest.approx(entry["difference"], abs=1e-4)
        assert entry["class"] == card.classes[labels[entry["index"]]]


def test_the_bins_of_a_reliability_diagram_add_up_to_the_ece(reports):
    for output in [reports[0]["fused"], *reports[0]["stages"]]:
        filled = [row for row in output["reliability"] if row["images"]]
        images = sum(row["images"] for row in filled)
        assert images == reports[0]["data"]["images"]
        gap = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in filled) / images
        assert gap == pytest.approx(output["ece"], abs=1e-6)
        assert all(row["from"] <= row["confidence"] <= row["to"] + 1e-9 for row in filled)


def test_adaptive_bins_hold_equally_many_images():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (1500, 4))
    probabilities, truth = softmax(logits), softmax(0.5 * logits)  # the surer, the more overconfident
    labels = (random.random((1500, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(0, 3)
    right, confidence = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1) - 0.15  # some too modest
    shifted = np.concatenate([confidence[:, None], np.zeros((1500, 1))], axis=1)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    assert (accuracy > mean).any()
    assert (accuracy < mean).any()  # or the bins would not matter
    assert adaptive_ece(shifted, np.where(right, 0, 1)) == pytest.approx(np.abs(accuracy - mean).mean(), abs=2e-3)


def test_a_confidence_of_exactly_1_is_in_the_last_bin():
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))[-1]["images"] == 1


def test_a_sum_that_is_not_exact_is_found(trained_run):
    subject = open_subject(trained_run, CPU)
    data = load_images(subject, None, None, {"workers": 0})

    def inexact(images):
        outputs = subject.forward(images)
        outputs.branch_maps[1][-1, 3, 0, 0] += 0.5  # one cell of one map of the last image of each batch
        return outputs

    exact, broken = (
        evaluate(dataclasses.replace(subject, forward=forward), data, 0).residuals
        for forward in (subject.forward, inexact)
    )
    height, width = subject.card.stages[1].map_size
    assert exact.logits < 1e-5
    expected = 0.5 * abs(subject.card.branch_weights[1][3]) / (height * width)
    assert broken.logits == pytest.approx(expected, rel=1e-3)
    assert broken.branch_logits[1] == pytest.approx(0.5 / (height * width), rel=1e-3)
    assert max(exact.branch_logits.max(), broken.branch_logits[0]) < 1e-5


class Page(HTMLParser):
    """Tags, those of them that are still open, sources and targets, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.links, self.ids, self.text = set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "br", "link"):
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(reports):
    run, _, text = reports
    page = Page(text)
    assert page.open == []
    assert {"svg", "img"} <= page.tags
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert "<script" not in text
    assert "url(http" not in text
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))  # of all pictures together
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert sum(link.startswith("data:image/webp") for link in page.links) == 6 * len(
        run["errors"] + run["disagreements"]
    )
    words = " ".join(page.text)
    assert f"{run['fused']['accuracy']:.2%}".replace("%", "\N{NO-BREAK SPACE}%") in words
    assert "nan" not in words.lower().split()


def test_classes_may_be_called_anything(trained_run):
    names = ("<script>alert(1)</script>", "$x_1$", "</svg>", "a & b", "猫", '"', "'", "{{ 7 * 7 }}", "long" * 20, "9")
    subject = open_subject(trained_run, CPU)
    data = load_images(subject, None, None, {"workers": 0})
    odd = dataclasses.replace(subject, card=subject.card.model_copy(update={"classes": names}))
    evaluation = evaluate(odd, data, 0)
    text = render(evaluation, figures(evaluation))
    page = Page(text)
    assert page.open == []
    assert "<script" not in text
    assert set(names[:2]) | set(names[3:8]) <= set(page.text)


def test_another_folder_is_evaluated_whole_and_its_files_are_named(exported, digit_files, reports, tmp_path):
    out = tmp_path / "new" / "report.html"
    assert main([str(exported / "digits" / "1"), "--data", str(digit_files), "--out", str(out), "--workers", "0"]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["data"]["split"], report["data"]["images"]) == ("all", reports[1]["data"]["images"])
    assert report["fused"]["accuracy"] == pytest.approx(reports[1]["fused"]["accuracy"])
    for entry in report["errors"]:
        label, name = entry["file"].split("/")
        assert label == entry["class"]
        assert (digit_files / label / name).is_file()
    assert entry["file"] in out.read_text()


def test_classes_in_another_order_are_matched_by_name(trained_run, digit_files):
    subject = open_subject(trained_run, CPU)
    backwards = subject.card.model_copy(update={"classes": subject.card.classes[::-1]})
    for card in (subject.card, backwards):
        data = load_images(dataclasses.replace(subject, card=card), str(digit_files), None, {"workers": 0})
        names = [card.classes[label] for label in data.images.labels.tolist()]
        assert names == [path.parent.name for path in data.images.paths]


@pytest.mark.parametrize(("split", "images"), [("train", 1295), ("val", 143), ("all", 1797)])
def test_splits_of_a_run_are_its_own(trained_run, split, images):
    subject = open_subject(trained_run, CPU)
    data = load_images(subject, None, split, {})
    assert len(data.images) == pytest.approx(images, abs=10)
    assert data.seen == (split != "val")


def test_a_single_stage_has_a_report_too(tmp_path):
    run, out = tmp_path / "run", tmp_path / "report.html"
    assert train(["--method", "normal", "--taps", "13", "--epochs", "1", "--width", "0.1", "--out", str(run)]) == 0
    assert main([str(run), "--out", str(out)]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["stages"][0]["accuracy_without"] is None
    assert report["disagreements"] == []
    assert report["agreement"]["mean"] == pytest.approx(1, abs=0.2)
    assert Page(out.read_text()).open == []


def test_the_benchmark_of_explanations_is_shown(trained_run, tmp_path):
    found = {
        "methods": {
            "ours <b>": {"kind": "ours", "faithfulness": {"srg": [0.301, 0.29, 0.31]}},
            "CAM": {"times": {"batch 1": 3.25}},
        }
    }
    (tmp_path / "explanations.json").write_text(json.dumps(found))
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    out = tmp_path / "report.html"
    given = [str(tmp_path / name) for name in ("explanations.json", "picture.png")]
    assert main([str(trained_run), "--out", str(out), "--explanations", *given]) == 0
    page = Page(out.read_text())
    assert {"ours <b>", "0.301 (0.290 to 0.310)", "3.25"} <= set(page.text)
    assert any(link.startswith("data:image/png") for link in page.links)
    assert json.loads(out.with_suffix(".json").read_text())["explanations"] == found


@pytest.fixture
def odd_artefact(exported, tmp_path):
    folder = tmp_path / "digits" / "2"
    shutil.copytree(exported / "digits" / "1", folder)
    return folder


def test_a_card_of_another_model_is_refused(odd_artefact):
    card = json.loads((odd_artefact / "model.json").read_text())
    (odd_artefact / "model.json").write_text(json.dumps(card | {"temperature": 1.5}))
    with pytest.raises(InterflowError, match=r"not the card that model\.onnx was exported with"):
        open_subject(odd_artefact, CPU)
    (odd_artefact / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InterflowError, match="not a model that can be run"):
        open_subject(odd_artefact, CPU)


def test_what_cannot_be_evaluated_is_refused_with_the_reason(trained_run, exported, photos, tmp_path):
    run, version = str(trained_run), str(exported / "digits" / "1")
    (tmp_path / "there.html").write_text("kept")
    (tmp_path / "table.json").write_text("[]")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "b").mkdir()
    out = ["--out", str(tmp_path / "report.html")]
    for arguments, reason in (
        ([str(tmp_path / "nothing")], "no such folder; give the folder of a run"),
        ([str(photos)], "neither run nor model; give"),
        ([str(exported / "digits")], "a model of which there are the versions 1; give"),
        ([run, "--data", str(photos)], "0, 1, 2, 3, 4 and 5 more are not in the data.* cat, coffee are none of"),
        ([run, "--data", str(tmp_path / "empty")], "no images"),
        ([run, "--data", str(tmp_path / "nowhere")], "no such folder"),
        ([version, "--data", "cifar10"], "in colour, and digits takes grey images"),
        ([version, "--split", "val"], "nothing that is known was held out"),
        ([version, "--explanations", str(tmp_path / "table.json")], "not the JSON of benchmarks/explanations.py"),
    ):
        with pytest.raises(InterflowError, match=reason):
            main([*arguments, *out])
    for name, reason in (
        ("there.html", "is there already"),
        ("table.html", "table.json is there already"),
        ("x.pdf", "HTML file"),
    ):
        with pytest.raises(InterflowError, match=reason):
            main([run, "--out", str(tmp_path / name)])
    assert (tmp_path / "there.html").read_text() == "kept"
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def photos_run(photos, tmp_path_factory):
    """A run on a copy of the photos, in a folder whose name a model may not have: its images, and the run's folder."""
    folder = tmp_path_factory.mktemp("run")
    root = shutil.copytree(photos, folder / "my photos")
    settings = ["--epochs", "1", "--width", "0.06", "--image-size", "32", "--val-fraction", "0.1", "--workers", "0"]
    assert train(["--data", str(root), *settings, "--out", str(folder / "run")]) == 0
    return root, folder / "run"


@pytest.mark.parametrize("written", ["my photos", "my photos/", "./my photos", "../{parent}/my photos"])
def test_a_runs_own_folder_is_known_however_it_is_written(photos_run, written, monkeypatch):
    root, run = photos_run
    monkeypatch.chdir(root.parent)
    data = load_images(open_subject(run, CPU), written.format(parent=root.parent.name), "train", {})
    assert data.seen
    assert len(data.images) == 8  # of 12, as in the run: those for test and those held out are not among them


def test_an_artefacts_own_folder_is_known_by_the_name_that_its_card_has(photos_run):
    root, run = photos_run
    subject = dataclasses.replace(open_subject(run, CPU), kind="artefact", recipe=None)
    assert subject.card.metrics.data == "my-photos"
    data = load_images(subject, str(root), None, {"workers": 0})
    assert (data.split, len(data.images)) == ("test", 2)
    assert load_images(subject, str(root), "train", {"workers": 0}).seen


def test_a_folder_that_changed_since_is_refused(photos_run, tmp_path):
    """Its split would be another, with images in test that the network was trained on."""
    root, run = (shutil.copytree(folder, tmp_path / folder.name) for folder in photos_run)
    recipe = load_recipe(run / "recipe.yaml").model_copy(update={"data": str(root)})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    assert main([str(run), "--out", str(tmp_path / "one.html")]) == 0
    for label in ("cat", "coffee"):
        shutil.copy(root / label / "0.png", root / label / "more.png")
    for data in ([], ["--data", f"{root}/"]):
        with pytest.raises(
            InterflowError, match=r"the images of .*my photos are not those that the run was trained on"
        ):
            main([str(run), *data, "--out", str(tmp_path / "two.html")])


@pytest.mark.parametrize("subject", ["run", "artefact"])
def test_a_number_of_workers_below_zero_is_refused(subject, trained_run, exported, tmp_path, capsys):
    folder = trained_run if subject == "run" else exported / "digits" / "1"
    with pytest.raises(SystemExit):
        main([str(folder), "--workers=-1", "--out", str(tmp_path / "report.html")])
    assert "argument --workers: -1: expected 0 or more" in capsys.readouterr().err


def test_an_artefact_of_a_folder_asks_where_it_is(exported):
    subject = open_subject(exported / "digits" / "1", CPU)
    metrics = subject.card.metrics.model_copy(update={"data": "scans"})
    elsewhere = dataclasses.replace(subject, card=subject.card.model_copy(update={"metrics": metrics}))
    with pytest.raises(InterflowError, match="trained on the folder scans, wherever that is; give it by --data"):
        load_images(elsewhere, None, None, {})


def test_without_out_a_report_is_named_after_what_it_is_of_and_not_written_twice(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(trained_run)]) == 0
    name = f"{trained_run.name}-digits-test"
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == [f"{name}.html", f"{name}.json"]
    with pytest.raises(InterflowError, match=f"{name}.html is there already"):
        main([str(trained_run)])


def test_what_is_stopped_leaves_nothing(trained_run, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "render", stopped)
    with pytest.raises(KeyboardInterrupt):
        main([str(trained_run), "--out", str(tmp_path / "report.html")])
    assert list(tmp_path.iterdir()) == []
