# Two images: the order service (the default), and the load generator (--target loadtest). The database is elsewhere.
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
RUN python -m venv /opt/venv
COPY requirements.txt .
# pip has done its work then: what runs can install nothing.
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.txt \
    && rm -rf /opt/venv/bin/pip* /opt/venv/lib/python3*/site-packages/pip* \
        /opt/venv/lib/python3*/site-packages/setuptools* /opt/venv/lib/python3*/site-packages/pkg_resources

FROM ${PYTHON_IMAGE} AS build-loadtest
WORKDIR /build
RUN python -m venv /opt/venv
COPY requirements-loadtest.txt .
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements-loadtest.txt \
    && rm -rf /opt/venv/bin/pip* /opt/venv/lib/python3*/site-packages/pip* \
        /opt/venv/lib/python3*/site-packages/setuptools* /opt/venv/lib/python3*/site-packages/pkg_resources

FROM ${PYTHON_IMAGE} AS base
# By number, so that Kubernetes can tell that it is not root.
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin app
WORKDIR /srv
# Nothing is written at run time: the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${REVISION} \
      org.opencontainers.image.licenses=Apache-2.0

FROM base AS loadtest
LABEL org.opencontainers.image.title="order-service-loadtest" \
      org.opencontainers.image.description="Load tests of the order service that end in a verdict."
COPY --from=build-loadtest /opt/venv /opt/venv
COPY loadtests loadtests
RUN python -m compileall -q loadtests
USER 10001:10001
ENTRYPOINT ["python", "-m", "loadtests"]
CMD ["--help"]

FROM base AS service
LABEL org.opencontainers.image.title="order-service" \
      org.opencontainers.image.description="An instrumented reference e-commerce order service."
COPY --from=build /opt/venv /opt/venv
COPY app app
RUN python -m compileall -q app
# It listens beyond loopback, so it does not start without API_KEYS (or ALLOW_ANONYMOUS=true, to let anybody order):
# whoever deploys it decides, not the image.
ENV HOST=0.0.0.0 \
    PORT=8000 \
    LOG_FORMAT=json
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-m", "app.healthcheck"]
CMD ["python", "-m", "app"]
