"""The stochastic networks of Table 10 at tiny sizes: data, seeds, and what the paper's scale does on a GPU."""

import math

import pytest
import torch

from common import paths
from common.data import images
from common.wu_dissecting import networks, table10
from common.wu_dissecting.pac_bayes.bound import Confidence
from common.wu_dissecting.pac_bayes.optimize import METHODS, ORDER, Schedule
from common.wu_dissecting.table10 import (
    COLUMNS,
    DATA,
    FRESH,
    bounds_of_networks,
    change_by_doubling,
    labelled,
    plain_descents,
    rank_correlation_of_sharp,
    unsettled,
)

SCHEDULE = Schedule(
    epochs=2, lr=0.001, lr_spread=0.03, decay_every=1, hessian_every=1, hessian_samples=50, batch_size=64
)
TINY = {
    "seeds": [0, 1], "samples": 300, "sgd_epochs": 1, "schedule": SCHEDULE, "draws": 500,
    "confidence": Confidence(0.025, 0.01, 100.0, 0.1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data").symlink_to(paths.CACHE / "data")  # decoded images
    monkeypatch.setattr(paths, "CACHE", tmp_path)


def test_what_the_networks_of_table_10_see():
    two, ten, random = (labelled(name, 400, 0) for name in ("T-600^2", "T-200^2_10", "R-600"))
    assert (two.classes, ten.classes, random.classes) == (2, 10, 2)
    assert torch.equal(two.X, ten.X) and torch.equal(two.y, (ten.y >= 5).long())
    assert float(two.X.min()) == -1 and float(two.X.max()) == 1
    assert torch.equal(two.X_test, 2 * images.load("MNIST", split="test").x.flatten(1) - 1)
    assert 0.4 < float((random.y != two.y).float().mean()) < 0.6
    assert 0.4 < float(random.y_test.float().mean()) < 0.6
    assert labelled("T-600", 0, 0).X.shape == (60000, 784)
    for wrong in ("T600", "T-600_5", "F-600"):
        with pytest.raises(ValueError, match="unknown network"):
            labelled(wrong, 400, 0)


def test_what_must_be_independent_has_streams_of_its_own():
    """A CPU's generator takes 32 bits of a seed: the initialization w₀ must know nothing of samples and labels."""
    streams = [torch.rand(100, generator=torch.Generator().manual_seed(s)) for s in (0, ORDER, DATA, FRESH)]
    for k, stream in enumerate(streams):
        assert not any(torch.equal(stream, other) for other in streams[:k])
    assert max(ORDER, DATA, FRESH) + 10**6 < 2**32
    network = networks.classifier("F-20", (784, 1, 1), 2)
    networks.truncated_gaussian(network, torch.Generator().manual_seed(0))
    y = labelled("R-20", 400, 0).y.double()
    W = network.get_submodule("fc1").weight.detach().flatten()[:400].double()
    assert abs(float(torch.corrcoef(torch.stack([W, y]))[0, 1])) < 0.2
    assert not torch.equal(torch.randint(2, (400,), generator=torch.Generator().manual_seed(0)).double(), y)


def test_all_bounds_of_all_networks_are_made_once(monkeypatch):
    results = bounds_of_networks(["T-6", "R-5^2_10"], ["T-6"], **TINY)
    assert list(results["T-6"][0]) == list(METHODS)
    assert list(results["R-5^2_10"][1]) == [method for method in METHODS if method != "LEARNED"]
    first = results["T-6"][0]["ITER"]
    assert set(first) == {*COLUMNS, "correlation", "rank", "curvature", "variance"}
    assert 0 < float(first["error"]) < float(first["error_bound"]) < float(first["bound"]) <= 1
    assert first["correlation"].shape == (2,) and first["rank"].shape == (2, 200)
    there = first["rank"].isfinite()
    assert (first["variance"][there] > 0).all() and (first["curvature"][0][there[0]].diff() <= 1e-12).all()
    assert float(results["T-6"][1]["ITER"]["kl"]) != float(first["kl"])
    monkeypatch.setattr(table10, "tighten", None)
    monkeypatch.setattr("common.wu_dissecting.training.train", None)
    again = bounds_of_networks(["T-6", "R-5^2_10"], ["T-6"], **TINY)
    assert float(again["R-5^2_10"][1]["BASE"]["bound"]) == float(results["R-5^2_10"][1]["BASE"]["bound"])
    with pytest.raises(ValueError, match="unknown methods"):
        table10.stochastic("T-6", ["BEST"], seed=0, **{k: v for k, v in TINY.items() if k != "seeds"})


def test_what_a_longer_schedule_moves_is_named():
    rank = torch.arange(1.0, 5.0)
    one = {"bound": torch.tensor(0.30), "half_log_prior": torch.tensor(-2.0), "variance": torch.stack([rank, rank])}
    moved = {"bound": torch.tensor(0.29), "half_log_prior": torch.tensor(-2.01), "variance": one["variance"].clone()}
    moved["variance"][1] *= torch.tensor([math.exp(0.4)] * 3 + [math.nan])
    change = change_by_doubling([one, one], [one, moved])
    assert change == pytest.approx({"bound": -0.01, "half_log_prior": -0.01, "log_std": 0.2}, rel=1e-3)
    assert unsettled(change) == "twice the epochs move the bound by 0.01 and ς by 0.2"
    assert unsettled(change_by_doubling([one], [one])) == ""


def test_the_correlation_is_that_of_the_sharp_directions():
    curvature = torch.logspace(0, -4, 41)
    variance = torch.where(curvature > 0.01, curvature, 1 / curvature)
    variance[3] = math.nan
    assert rank_correlation_of_sharp(curvature, variance) == pytest.approx(1)
    assert rank_correlation_of_sharp(curvature, 1 / curvature, share=1e-5) == pytest.approx(-1)
    with pytest.raises(ValueError, match="sharp"):
        rank_correlation_of_sharp(curvature, variance, share=0.9)


def test_plain_descent_of_a_network_of_the_table():
    options = {"seeds": [0, 1], "samples": 300, "sgd_epochs": 1}
    confidence = TINY["confidence"]
    found = plain_descents("T-6", epochs=2, lr=0.001, decay_every=1, batch_size=64, confidence=confidence, **options)
    assert found["rise"].shape == (2,) and (found["at_most"] > 0).all() and (found["needed"] > 0.1).all()
