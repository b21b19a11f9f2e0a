"""precision= of fit and MetaSVI: products in bfloat16, everything else in float32, and nothing left behind."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.lowered import in_bfloat16, lowered
from bayesmeta.train import checkpoint
from bayesmeta.train.precision import check_usable, in_precision
from tests.programs import TwoSites
from tests.test_contract import METHODS, on_network, sinusoids
from tests.test_fit import TASKS, make, same, state, train

#: bfloat16 has 8 bits: a number is rounded by at most this share of it
ROUNDING = 2.0**-8


def gradients(method, batch):
    method.zero_grad()
    loss = method.loss(batch, generator=0)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in method.parameters() if p.grad is not None]


# -- every method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_meta_gradients_are_float32_and_equal_within_bfloat16s_rounding(name):
    method, batch = on_network(name), sinusoids()
    method.prepare(batch)
    check_usable("bf16", torch.device("cpu"), [method])
    loss, wide = gradients(method, batch)
    with in_precision("bf16", method):
        lower, rounded = gradients(method, batch)
    again, after = gradients(method, batch)
    assert lower.dtype == torch.float32
    assert {g.dtype for g in rounded} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in gs]) for gs in (wide, rounded))
    off = float((one - other).norm() / one.norm())
    # implicit MAML solves with products of the Hessian, where errors of the products add up over its iterations
    assert off < (32 if name == "implicit_maml" else 8) * ROUNDING
    assert abs(float(loss - lower)) < ROUNDING * max(abs(float(loss)), 1.0)
    assert off > 1e-4, "control: float32's rounding alone would be 1e-6"
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(wide, after, strict=True))


# -- what is rounded, and what is not -----------------------------------------------------------------------------


def test_a_layer_is_the_product_of_rounded_factors():
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(50, 64, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 64, generator=generator))
    with lowered(layer):
        out = layer(x)
    rounded = x.bfloat16().double() @ layer.weight.detach().bfloat16().double().mT
    exact = x.double() @ layer.weight.detach().double().mT
    scale = exact.square().mean().sqrt()
    assert out.dtype == torch.float32
    # the sum is rounded once more on the way out; nothing else is
    assert ((out - rounded).abs() <= ROUNDING * rounded.abs() + 1e-5 * scale).all()
    assert ((out - exact).abs() > ROUNDING * exact.abs() + 1e-5 * scale).any(), "control: the factors are rounded"
    assert torch.equal(layer(x), x @ layer.weight.mT)


def test_a_sequential_stays_in_bfloat16_and_what_lies_outside_in_float32():
    seen = []

    class Seen(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    inside, outside = nn.Sequential(nn.Linear(4, 4), Seen(), nn.ReLU(), nn.Linear(4, 4)), Seen()
    with lowered(inside, outside):
        y = outside(inside(torch.ones(2, 4)))
        inside.double()
        assert inside(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64, "float64 is left alone"
    assert seen == [torch.bfloat16, torch.float32, torch.float64]
    assert y.dtype == torch.float32


@pytest.mark.parametrize("plain", [True, False])
def test_the_likelihood_and_the_prior_see_float32(plain):
    """Outputs are rounded, log-densities of them are not: they are those of the rounded outputs, to 1e-6."""
    network = (
        bm.nets.mlp(1, [16, 16], 1) if plain else nn.Sequential(nn.Linear(1, 16), nn.LayerNorm(16), nn.Linear(16, 1))
    )
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5))
    support = sinusoids().support
    model.prepare(support)
    u = model.learned_start(support).detach()
    with lowered(model):
        outputs, joint = model.output(u, support.x), model.log_joint(u, support)
    assert outputs.dtype == joint.dtype == torch.float32
    value = dist.Normal(outputs.double().squeeze(-1), 0.5).log_prob(support.y.double()).sum(-1)
    expected = value + model.log_prior(u, support).double()
    torch.testing.assert_close(joint.double(), expected, rtol=1e-6, atol=0.0)
    assert (joint - model.log_joint(u, support)).abs().max() > 1e-3


def test_closed_forms_are_those_of_the_rounded_features():
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [16, 16], 1), bm.Gaussian(0.5), task_modules="head")
    method, support = bm.BayesianLastLayer(model), sinusoids().support
    method.prepare(sinusoids())
    with lowered(method):
        loc = method.adapt(support).state()["loc"]
        design = model.last_layer_design(support.x).double().detach()
    centre, scale = (t.double().detach() for t in model.prior.moments())
    precision = design.mT @ design / 0.25 + torch.diag(scale**-2)
    right = design.mT @ support.y.double().unsqueeze(-1) / 0.25 + (centre / scale**2).unsqueeze(-1)
    expected = torch.linalg.solve(precision, right).squeeze(-1)
    torch.testing.assert_close(loc.reshape(expected.shape).double(), expected, rtol=1e-4, atol=1e-5)


# -- nothing is left behind ---------------------------------------------------------------------------------------


def test_modules_are_as_they_were_also_after_an_error():
    method = make()
    layers = [m for m in method.modules() if isinstance(m, nn.Linear)]
    assert layers
    with lowered(method):
        assert all("forward" in layer.__dict__ for layer in layers)
        twin = copy.deepcopy(layers[0])
        assert twin.forward.__self__ is twin, "a copy computes with its own weights"
    with pytest.raises(RuntimeError, match="shapes"), lowered(method):
        layers[0](torch.ones(2, 77))
    assert not any("forward" in m.__dict__ for m in method.modules())
    assert in_bfloat16(torch.mm, torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_is_set_inside_alone():
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [s.fp32_precision for s in settings]
    with in_precision("tf32"):
        assert [s.fp32_precision for s in settings] == ["tf32", "tf32"]
    assert [s.fp32_precision for s in settings] == before
    with pytest.raises(RuntimeError), in_precision("tf32"):
        torch.ones(2, 2) @ torch.ones(3, 3)
    assert [s.fp32_precision for s in settings] == before
    with in_precision("float32"):
        assert [s.fp32_precision for s in settings] == before


# -- fit ----------------------------------------------------------------------------------------------------------


def held_out(method):
    with torch.no_grad():
        return float(method.loss(TASKS.sample(200, support=10, query=10, generator=99), generator=0))


def trained(seed, precision, steps):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bm.nets.mlp(1, [16, 16], 1, activation="tanh")
    method = bm.ANIL(bm.NeuralTaskModel(network, bm.Gaussian(0.5), task_modules="head"), inner_lr=0.01)
    train(method, steps, seed=seed, precision=precision, optimizer=lambda p: torch.optim.Adam(p, 5e-3))
    return held_out(method)


def difference_of_trainings(seeds, steps):
    values = torch.tensor([[trained(s, p, steps) for s in range(seeds)] for p in ("float32", "bf16")])
    return values, float(values[0].std()), float((values[1] - values[0]).mean())


def test_a_short_training_reaches_the_same_loss():
    values, spread, difference = difference_of_trainings(3, 60)
    assert abs(difference) < spread
    assert (values[0] != values[1]).all()


@pytest.mark.slow
def test_a_training_reaches_the_same_loss_within_the_spread_of_seeds():
    values, spread, difference = difference_of_trainings(6, 1500)
    untrained = trained(0, "float32", 1)
    assert values.max() < 0.7 * untrained
    assert abs(difference) < 2 * spread * math.sqrt(2 / 6)


def test_parameters_and_the_optimizers_state_are_float32():
    kept = []

    def factory(parameters):
        kept.append(torch.optim.Adam(parameters, 1e-3))
        return kept[0]

    method = make()
    train(method, 3, precision="bf16", optimizer=factory)
    tensors = [v for s in kept[0].state.values() for v in s.values()] + list(method.parameters())
    assert {t.dtype for t in tensors} == {torch.float32}
    wide, lower, same_seed = make(), make(), make()
    train(wide, 3)
    train(lower, 3, precision="bf16")
    train(same_seed, 3, precision="bf16")
    assert same(state(lower), state(same_seed))
    assert not same(state(lower), state(wide))


def test_validation_is_in_the_precision_too_and_memory_counts_it():
    validation = TASKS.sample(10, support=10, query=10, generator=99)
    wide = train(make(), 2, validation=validation, validate_every=2, optimizer=lambda p: torch.optim.SGD(p, 1e-30))
    lower = train(
        make(),
        2,
        validation=validation,
        validate_every=2,
        optimizer=lambda p: torch.optim.SGD(p, 1e-30),
        precision="bf16",
    )
    assert 0 < abs(wide.best_validation - lower.best_validation) < ROUNDING * abs(wide.best_validation)
    big = {"tasks_per_step": 200, "memory": 200 * 2**10}
    chunks = [train(make("maml"), 1, precision=p, **big).chunk for p in ("float32", "bf16")]
    assert None not in chunks
    assert chunks[1] > 1.5 * chunks[0], "what is kept for the way back is half as wide"


def test_a_run_is_resumed_in_its_own_precision(tmp_path):
    straight, stopped, again = make(), make(), make()
    train(straight, 6, precision="bf16")
    train(stopped, 3, precision="bf16", out=tmp_path / "run")
    with pytest.raises(errors.CheckpointError, match="had precision = 'bf16', and here it is 'float32'"):
        train(make(), 6, out=tmp_path / "run", resume=True)
    train(again, 6, precision="bf16", out=tmp_path / "run", resume=True)
    assert same(state(straight), state(again))


def test_a_checkpoint_that_says_nothing_of_it_is_of_float32(tmp_path):
    train(make(), 3, out=tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = checkpoint.load(path)
    del content["options"]["precision"]
    checkpoint.save(path, content)
    assert train(make(), 4, out=tmp_path / "run", resume=True).steps == 4
    with pytest.raises(errors.CheckpointError):
        train(make(), 5, out=tmp_path / "run", resume=True, precision="bf16")


def test_precisions_that_are_refused():
    with pytest.raises(errors.OptionError, match="precision='half'; expected 'float32', 'tf32' or 'bf16'"):
        train(make(), 1, precision="half")
    with pytest.raises(errors.OptionError, match="would change nothing on 'cpu'"):
        train(make(), 1, precision="tf32")
    with pytest.raises(errors.OptionError, match=r"parameters of float64\. Use dtype=torch\.float32"):
        train(make(), 1, precision="bf16", dtype=torch.float64)
    with pytest.raises(errors.OptionError, match="none was found in what is trained"):
        train(bm.MAML(TwoSites()), 1, precision="bf16")
    check_usable("tf32", torch.device("cuda"), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["maml", "last_layer"])
def test_compiled_steps_are_those_of_the_precision(kind):
    """One graph with its casts: equal to the eager bf16 run within bf16's rounding, and not to float32."""
    results = {}
    for name, options in {
        "eager": {"precision": "bf16"},
        "compiled": {"precision": "bf16", "compile": "inductor"},
        "wide": {},
    }.items():
        method = make(kind)
        result = train(method, 30, optimizer=lambda p: torch.optim.SGD(p, 1e-4), log_every=1, **options)
        results[name] = torch.tensor([h["loss"] for h in result.history])
        if name == "compiled":
            assert result.compiled.startswith("compiled")
    scale = results["wide"].abs()
    assert ((results["eager"] - results["compiled"]).abs() < ROUNDING * scale).all()
    assert ((results["wide"] - results["compiled"]).abs() > 1e-6 * scale).any()


# -- MetaSVI ------------------------------------------------------------------------------------------------------


class Shared(PyroModule):
    """A slope for each task on features of a network that they share."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = PyroModule[nn.Sequential](
                PyroModule[nn.Linear](1, 8), nn.Tanh(), PyroModule[nn.Linear](8, 1)
            )
        self.seen = []

    def forward(self, x, y=None, mask=None):
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            features = self.features(x).squeeze(-1)
            self.seen.append(features.dtype)
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(slope * features, 0.5), obs=y)


def guide(x, y=None, mask=None):
    loc = pyro.param("loc", torch.zeros(()))
    with bm.task_plate(x):
        pyro.sample("slope", dist.Normal(loc, 0.1))


def svi(model, precision, **options):
    return bm.MetaSVI(
        model, guide, lambda p: torch.optim.Adam(p, 1e-2), pyro.infer.Trace_ELBO(), precision=precision, **options
    )


def test_meta_svi_rounds_the_layers_of_modules():
    support = sinusoids().support
    losses = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model = Shared()
        trained = svi(model, precision)
        losses[precision] = [trained.step(support) for _ in range(5)] + [trained.evaluate_loss(support)]
        assert set(model.seen) == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any("forward" in m.__dict__ for m in model.modules())
    wide, lower = (torch.tensor(losses[p], dtype=torch.float64) for p in ("float32", "bf16"))
    assert ((wide - lower).abs() < 8 * ROUNDING * wide.abs()).all()
    assert ((wide - lower).abs() > 1e-7 * wide.abs()).all()


def test_meta_svi_refuses_what_it_cannot_round():
    support, net = sinusoids().support, Shared()

    def model(x, y=None, mask=None):
        return net(x, y, mask)

    with pytest.raises(errors.OptionError, match="let it be a PyroModule that has the network"):
        svi(model, "bf16").step(support)
    with pytest.raises(errors.OptionError, match="would change nothing on 'cpu'"):
        svi(net, "tf32").step(support)
    with pytest.raises(errors.OptionError, match="expected 'float32', 'tf32' or 'bf16'"):
        svi(net, "double")
