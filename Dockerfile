# One image for every role of docker-compose.yml: Ray head and workers, extraction, training, TensorBoard.
# The torch wheel brings its CUDA libraries; the host needs the NVIDIA driver and container toolkit only.
# Another base, for example a CUDA one: docker build --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

RUN command -v python3 >/dev/null || ( \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/* )

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/compodistill
COPY . .
# Every role: the head's dashboard and jobs, workers, training on Ray, trackers.
RUN pip install --no-cache-dir --constraint constraints.txt '.[all]'

# Volumes mounted on these take over the owner of the folder in the image.
RUN useradd --create-home --uid 1000 --non-unique cdp \
    && mkdir -p /data /models /runs /cache \
    && chown cdp: /data /models /runs /cache
USER cdp
WORKDIR /runs
ENV HF_HOME=/cache/huggingface \
    CDP_CACHE_DIR=/cache/compodistill

CMD ["cdp", "--help"]
