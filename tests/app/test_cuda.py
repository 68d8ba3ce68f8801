"""On a GPU that is a fake, which runs on the CPU and is stricter than CUDA: `tests/app/fake_cuda` says in what."""

import ctypes
import gc
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import onnxruntime
import pytest

from app import cuda
from app.errors import DeviceLostError, DeviceMemoryError, InferenceError
from app.inference import STOPS
from app.main import create_app
from app.repository import Repository, load_model
from app.session import ModelError, Session
from app.settings import Settings
from app.versions import find_versions
from model.contract import BRANCH_LOGITS, LOGITS
from model.explain import readings
from model.images import read_input

CPU = Settings(provider="cpu", threads=1)
SEVEN = Path("app/static/examples/digits-7.png").read_bytes()


def on_cuda(artefact, **settings):
    return Session(artefact, Settings(**{"provider": "cuda", "max_batch": 8, "cuda_graphs": "off"} | settings))


@pytest.fixture
def images(artefact, photographs):
    """Real photographs, upright, upside down and in negative."""
    spec = Session(artefact, CPU).card.input
    upright = np.stack([read_input(path.read_bytes(), spec) for path in photographs.values()])
    return np.concatenate([upright, upright[:, ::-1], 255 - upright])


# What a network gives


def test_io_binding_gives_what_a_plain_run_gives_bit_for_bit(artefact, fake_cuda, images):
    plain, bound = Session(artefact, CPU), on_cuda(artefact, cuda_graphs="on")
    names = list(plain.card.outputs)
    for count in (1, 2, 4, 8):
        expected = plain._session.run(names, {"image": images[:count]})
        outputs = bound.run(images[:count], names)
        assert list(outputs) == names
        for name, values in zip(names, expected, strict=True):
            np.testing.assert_array_equal(outputs[name], values)


def test_batches_run_in_the_next_size_and_what_is_behind_them_is_not_seen(artefact, fake_cuda, images):
    session = on_cuda(artefact, max_batch=12)
    assert session.runtime.batch_sizes == [1, 2, 4, 8, 12]
    (opened,) = fake_cuda.FakeSession.opened
    assert [size for size, _ in opened.ran] == [1, 2, 4, 8, 12]
    session.run(images[:12], [LOGITS])  # leaves its images behind
    for count, size in ((5, 8), (1, 1), (3, 4), (9, 12)):
        outputs = session.run(images[-count:], [LOGITS, "branch_map_0"])
        assert opened.ran[-1] == (size, -1)
        for place in range(count):
            alone = session.run(images[len(images) - count + place :][:1], [LOGITS, "branch_map_0"])
            for name, values in outputs.items():
                assert len(values) == count
                np.testing.assert_allclose(values[place], alone[name][0], rtol=1e-4, atol=1e-4)


def test_an_answer_stays_as_it_was_when_its_memory_is_used_again(artefact, fake_cuda, images):
    session = on_cuda(artefact)
    first = session.run(images[:2], [LOGITS, "branch_map_1"])
    kept = {name: values.copy() for name, values in first.items()}
    session.run(images[4:6], [LOGITS, "branch_map_1"])
    for name, values in first.items():
        np.testing.assert_array_equal(values, kept[name])
        assert values.flags.owndata or values.base.flags.owndata  # and none is a view of what all lanes share


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_lanes_and_sizes_that_take_turns_give_each_its_own(artefact, fake_cuda, images, graphs):
    session = on_cuda(artefact, cuda_graphs=graphs)
    names = list(session.card.outputs)
    rng = np.random.default_rng(0)
    parts = [images[start : start + count] for start, count in zip(rng.integers(0, 8, 60), [1, 3, 8, 2, 5, 4] * 10)]  # noqa: B905
    expected = [session.run(part, names) for part in parts]
    with ThreadPoolExecutor(6) as threads:
        for outputs, known in zip(threads.map(lambda part: session.run(part, names), parts), expected, strict=True):
            for name in names:
                np.testing.assert_array_equal(outputs[name], known[name])


def test_images_of_another_shape_or_too_many_are_an_inference_error(artefact, fake_cuda, images):
    session = on_cuda(artefact)
    for wrong in (np.zeros((1, 2, 3, 4), np.uint8), np.zeros((1, 1, 1, 1), np.uint8), images[:9]):
        with pytest.raises(InferenceError, match="are no images of"):
            session.run(wrong, [LOGITS])


def test_each_image_stops_where_it_does_on_the_cpu(artefact, fake_cuda, images, rewrite_card):
    policy = {"max_loss": 0.001, "thresholds": [0.5] * 3, "accuracy": 0.99, "work": 0.7, "stops": [0, 0.5, 0.3, 0.2]}
    rewrite_card(artefact, exits=[policy])
    plain, bound = Session(artefact, CPU), on_cuda(artefact)
    images = images[:8]
    sure = readings(plain.run(images, [BRANCH_LOGITS])[BRANCH_LOGITS], plain.card.reading_scales).max(axis=2)[:, :3]
    thresholds = np.quantile(sure, 0.6, axis=0) + np.zeros((8, 1))
    thresholds[0] = np.inf
    expected, outputs = plain.run(images, [], thresholds), bound.run(images, [], thresholds)
    assert len(set(expected[STOPS])) >= 3  # or the test would say little
    assert list(outputs) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, rtol=1e-4, atol=1e-4)
        assert outputs[name].dtype == values.dtype


def test_a_session_that_is_gone_leaves_no_pinned_memory(artefact, fake_cuda, images):
    session = on_cuda(artefact)
    outputs = session.run(images[:2], [LOGITS])
    runtime = cuda.device._runtime
    assert len(runtime.pinned) == 2 * 4  # two lanes: the images and the outputs that are no maps
    del session
    gc.collect()
    assert runtime.pinned == {}
    assert np.isfinite(outputs[LOGITS]).all()


# What is asked of onnxruntime


def test_cuda_comes_first_and_is_told_what_was_set(artefact, fake_cuda):
    def asked(**settings):
        session = on_cuda(artefact, **settings)
        opened = fake_cuda.FakeSession.opened[-1]
        assert opened.get_providers() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return opened.cuda_options, session.runtime.cuda

    options, runtime = asked()
    assert options == {
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "1",
        "enable_cuda_graph": "0",
        "arena_extend_strategy": "kNextPowerOfTwo",
    }
    assert (runtime.tf32, runtime.graphs, runtime.memory) == (True, [], None)
    options, runtime = asked(cuda_tf32=False, cuda_memory=3 * 10**9, workers=2, cuda_graphs="on")
    assert options | {"cudnn_conv_algo_search": "HEURISTIC"} == {
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_cuda_graph": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "1500000000",
    }
    assert (runtime.tf32, runtime.graphs, runtime.memory) == (False, [1, 2, 4, 8], 1_500_000_000)


def test_lanes_and_threads_on_cuda(artefact, fake_cuda):
    runtime = on_cuda(artefact).runtime
    assert (runtime.provider, runtime.lanes, runtime.threads, runtime.niceness) == ("cuda", 2, 1, 0)
    assert on_cuda(artefact, lanes=3).runtime.lanes == 3
    assert Session(artefact, Settings(provider="cuda", cuda_graphs="off")).runtime.max_batch == 32


def test_sizes_are_captured_where_that_is_quicker(artefact, fake_cuda, monkeypatch, images):
    clock = [0.0]

    def cost(size, graph):
        clock[0] += 1 if (graph == size) == (size in (1, 4)) else 2

    monkeypatch.setattr(fake_cuda.FakeSession, "on_run", staticmethod(cost))
    monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    session = on_cuda(artefact, cuda_graphs="auto")
    assert session.runtime.cuda.graphs == [1, 4]
    for count in (1, 2, 3, 8):
        session.run(images[:count], [LOGITS])
    assert fake_cuda.FakeSession.opened[-1].ran[-4:] == [(1, 1), (2, -1), (4, 4), (8, -1)]


def test_a_network_that_cannot_be_captured_runs_without_graphs_unless_they_were_asked_for(
    artefact, fake_cuda, monkeypatch
):
    monkeypatch.setattr(fake_cuda.FakeSession, "refuses_graphs", True)
    session = on_cuda(artefact, cuda_graphs="auto")
    assert (session.runtime.provider, session.runtime.cuda.graphs) == ("cuda", [])
    with pytest.raises(ModelError, match=r"CUDA cannot run it .*graph capture feature as requested by the user"):
        on_cuda(artefact, cuda_graphs="on")


def test_a_capture_that_fails_leaves_a_session_without_graphs(artefact, fake_cuda, monkeypatch, logs):
    def fail(size, graph):
        if graph == 4:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")

    monkeypatch.setattr(fake_cuda.FakeSession, "on_run", staticmethod(fail))
    session = on_cuda(artefact, cuda_graphs="auto")
    assert session.runtime.cuda.graphs == []
    assert [opened.cuda_options["enable_cuda_graph"] for opened in fake_cuda.FakeSession.opened] == ["1", "0"]
    assert "runs without CUDA graphs: CUDA failure 900" in logs.text
    with pytest.raises(ModelError, match="fails on CUDA"):
        on_cuda(artefact, cuda_graphs="on")


# What stands against CUDA


class Driver:
    """libcuda, as far as it is asked."""

    def __init__(self, version=13000, devices=1, init=0):
        self.version, self.devices, self.init = version, devices, init

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = self.version
        return 0

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.devices
        return 0


@pytest.fixture
def driver(monkeypatch):
    """The NVIDIA driver is what the test says; what onnxruntime makes of CUDA, too."""

    def pretend(given):
        def load(name, *_):
            if given is None or name != "libcuda.so.1":
                raise OSError(f"{name}: cannot open shared object file")
            return given

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda.CUDA, "CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
        monkeypatch.setattr(
            onnxruntime, "preload_dlls", lambda: print("Failed to load libcudart.so.13: no such file\nmore")
        )

    return pretend


OBSTACLES = [
    (None, r"there is no NVIDIA driver \(libcuda\.so\.1 does not load\)"),
    (Driver(version=12040), r"the NVIDIA driver is for CUDA 12\.4, and onnxruntime .* needs one for 13\.0"),
    (Driver(devices=0), r"the NVIDIA driver has no GPU .*\(cuInit gave 0, 0 devices; CUDA_VISIBLE_DEVICES is '7'\)"),
    (Driver(init=100, devices=0), r"the NVIDIA driver has no GPU for us \(cuInit gave 100, 0 devices"),
]


@pytest.mark.parametrize(("given", "reason"), OBSTACLES)
def test_cuda_that_cannot_be_had_is_refused_and_auto_falls_back_loudly(
    artefact, driver, monkeypatch, logs, capfd, given, reason
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    driver(given)
    with pytest.raises(ModelError, match=f"INTERFLOW_PROVIDER is cuda, but {reason}.* Mend that"):
        Session(artefact, Settings(provider="cuda"))
    runtime = Session(artefact, Settings(provider="auto")).runtime
    assert (runtime.provider, runtime.requested_provider, runtime.cuda) == ("cpu", "auto", None)
    assert re.search(reason, runtime.fallback)
    (record,) = [record for record in logs.records if record.name == "app.session"]
    assert record.levelname == "WARNING"
    assert re.search(reason, record.message)
    assert capfd.readouterr() == ("", "")  # nothing of onnxruntime's own


def test_a_fallback_is_in_readyz_in_the_model_and_in_the_metrics(artefact, driver, serve):
    driver(None)
    (versions,) = find_versions(artefact.parents[1]).values()
    for provider, fallen_back in (("auto", 1), ("cpu", 0)):
        model = load_model(versions[0], Settings(provider=provider))
        # a name of its own: servers of other tests write down how it is with theirs
        model = replace(model, card=model.card.model_copy(update={"name": "fallen"}))
        with serve(create_app(Settings(), Repository([model]))) as client:
            (ready,) = client.get("/readyz").json()["models"]
            assert (ready["provider"], ready["fallback"] is not None) == ("cpu", bool(fallen_back))
            assert client.get("/model").json()["runtime"]["fallback"] == ready["fallback"]
            text = client.get("/metrics").text
        assert f'interflow_model_fallback{{model="fallen",version="1"}} {fallen_back:.1f}' in text


def test_an_onnxruntime_without_cuda(artefact, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDA (the package onnxruntime-gpu has)" in Session(artefact, Settings()).runtime.fallback


def test_cuda_that_silently_becomes_cpu_is_noticed_and_what_did_not_load_is_named(artefact, driver, monkeypatch):
    driver(Driver())
    plain = onnxruntime.InferenceSession

    def silent(model, options, providers, **others):
        return plain(model, options, ["CPUExecutionProvider"], **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", silent)
    reason = Session(artefact, Settings(provider="auto")).runtime.fallback
    assert "CUDA does not start (Failed to load libcudart.so.13: no such file; the extra `gpu`" in reason
    with pytest.raises(ModelError, match="INTERFLOW_PROVIDER is cuda, but CUDA does not start"):
        Session(artefact, Settings(provider="cuda"))


# Failures while serving


@pytest.fixture
def served(artefact, fake_cuda, serve):
    """A client of a server on the fake GPU, and its session of onnxruntime."""
    settings = Settings(provider="cuda", exports=artefact.parents[1], cuda_graphs="off", max_batch=4, cuda_lost="stay")
    with serve(create_app(settings)) as client:
        yield client, fake_cuda.FakeSession.opened[-1]


def test_memory_that_does_not_suffice_costs_one_batch(served):
    client, opened = served
    text = "BFCArena::AllocateRawInternal(...) Available memory of 5 is smaller than requested bytes of 9\nmore"
    opened.failure = RuntimeError(text)
    refused = client.post("/predict", content=SEVEN)
    assert (refused.status_code, refused.json()["code"]) == (503, "device_out_of_memory")
    assert refused.headers["retry-after"] == "1"
    assert client.get("/readyz").status_code == 200
    opened.failure = None
    assert client.post("/predict", content=SEVEN).json()["prediction"]["label"] == "7"
    reasons = 'interflow_failed_batches_total{model="digits",reason="device_out_of_memory"} 1.0'
    assert reasons in client.get("/metrics").text


def test_another_failure_is_no_loss(served):
    client, opened = served
    opened.failure = RuntimeError("CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED\nmore")
    assert (client.post("/predict", content=SEVEN).json()["code"]) == "inference_failed"
    assert client.get("/readyz").status_code == 200


def test_a_lost_gpu_fails_every_request_with_503_and_readiness(served, logs):
    client, opened = served
    assert client.get("/readyz").status_code == client.get("/v2/health/ready").status_code == 200
    opened.lose()
    opened.ran.clear()
    for _ in range(2):
        refused = client.post("/predict", content=SEVEN)
        assert refused.headers["content-type"] == "application/problem+json"
        assert (refused.status_code, refused.json()["code"]) == (503, "device_lost")
        assert "CUDA failure 700: an illegal memory access" in refused.json()["detail"]
    opened.failure, cuda.device._runtime.code = None, 0  # as if it were back: its context is not
    assert client.post("/predict", content=SEVEN).status_code == 503
    assert opened.ran == []
    for path in ("/readyz", "/v2/health/ready", "/v2/models/digits/ready"):
        assert client.get(path).status_code == 503
    assert client.get("/healthz").status_code == 200
    text = client.get("/metrics").text
    assert "interflow_device_lost 1.0" in text
    assert len([record for record in logs.records if record.levelname == "CRITICAL"]) == 1


def test_a_copy_that_fails_is_looked_into_as_well(artefact, fake_cuda, images):
    session = on_cuda(artefact)
    cuda.device._runtime.code = 2
    with pytest.raises(DeviceLostError, match="CUDA failure 2: out of memory"):  # the GPU itself keeps failing
        session.run(images[:1], [LOGITS])


def test_out_of_memory_is_known_by_what_each_library_says(fake_cuda):
    for said in (
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "void* onnxruntime::BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for requested buffer of 4",
    ):
        assert type(cuda.device.failure(RuntimeError(said))) is DeviceMemoryError
    assert type(cuda.device.failure(RuntimeError("CUDA failure 1: invalid argument"))) is InferenceError


# Processes


@pytest.fixture
def run_app(only_bundled, tmp_path):
    """Starts `python -m app` on the fake GPU; gives the process, its address, and the file that makes one lose it."""
    started = []

    def run(**settings):
        chosen = {
            "port": 0,
            "exports": only_bundled,
            "provider": "cuda",
            "max_batch": 2,
            "cuda_graphs": "on",
        } | settings
        folders = [str(Path(__file__).parent / "fake_cuda"), str(Path.cwd())]
        environment = {
            "PYTHONPATH": os.pathsep.join(folders),
            "FAKE_CUDA_LOSS": str(tmp_path / "lose"),
            "TMPDIR": str(tmp_path),
        } | {f"INTERFLOW_{name.upper()}": str(value) for name, value in chosen.items()}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app"],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        started.append(process)
        greeting = process.stdout.readline()
        assert ", cuda) on" in greeting, (tmp_path / "log").read_text()
        return process, greeting.split(" on ")[1].split(";")[0], tmp_path / "lose"

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_process_that_lost_its_gpu_ends_with_status_1(run_app, tmp_path):
    process, address, lose = run_app()
    lose.touch()
    refused = httpx2.post(f"{address}/predict", content=SEVEN, trust_env=False)
    assert (refused.status_code, refused.json()["code"]) == (503, "device_lost")
    assert process.wait(timeout=60) == 1
    assert "ended, because the GPU was lost" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_process_that_is_to_stay_stays_and_is_not_ready(run_app):
    process, address, lose = run_app(cuda_lost="stay")
    lose.touch()
    assert httpx2.post(f"{address}/predict", content=SEVEN, trust_env=False).status_code == 503
    time.sleep(1)
    assert httpx2.get(f"{address}/readyz", trust_env=False).json()["code"] == "device_lost"
    process.terminate()
    assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_of_several_workers_one_that_lost_its_gpu_is_replaced_under_load(run_app, tmp_path):
    process, address, lose = run_app(workers=2, drain_s=0.2, log_level="info")
    codes = []

    def ask(_):
        try:
            answer = httpx2.post(f"{address}/predict", content=SEVEN, trust_env=False, timeout=60)
        except httpx2.TransportError as error:
            return type(error).__name__
        return answer.json().get("code", answer.status_code)

    def load(count):
        with ThreadPoolExecutor(4) as threads:
            codes.extend(threads.map(ask, range(count)))

    load(40)
    assert set(codes) == {200}
    lose.touch()
    while "Another starts in" not in (tmp_path / "log").read_text():
        load(10)
    assert "device_lost" in codes
    assert set(codes) <= {200, "device_lost", "draining"}  # no other failure, and no connection was lost

    def value(name):
        text = httpx2.get(f"{address}/metrics", trust_env=False).text
        return sum(float(number) for number in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))

    while value('interflow_model_loaded{model="digits",version="1"}') < 2:
        load(5)
    assert value("interflow_device_lost") == 0
    codes.clear()
    load(40)
    assert set(codes) == {200}
    process.terminate()
    assert process.wait(timeout=60) == 0
