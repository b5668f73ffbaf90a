"""Recipes of other package lists say what pyproject.toml says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import spaformer_sc as sf

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ON_CONDA = {"dask": "dask-core", "torch": "pytorch", "torch-geometric": "pytorch_geometric"}
"""Names of packages that conda-forge has under another."""


def recipe(name):
    path = ROOT / "packaging" / name / "meta.yaml"
    if not path.exists():
        pytest.skip("a source distribution has no recipes")
    return path.read_text()


def test_the_conda_recipe_needs_what_the_package_needs():
    text = recipe("conda")
    version = re.search(r'set version = "(.*)"', text).group(1)
    lines = [line for line in text.splitlines() if not line.startswith("{%")]
    read = yaml.safe_load("\n".join(lines).replace("{{ version }}", version).replace("{{ PYTHON }}", "python"))
    assert version == PROJECT["version"] == sf.__version__
    assert read["package"]["name"] == PROJECT["name"]
    needed = [re.fullmatch(r"([\w-]+)(>=.*)", each).groups() for each in PROJECT["dependencies"]]
    wanted = {f"{ON_CONDA.get(name, name)} {bound}" for name, bound in needed}
    assert set(read["requirements"]["run"]) == wanted | {f"python {PROJECT['requires-python']}"}
    (script,) = PROJECT["scripts"].items()
    assert read["build"]["entry_points"] == [" = ".join(script)]
    assert read["about"]["license"] == PROJECT["license"]
    assert (ROOT / read["about"]["license_file"]).exists()


def test_the_entry_for_the_scverse_list_fits_the_package():
    read = yaml.safe_load(recipe("scverse"))
    assert (read["name"], read["version"], read["license"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )
    assert {"name", "description", "install", "license", "tags", "version", "test_command"} == set(read)
    extras = re.search(r"\[(.*)\]", read["test_command"]).group(1).split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert set(read["tags"]) & set(PROJECT["keywords"])
