"""Artefacts: proven before they are written, whole or not there, and refused where something does not fit."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tritonclient.grpc import model_config_pb2

from model.contract import METADATA_KEY, InterflowError, ModelCard
from model.images import read_input
from model.registry import create_model
from training import artefact
from training.checkpoint import load_network
from training.export import main
from training.run import CUT_FILE, newest_finished
from training.verify import VerificationError, verify


@pytest.fixture
def card(exported):
    return ModelCard.from_json((exported / "digits" / "1" / "model.json").read_bytes(), "card")


def test_the_artefact_is_one_file_with_its_card_inside(exported, card):
    version = exported / "digits" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["model.json", "model.onnx"]
    assert sorted(path.name for path in version.parent.iterdir()) == ["1", "config.pbtxt"]
    model = onnx.load(version / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata[METADATA_KEY] == (version / "model.json").read_text()
    assert model.opset_import[0].version >= 18
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert {"torch", "onnx", "onnxruntime"} <= set(card.provenance.versions)


def test_tritons_own_schema_reads_the_configuration(exported, card):
    config = text_format.Parse((exported / "digits" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == ("digits", "onnxruntime")
    assert config.max_batch_size > 1
    assert [(t.name, list(t.dims)) for t in config.input] == [("image", [32, 32, 1])]
    assert config.input[0].data_type == model_config_pb2.TYPE_UINT8
    assert [(t.name, tuple(t.dims)) for t in config.output] == [(n, s.shape[1:]) for n, s in card.outputs.items()]


@pytest.mark.parametrize("batch", [1, 2, 3, 17, 64])
def test_any_batch_gives_each_image_its_own_answer(exported, trained_run, batch, card):
    session = onnxruntime.InferenceSession(exported / "digits" / "1" / "model.onnx")
    samples = np.resize(np.load(trained_run / "samples.npy"), (batch, 32, 32, 1))
    together = session.run(None, {"image": samples})
    singles = [session.run(None, {"image": image[None]}) for image in samples]
    for i, name in enumerate(card.outputs):
        np.testing.assert_allclose(together[i], np.concatenate([s[i] for s in singles]), atol=1e-5, err_msg=name)


def loaded(run, card):
    network = artefact.network_of(card)
    return network, load_network(run / "checkpoint.safetensors", network)


@pytest.mark.parametrize("method", ["normal", "S0", "S1", "S3", "S9"])
@pytest.mark.parametrize(("channels", "shared_heads"), [(3, False), (1, True)])
def test_every_kind_of_network_is_exported_exactly(method, channels, shared_heads, card, photographs):
    network = create_model(
        "vgg16", method=method, num_classes=3, in_channels=channels, width=0.05, shared_heads=shared_heads
    ).eval()
    sizes = {7: (7, 9), 8: (4, 5)}  # of an input of 28 x 36
    fields = {
        "classes": ("a", "b", "c"),
        "input": card.input.model_copy(
            update={
                "height": 28,
                "width": 36,
                "channels": channels,
                "mean": (0.4,) * channels,
                "std": (0.2,) * channels,
            }
        ),
        "stages": tuple(
            card.stages[0].model_copy(
                update={"depth": s.depth, "map_size": sizes.get(s.depth, (4, 5) if s.depth < 11 else (2, 3))}
            )
            for s in network.stages
        ),
        "branch_weights": tuple(map(tuple, network.attention.matrix().tolist())),
    }
    card = card.model_copy(update=fields)
    pictures = [read_input(path, card.input) for path in photographs.values()]
    samples = np.resize(np.stack(pictures), (20, 28, 36, channels))
    model = artefact.to_onnx(network, card)
    assert verify(model, card, network, network.state_dict(), samples) < 1e-4


@pytest.mark.parametrize(
    "harm",
    ["weights of a head", "bias of a head", "attention", "a convolution", "mean of the pixels", "an output's name"],
)
def test_a_graph_that_differs_from_the_network_is_not_let_through(exported, trained_run, card, harm):
    model = onnx.load(exported / "digits" / "1" / "model.onnx")
    network, weights = loaded(trained_run, card)
    samples = np.load(trained_run / "samples.npy")
    assert verify(model.SerializeToString(), card, network, weights, samples) < 1e-4
    tensors = {t.name: t for t in model.graph.initializer}

    def nudge(match, amount=0.01):
        found = [t for name, t in tensors.items() if match(name, numpy_helper.to_array(t))]
        assert found
        for tensor in found:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(amount), tensor.name))

    if harm == "weights of a head":
        nudge(lambda name, _: "heads" in name and name.endswith("weight"))
    elif harm == "bias of a head":
        nudge(lambda name, _: "heads" in name and name.endswith("bias"))
    elif harm == "attention":
        nudge(lambda name, _: "attention" in name)
    elif harm == "a convolution":
        nudge(lambda _, value: value.ndim == 4 and value.shape[2] == 3)
    elif harm == "mean of the pixels":
        nudge(
            lambda _, value: value.size == 1 and value.dtype == np.float32 and np.isclose(value, card.input.mean).all()
        )
    else:
        for node in model.graph.node:
            node.output[:] = ["other" if name == "branch_map_2" else name for name in node.output]
            node.input[:] = ["other" if name == "branch_map_2" else name for name in node.input]
        model.graph.output[5].name = "other"
    with pytest.raises(VerificationError):
        verify(model.SerializeToString(), card, network, weights, samples)


def test_versions_count_up_and_one_that_is_there_is_kept(exported, trained_run, tmp_path, card):
    first = card
    shutil.copytree(exported, tmp_path / "exports")
    arguments = ["--run", str(trained_run), "--out", str(tmp_path / "exports")]
    assert main(arguments) == 0
    assert (tmp_path / "exports" / "digits" / "2" / "model.onnx").is_file()
    card = ModelCard.from_json((tmp_path / "exports" / "digits" / "2" / "model.json").read_bytes(), "card")
    assert (card.name, card.version) == ("digits", "2")
    assert card.provenance.created > first.provenance.created  # the server's default is the one exported last
    before = (tmp_path / "exports" / "digits" / "1" / "model.onnx").read_bytes()
    with pytest.raises(InterflowError, match=r"digits/1 is there already"):
        main([*arguments, "--version", "1"])
    assert (tmp_path / "exports" / "digits" / "1" / "model.onnx").read_bytes() == before
    for name in ("../digits", ".x", "", "a\n"):
        with pytest.raises(InterflowError, match=r"--name .*expected letters"):
            main([*arguments, "--name", name])
    for version in ("0", "two", "1\n", "-1"):
        with pytest.raises(InterflowError, match="expected a whole number"):
            main([*arguments, f"--version={version}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": [f"digit {i}" for i in range(10)]}, r"class 0 is '0' here and 'digit 0' in .*--name"),
        ({"input": {"height": 64}}, r"input image is uint8\[N, 32, 32, 1\] here and uint8\[N, 64, 32, 1\]"),
    ],
)
def test_versions_of_one_model_share_one_signature(exported, trained_run, tmp_path, change, message):
    shutil.copytree(exported, tmp_path / "exports")
    path = tmp_path / "exports" / "digits" / "1" / "model.json"
    content = json.loads(path.read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    arguments = ["--run", str(trained_run), "--out", str(tmp_path / "exports")]
    with pytest.raises(InterflowError, match=message):
        main(arguments)
    assert main([*arguments, "--name", "digits-other"]) == 0
    assert (tmp_path / "exports" / "digits-other" / "1" / "model.onnx").is_file()


def test_nothing_is_left_behind_when_writing_fails(exported, trained_run, tmp_path, monkeypatch, card):
    def full_disk(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "config_pbtxt", full_disk)
    with pytest.raises(OSError, match="No space"):
        artefact.write_artefact(tmp_path, card, b"model")
    assert list((tmp_path / "digits").iterdir()) == []
    monkeypatch.undo()
    assert artefact.write_artefact(tmp_path, card, b"model") == tmp_path / "digits" / "1"
    with pytest.raises(InterflowError, match="appeared meanwhile"):
        artefact.write_artefact(tmp_path, card, b"other")
    assert (tmp_path / "digits" / "1" / "model.onnx").read_bytes() == b"model"


def test_what_a_killed_export_left_is_removed_and_what_another_is_writing_is_not(tmp_path, card):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left, written = (tmp_path / "digits" / f".staged-{pid}-abc" for pid in (ended.pid, 1))
    for folder in (left, written):
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"half")
    artefact.write_artefact(tmp_path, card, b"model")
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == [written.name, "1", "config.pbtxt"]


def test_the_newest_run_is_no_cut_and_none_with_a_damaged_card(trained_run, tmp_path, capsys):
    for name in ("whole", "damaged", "cut"):
        shutil.copytree(trained_run, tmp_path / name)
    card = json.loads((trained_run / "card.json").read_text())
    card["provenance"]["created"] = "2999-01-01T00:00:00Z"
    (tmp_path / "cut" / "card.json").write_text(json.dumps(card))
    (tmp_path / "cut" / CUT_FILE).write_text("{}")
    (tmp_path / "damaged" / "card.json").write_text("{")
    assert newest_finished(tmp_path).folder.name == "whole"
    assert re.search(r"note: left out: \S+damaged/card\.json: not a model card", capsys.readouterr().out)
    shutil.rmtree(tmp_path / "whole")
    assert newest_finished(tmp_path).folder.name == "cut"


def test_no_run_an_unfinished_one_and_changed_weights_are_refused(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterflowError, match="no finished run"):
        main([])
    with pytest.raises(InterflowError, match="not a run's folder"):
        main(["--run", "runs/none"])
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(trained_run, copy)
    tensors = load_file(copy / "checkpoint.safetensors")
    tensors["network.attention.weight"][0, 0] += 0.1
    with_metadata = {METADATA_KEY: json.dumps({"epoch": 4, "step": 0, "data": "x"})}
    save_file(tensors, copy / "checkpoint.safetensors", metadata=with_metadata)
    with pytest.raises(InterflowError, match="not the weights that"):
        main([])
    content = json.loads((copy / "card.json").read_text())
    for field, message in (("depth", "not those of its network|ascending"), ("name", "not those of its network")):
        changed = json.loads(json.dumps(content))
        changed["stages"][0][field] = {"depth": 5, "name": "conv5"}[field]
        (copy / "card.json").write_text(json.dumps(changed))
        with pytest.raises(InterflowError, match=message):
            main([])
    (copy / "samples.npy").write_bytes(b"")
    with pytest.raises(InterflowError, match=r"samples\.npy"):
        main([])
    (copy / "card.json").unlink()
    with pytest.raises(InterflowError, match=r"not finished; finish it with `python training/train.py --resume"):
        main(["--run", str(copy)])
    assert not (tmp_path / "exports" / "digits" / "1").exists()


def test_a_photograph_of_another_size_says_the_same_in_pytorch_and_onnx(exported, trained_run, card, photographs):
    import torch

    from model.interflow import Normalize

    pixels = read_input(photographs["chelsea.png"], card.input)[None].copy()
    session = onnxruntime.InferenceSession(exported / "digits" / "1" / "model.onnx")
    (served,) = session.run(["logits"], {"image": pixels})
    with torch.inference_mode():
        network, _ = loaded(trained_run, card)
        expected = network(Normalize(card.input.mean, card.input.std)(torch.from_numpy(pixels))).logits
    np.testing.assert_allclose(served, expected, atol=1e-4)
