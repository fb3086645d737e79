"""The zoo of Wu et al.: what is trained, kept and shared, at tiny sizes."""

import pytest
import torch

from common import paths
from common.hessian.layer import layer_hessian
from common.wu_dissecting import trained, training
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.trained import dissected, dissected_all, dissected_rows, of_all_schemes, overlaps_in_layer

TINY = {"epochs": 1, "samples": 60, "seed": 3}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data").symlink_to(paths.CACHE / "data")  # decoded images
    monkeypatch.setattr(paths, "CACHE", tmp_path)


@pytest.fixture
def trainings(monkeypatch):
    """Seeds of the networks that are trained and not found, once for every stage."""
    seeds, train = [], training.train

    def counted(*arguments, **options):
        if options["stop"] > 0:  # the first stage is of no epochs
            seeds.append(list(options["seeds"]))
        return train(*arguments, **options)

    monkeypatch.setattr(training, "train", counted)
    return seeds


def test_convolutional_networks_are_shared_one_by_one_and_dense_ones_together(trainings):
    three = dissected("LeNet5-(fc1-7)", "CIFAR-10", members=3, **TINY)
    two = dissected("LeNet5-(fc1-7)", "CIFAR-10", members=2, **TINY)
    assert sorted(trainings) == [[3], [4], [5]]  # two at once, in either order
    assert three.ensemble.epochs.tolist() == [0, 1]
    assert two.members == 2
    for name, tensor in two.ensemble.states.items():
        assert torch.equal(tensor, three.ensemble.states[name][:, :2])
    dissected("F-5", "MNIST", members=2, **TINY)
    dissected("F-5", "MNIST", members=2, **TINY)
    assert trainings[3:] == [[3, 4]]


def test_what_the_networks_see():
    case, random = (dissected("F-5", data, members=2, **TINY) for data in ("MNIST", "MNIST-R"))
    assert float(case.X.mean()) == pytest.approx(0, abs=1e-5)
    assert float(case.X.std()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(case.X, random.X)
    assert (case.y != random.y).float().mean() > 0.5
    colours = dissected("LeNet5-(fc1-7)", "CIFAR-10", members=1, **TINY).X
    torch.testing.assert_close(colours.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(colours.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_eigenpairs_are_kept(monkeypatch):
    case = dissected("F-6-5", "MNIST", members=2, **TINY)
    found = case.eigenpairs(1, "fc2", 40, 7)
    expected = layer_hessian(case.network(1), "fc2", case.X[:40]).top_eigenpairs(7)
    torch.testing.assert_close(found.values, expected.values)
    assert case.eigenpairs(1, "fc2", 40, 1000).values.shape == (30,)  # all that there are
    full = case.full_eigenpairs(0, 40, 50)
    assert full["true"].shape == full["overlap"].shape == (21,)  # of all outputs
    assert (full["overlap"] <= 1 + 1e-5).all() and full["overlap"][0] > 0.5
    monkeypatch.setattr(trained, "layer_hessian", None)
    assert torch.equal(case.eigenpairs(1, "fc2", 40, 7).vectors, found.vectors)
    assert torch.equal(case.full_eigenpairs(0, 40, 50)["true"], full["true"])


def test_overlaps_of_all_layers_of_a_large_network(monkeypatch):
    case = dissected("VGG11-W3", "CIFAR-10", members=3, scheme="momentum", **TINY)
    assert case.ensemble.epochs.tolist() == [0, 1]
    found = case.overlaps(20, 1.5)
    assert list(found) == case.layers
    for layer in ("conv1", "conv5", "fc1"):
        k = found[layer]["pairs"].shape[2]
        bases = [case.eigenpairs(member, layer, 20, k).vectors for member in range(3)]
        assert float(found[layer]["pairs"][0, 2, -1]) == pytest.approx(overlap(bases[0], bases[2]), abs=1e-3)
        H = case.hessian(1, layer, 20)
        torch.testing.assert_close(found[layer]["tau"][1], H.output_basis[0], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(found[layer]["gamma"][1], H.input_basis[0], atol=1e-5, rtol=1e-3)
    monkeypatch.setattr(trained, "layer_hessians", None)
    assert torch.equal(case.overlaps(20, 1.5)["conv2"]["tau"], found["conv2"]["tau"])


def test_overlaps_in_a_layer_of_several_ensembles():
    cases = dissected_all(of_all_schemes("LeNet5-(fc1-7)", "CIFAR-10", members=[2, 1, 0], **TINY))
    found = overlaps_in_layer(cases, "fc1", 20, 1.5)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "pairs": (3, 3, 10), "tau": (3, 7), "gamma": (3, 400), "first": (3, 400), "kronecker": (3, 7),
        "outputs": (3, 3, 7), "effective": (3,), "on_first": (3, 10),
    }  # fmt: skip
    together = cases[0].overlaps(20, 1.5)["fc1"]
    for name, part in together.items():
        two = found[name][:2, :2] if name == "pairs" else found[name][:2]
        torch.testing.assert_close(two, part, atol=1e-3, rtol=1e-3, equal_nan=True)
    H, t = cases[1].hessian(0, "fc1", 20), found["first"][2]
    assert float(t @ H.autocorrelation @ t) == pytest.approx(float(found["gamma"][2, 0]))
    true, (_, product) = cases[1].eigenpairs(0, "fc1", 20, 10).vectors[:, :4], H.kronecker_eigenpairs(4)
    h = cases[1].eigenpairs(0, "fc1", 20, 10).vectors
    expected = (h[:, 4].view(7, 400) @ t).square().sum()
    assert float(found["on_first"][2, 4]) == pytest.approx(float(expected), abs=1e-4)
    bases = [cases[0].hessian(k, "fc1", 20).output_basis[1][:, :2] for k in range(2)]
    assert float(found["outputs"][0, 1, 1]) == pytest.approx(overlap(*bases), abs=1e-4)
    assert float(found["kronecker"][2, 3]) == pytest.approx(overlap(true, product), abs=1e-4)


def test_rows_of_large_networks_have_their_own_sizes_and_none_without_its_data(trainings, monkeypatch):
    monkeypatch.setattr(trained.images, "available", lambda data: False)
    rows = ["VGG11-W3 CIFAR-10", "VGG11-W3 CIFAR-100", "ResNet18-W2 CIFAR-10"]
    same = {"seed": 3, "scheme": "default"}
    found = dissected_rows(rows, [2, 2, 2], [2, 2, 1], [20, 20, 30], **same)
    assert list(found) == [rows[0], rows[2]]
    assert [len(case.y) for case in found.values()] == [20, 30]
    assert [case.ensemble.epochs.tolist() for case in found.values()] == [[0, 1, 2], [0, 1]]
    assert sorted(trainings) == [[3], [3], [3], [4], [4], [4]]
    layers = found[rows[2]].hessians(1, ["conv2", "sc-conv1"], 10)
    alone = found[rows[2]].hessian(1, "sc-conv1", 10)
    torch.testing.assert_close(layers["sc-conv1"].input_basis[0], alone.input_basis[0])
    with pytest.raises(ValueError, match="not as in"):
        dissected_rows(["VGG11"], [2], [1], [20], **same)
    with pytest.raises(ValueError, match="1 networks, 1 of members, 2 of epochs, 1 of samples"):
        dissected_rows(rows[:1], [2], [1, 2], [20], **same)


def test_schemes_have_networks_of_their_own(trainings):
    cases = dissected_all(of_all_schemes("LeNet5-(fc1-6)", "CIFAR-10", members=[2, 0, 1], **TINY))
    assert [case.members for case in cases] == [2, 1]
    assert sorted(trainings) == [[3], [4], [5]]
    assert torch.equal(cases[0].X, cases[1].X)
    assert torch.equal(cases[0].y, cases[1].y)
    with pytest.raises(ValueError, match="unknown scheme"):
        dissected("F-5", "MNIST", members=1, scheme="fast", **TINY)
    with pytest.raises(ValueError, match="unknown data set 'CIFAR-10-S'"):
        dissected("F-5", "CIFAR-10-S", members=1, **TINY)


def test_no_number_of_samples_is_all_of_them():
    case = dissected("F-6-5", "MNIST", members=3, **TINY)
    for found in (case.hessian(0, "fc2", 0), case.hessian(0, "fc2", 60)):
        assert len(found.X) == 60
    assert torch.equal(case.eigenpairs(1, "fc2", 0, 3).vectors, case.eigenpairs(1, "fc2", 60, 3).vectors)
    with pytest.raises(ValueError, match="at least 1, or 0 for all"):
        case.hessian(0, "fc2", -1)


def test_effective_samples_stand_beside_every_hessian():
    case = dissected("F-6-5", "MNIST", members=3, **TINY)
    H = case.hessian(2, "fc2", 0)
    expected = H.effective_samples
    assert 1 < expected < 60
    assert float(case.eigenpairs(2, "fc2", 0, 3).effective) == pytest.approx(expected, rel=1e-5)
    assert float(case.overlaps(0, 1.0)["fc2"]["effective"][2]) == pytest.approx(expected, rel=1e-5)
    assert float(overlaps_in_layer([case], "fc2", 0, 1.0)["effective"][2]) == pytest.approx(expected, rel=1e-5)
    # Of all parameters: the trace of every sample's Gauss-Newton matrix, by the Jacobian of its logits.
    network, traces = case.network(0).double(), []
    for x in case.X.double():
        logits = network(x[None])[0]
        rows = []
        for logit in logits:
            grads = torch.autograd.grad(logit, list(network.parameters()), retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in grads]))
        J, p = torch.stack(rows), logits.detach().softmax(0)
        traces.append(float(torch.trace(J.T @ (torch.diag(p) - torch.outer(p, p)) @ J)))
    w = torch.tensor(traces)
    full = float(case.full_eigenpairs(0, 0, 2)["effective"])
    assert full == pytest.approx(float(w.sum() ** 2 / w.square().sum()), rel=1e-4)


def test_epochs_on_the_way_by_which_a_claim_can_be_decided():
    case = dissected("LeNet5-(fc1-7)", "CIFAR-10", members=1, epochs=8, samples=20, seed=3)
    assert case.ensemble.epochs.tolist() == [0, 1, 2, 5, 8]
    assert case.checkpoints == [1, 2, 8]
    assert not torch.equal(case.eigenpairs(0, "fc1", 0, 2, epoch=1).values, case.eigenpairs(0, "fc1", 0, 2).values)
    assert dissected("F-5", "MNIST", members=1, **TINY).checkpoints == [1]
    assert dissected("F-5", "MNIST", members=1, epochs=0, samples=60, seed=3).checkpoints == [0]


def test_layers_of_a_large_network_are_taken_in_groups_that_fit():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 20, "e": 1}
    assert trained._within_memory(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert trained._within_memory(sizes, 100) == [list(sizes)]


def test_a_trained_network_is_found_again_at_every_kept_epoch():
    case = dissected("LeNet5-(fc1-7)", "CIFAR-10", members=1, **TINY)
    start, end = case.network(0, 0), case.network(0)
    reference = trained.classifier(case.name, case.X.shape[1:], 10)
    training.xavier(reference, torch.Generator().manual_seed(3))
    assert torch.equal(start.get_submodule("conv1").weight, reference.get_submodule("conv1").weight)
    assert not torch.equal(end.get_submodule("conv1").weight, reference.get_submodule("conv1").weight)
    H = case.hessian(0, "conv2", 20, epoch=0)
    assert H.shape == (2400, 2400)
    assert overlap(H.input_basis[1][:, :1], H.mean_input[:, None]) > 0.5


def test_figures_that_ask_for_nearly_as_many_eigenpairs_share_them(tmp_path):
    case = dissected("F-5", "MNIST", members=1, **TINY)
    few, more = (case.eigenpairs(0, "fc1", 0, k) for k in (3, 7))
    assert len(list(tmp_path.glob("wu_dissecting.trained.layer_eigenpairs/*.pt"))) == 1
    assert few.vectors.shape == (3920, 3) and torch.equal(few.vectors, more.vectors[:, :3])
    assert [len(part) for part in (few.values, few.residuals, few.on_first, few.kronecker)] == [3] * 4
    assert torch.equal(few.values, more.values[:3]) and len(more.kronecker) == 5
    every = case.eigenpairs(0, "fc2", 0, 60)
    assert len(every.values) == 50 and len(every.kronecker) == 10


def test_what_the_trainings_of_the_paper_take():
    case = dissected("F-5", "MNIST", members=1, **TINY)
    operations = trained.operations_of_training(case.network(0), case.X[:1])
    assert operations == 2 * (2 * 784 * 5 + 3 * 5 * 10)  # no gradient by the images is taken
    total, hours = operations * 60000 * 3000, operations * 60000 * 3000 / 7e10 / 3600
    minutes = 469 * 1000 * trained.STEP_ON_GPU / 60  # so small a network waits for the steps, not for the operations
    assert case.needs(members=3) == (
        f"3 trainings of F-5 for 1000 epochs on all 60000 images are {total:.1g} operations, {hours:.2g} hours on two "
        f"cores, by estimate {minutes:.2g} minutes of a GPU"
    )


def test_an_ensemble_is_summed_up_by_its_worst_network():
    case = dissected("F-5", "MNIST", members=2, **TINY)
    assert case.summary().startswith("F-5: 2 networks, 1 epochs on 60 samples, mean loss ")
    case.ensemble.accuracy[-1] = torch.tensor([1.0, 0.25])
    assert case.summary().endswith("smallest accuracy 0.2500")
