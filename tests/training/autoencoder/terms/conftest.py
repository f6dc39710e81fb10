import pytest

from tests.training.autoencoder.terms import small_runs


@pytest.fixture(scope="session")
def runs():
    """The module small_runs."""
    return small_runs
