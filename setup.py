"""Packaging. The folder configs/ is installed as ssl_pipeline/configs, so that packaged names work anywhere."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "ssl_pipeline" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

setup(
    name="ssl-pipeline",
    version=VERSION,
    description="Distributed ImageNet self-supervised pretraining, with SparseHead",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["ssl_pipeline", "ssl_pipeline.*"]), "ssl_pipeline.configs"],
    package_dir={"ssl_pipeline.configs": "configs"},
    package_data={"ssl_pipeline.configs": ["**/*.yaml"], "ssl_pipeline.evaluation": ["*.yaml"]},
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "timm>=1.0",
        "submitit",
        "tensorboard",
        "pyyaml",
        "pydantic>=2.7",
        "numpy",
        "scipy",
        "pillow",
    ],
    extras_require={
        # DALI by the driver; the cuda13 build runs without a GPU too.
        "cuda13": ["nvidia-dali-cuda130>=2.0"],
        "cuda12": ["nvidia-dali-cuda120"],
        "demo": ["scikit-learn", "matplotlib"],
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "types-PyYAML", "pre-commit", "setuptools"],
    },
    entry_points={"console_scripts": ["ssl-pipeline=ssl_pipeline.cli:entry"]},
)
