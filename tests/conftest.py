"""For all tests: what the annotations of `common` say of types and shapes is checked at every call."""

import jaxtyping
import pytest
from jaxtyping import install_import_hook

# An int is taken where a float is asked for, as the language itself has it (PEP 484).
install_import_hook("common", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from common.pipeline.isolation import isolate, tether  # noqa: E402

tether()
isolate()


@pytest.fixture
def unchecked():
    """What annotations refuse where they are checked, as in tests, functions refuse by hand elsewhere."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
