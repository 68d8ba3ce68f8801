"""The same job in LitServe, set as its documentation says for production: batches, workers, the fast queue.

MODEL=exports/cifar10/1 THREADS=1 WORKERS=2 PORT=8000 python benchmarks/peers/litserve_app.py
"""

import json
import os
from pathlib import Path

import litserve as ls  # type: ignore[import-not-found] # in an environment of its own
import numpy as np
import onnxruntime
from fastapi import UploadFile
from PIL import Image

MAX_BATCH = 32
BATCH_TIMEOUT_S = 0.002


class Classifier(ls.LitAPI):
    """JPEG in, label and probabilities out."""

    def setup(self, device: str) -> None:
        """In each worker."""
        folder = Path(os.environ["MODEL"])
        card = json.loads((folder / "model.json").read_text())
        self.classes, self.size = card["classes"], (card["input"]["width"], card["input"]["height"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])

    def decode_request(self, request: UploadFile) -> np.ndarray:
        """A form with one file, by the name that LitServe gives it."""
        picture = Image.open(request.file).convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        return np.asarray(picture)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Images of several requests."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Probabilities of a batch."""
        (logits,) = self.session.run(["logits"], {"image": x})
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """To each request its own."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, object]:
        """JSON."""
        return {
            "label": self.classes[int(output.argmax())],
            "probabilities": dict(zip(self.classes, output.tolist(), strict=True)),
        }


if __name__ == "__main__":
    server = ls.LitServer(
        Classifier(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S),
        accelerator="cpu",
        workers_per_device=int(os.environ["WORKERS"]),
        fast_queue=True,
        timeout=60,
    )
    quiet = {"generate_client_file": False, "log_level": "warning", "access_log": False}
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), **quiet)
