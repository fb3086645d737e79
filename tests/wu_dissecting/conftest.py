"""Networks that several tests of this folder begin with."""

import pytest

from common.wu_dissecting.networks import classifier


@pytest.fixture
def at_initialization():
    """A function of name, inputs, classes and generator: Gaussian weights of variance 2 over the inputs, no biases."""

    def network(name, inputs, classes, generator):
        found = classifier(name, (inputs, 1, 1), classes).eval()
        for parameter_name, parameter in found.named_parameters():
            weights = parameter_name.endswith("weight")
            scale = (2 / parameter.shape[-1]) ** 0.5 if weights else 0.0
            drawn = parameter.new_empty(parameter.shape).normal_(generator=generator)
            parameter.detach().copy_(drawn * scale)
        return found

    return network
