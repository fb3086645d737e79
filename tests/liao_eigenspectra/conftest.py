"""A model for several tests."""

import math

import numpy as np
import pytest

from common.liao_eigenspectra.glm import GLM, LOGISTIC, logistic_loss


@pytest.fixture
def general_model() -> GLM:
    """Everything at once: C not diagonal, μ, w and w* in general position."""
    p, rng = 60, np.random.default_rng(3)
    A = rng.standard_normal((p, p)) / math.sqrt(p)
    mean, w, w_star = rng.standard_normal((3, p)) / math.sqrt(p)
    C = A @ A.T + np.eye(p) / 2
    return GLM(p=p, mean=2.5 * mean, w=3 * w, w_star=w_star, covariance=C, response=LOGISTIC, loss=logistic_loss)
