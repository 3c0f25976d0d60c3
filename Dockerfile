# docker build -t vlmo .
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" vlmo train with data_root=arrow task_mlm_itm_itc_base ...
#
# The working directory of the container is /work: data, checkpoints and results of the mounted folder outlive it.
FROM python:3.12-slim
# compile=True builds code while it runs
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /vlmo
COPY requirements.txt setup.py pyproject.toml README.md LICENSE ./
COPY vlmo vlmo
RUN pip install --no-cache-dir .
WORKDIR /work
ENTRYPOINT ["vlmo"]
