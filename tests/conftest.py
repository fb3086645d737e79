"""For all tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """What annotations refuse where they are checked, as in tests, functions refuse by hand elsewhere."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
