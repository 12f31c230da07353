# A GPU image. Run it with --gpus all and enough shared memory for the frame slots, for example --shm-size 2g. A server
# that other hosts reach needs a key:
#   docker run --gpus all --shm-size 2g -p 30000:30000 -e SAFELIGHT_API_KEY -v "$PWD/state:/work/state" safelight \
#       serve --host 0.0.0.0 --state-dir /work/state
#   docker build -t safelight . && docker run --gpus all --shm-size 2g -v "$PWD/outputs:/work/outputs" safelight \
#       generate --prompt "a red apple on a blue background"
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml constraints.txt README.md LICENSE /opt/safelight/
COPY src /opt/safelight/src
COPY configs /opt/safelight/configs
COPY entrypoints /opt/safelight/entrypoints
COPY kernels /opt/safelight/kernels
COPY runtime /opt/safelight/runtime
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c /opt/safelight/constraints.txt /opt/safelight

RUN useradd --create-home --uid 10001 safelight && install -d -o safelight /work
USER safelight
WORKDIR /work
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
EXPOSE 30000
# Of `serve` on its default port; other commands run it in vain. /health needs no key.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["/opt/venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:30000/health')"]
ENTRYPOINT ["/opt/venv/bin/safelight"]
CMD ["--help"]
