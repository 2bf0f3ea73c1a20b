# bop-checkpoint: a small image that runs as a plain user on a read-only root.
ARG BASE=python:3.13-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY requirements/run.txt requirements/
RUN python3 -m venv /opt/bop \
    && /opt/bop/bin/python -m pip install --require-hashes --only-binary :all: --requirement requirements/run.txt
COPY pyproject.toml README.md ./
COPY app app
COPY migrations migrations
RUN site="$(/opt/bop/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && cp -r app migrations "$site/" \
    && printf '#!/opt/bop/bin/python\nfrom app.cli.main import main\nmain()\n' > /opt/bop/bin/bop-checkpoint \
    && chmod 0755 /opt/bop/bin/bop-checkpoint \
    && /opt/bop/bin/python -m compileall -q "$site" \
    && rm -rf /opt/bop/bin/pip* "$site"/pip "$site"/pip-* "$site"/setuptools "$site"/setuptools-* \
    && /opt/bop/bin/bop-checkpoint --help > /dev/null

# hadolint ignore=DL3006
FROM ${BASE}
LABEL org.opencontainers.image.title="bop-checkpoint" \
      org.opencontainers.image.description="Durable, incremental, provably restorable checkpoints on S3" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/bop /opt/bop
COPY LICENSE /opt/bop/
RUN groupadd --gid 10001 bop \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin bop \
    && install -d -o 10001 -g 10001 -m 0750 /data
ENV PATH=/opt/bop/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BOP_DATA_DIR=/data
# Another address than loopback needs BOP_AUTH_TOKENS_FILE; the service refuses to start without it.
VOLUME ["/data"]
WORKDIR /data
EXPOSE 8600
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('BOP_PORT', '8600') + '/healthz', timeout=4)"]
ENTRYPOINT ["bop-checkpoint"]
CMD ["serve"]
