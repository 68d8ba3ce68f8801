"""The inference server: reads exports/, answers over HTTP; never imports torch."""

import os

# onnxruntime's wheels report to their maker unless told not to, before they are imported. Nothing here calls home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
