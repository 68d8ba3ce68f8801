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
COPY exports ./exports
COPY model/__init__.py model/contract.py model/cpu.py model/cut.py model/explain.py model/images.py model/panels.py ./model/
COPY app ./app
# COPY keeps modes: a checkout under umask 077 would be unreadable for the server's user.
RUN chmod -R a+rX exports model app

FROM python:3.11-slim
WORKDIR /srv
COPY --from=build /srv/.venv ./.venv
COPY --from=build /srv/exports ./exports
COPY --from=build /srv/model ./model
COPY --from=build /srv/app ./app
ENV PATH=/srv/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    INTERFLOW_HOST=0.0.0.0 \
    INTERFLOW_PORT=8000
# By number: Kubernetes' runAsNonRoot refuses names.
USER 10001:10001
EXPOSE 8000
# http.client, because urllib would ask a proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', os.environ['INTERFLOW_PORT'], timeout=2); c.request('GET', '/readyz'); exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "app"]
