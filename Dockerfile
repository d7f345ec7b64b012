# docker build -t ds_higgs .
# The wheel of TORCH has to fit the CUDA of the base image, and the machine's driver both (525 or newer for CUDA 12).
ARG CUDA=12.6.3
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ ffmpeg libsndfile1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ds_higgs
COPY pyproject.toml README.md LICENSE ./
COPY launch launch
COPY ds_higgs ds_higgs
RUN TORCH="$TORCH" bash launch/install.sh /opt/venv liger,nf4

# What a job writes lies in folders that are mounted: /work for runs and data, HF_HOME for what comes from the hub.
ENV HF_HOME=/work/.cache/huggingface XDG_CACHE_HOME=/work/.cache
WORKDIR /work
CMD ["ds-higgs", "--help"]
