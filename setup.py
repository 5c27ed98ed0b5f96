"""Packaging: the wheel holds one top-level package; `pipelines/` travels inside it as `localdit.pipelines`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["localdit", "localdit.*"]), "localdit.pipelines"],
    package_dir={"localdit.pipelines": "pipelines"},
    package_data={
        "localdit": ["pretrained/**/*"],
        "localdit.data": ["*.txt"],
    },
)
