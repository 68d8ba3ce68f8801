"""Fewer bits: near the float32 network, the sums as exact as ever, and a card that says what was lost."""

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from starlette.testclient import TestClient

from app import session as serving
from app.main import create_app
from app.session import Session
from app.settings import Settings
from model import cpu
from model.contract import CARD_FILE, LOGITS, MODEL_FILE, CardError, InterflowError, ModelCard, branch_map_name
from model.cut import CutError
from model.explain import contributions, readings
from model.images import read_input
from training import export, fewer_bits, precision
from training.artefact import to_graph
from training.calibration import Predictions, fit_reading_scales, importance
from training.checkpoint import load_network
from training.data import load_data
from training.export import main
from training.finish import open_finished
from training.recipe import load_recipe
from training.run import Run
from training.verify import CUT_TOLERANCE, VerificationError, verify

KINDS = {"int8": ("int8", "digits-int8"), "fp16": ("float16", "digits-fp16")}


@pytest.fixture(scope="module")
def reduced(trained_run, tmp_path_factory) -> Path:
    """A model repository with the run in int8 and in float16."""
    exports = tmp_path_factory.mktemp("reduced")
    for asked in KINDS:
        assert main(["--run", str(trained_run), "--precision", asked, "--tolerance", "2", "--out", str(exports)]) == 0
    return exports


@pytest.fixture(scope="module")
def data(trained_run):
    return load_data(load_recipe(trained_run / "recipe.yaml"))


@pytest.fixture(params=KINDS)
def folder(request, reduced) -> Path:
    return reduced / KINDS[request.param][1] / "1"


@pytest.fixture
def card(folder):
    return card_of(folder)


def card_of(folder):
    return ModelCard.from_json((folder / CARD_FILE).read_bytes(), folder)


def answers(folder, images):
    """All outputs by name."""
    session = onnxruntime.InferenceSession(folder / MODEL_FILE)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


def test_models_in_fewer_bits_have_names_of_their_own_and_the_same_signature(reduced, exported):
    assert sorted(path.name for path in reduced.iterdir()) == ["digits-fp16", "digits-int8"]
    whole = card_of(exported / "digits" / "1")
    for kind, name in KINDS.values():
        card = card_of(reduced / name / "1")
        assert (card.precision, card.name, card.version) == (kind, name, "1")
        assert (card.inputs, card.outputs) == (whole.inputs, whole.outputs)
        assert (card.against_float32.calibrated_on is not None) == (kind == "int8")
        assert card.provenance.weights_sha256 == whole.provenance.weights_sha256


def test_the_card_says_what_the_graph_does_on_the_test_images(folder, card, data, exported):
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    smaller, whole = answers(folder, images), answers(exported / "digits" / "1", images)
    right = smaller[LOGITS].argmax(axis=1) == labels
    assert card.metrics.accuracy == pytest.approx(right.mean(), abs=1e-6)
    against = card.against_float32
    assert against.accuracy == pytest.approx((whole[LOGITS].argmax(axis=1) == labels).mean(), abs=1e-6)
    same = smaller[LOGITS].argmax(axis=1) == whole[LOGITS].argmax(axis=1)
    assert against.agreement == pytest.approx(same.mean(), abs=1e-6)
    assert same.mean() > 0.97
    assert against.accuracy - card.metrics.accuracy <= 0.02
    read = readings(smaller["branch_logits"], np.asarray(card.reading_scales)).argmax(axis=2)
    np.testing.assert_allclose(card.metrics.branch_accuracy, (read == labels[:, None]).mean(axis=0), atol=1e-6)
    float32 = card_of(exported / "digits" / "1")
    read_whole = readings(whole["branch_logits"], np.asarray(float32.reading_scales)).argmax(axis=2)
    np.testing.assert_allclose(against.branch_agreement, (read == read_whole).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(against.branch_accuracy, float32.metrics.branch_accuracy, atol=0.01)

    scale = max(1, np.abs(smaller["branch_logits"]).max(), np.abs(smaller[LOGITS]).max())
    sums = contributions(smaller["branch_logits"].astype(float), smaller["branch_weights"].astype(float)).sum(axis=1)
    assert np.abs(sums - smaller[LOGITS]).max() / scale <= 2 * against.residual + 1e-7
    assert against.residual < 1e-5


def test_all_that_is_fitted_is_fitted_on_the_reduced_graph(folder, card, data, exported):
    outputs = answers(folder, data.val.images.numpy())
    predictions = Predictions(outputs["branch_logits"], outputs["branch_weights"][0], data.val.labels.numpy())
    scales = fit_reading_scales(predictions, per_class=card.method.attention == "class")
    np.testing.assert_allclose(card.reading_scales, scales, rtol=1e-3)
    np.testing.assert_allclose(card.branch_importance, importance(predictions), atol=1e-5)
    whole = card_of(exported / "digits" / "1")
    assert not np.allclose(whole.branch_importance, card.branch_importance, rtol=0, atol=2e-6)


def test_the_sums_are_exact_on_images_unlike_any_that_ranges_were_made_of(folder, card, photographs):
    images = np.stack([read_input(path, card.input) for path in photographs.values()])
    outputs = answers(folder, images)
    assert all(values.dtype == np.float32 for values in outputs.values())
    for branch in range(len(card.stages)):
        means = outputs[branch_map_name(branch)].mean(axis=(2, 3), dtype=np.float64)
        scale = max(1, np.abs(means).max())
        np.testing.assert_allclose(outputs["branch_logits"][:, branch], means, atol=1e-5 * scale)
    sums = (outputs["branch_weights"].astype(float) * outputs["branch_logits"]).sum(axis=1)
    np.testing.assert_allclose(outputs[LOGITS], sums, atol=1e-5 * max(1, np.abs(sums).max()))
    np.testing.assert_allclose(outputs["branch_weights"][0], card.branch_weights, atol=1e-6)


def test_the_trunk_is_in_fewer_bits_and_the_branches_are_as_they_were_trained(folder, card, trained_run):
    model = onnx.load(folder / MODEL_FILE)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    maps = {branch_map_name(branch) for branch in range(len(card.stages))}
    network, tensors = open_finished(Run(trained_run))[1], {}
    tensors = load_network(trained_run / "checkpoint.safetensors", network)
    expected = TensorProto.INT8 if card.precision == "int8" else TensorProto.FLOAT16
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 13 + len(maps)
    for node in convolutions:
        name = node.input[1]
        if node.output[0] in maps:
            head = network.head_names[int(node.output[0].rpartition("_")[2])]
            weights = numpy_helper.to_array(constants[name])
            np.testing.assert_array_equal(weights, tensors[f"heads.{head}.weight"].numpy())
        else:
            name = makers[name].input[0] if name in makers else name  # int8: behind DequantizeLinear
            assert constants[name].data_type == expected
    size, whole = (folder / MODEL_FILE).stat().st_size, sum(tensor.numel() * 4 for tensor in tensors.values())
    assert size < whole * (0.6 if card.precision == "int8" else 0.8)


def test_what_loses_more_than_the_tolerance_is_refused_with_its_figures(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_some", lambda split, workers: np.zeros((16, 32, 32, 1), np.uint8))
    arguments = ["--run", str(trained_run), "--precision", "int8", "--out", str(tmp_path)]
    with pytest.raises(InterflowError, match=r"\d+\.\d+% of 359 test images are right in int8, .*allows 0\.3\."):
        main(arguments)
    assert not (tmp_path / "digits-int8" / "1").exists()
    with pytest.raises(VerificationError, match=r"of 20 images \d+ have the answer of PyTorch in int8"):
        main([*arguments, "--tolerance", "100"])
    with pytest.raises(InterflowError, match="--tolerance -1: expected points"):
        main([*arguments, "--tolerance", "-1"])
    assert not (tmp_path / "digits-int8" / "1").exists()


@pytest.mark.parametrize("harm", ["a head", "the fusion", "the card", "what crosses"])
def test_a_reduced_graph_that_breaks_its_promises_is_not_let_through(folder, card, trained_run, harm, monkeypatch):
    network = open_finished(Run(trained_run))[1]
    samples = np.load(trained_run / "samples.npy")
    model = onnx.load(folder / MODEL_FILE)
    assert verify(model.SerializeToString(), card, network, network.state_dict(), samples) < 1e-3
    harmed = card
    if harm == "the card":
        rows = [list(row) for row in card.branch_weights]
        rows[0][0] += 0.01
        harmed = card.model_copy(update={"branch_weights": tuple(map(tuple, rows))})
    elif harm == "what crosses":
        monkeypatch.setitem(CUT_TOLERANCE, card.precision, -1.0)
    else:
        part = "heads" if harm == "a head" else "attention"
        found = [tensor for tensor in model.graph.initializer if part in tensor.name and len(tensor.dims) > 1]
        assert found
        tensor = found[0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.01), tensor.name))
    assert card.exits
    with pytest.raises(VerificationError, match="differs from"):
        verify(model.SerializeToString(), harmed, network, network.state_dict(), samples)


def test_where_a_graph_cannot_be_cut_no_answer_stops_early_and_export_says_so(
    trained_run, tmp_path, monkeypatch, capsys
):
    def refuse(*_arguments):
        raise CutError("`x` crosses between stages.")

    monkeypatch.setattr(export, "cut", refuse)
    assert main(["--run", str(trained_run), "--out", str(tmp_path)]) == 0
    assert "answers cannot stop early: `x` crosses" in capsys.readouterr().out
    assert card_of(tmp_path / "digits" / "1").exits == ()


def graph_of(trained_run):
    card, network = open_finished(Run(trained_run))
    return to_graph(network, card), len(card.stages)


def quantised_weights(model):
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        numpy_helper.to_array(by_name[node.input[0]])
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in by_name and len(by_name[node.input[0]].dims) == 4
    ]


def test_weights_keep_to_7_bits_where_products_could_overflow_and_amx_changes_no_answer(trained_run, data, monkeypatch):
    graph, stages = graph_of(trained_run)
    images = data.val.images.numpy()[:64]
    models = {}
    for features in (("x86_64", "avx2"), ("x86_64", "avx2", "avx512_vnni"), ("x86_64", "avx512_vnni", "amx_int8")):
        monkeypatch.setattr(fewer_bits, "cpu_features", lambda features=features: features)
        models[features[-1]] = fewer_bits.to_int8(graph, stages, images)
    extremes = {name: max(np.abs(w.astype(int)).max() for w in quantised_weights(m)) for name, m in models.items()}
    assert extremes == {"avx2": 64, "avx512_vnni": 127, "amx_int8": 128}
    direct, by_matrices = (
        onnxruntime.InferenceSession(models[name].SerializeToString()).run(["branch_logits"], {"image": images})[0]
        for name in ("avx512_vnni", "amx_int8")
    )
    np.testing.assert_allclose(by_matrices, direct, rtol=1e-6, atol=1e-6)


def test_the_quantiser_says_nothing_and_leaves_nothing(trained_run, data, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    graph, stages = graph_of(trained_run)
    with caplog.at_level(logging.DEBUG):
        fewer_bits.to_int8(graph, stages, data.val.images.numpy()[:20])
        fewer_bits.to_float16(graph, stages)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert list(tmp_path.iterdir()) == []
    assert logging.root.manager.disable == logging.NOTSET


def test_the_server_answers_with_models_in_fewer_bits(reduced, photographs):
    picture = photographs["chelsea.png"].read_bytes()
    with TestClient(create_app(Settings(exports=reduced, provider="cpu", threads=1))) as client:
        for kind, name in KINDS.values():
            card = card_of(reduced / name / "1")
            described = client.get("/model", params={"model": name}).json()
            assert (described["precision"], described["against_float32"]["agreement"]) == (
                kind,
                card.against_float32.agreement,
            )
            for mode in ("full", "adaptive"):
                answer = client.post("/predict", params={"model": name, "mode": mode}, content=picture).json()
                assert answer["model"]["name"] == name, answer
            logits = answers(reduced / name / "1", read_input(photographs["chelsea.png"], card.input)[None])[LOGITS]
            full = client.post("/predict", params={"model": name}, content=picture).json()
            assert full["prediction"]["index"] == logits[0].argmax()
            added = sum(stage["contribution"] for stage in full["stages"])
            assert added == pytest.approx(logits.max(), abs=1e-3)


def test_the_server_warns_on_a_cpu_that_can_do_less(folder, monkeypatch, caplog):
    card = card_of(folder)
    Session(folder, Settings(provider="cpu", threads=1))
    assert "was measured on a CPU" not in caplog.text
    machine, *extensions = card.against_float32.cpu
    if not extensions:
        pytest.skip("this system does not tell what its CPU can do")
    monkeypatch.setattr(serving, "cpu_features", lambda: (machine, *extensions[:-1]))
    Session(folder, Settings(provider="cpu", threads=1))
    (record,) = [record for record in caplog.records if "was measured on a CPU" in record.getMessage()]
    assert f"is in {card.precision} and was measured on a CPU with {extensions[-1]}, which" in record.getMessage()
    assert record.levelno == logging.WARNING


def test_a_float32_model_knows_no_cpu(exported, monkeypatch, caplog):
    monkeypatch.setattr(serving, "cpu_features", lambda: ("abacus",))
    Session(exported / "digits" / "1", Settings(provider="cpu", threads=1))
    assert "was measured on a CPU" not in caplog.text


def test_a_card_in_fewer_bits_says_what_they_changed(folder):
    content = json.loads((folder / CARD_FILE).read_text())
    for change, message in (
        ({"against_float32": None}, "every precision but float32"),
        ({"precision": "float32"}, "every precision but float32"),
        ({"precision": "int4"}, "precision"),
        ({"against_float32": content["against_float32"] | {"branch_agreement": [1.0]}}, "needs 4 values"),
    ):
        with pytest.raises(CardError, match=message):
            ModelCard.from_json(json.dumps(content | change), "card")


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 f16c amx_int8 avx512_vnni\n", ("f16c", "avx2", "avx512_vnni", "amx_int8")),
        ("processor : 0\nFeatures : fp asimd asimddp i8mm\n", ("asimddp", "i8mm")),
        ("nothing known\n", ()),
        (None, ()),
    ],
)
def test_what_the_cpu_can_do_is_read_from_linux(tmp_path, monkeypatch, text, features):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpu.cpu_features()[1:] == features
    assert cpu.cpu_features()[0]
