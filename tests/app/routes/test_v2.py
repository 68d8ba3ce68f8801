"""The Open Inference Protocol: its numbers are /predict's, as JSON and as binary data, and tritonclient speaks it."""

import gzip
import io
import json
import re
import shutil
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from app.main import create_app
from app.repository import Repository
from app.settings import Settings
from model.contract import LayerAttentionInfo, ModelCard

KEY = {"Authorization": "Bearer sesame"}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)  # of the network by hand
INFER = "/v2/models/colours/infer"


@contextmanager
def speak(client):
    """tritonclient, to the same server as an httpx2 client."""
    with triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as speaking:
        yield speaking


@pytest.fixture(scope="module")
def managed(serve, only_bundled, tmp_path_factory):
    """A client of a server of the bundled model that can be managed, in an exports folder of its own."""
    exports = tmp_path_factory.mktemp("managed") / "exports"
    shutil.copytree(only_bundled, exports)
    settings = Settings(exports=exports, provider="cpu", threads=1, lanes=1, management_key="sesame")
    with serve(create_app(settings)) as client:
        yield client


def tensor(images=IMAGES, **changes):
    return {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "data": images.ravel().tolist(),
    } | changes


def ask(*outputs, images=IMAGES, **others):
    return {"inputs": [tensor(images)], "outputs": [{"name": name} for name in outputs]} | others


def binary(request, images=IMAGES):
    """The request with its tensor behind the JSON: body and headers."""
    (given,) = request["inputs"]
    kept = {key: value for key, value in given.items() if key != "data"}
    text = json.dumps(request | {"inputs": [kept | {"parameters": {"binary_data_size": images.size}}]}).encode()
    return {"content": text + images.tobytes(), "headers": {"Inference-Header-Content-Length": str(len(text))}}


def arrays(answer):
    """An answer's tensors by name, however they came."""
    assert answer.status_code == 200, answer.text
    size = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    body, rest = json.loads(answer.content[:size]), answer.content[size:]
    found = {}
    for output in body["outputs"]:
        if "data" in output:
            assert "parameters" not in output
            values = np.array(output["data"], {"FP32": np.float32, "BYTES": object}[output["datatype"]])
        else:
            bytes_here = output["parameters"]["binary_data_size"]
            assert output["datatype"] == "FP32"
            values, rest = np.frombuffer(rest[:bytes_here], np.float32), rest[bytes_here:]
        found[output["name"]] = values.reshape(output["shape"])
    assert rest == b""
    return found


def refused(answer, status, *expected):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    for words in expected:
        assert words in answer.json()["error"]


# --- inference ---


def test_the_numbers_are_predicts(digits):
    """Logits, branch logits and weights say what /predict says of the same pixels."""
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 1), np.uint8)
    outputs = arrays(
        digits.post("/v2/models/digits/infer", json=ask("logits", "branch_logits", "branch_weights", images=images))
    )
    card = ModelCard.model_validate(digits.get("/model").json())
    for index, image in enumerate(images):
        picture = io.BytesIO()
        Image.fromarray(image[..., 0]).save(picture, "png")
        predicted = digits.post("/predict", files={"image": picture.getvalue()}).json()
        logits = outputs["logits"][index]
        chances = np.exp(-(((logits.max() - logits) / card.temperature) ** card.power))
        confidences = chances / chances.sum()
        assert predicted["prediction"]["index"] == confidences.argmax()
        assert predicted["prediction"]["confidence"] == pytest.approx(confidences.max(), abs=1e-5)
        answer = predicted["prediction"]["index"]
        for branch, stage in enumerate(predicted["stages"]):
            weight, z = (outputs[name][index, branch, answer] for name in ("branch_weights", "branch_logits"))
            assert stage["weight"] == pytest.approx(weight, rel=1e-5)
            assert stage["contribution"] == pytest.approx(weight * z, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("answer_binary", [False, True])
@pytest.mark.parametrize("form", ["flat", "nested", "binary", "gzip", "deflate"])
def test_all_forms_say_the_same(colours, form, answer_binary):
    request = ask("logits", "branch_map_1", parameters={"binary_data_output": answer_binary})
    sent = {
        "flat": {"json": request},
        "nested": {"json": request | {"inputs": [tensor(data=IMAGES.tolist())]}},
        "binary": binary(request),
        "gzip": {"content": gzip.compress(json.dumps(request).encode()), "headers": {"Content-Encoding": "gzip"}},
        "deflate": {"content": zlib.compress(json.dumps(request).encode()), "headers": {"Content-Encoding": "deflate"}},
    }[form]
    answer = colours.post(INFER, **sent)
    outputs = arrays(answer)
    assert answer.headers["content-type"] == ("application/octet-stream" if answer_binary else "application/json")
    means = IMAGES.astype(np.float32).mean(axis=(1, 2)) / 255
    logits = means * 4 + 0.5 * np.roll(means, 1, axis=1)
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5)
    np.testing.assert_allclose(
        outputs["branch_map_1"], np.broadcast_to(-2 * means[..., None, None], (5, 3, 2, 2)), rtol=1e-5
    )
    assert list(outputs) == ["logits", "branch_map_1"]


def test_compressed_binary_data(colours):
    sent = binary(ask("logits"))
    plain = arrays(colours.post(INFER, **sent))["logits"]
    sent = {"content": gzip.compress(sent["content"]), "headers": sent["headers"] | {"Content-Encoding": "gzip"}}
    np.testing.assert_array_equal(arrays(colours.post(INFER, **sent))["logits"], plain)


def test_only_what_is_asked_for_is_computed(serve, colour_model):
    asked = []

    class Recording:
        def run(self, images, names, thresholds=None, *, alone=False):
            asked.append(list(names))
            return {name: np.zeros((len(images), 3), np.float32) for name in names}

    with serve(create_app(Settings(), Repository([colour_model(Recording())]))) as client:
        arrays(client.post(INFER, json=ask("logits")))
        arrays(client.post(INFER, json=ask("branch_map_0", "logits", "branch_map_0")))
    assert asked == [["logits"], ["branch_map_0", "logits"]]


def test_without_outputs_all_come_in_the_graphs_order(colours):
    request = ask()
    del request["outputs"]
    described = colours.get("/v2/models/colours").json()["outputs"]
    outputs = arrays(colours.post(INFER, json=request))
    assert list(outputs) == [output["name"] for output in described]
    for output in described:
        assert outputs[output["name"]].shape == (5, *output["shape"][1:])


def test_an_outputs_own_choice_of_form_counts(colours):
    request = ask(parameters={"binary_data_output": True}) | {
        "outputs": [
            {"name": "logits", "parameters": {"binary_data": False}},
            {"name": "branch_logits"},
            {"name": "logits", "parameters": {"binary_data": True}},
        ]
    }
    answer = colours.post(INFER, json=request)
    size = int(answer.headers["inference-header-content-length"])
    first, second, third = json.loads(answer.content[:size])["outputs"]
    assert "data" in first
    assert second["parameters"] == {"binary_data_size": 5 * 3 * 3 * 4}
    np.testing.assert_array_equal(
        np.array(first["data"], np.float32),
        np.frombuffer(answer.content[-third["parameters"]["binary_data_size"] :], "<f4"),
    )


def test_the_answer_names_model_version_and_id(colours):
    answer = colours.post(INFER, json=ask("logits", id="mine", model_name="ignored")).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("colours", "1", "mine")
    assert "id" not in colours.post(INFER, json=ask("logits")).json()


def test_classification_ranks_as_triton_does(colours):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 0] = 255  # logits (4, 0.5, 0)
    images[1, ..., 1] = 255  # logits (0, 4, 0.5)
    request = ask(images=images) | {"outputs": [{"name": "logits", "parameters": {"classification": 2}}]}
    answer = colours.post(INFER, json=request).json()["outputs"]
    assert answer == [
        {
            "name": "logits",
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": ["4.000000:0:red", "0.500000:1:green", "4.000000:1:green", "0.500000:2:blue"],
        }
    ]
    request["outputs"][0]["parameters"]["classification"] = 99
    assert colours.post(INFER, json=request).json()["outputs"][0]["shape"] == [2, 3]


def test_a_request_may_limit_its_time(serve, colour_model):
    gate = threading.Event()

    class Waiting:
        def run(self, images, names, thresholds=None, *, alone=False):
            assert gate.wait(30)
            return {name: np.zeros((len(images), 3), np.float32) for name in names}

    with serve(create_app(Settings(timeout_ms=0), Repository([colour_model(Waiting())]))) as client:
        refused(client.post(INFER, json=ask("logits", parameters={"timeout": 1000})), 504, "time was up")
        gate.set()
        arrays(client.post(INFER, json=ask("logits", parameters={"timeout": 0})))


def test_numbers_that_are_not_finite_are_no_answer(serve, colour_model):
    class Broken:
        def run(self, images, names, thresholds=None, *, alone=False):
            return {name: np.full((len(images), 3), np.nan, np.float32) for name in names}

    with serve(create_app(Settings(), Repository([colour_model(Broken())]))) as client:
        for request in (ask("logits"), ask("logits", parameters={"binary_data_output": True})):
            refused(client.post(INFER, json=request), 500, "not finite")


# --- what is refused ---


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ([], "no inference request"),
        ({}, "`inputs`: Field required"),
        ({"inputs": {}}, "`inputs`"),
        ({"inputs": []}, "the inputs are none; expected one, 'image'"),
        ({"inputs": [tensor(name="picture")]}, "the inputs are 'picture'"),
        ({"inputs": [tensor(), tensor()]}, "the inputs are 'image', 'image'"),
        ({"inputs": [tensor(datatype="FP32")]}, "'FP32'; expected 'UINT8'"),
        ({"inputs": [tensor(shape=[5, 4, 3, 4])]}, "expected [4, 4, 3] behind"),
        ({"inputs": [tensor(shape=[80, 3])]}, "expected [4, 4, 3] behind"),
        ({"inputs": [tensor(shape=[0, 4, 4, 3], data=[])]}, "at least 1"),
        ({"inputs": [tensor(shape=[-1, 4, 4, 3])]}, "greater than or equal to 0"),
        ({"inputs": [tensor(shape=["5", 4, 4, 3])]}, "`inputs.0.shape.0`"),
        ({"inputs": [tensor(shape=[2**70, 4, 4, 3])]}, ""),
        ({"inputs": [tensor(shape=[6, 4, 4, 3])]}, "holds 240 values; its shape [6, 4, 4, 3] has 288"),
        ({"inputs": [tensor(data=[])]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=None)]}, "either `data` or `binary_data_size`"),
        ({"inputs": [tensor(data=[256] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[-1] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[0.5] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=["1"] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[True] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[{}] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[2**70] * 240)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[[1, 2], [3]])]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor(parameters={"binary_data_size": 240})]}, "either `data` or `binary_data_size`"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": 240})]}, "0 bytes follow the JSON"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "r"})]}, "shared memory is not supported"),
        (ask("probabilities"), "'probabilities' is not an output of the model; there are logits, branch_logits"),
        (
            ask() | {"outputs": [{"name": "branch_logits", "parameters": {"classification": 1}}]},
            "only the fused logits",
        ),
        (ask() | {"outputs": [{"name": "logits", "parameters": {"classification": -1}}]}, "classification"),
        (ask() | {"outputs": [{"name": "logits", "parameters": {"shared_memory_region": "r"}}]}, "shared memory"),
        (ask("logits", parameters={"binary_data_output": "yes"}), "binary_data_output"),
        (ask("logits", id=7), "`id`"),
        (ask("logits", parameters={"timeout": -1}), "`parameters.timeout`"),
        (ask("logits", parameters={"timeout": 10**400}), "`parameters.timeout`"),
    ],
)
def test_what_breaks_the_protocol_or_does_not_fit_the_model(colours, request_, expected):
    refused(colours.post(INFER, json=request_), 400, expected)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"inputs": [' + b"[" * 100_000])
def test_what_is_no_json(colours, body):
    refused(colours.post(INFER, content=body), 400, "the JSON is no inference request")


@pytest.mark.parametrize("length", ["-1", "x", "", "10000", "9" * 5000, "1.0", "+5"])
def test_a_length_of_the_json_that_cannot_be(colours, length):
    sent = binary(ask("logits"))
    answer = colours.post(INFER, content=sent["content"], headers={"Inference-Header-Content-Length": length})
    refused(answer, 400, "Inference-Header-Content-Length is '")


def test_binary_data_of_another_size(colours):
    sent = binary(ask("logits"))
    refused(
        colours.post(INFER, content=sent["content"][:-1], headers=sent["headers"]), 400, "239 bytes follow the JSON"
    )
    refused(colours.post(INFER, content=sent["content"] + b"0", headers=sent["headers"]), 400, "241 bytes follow")
    header = {"Inference-Header-Content-Length": str(len(json.dumps(ask("logits"))))}
    content = json.dumps(ask("logits")).encode() + b"rest"
    refused(colours.post(INFER, content=content, headers=header), 400, "4 bytes follow the JSON")


def test_bodies_are_limited_while_they_come_in_and_before_they_are_inflated(serve, colour_model, raw_answer):
    settings = Settings(max_tensor_bytes=20_000, max_json_bytes=5_000)
    with serve(create_app(settings, Repository([colour_model()]))) as client:
        enough, much = (
            binary(ask("logits", images=images), images)
            for images in (np.zeros((300, 4, 4, 3), np.uint8), np.zeros((500, 4, 4, 3), np.uint8))
        )
        assert client.post(INFER, **enough).status_code == 200
        refused(client.post(INFER, **much), 413, "more than 20000 bytes", "INTERFLOW_MAX_TENSOR_BYTES")
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        chunk = b"1000\r\n" + b"0" * 4096 + b"\r\n"
        assert b"413" in raw_answer(client, head + 10 * chunk).partition(b"\r\n")[0]
        bomb = {"content": zlib.compress(b" " * 1_000_000), "headers": {"Content-Encoding": "deflate"}}
        refused(client.post(INFER, **bomb), 413, "inflates to more than 20000 bytes")
        text = client.post(INFER, content=b" " * 5001)
        refused(text, 413, "the JSON has 5001 bytes; the limit is 5000 (INTERFLOW_MAX_JSON_BYTES)")


def test_an_answer_that_would_fill_the_memory_is_refused_before_anything_is_computed(serve, colour_model):
    class Untouched:
        def run(self, images, names, thresholds=None, *, alone=False):
            raise AssertionError

    settings = Settings(max_tensor_bytes=20_000, max_json_bytes=5_000)
    images = np.zeros((100, 4, 4, 3), np.uint8)
    with serve(create_app(settings, Repository([colour_model(Untouched())]))) as client:
        everything = ask(images=images, parameters={"binary_data_output": True})
        refused(client.post(INFER, **binary(everything, images)), 413, "tensors would have 22800 bytes")
        in_json = ask("logits", "branch_logits", "branch_weights", images=images)
        refused(client.post(INFER, **binary(in_json, images)), 413, "in JSON would have 8400 bytes", "as binary data")


@pytest.mark.parametrize(
    ("coding", "change", "status", "expected"),
    [
        ("br", bytes, 415, "expected gzip, deflate or none"),
        ("gzip, deflate", bytes, 415, "expected gzip, deflate or none"),
        ("gzip", gzip.decompress, 400, "not what its Content-Encoding says"),
        ("gzip", lambda body: body[:-9], 400, "ends early"),
        ("gzip", lambda body: body + b"more", 400, "goes on after its end"),
        ("gzip", lambda body: b"", 400, "ends early"),
    ],
)
def test_codings_that_cannot_be_undone(colours, coding, change, status, expected):
    body = gzip.compress(json.dumps(ask("logits")).encode())
    answer = colours.post(INFER, content=change(body), headers={"Content-Encoding": coding})
    refused(answer, status, expected)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/colours/versions/9/infer", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/colours/versions/9", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/repository/models/colours/load", 403),
        ("POST", "/v2/repository/models/colours/unload", 403),
    ],
)
def test_every_refusal_has_the_protocols_form(colours, method, path, status):
    refused(colours.request(method, path), status)


# --- metadata, health and the repository ---


def test_metadata_of_server_and_model(colours):
    server = colours.get("/v2").json()
    assert server["name"] == "interflow"
    assert set(server["extensions"]) == {"binary_tensor_data", "classification", "model_repository"}
    for path in ("/v2/models/colours", "/v2/models/colours/versions/1"):
        described = colours.get(path).json()
        assert (described["name"], described["versions"]) == ("colours", ["1"])
        assert described["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 4, 4, 3]}]
        assert described["outputs"][1] == {"name": "branch_logits", "datatype": "FP32", "shape": [-1, 3, 3]}


def test_the_description_of_the_routes_names_what_their_paths_hold(colours):
    paths = colours.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        if path.startswith("/v2"):
            for method in methods.values():
                named = {(given["in"], given["name"]) for given in method.get("parameters", [])}
                assert named == {("path", name) for name in re.findall(r"\{(\w+)\}", path)}


def test_alive_but_not_ready_without_a_model(serve):
    with serve(create_app(Settings(), Repository())) as client:
        assert client.get("/v2/health/live").json() == {"live": True}
        refused(client.get("/v2/health/ready"), 503, "no model is loaded")
        refused(client.get("/v2/models/digits/ready"), 503)


def test_not_ready_once_the_server_was_told_to_end(serve, colour_model):
    app = create_app(Settings(), Repository([colour_model()]))
    with serve(app) as client:
        app.state.draining = True
        refused(client.get("/v2/health/ready"), 503, "told to end")
        assert client.get("/v2/health/live").status_code == 200


def test_errors_have_the_protocols_form_behind_a_path_prefix_too(serve, colour_model):
    with serve(create_app(Settings(root_path="/prefix"), Repository([colour_model()]))) as client:
        refused(client.get("/v2/models/other"), 404)
        refused(client.get("/prefix/v2/models/other"), 404)


def test_ready(colours):
    assert colours.get("/v2/health/ready").json() == {"ready": True}
    assert colours.get("/v2/models/colours/ready").json() == {"name": "colours", "ready": True}
    assert colours.get("/v2/models/colours/versions/1/ready").status_code == 200


def test_a_model_is_unloaded_and_loaded_again(managed):
    assert managed.post("/v2/repository/models/digits/unload", headers=KEY).status_code == 200
    for path in ("/readyz", "/v2/health/ready"):
        assert managed.get(path).status_code == 503
    assert managed.get("/healthz").status_code == 200
    refused(managed.post("/v2/models/digits/infer", content=b"{}"), 503, "no model is loaded")
    refused(managed.post("/v2/repository/models/digits/unload", headers=KEY), 404, "'digits' is not loaded")
    unloaded = [{"name": "digits", "version": "1", "state": "UNAVAILABLE", "reason": "not loaded"}]
    assert managed.post("/v2/repository/index").json() == unloaded
    assert managed.post("/v2/repository/index", json={"ready": True}).json() == []
    assert managed.post("/v2/repository/models/digits/load", headers={"X-API-Key": "sesame"}).status_code == 200
    assert managed.get("/readyz").status_code == managed.get("/v2/health/ready").status_code == 200
    assert managed.post("/v2/repository/index", json={"ready": True}).json() == [
        {"name": "digits", "version": "1", "state": "READY", "reason": ""}
    ]


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_management_takes_its_key(managed, verb):
    path = f"/v2/repository/models/digits/{verb}"
    for headers in ({}, {"Authorization": "Bearer other"}, {"X-API-Key": "sesame2"}):
        refused(managed.post(path, headers=headers), 401, "management key")
    assert managed.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("index", b"[]"),
        ("index", b'{"ready": "yes"}'),
        ("models/digits/load", b"{"),
        ("models/digits/load", b'{"parameters": []}'),
        ("models/digits/load", b'{"parameters": {"file:1/model.onnx": "AAAA"}}'),
        ("models/digits/load", b'{"parameters": {"config": {}}}'),
        ("models/digits/load", b'{"parameters": {"config": "{}"}}'),
        ("models/digits/unload", b'{"parameters": {"unload_dependents": 1}}'),
    ],
)
def test_management_requests_that_cannot_be_used(managed, path, body):
    refused(managed.post(f"/v2/repository/{path}", content=body, headers=KEY), 400, "cannot be used")
    refused(managed.post(f"/v2/repository/{path}", content=b" " * 70_000, headers=KEY), 413)


# --- swaps while others ask ---


@pytest.fixture
def two_versions(artefact, rewrite_card, add_layer_attention):
    """Two versions, whose graphs say which they are: 0.25 * version in the output `layer_attention`."""
    rows = [LayerAttentionInfo(block="b", module="AFI", kind="gate", sources=("s",))]
    second = artefact.with_name("2")
    shutil.copytree(artefact, second)
    for number, folder in ((1, artefact), (2, second)):
        add_layer_attention(folder, rows, [[0.25 * number]], [[0.0]])
        rewrite_card(folder, layer_attention=rows, version=str(number))
    return artefact.parents[1]


def test_swaps_fail_no_request_and_mix_no_versions(serve, two_versions):
    """Four clients ask all the time while one version takes the other's place and back."""
    settings = Settings(exports=two_versions, provider="cpu", threads=1, lanes=1, management_key="sesame")
    images = np.zeros((3, 32, 32, 1), np.uint8)
    sent = binary(ask("layer_attention", images=images), images)
    done, wrong, served = threading.Event(), [], []
    with serve(create_app(settings)) as client:

        def keep_asking():
            while not done.is_set():
                answer = client.post("/v2/models/digits/infer", **sent)
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                version = answer.json()["model_version"]
                served.append(version)
                if answer.json()["outputs"][0]["data"] != [0.25 * int(version)] * 3:
                    wrong.append(answer.json())

        askers = [threading.Thread(target=keep_asking) for _ in range(4)]
        for asker in askers:
            asker.start()
        before = None
        for turn in range(20):
            config = {"version_policy": {"specific": {"versions": [1 + turn % 2]}}}
            body = {"parameters": {"config": json.dumps(config)}}
            assert client.post("/v2/repository/models/digits/load", json=body, headers=KEY).status_code == 200
            if turn == 9:
                before = threading.active_count()
        after = threading.active_count()
        done.set()
        for asker in askers:
            asker.join()
    assert wrong == []
    assert set(served) == {"1", "2"}
    assert after <= before + 1  # an old lane that is just ending


# --- tritonclient, unchanged ---


def infer_input(images, **how):
    given = triton.InferInput("image", images.shape, "UINT8")
    given.set_data_from_numpy(images, **how)
    return given


def test_tritonclient_asks_for_health_and_metadata(colours):
    with speak(colours) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("colours")
        assert client.is_model_ready("colours", "1")
        assert not client.is_model_ready("colours", "2")
        assert client.get_server_metadata()["name"] == "interflow"
        assert client.get_model_metadata("colours")["inputs"][0]["shape"] == [-1, 4, 4, 3]
        with pytest.raises(InferenceServerException, match="'other' is not loaded; loaded are"):
            client.get_model_metadata("other")


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_data", [True, False])
def test_tritonclient_infers(colours, binary_data, compression):
    expected = arrays(colours.post(INFER, json=ask("logits")))["logits"]
    with speak(colours) as client:
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary_data)]
        given = [infer_input(IMAGES, binary_data=binary_data)]
        result = client.infer(
            "colours", given, outputs=outputs, request_id="9", request_compression_algorithm=compression
        )
        np.testing.assert_array_equal(result.as_numpy("logits"), expected)
        assert result.as_numpy("branch_logits") is None
        assert result.get_response()["id"] == "9"
        everything = client.infer("colours", given, model_version="1", timeout=60_000_000)
        np.testing.assert_array_equal(everything.as_numpy("logits"), expected)
        assert everything.as_numpy("branch_map_2").shape == (5, 3, 2, 2)


@pytest.mark.parametrize("binary_data", [True, False])
def test_tritonclient_classifies(colours, binary_data):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[:, ..., 2] = 255
    with speak(colours) as client:
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary_data, class_count=2)]
        ranked = client.infer("colours", [infer_input(images)], outputs=outputs).as_numpy("logits")
    texts = [[text.decode() if binary_data else text for text in row] for row in ranked]
    assert texts == [["4.000000:2:blue", "0.500000:0:red"]] * 2


def test_tritonclient_shows_what_is_wrong(colours):
    given = triton.InferInput("image", [1, 4, 4, 3], "FP32")
    given.set_data_from_numpy(np.zeros((1, 4, 4, 3), np.float32))
    with speak(colours) as client, pytest.raises(InferenceServerException, match="expected 'UINT8'") as caught:
        client.infer("colours", [given])
    assert caught.value.status() == "400"


def test_tritonclient_manages_models(managed):
    with speak(managed) as client:
        assert client.get_model_repository_index()[0]["state"] == "READY"
        with pytest.raises(InferenceServerException, match="management key"):
            client.unload_model("digits")
        client.unload_model("digits", headers=KEY)
        assert not client.is_server_ready()
        assert client.get_model_repository_index()[0]["state"] == "UNAVAILABLE"
        config = json.dumps({"version_policy": {"specific": {"versions": [2]}}})
        with pytest.raises(InferenceServerException, match="version 2, is not in"):
            client.load_model("digits", headers=KEY, config=config)
        client.load_model("digits", headers=KEY, config=config.replace("2", "1"))
        assert client.is_model_ready("digits", "1")


def test_the_readmes_example_runs(digits, capsys):
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    exec(example.replace("localhost:8000", f"{digits.base_url.host}:{digits.base_url.port}"), {})
    assert capsys.readouterr().out.startswith("(64, 4, 10) [b'")
