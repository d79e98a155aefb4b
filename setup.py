"""Packages are found; two that lie at the repository's top are inside the package once built."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tdm_lightning", "tdm_lightning.*"]),
        *(
            f"tdm_lightning.{name}"
            for name in find_packages(include=["callbacks", "callbacks.*", "configs", "configs.*"])
        ),
    ],
    package_dir={
        "tdm_lightning.callbacks": "callbacks",
        "tdm_lightning.configs": "configs",
    },
)
