"""The small runs of this folder, as a fixture, because an installed package is also named `tests`."""

import importlib.util
from pathlib import Path

import pytest

specification = importlib.util.spec_from_file_location("small_autoencoders", Path(__file__).with_name("small_runs.py"))
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)


@pytest.fixture(scope="session")
def runs():
    """The module small_runs."""
    return module
