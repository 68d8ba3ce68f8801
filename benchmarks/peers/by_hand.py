"""A handler as one writes it by hand: FastAPI and onnxruntime, decoding and inference in Starlette's thread pool.

MODEL=exports/cifar10/1 THREADS=2 uvicorn --app-dir benchmarks/peers by_hand:app --no-access-log
"""

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from fastapi import FastAPI, UploadFile
from PIL import Image

folder = Path(os.environ["MODEL"])
card = json.loads((folder / "model.json").read_text())
classes, size = card["classes"], (card["input"]["width"], card["input"]["height"])

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ["THREADS"])
options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would burn the CPUs that decode
session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])

app = FastAPI()


@app.get("/health")
def is_alive() -> dict[str, str]:
    """200 while it answers."""
    return {"status": "ok"}


@app.post("/predict")
def predict(image: UploadFile) -> dict[str, object]:  # `def`: FastAPI calls it in a thread
    """The class of one image, and the probabilities of all."""
    picture = Image.open(image.file).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    (logits,) = session.run(["logits"], {"image": np.asarray(picture)[np.newaxis]})
    exponentials = np.exp(logits[0] - logits[0].max())
    probabilities = exponentials / exponentials.sum()
    return {
        "label": classes[int(probabilities.argmax())],
        "probabilities": dict(zip(classes, probabilities.tolist(), strict=True)),
    }
