"""Networks drawn from a grammar of modules: the Hessian of a layer is that of autograd, or is refused in one line."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.hessian.layer import layer_gauss_newton, layer_hessian, layer_hessians
from common.hessian.operators import FullHessian

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


class Do(nn.Module):
    """Modules that a function combines."""

    def __init__(self, function, *parts):
        super().__init__()
        self.parts, self.function = nn.ModuleList(parts), function

    def forward(self, x):
        return self.function(x, *self.parts)


def residual(x, f):
    return x + f(x)


def parallel(x, f, g):
    return f(x) + g(x)


def beside(x, f, g):
    return torch.cat([f(x), g(x)], -1)


def twice(x, f):
    return f(f(x).relu())


def on_both_halves(x, f):
    return sum(f(half) for half in x.chunk(2, -1))


def again_after(x, f, g):
    return f(x) + f(g(x))


def tied_in_turn(x, f):
    return F.linear(x, f.weight.T) + f(x)


def gated(x, f):
    return x * f(x)


def attended(x, f):
    return f(x, x, x, need_weights=False)[0]


def embedded(x, f):
    return f(x.long())


def transposed(x, f):
    return f(x.transpose(0, 1)).transpose(0, 1)


def tied(f):
    g = nn.Linear(f.in_features, f.out_features)
    g.weight = f.weight
    return g


#: Functions that a forward may call: those after which the Hessian is the Gauss-Newton matrix, and others.
LINEAR_PIECES = [
    F.relu, F.leaky_relu, F.relu6, F.hardtanh, torch.abs, lambda x: x.clamp(-0.5, 0.5), lambda x: x / 2 - x.detach(),
    lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: torch.maximum(x, 0.3 * x), F.softshrink, F.hardshrink,
    lambda x: x.masked_fill(x < -1, -1.0), lambda x: x.flip(-1) + 0.5 * x.roll(1, -1), lambda x: x.cumsum(-1),
]  # fmt: skip
SMOOTH = [
    F.gelu, torch.tanh, F.silu, F.softplus, F.hardswish, torch.sigmoid, torch.sin, F.elu, lambda x: x * x,
    lambda x: x.softmax(-1), lambda x: x / (1 + x.abs()), lambda x: x * x.sigmoid(), F.mish, lambda x: x.square(),
]  # fmt: skip
ODD = [lambda x: x - x.mean(0), lambda x: F.dropout(x, 0.5, True), lambda x: x + torch.randn_like(x)]


def pointwise(draw, exact):
    kind = 0.54 * draw.random() if exact else draw.random()
    if kind < 0.55:
        in_place = not exact and draw.random() < 0.3
        return draw.choice([Do(draw.choice(LINEAR_PIECES)), nn.ReLU(inplace=in_place)])
    if kind < 0.7:
        return nn.Dropout()
    if kind < 0.97:
        return Do(draw.choice(SMOOTH)) if draw.random() < 0.6 else draw.choice([nn.GELU(), nn.Tanh(), nn.SiLU()])
    return Do(draw.choice(ODD))


def dense(draw, n, m, exact):
    f = nn.Linear(n, m, bias=draw.random() < 0.7)
    kind = draw.random()
    if kind < 0.4:
        return f
    if kind < 0.55 and n % 2 == 0:
        return Do(on_both_halves, nn.Linear(n // 2, m))
    if kind < 0.7:
        others = [nn.Linear(n, m), nn.Linear(n, m).requires_grad_(False)]
        return Do(parallel, f, draw.choice(others if exact else [*others, tied(f)]))
    if kind < 0.8 and n == m:
        return Do(residual if exact else draw.choice([twice, residual, gated, tied_in_turn]), f)
    if kind < 0.9:
        return Do(again_after, f, nn.Sequential(nn.Linear(n, n), pointwise(draw, exact)))
    return nn.Sequential(nn.Linear(n, m - 1), nn.ReLU(), Do(beside, nn.Linear(m - 1, 1), nn.Identity()))


def vectors(draw, n, exact):
    """Modules from (N, n) to (N, n')."""
    if draw.random() < 0.5:
        return pointwise(draw, exact), n
    if draw.random() < 0.3:
        norm = nn.BatchNorm1d(n, affine=draw.random() < 0.5, track_running_stats=exact or draw.random() < 0.7)
        return norm if exact else draw.choice([norm, nn.LayerNorm(n)]), n
    m = draw.randint(2, 4)
    return dense(draw, n, m, exact), m


def sequences(draw, n, exact):
    """Modules from (N, T, n) to (N, T, n')."""
    kind = draw.random()
    if kind < 0.35:
        return pointwise(draw, exact), n
    if kind < 0.5 and not exact:
        return draw.choice([nn.LayerNorm(n), Do(attended, nn.MultiheadAttention(n, 1, batch_first=True))]), n
    if kind < 0.55 and not exact:
        return Do(transposed, nn.Linear(n, n)), n
    m = draw.randint(2, 3)
    return dense(draw, n, m, exact), m


def images(draw, n, exact):
    """Modules from (N, n, h, w) to (N, n', h', w')."""
    kind = draw.random()
    if kind < 0.3:
        return pointwise(draw, exact), n
    if kind < 0.5:
        pools = [nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3)]
        pools += [nn.BatchNorm2d(n), nn.Upsample(scale_factor=2)]
        return draw.choice(pools if exact else [*pools, nn.GroupNorm(1, n), nn.InstanceNorm2d(n)]), n
    m, groups = draw.randint(1, 3), 1 if exact else draw.choice([1, 1, 1, n])
    stride, padding = draw.choice([(1, "same"), (1, "valid"), (2, 1), ((1, 2), (1, 0)), (1, 1)])
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "zeros" if exact else "circular"])
    f = nn.Conv2d(n, m * groups, draw.choice([1, 2, (2, 1), 3]), stride, padding, draw.choice([1, 1, 2]), groups,
                  padding_mode=mode)  # fmt: skip
    return f, m * groups


def network(draw, exact):
    """A network and its samples, in double precision; ``exact`` if no layer's Hessian needs to be refused."""
    N, c = draw.choice([1, 2, 3, 6]), draw.choice([1, 2, 3, 3, 3, 3])
    parts, kind = [], draw.choice(["vectors", "vectors", "sequences", "tokens", "images"])
    n = draw.randint(1, 4)
    grow = {"vectors": vectors, "sequences": sequences, "tokens": sequences, "images": images}[kind]
    shape = {"vectors": (n,), "sequences": (3, n), "tokens": (3,), "images": (n, 5, 5)}[kind]
    if kind == "tokens":
        parts.append(Do(embedded, nn.Embedding(4, n)))
    for _ in range(draw.randint(1, 4)):
        part, n = grow(draw, n, exact)
        parts.append(part)
    if kind != "vectors":
        ends = [lambda x: x.flatten(1), lambda x: x.flatten(2).mean(2) if kind == "images" else x.mean(1)]
        parts.append(Do(draw.choice(ends)))
    generator = torch.Generator().manual_seed(draw.randint(0, 2**30))
    X = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
    if kind == "tokens":
        X = (2 * X).abs().clamp(max=3).floor()
    made = nn.Sequential(*parts).double().eval()
    with torch.no_grad():
        made.append(nn.Linear(made(X.clone()).shape[1], c, dtype=torch.float64))
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.8 * noise)
    for p in made.parameters():
        p.requires_grad_(draw.random() < 0.9)
    return made.train(draw.random() < 0.5), X, torch.randint(c, (N,), generator=generator)


def outputs_of(made, name, X):
    """Logits in evaluation mode as a function of one flat parameter, and that parameter."""
    made = made.eval()
    weight = dict(made.named_parameters())[name].detach()
    return lambda w: torch.func.functional_call(made, {name: w.view_as(weight)}, (X.clone(),)), weight.flatten()


def dense_hessian(made, name, X, y):
    logits, w = outputs_of(made, name, X)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda w: F.cross_entropy(logits(w), y), w)


def dense_gauss_newton(made, name, X):
    logits, w = outputs_of(made, name, X)
    J = torch.autograd.functional.jacobian(logits, w)
    p = logits(w).softmax(1)
    return torch.einsum("nap,nab,nbq->pq", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J) / len(X)


def dense_of(H):
    return H @ torch.eye(H.shape[0], dtype=torch.float64)


def assert_close(found, expected):
    found, expected = dense_of(found).detach(), expected.detach()
    assert (found - expected).abs().max() <= 1e-8 * max(float(expected.abs().max()), 1e-3)


def twice_differentiable(made, name, X, y):
    try:
        dense_hessian(made, name, X, y)
    except RuntimeError:
        return False
    return True


def check(draw):
    """What is found for one layer and one parameter of one network, and how the layer's Hessian was answered."""
    torch.manual_seed(0)
    exact = draw.random() < 0.4
    try:
        made, X, y = network(draw, exact)
    except (RuntimeError, ValueError):
        return "no network: sizes do not fit"
    every = made.named_parameters(remove_duplicate=False)
    layer = draw.choice([name for name, _ in every if name.endswith(".weight")]).removesuffix(".weight")
    weight = made.get_submodule(layer).weight
    if weight.numel() > 150:
        return "no network: too large to form a matrix"
    name = next(name for name, p in made.named_parameters() if p is weight)
    answer = "equal"
    try:
        found = layer_hessian(made, layer, X)
    except ValueError as error:
        answer = str(error)
        assert not (exact and isinstance(made.get_submodule(layer), nn.Linear | nn.Conv2d)), answer
        assert "\n" not in answer and ("FullHessian" in answer or re.search("at random|torch cannot", answer)), answer
    else:
        assert_close(found, dense_hessian(made, name, X, y))
    try:
        found = layer_gauss_newton(made, layer, X)
    except ValueError as error:
        assert answer != "equal" and "\n" not in str(error)
    else:
        assert_close(found, dense_gauss_newton(made, name, X))
    name = draw.choice([name for name, p in made.named_parameters() if p.numel() < 60] or [name])
    try:
        found = FullHessian(made, X, y, parameters=[name])
    except ValueError as error:
        assert "\n" not in str(error)
        assert "draws at random" in str(error) or not twice_differentiable(made, name, X, y), error
    else:
        assert_close(found, dense_hessian(made, name, X, y))
    return answer


@pytest.fixture(scope="module", autouse=True)
def _several_batches():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("layer", "operators"):
            patch.setattr(f"common.hessian.{module}.SAMPLES_AT_ONCE", 3)
        yield


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_layer_of_any_network_has_the_hessian_of_autograd_or_is_refused(seed):
    check(random.Random(seed))


def between(function):
    """Two layers with a function between them, and samples."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), Do(function), nn.Linear(6, 3)).double()
    return made, torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3


@pytest.mark.parametrize("function", LINEAR_PIECES)
def test_what_is_piecewise_linear_is_not_refused(function):
    made, X, y = between(function)
    assert_close(layer_hessian(made, "0", X), dense_hessian(made, "0.weight", X, y))


@pytest.mark.parametrize("function", SMOOTH)
def test_what_is_smooth_is_named_and_has_what_is_offered(function):
    made, X, y = between(function)
    with pytest.raises(ValueError, match=r"'0': \w+ in 1 \(Do\) is not known to be. layer_gauss_newton .* FullHessian"):
        layer_hessian(made, "0", X)
    assert_close(layer_hessian(made, "2", X), dense_hessian(made, "2.weight", X, y))
    assert_close(FullHessian(made, X, y, parameters=["0.weight"]), dense_hessian(made, "0.weight", X, y))
    found, expected = layer_gauss_newton(made, "0", X), dense_gauss_newton(made, "0.weight", X)
    assert_close(found, expected)
    assert (expected - dense_hessian(made, "0.weight", X, y)).abs().max() > 0.02 * expected.abs().max()
    assert "Hessian" not in type(found).__name__


def net(function, seed=0, samples=7, **parts):
    """A network whose forward is a function of its parts and the samples, and samples for it."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part())

        def forward(self, x):
            return function(self, x)

    return Net().double(), torch.randn(samples, 4, dtype=torch.float64), torch.arange(samples) % 3


def a():
    return nn.Linear(4, 5)


def c():
    return nn.Linear(5, 3)


def routed(s, x):
    first = x[:, 0] > 0
    return s.c(torch.cat([s.a(x[first]), s.b(x[~first])]).relu())[torch.argsort(torch.argsort(~first, stable=True))]


def in_reverse(s, x):
    return s.c(s.a(x).relu() + s.a(2 * x.flip(0)).flip(0))


class Square(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(Square):
    """With one derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


#: By its name alone it would be piecewise linear.
Abs = type("Abs", (Square,), {})


def modulus(s, x):
    h = s.a(x)
    return s.c(torch.cat([(h[:, :2] + 1j * h[:, 2:4]).abs(), h[:, :3]], 1))


@pytest.mark.parametrize(
    ("function", "layer", "line"),
    [
        (lambda s, x: s.c(s.a(x).relu() + F.linear(x, s.a.weight)), "a", "'a' are used elsewhere"),
        (lambda s, x: s.c((s.a(x) + s.a.weight.sum(1)).relu()), "a", "'a' are used elsewhere"),
        (lambda s, x: s.d(s.c(s.a(x).relu()) + s.d.weight.sum(0)), "d", "'d' are used elsewhere"),
        (lambda s, x: s.c(s.a(x).relu() + s.b(x[:1])), "b", r"'b' is called with \[\(1, 4\)\]"),
        (routed, "a", "'a' is called with"),
        (in_reverse, "a", "mixes the samples"),
        (lambda s, x: s.c(s.a(x).cumsum(0)), "a", "mixes the samples"),
        (lambda s, x: s.c(s.a(x / x.abs().max())), "a", "mixes the samples"),
        (lambda s, x: s.c(Abs.apply(s.a(x))), "a", "AbsBackward in the network's own forward"),
        (modulus, "a", "Abs in the network's own forward"),
    ],
)
def test_networks_that_a_layer_is_refused_of(function, layer, line):
    made, X, y = net(function, a=a, b=a, c=c, d=lambda: nn.Linear(3, 3))
    name = f"{layer}.weight"
    with pytest.raises(ValueError, match=f"{line}.*FullHessian.*'{name}'"):
        layer_hessian(made, layer, X)
    assert_close(FullHessian(made, X, y, parameters=[name]), dense_hessian(made, name, X, y))


def test_modules_around_a_layer_are_heeded():
    """Hooks before and after it, parts of the network that are passed without gradients, arguments by name."""
    made, X, y = net(lambda s, x: s.c(s.a(input=s.b(x)).relu()), a=lambda: nn.Linear(5, 5), b=a, c=c)
    made.b.forward = torch.no_grad()(made.b.forward)
    made.a.register_forward_pre_hook(lambda _, given: given)
    made.a.register_forward_hook(lambda _m, _x, out: 2 * out)
    made.c.register_forward_pre_hook(lambda _, given: (3 * given[0],))
    for layer in ("a", "c"):
        assert_close(layer_hessian(made, layer, X), dense_hessian(made, f"{layer}.weight", X, y))
    with pytest.raises(ValueError, match="'b' is a Linear with a forward of its own"):
        layer_hessian(made, "b", X)


class Bounded(nn.Module):
    def forward(self, x):
        return x.tanh()


def test_weights_that_are_made_of_others_have_the_products_that_are_offered():
    made, X, y = net(lambda s, x: s.c(s.a(x).relu()), a=a, c=c)
    nn.utils.parametrize.register_parametrization(made.a, "weight", Bounded())
    with pytest.raises(ValueError, match="'a' has weights made of other parameters") as refused:
        layer_hessian(made, "a", X)
    names = re.findall(r"'(a\.[^']+)'", str(refused.value))
    assert set(names) == {name for name, _ in made.named_parameters() if name.startswith("a.")}
    name = "a.parametrizations.weight.original"
    assert_close(FullHessian(made, X, y, parameters=[name]), dense_hessian(made, name, X, y))
    assert_close(layer_hessian(made, "c", X), dense_hessian(made, "c.weight", X, y))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_second_derivatives_that_torch_has_wrong_are_refused(norm):
    made, X, y = net(lambda s, x: s.c(s.a(x).relu()), a=lambda: norm(nn.Linear(4, 5)), c=c)
    made(X)  # leaves a tensor that is no parameter, of which copies are made
    with pytest.raises(ValueError, match="made of other parameters"):
        layer_hessian(made, "a", X)
    with pytest.raises(ValueError, match="not symmetric"):
        FullHessian(made, X, y)
    assert_close(FullHessian(made, X, y, parameters=["c.weight"]), dense_hessian(made, "c.weight", X, y))


def test_a_convolution_that_was_altered():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 2, 4, 4), nn.Flatten(), nn.Linear(2, 3)).double()
    made[0].padding = (1, 1)
    X, y = torch.randn(4, 1, 5, 5, dtype=torch.float64), torch.arange(4) % 3
    assert_close(layer_hessian(made, "0", X), dense_hessian(made, "0.weight", X, y))


def test_parameters_that_are_not_used_have_zeros():
    made, X, y = net(lambda s, x: s.c(s.a(x).relu()), a=a, b=a, c=c)
    H = dense_of(FullHessian(made, X, y, parameters=["a.weight", "b.weight", "b.bias"]))
    assert_close(FullHessian(made, X, y, parameters=["a.weight"]), H[:20, :20])
    assert not H[20:].any() and not H[:, 20:].any()
    assert not dense_of(FullHessian(made, X, y, parameters=["b.bias"])).any()


def test_what_has_one_derivative_alone_is_refused():
    made, X, y = net(lambda s, x: s.c(s.a(x) + Once.apply(s.a(x))), a=a, c=c)
    with pytest.raises(ValueError, match="once_differentiable"):
        FullHessian(made, X, y)


def test_lists_of_layers():
    made, X, _ = net(lambda s, x: s.c(s.a(x).relu()), a=a, c=c)
    made.e = made.a
    assert torch.equal(layer_hessian(made, "e", X).B, layer_hessian(made, "a", X).B)
    assert list(layer_hessians(made, ["c", "c"], X)) == ["c"]
    for layers in ([], ["a", "e"]):
        with pytest.raises(ValueError, match="different layers are needed"):
            layer_hessians(made, layers, X)


def counted(s, x):
    s.passes = getattr(s, "passes", 0) + 1
    return s.c(s.a(x).relu() * s.passes)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda s, x: F.dropout(s.c(s.a(x)), 0.5, True), "draws at random"),
        (counted, "draws at random"),
        (lambda s, x: s.c(s.a(x).relu() / (x[:, 3:] < 90)), "not finite"),  # of the last sample
        (lambda s, x: (s.c(s.a(x)), x), "a tuple"),
        (lambda s, x: s.c(s.a(x))[:, 0], r"gives \(\d,\)"),
        (lambda s, x: s.c(x), "does not take samples"),
    ],
)
def test_networks_that_have_no_hessian(function, line):
    made, X, y = net(function, a=a, c=c)
    X[-1] = 100
    before = torch.get_rng_state()
    for make in (lambda: layer_hessian(made, "a", X), lambda: FullHessian(made, X, y)):
        with pytest.raises(ValueError, match=line):
            make()
    assert torch.equal(torch.get_rng_state(), before)
