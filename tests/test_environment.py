"""The lock file, pyproject.toml and environment.yml describe one environment, and this is it."""

import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from common.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def locked_lines():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def locked():
    """Version by canonical name."""
    pins = [line.split("==") for line in locked_lines() if not line.startswith("--")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def test_every_line_of_the_lock_is_an_option_or_an_exact_version():
    options = [line for line in locked_lines() if line.startswith("--")]
    assert options == ["--only-binary :all:", "--no-binary connection_pool"]
    pins = [line for line in locked_lines() if line not in options]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(pins) == len(locked()), "a package is locked twice"


@pytest.mark.parametrize("requirement", RANGES, ids=str)
def test_lock_is_within_the_ranges(requirement):
    version = locked().get(canonicalize_name(requirement.name))
    assert version is not None, f"requirements.lock lacks {requirement.name}"
    assert version in requirement.specifier


def test_conda_environment_is_the_lock():
    (pip,) = (entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    others = [entry for entry in CONDA["dependencies"] if isinstance(entry, str)]
    (python,) = (entry.removeprefix("python=") for entry in others if entry.startswith("python="))
    assert [entry for entry in others if not entry.startswith("python=")] == ["pip"]
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


def need_our_environment():
    ours = Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
    if not (ours or os.environ.get("CONDA_DEFAULT_ENV") == CONDA["name"]):
        pytest.skip(f"running in {sys.prefix}: neither the project's .venv nor the conda environment {CONDA['name']}")


def test_installed_versions_are_the_locked_ones():
    need_our_environment()
    installed = {canonicalize_name(d.name): Version(d.version).public for d in metadata.distributions()}
    different = {
        name: f"locked {version}, installed {installed.get(name)}"
        for name, version in locked().items()
        if installed.get(name) != version.public
    }
    assert different == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the lock is made on Linux; elsewhere a few packages need others")
def test_lock_is_complete():
    need_our_environment()
    names = locked().keys()
    missing = set()
    for name in names - {"torch"}:  # torch pins its CUDA packages itself, and without CUDA has none
        for requirement in map(Requirement, metadata.requires(name) or []):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(requirement.name) not in names:
                missing.add(f"{requirement.name}, needed by {name}")
    assert missing == set()
