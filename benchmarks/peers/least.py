"""The least that a server on uvicorn can be: our decoder, our batches and the network, and of it all one label.

No FastAPI, no limits, no deadlines, no metrics, nothing of what a stage said. What it reaches is about what any server
in Python that decodes and infers as ours can, and the difference to ours is what all the rest costs.

MODEL=exports/cifar10/1 PORT=8000 python -m benchmarks.peers.least
"""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import uvicorn
from starlette.types import Receive, Scope, Send

from app.batcher import Batcher
from app.cpus import usable_cpus
from app.decoders import Decoders
from app.server import SWITCH_S
from app.session import Session
from app.settings import Settings
from model.contract import LOGITS

settings = Settings()
session = Session(Path(os.environ["MODEL"]), settings)
batcher = Batcher(
    session,
    lanes=session.runtime.lanes,
    helpers=session.runtime.helpers,
    max_batch=session.runtime.max_batch,
    small_batch=session.runtime.small_batch,
    niceness=session.runtime.niceness,
)
decoders = Decoders(usable_cpus(), settings.max_queue, settings.max_pixels)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI: a POST is a form with one image, anything else asks whether it is alive."""
    if scope["method"] != "POST":
        await _answer(send, b"{}")
        return
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message["body"])
        more = message["more_body"]
    form = b"".join(pieces)
    image = form[form.index(b"\r\n\r\n") + 4 : form.rindex(b"\r\n--")]
    pixels = await decoders.decode(image, session.card.input, None)
    inferred = await batcher.infer(pixels[np.newaxis], [LOGITS], more_to_come=decoders.behind)
    label = session.card.classes[inferred.outputs[LOGITS][0].argmax()]
    await _answer(send, b'{"label":"%b"}' % label.encode())


async def _answer(send: Send, text: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(text)), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # this and the next two as our server
    gc.set_threshold(50_000, 20, 20)
    sys.setswitchinterval(SWITCH_S)
    port = int(os.environ["PORT"])
    uvicorn.run(app, port=port, lifespan="off", loop="uvloop", http="httptools", access_log=False, log_level="warning")
