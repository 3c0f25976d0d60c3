"""Package metadata; the requirements are those of requirements.txt, so that the two cannot drift apart."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINES = (line.split("#")[0].strip() for line in (HERE / "requirements.txt").read_text().splitlines())

setup(
    name="vlmo",
    version="1.0.0",
    description="Vision-language pre-training with a mixture of modality experts (VLMo), on today's stack",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["vlmo", "vlmo.*"]),
    entry_points={"console_scripts": ["vlmo = vlmo.__main__:main"]},
    install_requires=[line for line in LINES if line],
    extras_require={
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.10",
            "aiohttp>=3.9",
            "s3fs>=2025.5",
            "gcsfs>=2025.5",
            "moto[server]>=5",
            "eccv-caption>=0.1",
            "peft>=0.14",
            "fastapi>=0.115",
            "httpx>=0.27",
        ],
        "app": ["gradio>=6.10"],
        "evaluate": ["eccv-caption>=0.1"],
        "export": [
            "onnx>=1.18",
            "onnxscript>=0.5",
            "onnxruntime>=1.20",
            "openvino>=2025.0",
            "nncf>=2.15",
        ],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "nbclient>=0.10", "ipykernel>=6.29"],
        "wandb": ["wandb>=0.16"],
        "mlflow": ["mlflow>=2.9"],
        "comet": ["comet_ml>=3.44"],
        "trackio": ["trackio>=0.2"],
        "fast": ["simplejpeg>=1.7"],
        "ray": ["ray>=2.40"],
        "remote": ["fsspec>=2025.5", "aiohttp>=3.9", "s3fs>=2025.5", "gcsfs>=2025.5"],
        "lora": ["peft>=0.14"],
        "sharded": ["deepspeed>=0.16", "fairscale>=0.4.13"],
    },
)
