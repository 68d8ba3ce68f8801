"""Networks cut behind a stage say what the whole one says there, cost less, and are chosen by held-out images alone."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image

from model.contract import BackboneInfo, InterflowError, LayerAttentionInfo, MethodInfo, ModelCard, StageInfo
from model.images import read_input
from model.interflow import Normalize
from model.registry import create_model
from training import artefact, depth, shorten
from training.calibration import fused_accuracy
from training.checkpoint import load_network
from training.depth_report import DepthTable, Row
from training.evaluate import main as evaluate
from training.export import main as export
from training.loop import StoppedError
from training.run import BusyError, Run
from training.train import main as train
from training.verify import verify
from training.work import stage_effort


@pytest.fixture(scope="module")
def trained(trained_run):
    return shorten.open_trained(Run(trained_run))


@pytest.fixture
def own_run(trained_run, tmp_path):
    """A copy, beside which fine-tuned runs may lie."""
    return shutil.copytree(trained_run, tmp_path / "runs" / "digits")


def card_of(path):
    return ModelCard.from_json(path.read_bytes(), path)


NETWORKS = {
    "vgg16": {"width": 0.25},
    "vgg16, S0": {"width": 0.25, "method": "S0"},
    "vgg16, own heads": {"width": 0.25, "method": "S9", "shared_heads": False},
    "plain40": {"width": 0.1, "method": "S1"},
    "resnet20": {},
    "afi_resnet32_b": {},
    "aff_resnext38_32x4d": {"width": 0.5},
    "mobilenetv2": {"width": 0.5},
    "mrla_base_deit_tiny": {"size": 64},
    "timm/resnet18": {"size": 64},
    "timm/vit_tiny_patch16_224": {"size": 64},
    "torchvision/mobilenet_v3_small": {"size": 64},
    "torchvision/mobilenet_v3_small, nodes": {"size": 64, "taps": ("features.2", "features.5", "features.12")},
}


def described(network, name, settings, spec, template):
    """A card of a network with random weights: what describes it is right, the rest is the template's."""
    with torch.no_grad():
        output = network(torch.zeros(1, spec.channels, spec.height, spec.width))
    method = network.method
    return template.model_copy(
        update={
            "input": spec,
            "backbone": BackboneInfo(name=name, depth=network.backbone.depth, width=settings.get("width", 1)),
            "method": MethodInfo(
                name=method.name,
                attention=method.attention,
                initial_weights=method.initial_weights or "random",
                learned=method.learned,
                shared_heads=network.shared_heads,
            ),
            "stages": tuple(
                StageInfo(name=stage.name, depth=stage.depth, channels=stage.channels, map_size=branch_map.shape[2:])
                for stage, branch_map in zip(network.stages, output.branch_maps, strict=True)
            ),
            "layer_attention": tuple(
                LayerAttentionInfo(block=row.block, module=row.module, kind=row.kind, sources=row.sources)
                for row in output.layer_attention
            ),
        }
    )


@pytest.mark.parametrize("key", NETWORKS)
def test_a_cut_network_says_what_the_whole_one_says_up_to_there(key, trained, photographs):
    name, settings = key.partition(",")[0], dict(NETWORKS[key])
    size = settings.pop("size", 32)
    spec = trained.card.input.model_copy(
        update={"height": size, "width": size, "channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    )
    torch.manual_seed(0)
    network = create_model(name, num_classes=10, image_size=(size, size), **settings)
    samples = np.stack([read_input(path, spec) for path in photographs.values()])
    images = Normalize(spec.mean, spec.std)(torch.from_numpy(samples))
    with torch.no_grad():
        for _ in range(5):  # batch norms must know real images
            network.train()(images)
        whole = network.eval()(images)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    card = described(network, name, settings, spec, trained.card)

    sizes = []
    for place, stage in enumerate(card.stages, start=1):
        if stage.depth < 4 and name == "vgg16":
            continue
        short, fields = shorten.shorten(network, card, stage.name)
        with torch.no_grad():
            output = short(images)
        torch.testing.assert_close(output.branch_logits, whole.branch_logits[:, :place], rtol=0, atol=1e-6)
        partial = (whole.branch_weights * whole.branch_logits)[:, :place].sum(dim=1)
        torch.testing.assert_close(output.logits, partial, rtol=1e-6, atol=1e-5)
        for mine, theirs in zip(output.branch_maps, whole.branch_maps, strict=False):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        sizes.append(sum(parameter.numel() for parameter in short.parameters()))
        assert [info.name for info in fields["stages"]] == [info.name for info in card.stages[:place]]
        assert [info.work for info in fields["stages"]][-1] == 1
        assert [row.block for row in fields["layer_attention"]] == [row.block for row in output.layer_attention]
        rebuilt = artefact.network_of(card.model_copy(update=fields))  # the card is enough
        rebuilt.load_state_dict(short.state_dict())
        assert rebuilt.method.initial_weights == short.method.initial_weights
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == sum(parameter.numel() for parameter in network.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())  # left as it was


def test_work_is_that_of_the_shorter_network(trained):
    effort = stage_effort(trained.network, trained.card.input)
    shares = np.array(effort[:3]) / effort[2]  # of multiplications, and of weights
    _, card = shorten.shortened(trained, "conv10")
    assert [info.work for info in card.stages] == pytest.approx(shares.mean(axis=1).tolist())


@pytest.fixture(scope="module")
def cuts(trained_run, tmp_path_factory):
    """A model repository with two of the cuts."""
    folder = tmp_path_factory.mktemp("cuts")
    for stage in ("conv7", "conv10"):
        assert export(["--run", str(trained_run), "--depth", stage, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(("stage", "kept"), [("conv7", 2), ("conv10", 3)])
def test_a_shorter_network_is_exported_with_all_checks_and_fitted_anew(
    stage, kept, cuts, trained_run, trained, exported
):
    whole, path = card_of(exported / "digits" / "1" / "model.json"), cuts / f"digits-{stage}" / "1"
    card = card_of(path / "model.json")
    assert (card.name, card.stages[-1].name, len(card.stages)) == (f"digits-{stage}", stage, kept)
    assert card.provenance.weights_sha256 != whole.provenance.weights_sha256
    assert card.provenance.run == whole.provenance.run
    assert card.method == whole.method.model_copy(update={"weighed_anew": True})
    factors = np.divide(card.branch_weights, whole.branch_weights[:kept])
    np.testing.assert_allclose(factors, factors[:, :1].repeat(10, axis=1), rtol=1e-5)  # one a stage
    assert (factors > 0).all()
    assert len({round(factor, 2) for factor in factors[:, 0]}) == kept
    assert card.fitted_on == whole.fitted_on
    assert card.exits
    logits = (card.branch_weights * trained.test.branch_logits[:, :kept]).sum(axis=1)
    assert card.metrics.accuracy == pytest.approx((logits.argmax(axis=1) == trained.test.labels).mean())
    assert card.metrics.images == len(trained.test.labels)
    # a stage's reading is the same at any depth; what is fitted on the fused logits is not
    np.testing.assert_allclose(card.reading_scales, whole.reading_scales[:kept], rtol=1e-3)
    assert card.metrics.branch_accuracy == pytest.approx(whole.metrics.branch_accuracy[:kept])
    assert card.temperature != whole.temperature
    assert sum(card.branch_importance) == pytest.approx(1)

    samples, files = (
        np.load(trained_run / "samples.npy"),
        (path / "model.onnx", exported / "digits" / "1" / "model.onnx"),
    )
    short, full = (onnxruntime.InferenceSession(file).run(["branch_logits"], {"image": samples})[0] for file in files)
    np.testing.assert_allclose(short, full[:, :kept], atol=1e-4)
    assert files[0].stat().st_size < (0.4, 0.7)[kept - 2] * files[1].stat().st_size


def test_an_exported_cut_is_evaluated_as_any_model(cuts, tmp_path):
    assert evaluate([str(cuts / "digits-conv10" / "1"), "--out", str(tmp_path / "report.html")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    card = card_of(cuts / "digits-conv10" / "1" / "model.json")
    assert report["fused"]["accuracy"] == pytest.approx(card.metrics.accuracy)
    assert [stage["name"] for stage in report["stages"]] == ["conv4", "conv7", "conv10"]


def test_auto_takes_the_shortest_within_the_tolerance_by_held_out_images(trained_run, trained, tmp_path, capsys):
    held_out = trained.held_out
    short = [shorten.up_to(trained, count, weigh_anew=count < 4)[0] for count in range(1, 5)]
    right = [int((said.logits.argmax(axis=1) == held_out.labels).sum()) for said in short]
    images = len(held_out.labels)
    assert right == sorted(set(right))  # the deeper the better, so that every tolerance has one answer
    for place, stage in enumerate(("conv4", "conv7", "conv10")):
        exact = 100 * (right[-1] - right[place]) / images
        assert shorten.choose(trained, exact)[0] == stage
        assert shorten.choose(trained, exact - 0.01)[0] == ("conv7", "conv10", "conv13")[place]
    generous = 100 * (right[-1] - right[2]) / images
    arguments = ["--run", str(trained_run), "--depth", "auto", "--out", str(tmp_path)]
    assert export([*arguments, f"--tolerance={generous}"]) == 0
    said = capsys.readouterr().out
    assert "conv10 is the shortest within" in said
    assert f"conv10 {right[2] / images:.2%}" in said
    assert (tmp_path / "digits-conv10" / "1" / "model.onnx").is_file()
    assert export([*arguments, "--tolerance", "0"]) == 0
    assert "no shorter network is within 0 points of the whole, which is kept" in capsys.readouterr().out
    card = card_of(tmp_path / "digits" / "1" / "model.json")
    assert card.provenance.weights_sha256 == trained.card.provenance.weights_sha256


def test_test_images_have_no_say(trained):
    random = np.random.default_rng(0)
    scrambled = replace(trained.test, labels=random.permutation(trained.test.labels))
    for tolerance in (0.2, 10, 50, 80):
        assert shorten.choose(replace(trained, test=scrambled), tolerance) == shorten.choose(trained, tolerance)
    scrambled = replace(trained.held_out, labels=random.permutation(trained.held_out.labels))
    assert any(
        shorten.choose(replace(trained, held_out=scrambled), tolerance)[0] != shorten.choose(trained, tolerance)[0]
        for tolerance in (0.2, 10, 50, 80)
    )


@pytest.fixture(scope="module")
def fine_tuned(trained_run, tmp_path_factory):
    """A copy of the run, beside it that which was cut behind conv10 and fine-tuned; the results; what was said."""
    folder = tmp_path_factory.mktemp("depth")
    run = shutil.copytree(trained_run, folder / "runs" / "digits")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert depth.main(command(run, folder / "results")) == 0
    return run, folder / "results", said.getvalue()


def command(run, results, epochs=2):
    return ["--run", str(run), "--fine-tune", str(epochs), "--stages", "conv10", "--out", str(results)]


def test_the_table_says_what_the_cards_of_the_cuts_say(fine_tuned, trained):
    _, results, said = fine_tuned
    assert sorted(path.name for path in results.iterdir()) == [f"depth-digits.{kind}" for kind in ("json", "md", "png")]
    table, page = json.loads((results / "depth-digits.json").read_text()), (results / "depth-digits.md").read_text()
    rows = [row for row in table["rows"] if not row["fine_tuned"]]
    assert [row["stage"] for row in rows] == ["conv4", "conv7", "conv10", "conv13"]
    for row in rows:
        network, card = shorten.shortened(trained, row["stage"])
        assert row["test"] == pytest.approx(card.metrics.accuracy)
        assert row["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert min(row["latency_ms"], row["images_per_second"]) > 0
        assert re.search(rf"\| +{row['parameters']:,} \|", said)
    effort = [stage.multiplications for stage in stage_effort(trained.network, trained.card.input)]
    done = [row["multiply_adds"] / rows[-1]["multiply_adds"] for row in rows]
    # the branches' linear layers are in the one, and not in the other
    assert done == pytest.approx([count / effort[-1] for count in effort], abs=0.01)
    for figure in ("parameters", "onnx_bytes", "multiply_adds"):
        assert [row[figure] for row in rows] == sorted({row[figure] for row in rows})
    assert table["advice"] in page
    assert table["advice"] in said
    assert "(depth-digits.png)" in page
    assert re.search(r"`python training/depth\.py --run \S+ --tolerance 0\.2 --fine-tune 2 --stages conv10`", page)
    with Image.open(results / "depth-digits.png") as picture:
        assert picture.width > 800


def row(stage, held_out, fine_tuned=0, **fields):
    return Row(
        **{
            "stage": stage,
            "fine_tuned": fine_tuned,
            "run": f"runs/it-{stage}" if fine_tuned else "runs/it",
            "held_out": held_out,
            "test": 0.5,
            "parameters": 10,
            "onnx_bytes": 10,
            "multiply_adds": 5 if stage == "b" else 10,
            "latency_ms": 1.0,
            "images_per_second": 1.0,
        }
        | fields
    )


@pytest.mark.parametrize(
    ("held_out", "advised"),
    [
        ((0.80, 0.898, 0.90, 0.90), "--run runs/it --depth b`"),  # two points in a thousand, exactly
        ((0.80, 0.8979, 0.90, 0.90), "--run runs/it-b --name photos-b`"),
        ((0.80, 0.8979, 0.85, 0.90), "Keep the whole network.*b, the nearest, has 89.79%"),
        ((0.95, 0.8979, 0.85, 0.90), "--run runs/it --depth a`"),
        ((0.80, 0.8979, 0.8981, 0.90), "behind b, fine-tuned for 2 epochs: .*89.81%, with 50% of the multiply-adds"),
    ],
)
def test_the_advice_is_the_shortest_within_the_tolerance(held_out, advised):
    rows = [row("a", held_out[0]), row("b", held_out[1]), row("b", held_out[2], 2), row("c", held_out[3])]
    table = DepthTable("runs/it", "photos", "0" * 64, "photos", 100, "one machine", 0.2, rows)
    assert re.search(advised, table.advice())


def killed(*_):
    raise StoppedError


def test_a_fine_tuned_cut_is_a_run_like_any_other(fine_tuned, tmp_path):
    whole, results, _ = fine_tuned
    run = Run(whole.with_name("digits-conv10"))
    card = run.finished_card()
    assert [info.name for info in card.stages] == ["conv4", "conv7", "conv10"]
    rates = [yaml.safe_load((folder / "recipe.yaml").read_text())["lr"] for folder in (run.folder, whole)]
    assert rates[0] == pytest.approx(rates[1] / 10)
    rows = json.loads((results / "depth-digits.json").read_text())["rows"]
    assert [(row["stage"], row["fine_tuned"]) for row in rows] == [
        ("conv4", 0), ("conv7", 0), ("conv10", 0), ("conv10", 2), ("conv13", 0),
    ]  # fmt: skip
    again = shorten.open_trained(run)
    assert fused_accuracy(again.held_out) == pytest.approx(rows[3]["held_out"])
    assert fused_accuracy(again.test) == pytest.approx(card.metrics.accuracy)
    assert rows[3]["held_out"] > rows[2]["held_out"]  # it began as the cut, and learned
    exports = tmp_path / "exports"
    assert export(["--run", str(run.folder), "--name", "photos", "--out", str(exports)]) == 0
    assert rows[3]["test"] == pytest.approx(card_of(exports / "photos" / "1" / "model.json").metrics.accuracy)


def test_what_is_fine_tuned_is_not_trained_twice_and_not_taken_for_another(fine_tuned, trained, monkeypatch):
    whole, results, _ = fine_tuned
    (plan,) = depth._plans(Run(whole), trained.card, ["conv10"], 2)
    monkeypatch.setattr(depth, "train", killed)
    depth.fine_tune(plan, trained)  # finished: nothing is left to train
    with pytest.raises(InterflowError, match=r"digits-conv10 holds another run .* for 3 epochs; move it away"):
        depth.main(command(whole, results, epochs=3))
    newer = trained.card.provenance.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(InterflowError, match="digits-conv10 holds another run than digits as it is now"):
        depth._plans(Run(whole), trained.card.model_copy(update={"provenance": newer}), None, 2)


def test_fine_tuning_that_was_stopped_goes_on_to_the_same_weights(fine_tuned, own_run, trained, monkeypatch):
    (plan,) = depth._plans(Run(own_run), trained.card, ["conv10"], 2)
    with monkeypatch.context() as patch:
        patch.setattr(depth, "train", killed)
        with pytest.raises(StoppedError):
            depth.fine_tune(plan, trained)
    assert not plan.run.card.exists()
    assert train(["--resume", str(plan.run.folder)]) == 0
    other = Run(fine_tuned[0].with_name("digits-conv10"))
    assert plan.run.finished_card().provenance.weights_sha256 == other.finished_card().provenance.weights_sha256


def test_fine_tuning_begins_with_the_weights_of_the_cut(own_run, trained, monkeypatch):
    (plan,) = depth._plans(Run(own_run), trained.card, ["conv7"], 1)
    monkeypatch.setattr(depth, "train", killed)
    with pytest.raises(StoppedError):
        depth.fine_tune(plan, trained)
    network, _ = shorten.shorten(trained.network, trained.card, "conv7")
    begun = load_network(plan.run.checkpoint, network)
    whole = trained.network.state_dict()
    whole["attention.weight"] = whole["attention.weight"][:2]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in begun.items())


def test_fine_tuning_leaves_a_run_that_another_process_begins(own_run, trained):
    (plan,) = depth._plans(Run(own_run), trained.card, ["conv7"], 1)
    plan.run.folder.mkdir()
    plan.run.checkpoint.write_bytes(b"another's")
    with FileLock(plan.run.folder / ".lock"), pytest.raises(BusyError):
        depth.fine_tune(plan, trained)
    assert plan.run.checkpoint.read_bytes() == b"another's"


@pytest.mark.parametrize("entry", [export, depth.main])
def test_what_cannot_be_cut_is_refused_with_the_reason(entry, own_run, tmp_path):
    arguments = ["--run", str(own_run), "--out", str(tmp_path / "out")]
    auto = ["--depth", "auto"] if entry is export else []
    content = json.loads((own_run / "card.json").read_text())
    if entry is export:
        with pytest.raises(
            InterflowError, match="no stage 'conv5'; digits has conv4, conv7, conv10, conv13, or say auto"
        ):
            entry([*arguments, "--depth", "conv5"])
    else:
        for stage in ("conv5", "conv13"):
            with pytest.raises(InterflowError, match=f"--stages {stage}: .* can be cut behind conv4, conv7, conv10"):
                entry([*arguments, "--fine-tune", "1", "--stages", stage])
        with pytest.raises(SystemExit):
            entry([*arguments, "--stages", "conv4"])
    with pytest.raises(InterflowError, match="--tolerance -1: expected points"):
        entry([*arguments, *auto, "--tolerance=-1"])

    (own_run / "card.json").write_text(json.dumps(content | {"backbone": content["backbone"] | {"neck": "aff"}}))
    with pytest.raises(InterflowError, match=r"cannot be cut: behind its neck \(aff\) every stage's branch needs"):
        entry([*arguments, *auto])
    (own_run / "card.json").write_text(json.dumps(content))

    recipe = yaml.safe_load((own_run / "recipe.yaml").read_text())
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": str(tmp_path / "photos")}))
    with pytest.raises(InterflowError, match=r"takes the run's own images; put them back where .*recipe\.yaml says"):
        entry([*arguments, *auto])
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"image_size": 16}))
    with pytest.raises(InterflowError, match="not those that the run was trained on"):
        entry([*arguments, *auto])
    assert not (tmp_path / "out").exists()


def test_a_network_with_a_neck_is_refused_by_its_card(trained):
    card = trained.card.model_copy(update={"backbone": trained.card.backbone.model_copy(update={"neck": "iaff"})})
    with pytest.raises(InterflowError, match="Train it without --neck"):
        shorten.shorten(trained.network, card, "conv7")
    single = trained.card.model_copy(update={"stages": trained.card.stages[-1:]})
    with pytest.raises(InterflowError, match="it has one stage, conv13"):
        shorten.shorten(trained.network, single, "conv13")


def test_verify_notices_a_cut_with_other_weights(trained, trained_run):
    network, card = shorten.shortened(trained, "conv7")
    samples = np.load(trained_run / "samples.npy")
    model = artefact.to_onnx(network, card)
    assert verify(model, card, network, network.state_dict(), samples) < 1e-4
    other, _ = shorten.shortened(trained, "conv7")
    with torch.no_grad():
        other.attention.weight[0, 0] += 0.1
    with pytest.raises(InterflowError):
        verify(model, card, other, other.state_dict(), samples)


def test_stages_of_any_name_name_a_model():
    assert shorten.name_of_cut("photos", "stage1.block4") == "photos-stage1.block4"
    assert shorten.name_of_cut("photos", "blocks#2/x") == "photos-blocks-2-x"
