# docker build -t vlmo . && docker run --rm --gpus all --shm-size 8g -v $PWD/data:/data vlmo train with data_root=/data ...
FROM python:3.12-slim
WORKDIR /vlmo
COPY requirements.txt setup.py pyproject.toml README.md LICENSE ./
COPY vlmo vlmo
RUN pip install --no-cache-dir .
WORKDIR /work
ENTRYPOINT ["vlmo"]
