"""The Hessian of the hinge loss of any network with one output, in three ways, or a refusal in one line."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.li_adaptive.data import zero_against_rest
from common.li_adaptive.hessian_samples import hessian_samples
from common.li_adaptive.hinge_hessian import BipartitePart, TridiagonalGOE, formed_hessian, hinge_hessian
from common.li_adaptive.networks import BatchStandardize, perceptron
from common.li_adaptive.normalization import gradient_size, single_gradients, take_steps

#: A module without weights may stand at several places.
SHARED = nn.ReLU()


def vectors(draw, n):
    m = draw.randint(1, 4)
    parts = [nn.Linear(n, m, bias=draw.random() < 0.6)]
    if draw.random() < 0.3:
        parts.append(
            draw.choice(
                [nn.LayerNorm(m), nn.BatchNorm1d(m), BatchStandardize(), nn.GELU(), nn.BatchNorm1d(m, affine=False)]
            )
        )
    return [*parts, draw.choice([nn.ReLU(), SHARED, SHARED, nn.ReLU(inplace=True), nn.Dropout()])], m


def images(draw, n):
    m = draw.randint(1, 3)
    settings = draw.choice(
        [{}, {}, {"padding": 1}, {"padding": "valid"}, {"stride": 2}, {"dilation": 2}, {"padding": (1, 0)},
         {"padding": 1, "padding_mode": "circular"}]
    )  # fmt: skip
    parts = [nn.Conv2d(n, m, draw.choice([1, 2, (2, 1)]), **settings), nn.ReLU()]
    if draw.random() < 0.5:
        pooling = draw.choice([{}, {"stride": 1}, {"padding": 1}, {"ceil_mode": True}, {"stride": 1, "dilation": 2}])
        parts.append(nn.MaxPool2d(2, **pooling))
    return parts, m


def network(draw):
    """A network, its samples and labels; some parameters are frozen, some modules in training mode."""
    n, N = draw.randint(1, 3), draw.randint(1, 6)
    shape, parts = (n,), []
    if draw.random() < 0.4:
        shape = (n, 6, 6)
        for _ in range(draw.randint(1, 2)):
            some, n = images(draw, n)
            parts += some
        parts.append(nn.Flatten())
    elif draw.random() < 0.2:
        shape, parts, n = (n, 2), [nn.Flatten()], 2 * n
    elif draw.random() < 0.1:
        parts.append(nn.ReLU())
    generator = torch.Generator().manual_seed(draw.randint(0, 2**30))
    X = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
    made = nn.Sequential(*parts).double().eval()
    with torch.no_grad():
        n = made(X.clone()).shape[1]
    for _ in range(draw.randint(0, 2)):
        some, n = vectors(draw, n)
        made.extend(some)
    made.extend([nn.Linear(n, 1, bias=draw.random() < 0.2), nn.Flatten(0)]).double()
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else draw.choice([0.3, 1.0]) * noise)
    for p in made.parameters():
        p.requires_grad_(draw.random() < 0.8)
    return made.train(draw.random() < 0.5), X, torch.sign(torch.randn(N, generator=generator, dtype=torch.float64))


def by_autograd(made, X, y):
    """Reverse over reverse, as forward over reverse is wrong where a layer normalization has an affine map."""
    made = made.eval()
    named = {name: p.detach() for name, p in made.named_parameters()}

    def risk(theta):
        parts = theta.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return torch.relu(1 - y * torch.func.functional_call(made, weights, (X.clone(),))).mean()

    return torch.autograd.functional.hessian(risk, torch.cat([p.flatten() for p in named.values()]))


def state(made):
    return (
        [m.training for m in made.modules()], [p.requires_grad for p in made.parameters()],
        [len(m._forward_hooks) for m in made.modules()], torch.get_rng_state().tolist(),
        {name: value.tolist() for name, value in made.state_dict().items()},
    )  # fmt: skip


def check(draw):
    torch.manual_seed(0)
    try:
        made, X, y = network(draw)
    except (RuntimeError, ValueError):
        return "no network: sizes do not fit"
    before = state(made)
    whole = formed_hessian(made, X, y)
    operator = hinge_hessian(made, X, y, batch_size=draw.randint(1, 3))
    product = operator @ torch.eye(len(whole), dtype=torch.float64)
    places = [torch.tensor([draw.randrange(len(whole)) for _ in range(5)]) for _ in range(2)]
    answer = "equal"
    try:
        (samples,) = hessian_samples(made, X, y, *places, batch_size=len(X))
    except (TypeError, ValueError) as error:
        samples, answer = None, str(error)
        assert "\n" not in answer and "layer '" in answer, answer
    assert state(made) == before
    expected = by_autograd(made, X, y)
    tolerance = {"rtol": 0, "atol": 1e-10 * max(1.0, float(expected.abs().max()))}
    torch.testing.assert_close(whole, expected, **tolerance)
    torch.testing.assert_close(product, expected, **tolerance)
    if samples is not None:
        torch.testing.assert_close(samples, expected[places[0]][:, places[1]], **tolerance)
    return answer


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_three_ways_to_the_hessian_are_that_of_autograd(seed):
    check(random.Random(seed))


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit is refused in one line, and not broadcast


def problem():
    made = perceptron([4, 5]).double()
    for k, p in enumerate(made.parameters()):
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    X = torch.randn(4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return made, X, torch.tensor([1.0, -1.0, 1.0, -1.0]).double()


def every_way(made, X, y):
    places = torch.arange(3)
    return [
        lambda: formed_hessian(made, X, y), lambda: hinge_hessian(made, X, y),
        lambda: hessian_samples(made, X, y, places, places, batch_size=4),
    ]  # fmt: skip


def one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made, X, y: (made, X, y[:, None]), "one output and one label a sample"),
        (lambda made, X, y: (made[:-1], X, y), "one output and one label a sample"),
        (lambda made, X, y: (made, X, y[:1]), "one output and one label a sample"),
        (lambda made, X, y: (made, X[:0], y[:0]), "at least one sample"),
        (lambda made, X, y: (made, X, (y + 1) / 2), r"labels y must be ±1.*\[0.0, 1.0\]"),
        (lambda made, X, y: (made, X, y * torch.nan), "labels y must be ±1"),
        (lambda made, X, y: (made, X * torch.nan, y), "outputs that are not finite"),
        (lambda made, X, y: (made, X.float(), y), "the samples are torch.float32"),
    ],
)
def test_labels_outputs_and_samples_that_do_not_fit(change, message):
    made, X, y = change(*problem())
    for call in every_way(made, X, y):
        one_line(call, message)


@pytest.mark.usefixtures("unchecked")
def test_a_gradient_or_a_step_is_not_that_of_labels_that_were_broadcast():
    made, X, y = problem()
    for call in (
        lambda: gradient_size(made, X, y[:, None]),
        lambda: gradient_size(made[:-1], X, y),
        lambda: take_steps(made, [(X, y[:, None])], (X, y), constant=0.1),
        lambda: take_steps(made, [(X, y)], (X, y[:, None]), constant=0.1),
    ):
        one_line(call, "one output and one label a sample")
    one_line(lambda: take_steps(made, [(X, y)], (X, y), constant=0.1, every=0), "every 1, 2, ... steps, got 0")


@pytest.mark.usefixtures("unchecked")
def test_a_frozen_network_and_whole_labels_have_the_same_hessian():
    made, X, y = problem()
    expected = by_autograd(made, X, y)
    size = gradient_size(made, X, y)
    made.requires_grad_(False)
    assert gradient_size(made, X, y) == size
    assert len(take_steps(made, [(X, y)], (X, y), constant=0.1).risk) == 1
    places = torch.arange(len(expected))
    with torch.no_grad():
        torch.testing.assert_close(hessian_samples(made, X, y.long(), places, places, batch_size=4)[0], expected)
        torch.testing.assert_close(formed_hessian(made, X, y.long()), expected)


def test_a_network_that_mixes_samples_has_them_all_in_one_batch():
    made = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.ReLU(), nn.Linear(5, 1))
    made = made.append(nn.Flatten(0)).double()
    _, X, y = problem()
    y = torch.sign(made(X)).detach()
    made[3].weight.data *= 4  # some are beyond their margins
    assert 0 < int((y * made(X) < 1).sum()) < 4
    found = hinge_hessian(made, X, y, batch_size=1) @ torch.eye(sum(p.numel() for p in made.parameters())).double()
    torch.testing.assert_close(found, by_autograd(made, X, y))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_a_network_may_mix_samples_that_come_late():
    """The first ones have units that are all off, of mean zero in any batch of their own."""
    made = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), Centred(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1), nn.Flatten(0)
    )
    made, (_, X, y) = made.double(), problem()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        made[0].bias.zero_()
        made[0].weight.abs_()
        X = torch.cat([-X[:2].abs(), X[2:].abs()])
    assert not made[:2](X[:2]).any() and made[:2](X[2:]).any()
    found = hinge_hessian(made, X, y, batch_size=2) @ torch.eye(sum(p.numel() for p in made.parameters())).double()
    torch.testing.assert_close(found, by_autograd(made, X, y))


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.usefixtures("unchecked")
def test_requests_for_hessians_that_there_are_not():
    made, X, y = problem()
    one_line(lambda: hinge_hessian(made, X, y, names=[]), "at least one parameter")
    one_line(lambda: hinge_hessian(made, X, y, batch_size=0), "batches of at least one sample")
    before = torch.get_rng_state()
    one_line(lambda: hinge_hessian(nn.Sequential(Noisy(), *made), X, y), "draws at random")
    assert torch.equal(torch.get_rng_state(), before)
    one_line(lambda: BipartitePart(hinge_hessian(made, X, y, names=["0.weight"]), made), "25 parameters.* by 20")
    one_line(lambda: TridiagonalGOE(0, seed=0), "dimension must be at least 1, got 0")
    one_line(lambda: perceptron([]), "widths of at least 1")
    places = torch.tensor([True])
    one_line(lambda: hessian_samples(made, X, y, places, places, batch_size=4), "whole numbers in 0..24")
    one_line(lambda: hessian_samples(made, X, y, places.long(), places.long(), batch_size=4, at_once=0), "0 products")


def test_a_layer_that_is_used_twice_is_refused():
    shared = nn.Linear(4, 4)
    made, places = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), *perceptron([4])), torch.arange(3)
    one_line(lambda: hessian_samples(made, torch.ones(2, 4), torch.ones(2), places, places, batch_size=2), "used twice")


@pytest.mark.usefixtures("unchecked")
def test_a_layer_that_is_applied_at_several_positions_is_refused():
    made, places = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), *perceptron([8])), torch.arange(3)
    samples = -torch.ones(2, 2, 3), -torch.ones(2)
    one_line(lambda: hessian_samples(made, *samples, places, places, batch_size=2), r"layer '0' needs inputs \(N, n\)")
    with pytest.raises(TypeError, match=r"must be an nn.Sequential of layers, got Noisy"):
        hessian_samples(Noisy(), torch.ones(2), torch.tensor([1.0, -1.0]), places[:0], places[:0], batch_size=2)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_those_of_python():
    made, X, y = problem()
    places, two = torch.arange(3), np.int64(2)
    whole = hinge_hessian(made, X, y) @ torch.eye(25).double()
    torch.testing.assert_close(hinge_hessian(made, X, y, batch_size=two) @ torch.eye(25).double(), whole)
    standardized = perceptron([4, 5], standardize=True).double()
    found = [hessian_samples(standardized, X, y, places, places, batch_size=k, at_once=k) for k in (2, two)]
    assert torch.equal(*found)
    assert (single_gradients([8], [2], networks=1, seed=two) == single_gradients([8], [2], networks=1, seed=2)).all()
    numbers = [zero_against_rest("MNIST", split="test", seed=k, samples=k).y for k in (2, two)]
    assert torch.equal(*numbers)
    with pytest.raises(ValueError, match="number of samples must be at least 1, got -1"):
        zero_against_rest("MNIST", split="test", seed=0, samples=2).first(-1)


def test_samples_are_left_as_they_are_by_a_layer_that_works_in_place():
    made, X, y = problem()
    made, before, places = nn.Sequential(nn.ReLU(inplace=True), *made), X.clone(), torch.arange(3)
    expected = by_autograd(made, X, y)
    torch.testing.assert_close(formed_hessian(made, X, y), expected)
    torch.testing.assert_close(hinge_hessian(made, X, y) @ torch.eye(25).double(), expected)
    torch.testing.assert_close(hessian_samples(made, X, y, places, places, batch_size=4)[0], expected[:3, :3])
    gradient_size(made, X, y)
    take_steps(made, [(X, y)], (X, y), constant=0.1)
    assert torch.equal(X, before)
