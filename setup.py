"""Build step that pyproject.toml cannot express: conf/ is kd/conf in a wheel. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["kd*", "sweeps*"]), "kd.conf"], package_dir={"kd.conf": "conf"})
