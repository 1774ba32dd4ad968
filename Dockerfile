# The order service alone: the database is elsewhere (DATABASE_URL), and so are the test and load tools.
FROM python:3.13-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/venv
COPY requirements.txt .
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.txt

FROM python:3.13-slim-bookworm
# By number, so that Kubernetes can tell that it is not root.
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin app
COPY --from=build /opt/venv /opt/venv
WORKDIR /srv
COPY app app
RUN /opt/venv/bin/python -m compileall -q app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    LOG_FORMAT=json
# It listens beyond loopback, so it does not start without API_KEYS (or ALLOW_ANONYMOUS=true, to let anybody order):
# whoever deploys it decides, not the image.
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-m", "app.healthcheck"]
CMD ["python", "-m", "app"]
