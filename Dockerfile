# The server, without torch.
#
#     docker build -t interflow .                          CPU
#     docker build -t interflow --build-arg EXTRA=gpu .    CUDA and cuDNN inside; run with --gpus all
#     docker run -p 8000:8000 -v ./exports:/srv/exports:ro interflow

FROM python:3.11-slim AS build
ARG EXTRA=""
RUN pip install --no-cache-dir uv
WORKDIR /srv
# Dependencies only, so that this layer is built anew only when they change.
COPY pyproject.toml ./
RUN uv sync --no-cache --no-dev --no-install-project ${EXTRA:+--extra ${EXTRA}}

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home interflow
WORKDIR /srv
COPY --from=build /srv/.venv ./.venv
COPY exports ./exports
COPY model/__init__.py model/contract.py model/explain.py model/images.py ./model/
COPY app ./app
ENV PATH=/srv/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    INTERFLOW_HOST=0.0.0.0 \
    INTERFLOW_PORT=8000
USER interflow
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"INTERFLOW_PORT\"]}/readyz', timeout=2)"]
CMD ["python", "-m", "app"]
