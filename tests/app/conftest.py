"""What the server's tests share: a network whose answers are computed by hand, the bundled artefact, a real server."""

import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import httpx2
import numpy as np
import pytest
from fastapi import FastAPI

from app.answers import Interpreter, ReadNetwork
from app.batcher import Batcher
from app.inference import Network, Outputs
from app.main import create_app
from app.repository import LoadedModel, Repository
from app.schemas import Runtime
from app.server import Server
from app.settings import PREFIX, Settings, variable
from model.contract import (
    BRANCH_LOGITS,
    BRANCH_WEIGHTS,
    CARD_FILE,
    LAYER_ATTENTION,
    LOGITS,
    METADATA_KEY,
    MODEL_FILE,
    LayerAttentionInfo,
    ModelCard,
    branch_map_name,
)

ROOT = Path(__file__).parents[2]
CLASSES = ("red", "green", "blue")
RUNTIME = Runtime(
    provider="cpu",
    requested_provider="cpu",
    fallback=None,
    onnxruntime="0",
    cpus=1,
    lanes=1,
    helpers=0,
    threads=1,
    lone_threads=1,
    pinned=False,
    niceness=0,
    spinning=False,
    max_batch=32,
    small_batch=32,
    batch_sizes=None,
    batch_wait_us=0,
    max_queue=512,
)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """But for INTERFLOW_PROVIDER: with cuda there, all servers whose provider the test leaves open run on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.upper().startswith(PREFIX) and name.upper() != variable("provider"):
                patch.delenv(name)
        yield


class ColourNetwork:
    """Three stages, three classes; with m = the mean red, green and blue of an image, in 0..1:

    stage 0: z = m, w = 1; stage 1: z = -2 m, w = -1.5 (upside down); stage 2: z = m moved on by one class, w = 0.5.
    """

    weights = np.array([[1.0] * 3, [-1.5] * 3, [0.5] * 3], np.float32)

    def run(self, images, names, thresholds=None, *, alone=False) -> Outputs:
        outputs = self.outputs(images)
        return {name: outputs[name] for name in names}

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """All of them; the maps are the same everywhere."""
        means = images.astype(np.float32).mean(axis=(1, 2)) / 255
        branch_logits = np.stack([means, -2 * means, np.roll(means, 1, axis=1)], axis=1)
        weights = np.broadcast_to(self.weights, branch_logits.shape)
        maps = np.broadcast_to(branch_logits[..., None, None], (*branch_logits.shape, 2, 2))
        return {
            LOGITS: (weights * branch_logits).sum(axis=1),
            BRANCH_LOGITS: branch_logits,
            BRANCH_WEIGHTS: weights,
            **{branch_map_name(branch): maps[:, branch] for branch in range(3)},
        }


class LayeredNetwork(ColourNetwork):
    """`ColourNetwork`, whose blocks draw on each other; with the mean red, green and blue of an image, in 0..1:

    AFI: (1 + red) / 4 and (3 - red) / 4; MRLA-base: green / 2, blue / 2 and what remains; MRLA-light: blue.
    """

    blocks = (
        {"block": "stage1.block3", "module": "AFI", "kind": "share", "sources": ("stage1.block1", "stage1.block2")},
        {
            "block": "stage2.block3",
            "module": "MRLA-base",
            "kind": "share",
            "sources": ("stage2.block1", "stage2.block2", "stage2.block3"),
        },
        {"block": "stage3.block1", "module": "MRLA-light", "kind": "gate", "sources": ("stage3.block1",)},
    )

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        red, green, blue = (images.astype(np.float32).mean(axis=(1, 2)) / 255).T
        none = np.zeros_like(red)
        attention = [
            [(1 + red) / 4, (3 - red) / 4, none],
            [green / 2, blue / 2, 1 - green / 2 - blue / 2],
            [blue, none, none],
        ]
        return super().outputs(images) | {LAYER_ATTENTION: np.array(attention).transpose(2, 0, 1)}


def _colour_card(
    name: str = "colours",
    version: str = "1",
    created: str = "2026-01-01T00:00:00Z",
    layer_attention: Sequence[dict[str, object]] = (),
) -> ModelCard:
    stages = [{"name": f"conv{i}", "depth": i, "channels": 4, "map_size": (2, 2)} for i in (1, 2, 3)]
    return ModelCard.model_validate(
        {
            "name": name,
            "version": version,
            "classes": CLASSES,
            "input": {"height": 4, "width": 4, "channels": 3, "mean": [0] * 3, "std": [1] * 3, "resize": "squash"},
            "backbone": {"name": "by hand", "depth": 3, "width": 1.0},
            "method": {
                "name": "S1",
                "attention": "branch",
                "initial_weights": "random",
                "learned": True,
                "shared_heads": False,
            },
            "stages": stages,
            "layer_attention": layer_attention,
            "branch_weights": ColourNetwork.weights.tolist(),
            "reading_scales": ColourNetwork.weights.tolist(),
            "temperature": 2.0,
            "branch_importance": [0.25, 0.7, 0.05],
            "fitted_on": "nothing",
            "metrics": {
                "data": "colours",
                "split": "test",
                "images": 3,
                "seed": 0,
                "accuracy": 1.0,
                "branch_accuracy": [1.0, 0.9, 0.0],
                "ece": 0.1,
                "branch_ece": [0.1, 0.1, 0.1],
            },
            "provenance": {
                "created": created,
                "run": "by hand",
                "weights_sha256": "0" * 64,
                "git_revision": None,
                "versions": {},
            },
        }
    )


@pytest.fixture
def colour_card() -> Callable[..., ModelCard]:
    """Makes the card of `ColourNetwork` under any name, version and time."""
    return _colour_card


@pytest.fixture
def colour_network() -> ColourNetwork:
    """The network by itself."""
    return ColourNetwork()


@pytest.fixture
def layered_network() -> LayeredNetwork:
    """The network by itself."""
    return LayeredNetwork()


def _loaded(card: ModelCard, network: Network) -> LoadedModel:
    return LoadedModel(card, RUNTIME, Batcher(ReadNetwork(network, Interpreter(card))))


@pytest.fixture
def colour_model() -> Callable[..., LoadedModel]:
    """Makes a loaded model of the card's arguments and a network, `ColourNetwork` by default."""

    def make(network: Network | None = None, **card: str) -> LoadedModel:
        return _loaded(_colour_card(**card), network or ColourNetwork())

    return make


def _layered_model() -> LoadedModel:
    card = _colour_card(name="layered", layer_attention=LayeredNetwork.blocks)
    return _loaded(card, LayeredNetwork())


@pytest.fixture(scope="session")
def make_layered_model() -> Callable[[], LoadedModel]:
    """Makes what `layered_model` is."""
    return _layered_model


@pytest.fixture
def layered_model() -> LoadedModel:
    """A loaded `LayeredNetwork`, by the name of layered."""
    return _layered_model()


@pytest.fixture(scope="session")
def fake_cuda_module() -> ModuleType:
    """`tests/app/fake_cuda`, not installed."""
    spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).parent / "fake_cuda" / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_cuda(fake_cuda_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A GPU that is none, for this test; `FakeSession` holds what was opened on it."""
    monkeypatch.setattr(fake_cuda_module.FakeSession, "opened", [])
    fake_cuda_module.install(monkeypatch.setattr)
    return fake_cuda_module


Serve = Callable[[FastAPI], AbstractContextManager[httpx2.Client]]


@contextmanager
def _serve(app: FastAPI) -> Iterator[httpx2.Client]:
    """A uvicorn server in a thread, and a client that speaks real HTTP to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        # others of this process must outlive a GPU that a test loses
        stays = {"cuda_lost": "stay"}
        server = Server(app, getattr(app.state, "settings", Settings()).model_copy(update=stays))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while thread.is_alive() and not server.started:
            time.sleep(0.005)
        if not server.started:
            raise RuntimeError("the server did not start")
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx2.Client(base_url=address, timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Context manager that serves an application and gives a client for it."""
    return _serve


@pytest.fixture(scope="session")
def colours() -> Iterator[httpx2.Client]:
    """A client of a server of the hand-computed network, with 100,000 bytes and 1,000,000 pixels allowed."""
    settings = Settings(max_bytes=100_000, max_pixels=1_000_000)
    model = _loaded(_colour_card(), ColourNetwork())
    with _serve(create_app(settings, Repository([model]))) as client:
        yield client


@pytest.fixture(scope="session")
def layered() -> Iterator[httpx2.Client]:
    """A client of a server of `LayeredNetwork`, by the name of layered, and of `ColourNetwork`, which has no layers."""
    colours = _loaded(_colour_card(), ColourNetwork())
    with _serve(create_app(Settings(), Repository([_layered_model(), colours], "layered"))) as client:
        yield client


@pytest.fixture(scope="session")
def digits(only_bundled: Path) -> Iterator[httpx2.Client]:
    """A client of a server of the bundled models, as a user starts it."""
    with _serve(create_app(Settings(exports=only_bundled))) as client:
        yield client


@pytest.fixture(scope="session")
def only_bundled(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the bundled artefact alone, whatever else this checkout has exported."""
    exports = tmp_path_factory.mktemp("bundled")
    shutil.copytree(bundled, exports / "digits" / "1")
    return exports


@pytest.fixture(scope="module")
def both(serve: Serve, bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a server of two bundled models, digits and cifar10, and no others."""
    exports = tmp_path_factory.mktemp("both")
    for name in ("cifar10", "digits"):
        shutil.copytree(bundled.parents[1] / name / "1", exports / name / "1")
    with serve(create_app(Settings(exports=exports))) as client:
        yield client


@pytest.fixture
def artefact(tmp_path: Path, bundled: Path) -> Path:
    """A copy of the bundled artefact, free to be broken: `<tmp_path>/exports/digits/1`."""
    folder = tmp_path / "exports" / "digits" / "1"
    shutil.copytree(bundled, folder)
    return folder


@pytest.fixture
def rewrite_card() -> Callable[..., None]:
    """Changes fields of an artefact's card, in model.json and in the graph's metadata alike."""

    def rewrite(folder: Path, metadata: bool = True, **changes: object) -> None:
        card = ModelCard.from_json((folder / CARD_FILE).read_bytes(), folder)
        text = ModelCard.model_validate(card.model_dump() | changes).to_json()
        (folder / CARD_FILE).write_text(text)
        if metadata:  # protobuf: what is appended is read last, and the last entry of a key counts
            entry = _field(1, METADATA_KEY.encode()) + _field(2, text.encode())
            with (folder / MODEL_FILE).open("ab") as file:
                file.write(_field(14, entry))

    return rewrite


@pytest.fixture
def add_layer_attention(rewrite_card: Callable[..., None]) -> Callable[..., None]:
    """Adds the output `layer_attention` to an artefact, card and graph: constant + g * varying, both (L, S).

    g = sigmoid(the mean of an image's branch logits). Written as protobuf, so that nothing here needs onnx.
    """

    def add(folder: Path, rows: Sequence[LayerAttentionInfo], constant: np.ndarray, varying: np.ndarray) -> None:
        graph = b"".join(
            [
                _tensor("layers.axes", np.array([1, 2])),
                _tensor("layers.constant", np.asarray(constant, np.float32)),
                _tensor("layers.varying", np.asarray(varying, np.float32)),
                _node("ReduceMean", [BRANCH_LOGITS, "layers.axes"], "layers.mean"),
                _node("Sigmoid", ["layers.mean"], "layers.g"),
                _node("Mul", ["layers.g", "layers.varying"], "layers.moved"),
                _node("Add", ["layers.constant", "layers.moved"], LAYER_ATTENTION),
                _output(LAYER_ATTENTION, np.shape(constant)),
            ]
        )
        with (folder / MODEL_FILE).open("ab") as file:
            file.write(_field(7, graph))  # a second graph is merged into the first
        rewrite_card(folder, layer_attention=rows)

    return add


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    return _field(
        1, b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode()) + _field(4, kind.encode())
    )


def _tensor(name: str, values: np.ndarray) -> bytes:
    kind = {np.float32: 1, np.int64: 7}[values.dtype.type]
    sizes = b"".join(_number(1, size) for size in values.shape)
    return _field(5, sizes + _number(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes()))


def _output(name: str, shape: tuple[int, ...]) -> bytes:
    sizes = [_field(2, b"batch"), *(_number(1, size) for size in shape)]
    tensor = _number(1, 1) + _field(2, b"".join(_field(1, size) for size in sizes))
    return _field(12, _field(1, name.encode()) + _field(2, _field(1, tensor)))


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real pictures that scikit-image carries."""
    spec = importlib.util.find_spec("skimage")
    return Path(spec.origin).parent / "data"


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log records from info up."""
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture(scope="session")
def start(only_bundled: Path) -> Callable[..., subprocess.Popen]:
    """Starts `python -m app` with the given arguments and INTERFLOW_ settings, on a free port by default."""

    def run(*arguments: str, **settings: object) -> subprocess.Popen:
        chosen = {"port": 0, "exports": only_bundled} | settings
        environment = os.environ | {PREFIX + name.upper(): str(value) for name, value in chosen.items()}
        return subprocess.Popen(
            [sys.executable, "-m", "app", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def raw_answer() -> Callable[..., bytes]:
    """Sends bytes as they are to a client's server, and returns all that comes back."""

    def exchange(client: httpx2.Client, request: bytes, half_close: bool = False, read: bool = True) -> bytes:
        answer = b""
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
            with contextlib.suppress(ConnectionError):  # the server may have answered and closed before the end
                connection.sendall(request)
            with contextlib.suppress(OSError):  # so says the system of a connection that was reset
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while read and (received := connection.recv(65536)):
                    answer += received
        return answer

    return exchange


class MeasuredServer:
    """`python -m app` of the bundled model and two decoders, whose memory and log are looked at."""

    max_pixels = 4_000_000
    max_bytes = 16_000_000
    patience_s = 2

    def __init__(self, process: subprocess.Popen) -> None:
        self._status = Path(f"/proc/{process.pid}/status")
        self._reset = Path(f"/proc/{process.pid}/clear_refs")
        address = process.stdout.readline().split(" on ")[1].split(";")[0]
        self.client = httpx2.Client(base_url=address, timeout=60, trust_env=False)
        self.log: list[str] = []
        # read all along, for a full pipe would hold up the server
        self._reading = threading.Thread(target=lambda: self.log.extend(process.stderr), daemon=True)
        self._reading.start()

    def growth(self, abuse: Callable[[], object]) -> int:
        """Bytes by which the process was larger at its peak while this was done to it than before."""
        self._reset.write_text("5")  # the peak is counted anew
        before = self._bytes("VmRSS")
        abuse()
        self.require_honest_answer()
        return self._bytes("VmHWM") - before

    def require_honest_answer(self) -> None:
        """It still says what a picture shows, and has nothing to complain of but its clients."""
        answer = self.client.post("/predict", content=(ROOT / "app/static/examples/digits-7.png").read_bytes())
        assert answer.json()["prediction"]["label"] == "7"
        assert [line for line in self.log if "ERROR" in line or "Traceback" in line] == []

    def _bytes(self, name: str) -> int:
        (line,) = (line for line in self._status.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024


@pytest.fixture(scope="session")
def measure(start: Callable[..., subprocess.Popen]) -> Callable[..., AbstractContextManager[MeasuredServer]]:
    """Starts a real server process of the given settings, whose memory is measured."""

    @contextmanager
    def run(**settings: object) -> Iterator[MeasuredServer]:
        process = start(provider="cpu", threads=1, lanes=1, decode_workers=2, **settings)
        with process.stdout, process.stderr:
            server = MeasuredServer(process)
            try:
                with server.client:
                    server.require_honest_answer()
                    yield server
            finally:
                process.terminate()
                ended = process.wait(timeout=60)
        assert ended == 0

    return run


@pytest.fixture(scope="session")
def measured(measure: Callable[..., AbstractContextManager[MeasuredServer]]) -> Iterator[MeasuredServer]:
    """The one that most tests share, with small limits and little patience."""
    limits = dict.fromkeys(("max_bytes", "max_batch_bytes", "max_tensor_bytes"), MeasuredServer.max_bytes)
    patience = dict.fromkeys(("body_timeout_s", "keep_alive_s"), MeasuredServer.patience_s)
    with measure(max_pixels=MeasuredServer.max_pixels, **limits, **patience) as server:
        yield server
