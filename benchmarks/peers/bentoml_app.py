"""The same job in BentoML, with adaptive batching.

MODEL=exports/cifar10/1 THREADS=2 bentoml serve bentoml_app:Classifier --working-dir benchmarks/peers
"""

import json
import os
from pathlib import Path

import bentoml  # type: ignore[import-not-found] # in an environment of its own
import numpy as np
import onnxruntime
from PIL import Image


@bentoml.service(logging={"access": {"enabled": False}})
class Classifier:
    """JPEG in, label and probabilities out."""

    def __init__(self) -> None:
        folder = Path(os.environ["MODEL"])
        card = json.loads((folder / "model.json").read_text())
        self.classes, self.size = card["classes"], (card["input"]["width"], card["input"]["height"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])

    # the latency is what large images at 128 connections may take: beyond it BentoML answers 503
    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=10_000)
    def predict(self, images: list[Image.Image]) -> list[dict]:
        """The classes of the images of several requests, which each send one."""
        pictures = [np.asarray(image.convert("RGB").resize(self.size, Image.Resampling.BILINEAR)) for image in images]
        (logits,) = self.session.run(["logits"], {"image": np.stack(pictures)})
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return [
            {
                "label": self.classes[int(row.argmax())],
                "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]
