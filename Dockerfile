# A GPU image. Run it with --gpus all and enough shared memory for the frame slots, for example --shm-size 2g:
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
ENTRYPOINT ["/opt/venv/bin/safelight"]
CMD ["--help"]
