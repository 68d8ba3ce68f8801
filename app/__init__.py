"""The server: reads exports/, answers over HTTP. Never imports torch."""
