"""Installs FleetLM: `pip install -e .`, with extras cuda, tpu, test, parity and notebooks."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "nbformat",
    "nbclient",
    "ipykernel",
    "lark>=1.3",
    "jsonschema>=4",
]

setup(
    name="fleetlm",
    version="0.1.0",
    description="Efficient language models in JAX: faster decoding, smaller fine-tuning, one file per paper.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(
        include=[
            f"{room}{rest}"
            for room in ("models", "decoding", "finetune", "pallas_kernels", "experiments")
            for rest in ("", ".*")
        ],
        exclude=["experiments.notebooks"],
    ),
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "chex>=0.1.90",
        "einops>=0.8",
        "datasets>=4",
        "tensorboardX>=2.6",
        "numpy>=2",
        "gguf>=0.17",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "huggingface_hub>=0.34",
        "matplotlib>=3.9",
        "filelock>=3.16",
        "jinja2>=3.1.6",
        "pydantic>=2.10",
        "tyro>=1.0",
        "bm25s>=0.2",
        "llguidance>=1.9.1",
        "outlines-core>=0.2.14",
        "datasketch>=2",
        "scipy>=1.13",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "test": TEST,
        "parity": [*TEST, "torch==2.13.0", "transformers>=5", "peft==0.21.0", "accelerate>=1", "sentencepiece>=0.2"],
        "notebooks": ["jupyterlab>=4"],
    },
)
