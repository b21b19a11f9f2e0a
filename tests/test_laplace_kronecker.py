"""The Kronecker-factored Laplace posterior against dense matrices, torch's densities and finite differences."""

import copy
import math

import pyro
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops import kronecker
from bayesmeta.ops.batched import FlatParameters
from bayesmeta.ops.curvature import jacobian
from bayesmeta.ops.kronecker import KroneckerPrecision, LinearLayers, ShiftedKronecker, separable_scale
from tests.numerics import by_finite_differences
from tests.programs import TwoSites, batch_of

F64 = torch.float64


def observations_of(targets, tasks=3, shots=6, features=2, ragged=True):
    generator = torch.Generator().manual_seed(5)
    data = batch_of(tasks, shots, features, dtype=F64, ragged=ragged)
    return bm.Observations(data.x, targets(generator, (tasks, shots)), data.mask)


LIKELIHOODS = {
    "gaussian": (bm.Gaussian(0.5), 1, lambda g, s: torch.randn(*s, generator=g, dtype=F64)),
    "two outputs": (bm.Gaussian([0.5, 2.0]), 2, lambda g, s: torch.randn(*s, 2, generator=g, dtype=F64)),
    "heteroscedastic": (
        bm.likelihoods.HeteroscedasticGaussian(),
        2,
        lambda g, s: torch.randn(*s, generator=g, dtype=F64),
    ),
    "categorical": (bm.likelihoods.Categorical(3), 3, lambda g, s: torch.randint(3, s, generator=g).to(F64)),
    "poisson": (bm.likelihoods.Poisson(), 1, lambda g, s: torch.randint(5, s, generator=g).to(F64)),
}


def network_of(outputs, hidden=(4, 4), activation="tanh", features=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.nets.mlp(features, hidden, outputs, activation=activation)


def on_network(name="gaussian", prior=None, network=None, shots=6, ragged=True, task_modules="all", **options):
    likelihood, outputs, targets = LIKELIHOODS[name]
    prior = bm.priors.Normal(0.5) if prior is None else prior
    network = network_of(outputs) if network is None else network
    model = bm.NeuralTaskModel(network, copy.deepcopy(likelihood), prior, task_modules=task_modules).double()
    observations = observations_of(targets, shots=shots, ragged=ragged)
    method = bm.Laplace(model, curvature="kronecker", **options)
    method.prepare(observations)
    noise = torch.randn(1, 3, model.layout.dim, dtype=F64, generator=torch.Generator().manual_seed(1))
    return method, observations, model.prior.loc.detach() + 0.5 * noise


def with_mask(observations, mask):
    return bm.Observations(observations.x, observations.y, mask)


def with_curvature(method, curvature, u, observations, theta=None):
    before, method.curvature = method.curvature, curvature
    found = method.precision(u, observations, theta)
    method.curvature = before
    return found


def blocks_of(method):
    """Where each layer lies in u, weights and bias together."""
    parts = list(method.program.blocks.items())
    stems = dict.fromkeys(name.rpartition(".")[0] for name, _ in parts)
    return [
        torch.cat([torch.arange(s.start, s.stop) for n, s in parts if n.rpartition(".")[0] == stem]) for stem in stems
    ]


def by_kron(method, u, observations, task, name="gaussian", swapped=False):
    """Σ ã ãᵀ / N ⊗ Σ Bᵀ F B of each layer of a tanh network for one task, one shot after the other, in u's order."""
    layers = [m for m in method.program.central_network() if isinstance(m, torch.nn.Linear)]
    weights = method.program.flat.views(u[0, task])
    dense = torch.zeros(u.shape[-1], u.shape[-1], dtype=F64)
    mask = observations.full_mask()[task]
    sums = [[0.0, 0.0] for _ in layers]
    for x in observations.x[task][mask]:
        taken, given, h = [], [], x
        for i in range(len(layers)):
            taken.append(torch.cat([h.detach(), torch.ones(1, dtype=F64)]))
            given.append((weights[f"{2 * i}.weight"] @ h + weights[f"{2 * i}.bias"]).detach().requires_grad_())
            h = given[-1].tanh() if i + 1 < len(layers) else given[-1]
        for i in range(len(layers)):

            def rest(s, i=i):
                for j in range(i + 1, len(layers)):
                    s = weights[f"{2 * j}.weight"] @ s.tanh() + weights[f"{2 * j}.bias"]
                return s

            back = torch.autograd.functional.jacobian(rest, given[i])
            sums[i][0] += torch.outer(taken[i], taken[i]) / mask.sum()
            sums[i][1] += back.T @ INFORMATION[name](method.program.likelihood, h.detach()) @ back
    for (a, g), index in zip(sums, blocks_of(method), strict=True):
        outputs, inputs = len(g), len(a)
        at = [o * inputs + i for o in range(outputs) for i in range(inputs - 1)]  # weights, then biases
        at = torch.tensor(at + [o * inputs + inputs - 1 for o in range(outputs)])
        block = torch.kron(a, g) if swapped else torch.kron(g, a)
        dense[index.unsqueeze(1), index] = block[at.unsqueeze(1), at]
    return dense


# -- the precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["linear", "sequential", "no bias", "head"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_one_linear_layer_with_gaussian_noise_is_exact(network, outputs):
    name = "gaussian" if outputs == 1 else "two outputs"
    torch.manual_seed(0)
    made = {
        "linear": torch.nn.Linear(2, outputs),
        "sequential": torch.nn.Sequential(torch.nn.Linear(2, outputs)),
        "no bias": torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(2, outputs, bias=False)),
        "head": network_of(outputs),
    }[network]
    method, observations, u = on_network(name, network=made, task_modules="head")
    found = method.precision(u, observations)
    torch.testing.assert_close(found, with_curvature(method, "ggn", u, observations), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, with_curvature(method, "full", u, observations), rtol=1e-10, atol=1e-10)
    padded = with_curvature(method, "ggn", u, with_mask(observations, None))
    assert (found - padded).abs().max() > 0.1  # control: the mask counts


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_one_observation_is_exact_within_each_layer(name):
    method, observations, u = on_network(name, shots=1, ragged=False)
    found, whole = method.precision(u, observations), with_curvature(method, "ggn", u, observations)
    kept = torch.zeros_like(found, dtype=torch.bool)
    for index in blocks_of(method):
        kept[..., index.unsqueeze(1), index] = True
    torch.testing.assert_close(found, torch.where(kept, whole, 0.0), rtol=1e-10, atol=1e-10)
    assert (whole - found).abs().max() > 1e-2  # control: layers do depend on one another
    method, observations, u = on_network(name)  # control: of several observations it is an approximation
    found, whole = method.precision(u, observations), with_curvature(method, "ggn", u, observations)
    assert ((whole - found) * kept).abs().max() > 1e-2


INFORMATION = {
    "gaussian": lambda likelihood, f: likelihood.scale.pow(-2).reshape(1, 1),
    "two outputs": lambda likelihood, f: likelihood.scale.pow(-2).diag(),
    "categorical": lambda likelihood, f: f.softmax(-1).diag() - torch.outer(f.softmax(-1), f.softmax(-1)),
    "poisson": lambda likelihood, f: f.exp().diag(),
}


@pytest.mark.parametrize("name", INFORMATION)
def test_factors_by_hand(name):
    """Closed Fisher information, one shot after the other, torch.kron; padding left out."""
    method, observations, u = on_network(name)
    prior = (-2 * method.program.prior.log_scale.detach()).exp().diag()
    found = method.precision(u, observations)
    for task in range(3):
        wanted = by_kron(method, u, observations, task, name) + prior
        torch.testing.assert_close(found[0, task], wanted, rtol=1e-9, atol=1e-9)
    padded = with_mask(observations, None)
    assert (method.precision(u, padded) - found).abs().max() > 1e-2  # control: with padding counted


def test_swapped_factors_are_another_matrix():
    """The control of the order: in square layers, where shapes alone would not tell."""
    features, width = 3, 4
    network = network_of(4, hidden=(4,), features=features)
    likelihood = bm.Gaussian([0.5, 1.0, 2.0, 3.0])
    model = bm.NeuralTaskModel(network, likelihood, bm.priors.Normal(0.5)).double()
    data = batch_of(3, 5, features, dtype=F64)
    observations = data.with_y(torch.randn(3, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(0)))
    method = bm.Laplace(model, curvature="kronecker")
    method.prepare(observations)
    u = model.prior.loc.detach().expand(1, 3, -1) * 2.0
    found = method.precision(u, observations)[0, 0] - 4.0 * torch.eye(u.shape[-1], dtype=F64)
    first = blocks_of(method)[0]  # 4 inputs with the bias, 4 outputs
    assert len(first) == width * (features + 1)
    for swapped in (False, True):
        wanted = by_kron(method, u, observations, 0, "two outputs", swapped)
        distance = (found - wanted)[first.unsqueeze(1), first].abs().max()
        assert (distance > 0.1) == swapped


def test_in_place_activations_spare_what_layers_give_and_data():
    torch.manual_seed(0)
    parts = [torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 5), torch.nn.ELU(), torch.nn.Linear(5, 1)]
    method, observations, u = on_network(network=torch.nn.Sequential(*copy.deepcopy(parts)))
    wanted = method.precision(u, observations)
    x = observations.x.clone()
    parts[1].inplace = parts[3].inplace = True
    method, observations, _ = on_network(network=torch.nn.Sequential(*parts))
    torch.testing.assert_close(method.precision(u, observations), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(observations.x, x)


def test_exposure_and_some_layers_shared():
    """The exposure is not an input; layers that all tasks share have no block."""
    torch.manual_seed(0)
    network = network_of(1, features=1)
    model = bm.NeuralTaskModel(
        network, bm.likelihoods.Poisson(exposure=0), bm.priors.Normal(0.5), task_modules=["2"]
    ).double()
    data = batch_of(3, 1, 2, dtype=F64)
    observations = bm.Observations(data.x.abs() + 0.1, data.y.abs().round())
    method = bm.Laplace(model, curvature="kronecker")
    method.prepare(observations)
    u = model.prior.loc.detach().expand(1, 3, -1) * 1.5
    assert u.shape[-1] == 20
    wanted = with_curvature(method, "ggn", u, observations)  # one shot, one layer: exact
    torch.testing.assert_close(method.precision(u, observations), wanted, rtol=1e-10, atol=1e-10)


# -- the prior ------------------------------------------------------------------------------------------------------


def test_a_scale_for_each_tensor_is_added_exactly():
    method, observations, u = on_network(prior=bm.priors.LayerScales(0.5))
    theta = torch.linspace(-2.0, 1.0, 12, dtype=F64).reshape(2, 6)
    u = u.expand(2, -1, -1)
    found = method.precision(u, observations, theta)
    sizes = torch.tensor(method.program.flat.sizes)
    for g in range(2):
        prior = (-2 * theta[g]).exp().repeat_interleave(sizes).diag()
        wanted = by_kron(method, u[:1], observations, 1) + prior
        torch.testing.assert_close(found[g, 1], wanted, rtol=1e-9, atol=1e-9)


def unequal(prior, spread=0.7):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        prior.log_scale += spread * torch.randn(prior.log_scale.shape, generator=generator, dtype=F64)


def test_other_scales_are_replaced_by_the_nearest_product_where_there_are_data():
    method, observations, u = on_network()
    unequal(method.program.prior)
    mask = observations.full_mask().clone()
    mask[2] = False
    observations = with_mask(observations, mask)
    log_scale = method.program.prior.log_scale.detach()
    found = method.precision(u, observations)
    for index, (outputs, inputs) in zip(blocks_of(method), [(4, 3), (4, 5), (1, 5)], strict=True):
        weights, bias = log_scale[index].split([outputs * (inputs - 1), outputs])
        matrix = torch.cat([weights.reshape(outputs, -1), bias.unsqueeze(-1)], -1)
        rows = torch.eye(outputs, dtype=F64).repeat_interleave(inputs, 0)
        design = torch.cat([rows, torch.eye(inputs, dtype=F64).repeat(outputs, 1)], -1)
        fitted = design @ torch.linalg.lstsq(design, matrix.reshape(-1, 1), driver="gelsd").solution
        fitted = fitted.reshape(outputs, inputs)
        flat = torch.cat([fitted[:, :-1].flatten(), fitted[:, -1]])
        torch.testing.assert_close(flat.sum(), log_scale[index].sum())  # the determinant
        prior = (-2 * flat).exp().diag()
        for task in range(2):
            wanted = by_kron(method, u, observations, task)[index.unsqueeze(1), index]
            torch.testing.assert_close(found[0, task][index.unsqueeze(1), index], wanted + prior, rtol=1e-9, atol=1e-9)
        near = (flat - log_scale[index]).abs().max()
        assert near < 1e-12 if outputs == 1 else near > 0.1  # one output: any scales are a product
    torch.testing.assert_close(found[0, 2], (-2 * log_scale).exp().diag(), rtol=1e-12, atol=1e-12)  # no data: itself


def test_separable_scales_stay():
    layers = LinearLayers(FlatParameters({"0.weight": torch.Size([3, 2]), "0.bias": torch.Size([3])}))
    rows, columns = torch.rand(5, 3, 1, dtype=F64) + 0.1, torch.rand(5, 1, 3, dtype=F64) + 0.1
    scale = layers.vector([rows * columns])
    near, t, r = separable_scale(layers, scale)
    torch.testing.assert_close(near, scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(r[0].unsqueeze(-1) * t[0].unsqueeze(-2), rows * columns, rtol=1e-12, atol=0)


@pytest.mark.parametrize("support", ["no shots", "all masked"])
def test_without_support_it_is_the_prior(support):
    method, observations, _ = on_network()
    unequal(method.program.prior)
    nothing = bm.Observations(observations.x, observations.y, torch.zeros(3, 6, dtype=torch.bool))
    if support == "no shots":
        nothing = bm.Observations(observations.x[:, :0], observations.y[:, :0])
    posterior, prior = method.adapt(nothing), method.program.prior.distribution()
    u = posterior.draws(7).u
    assert u.std() > 0
    torch.testing.assert_close(posterior.log_prob(u), prior.log_prob(u), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.covariance[0, 0], prior.base_dist.variance.detach().diag())


# -- the posterior --------------------------------------------------------------------------------------------------


def of_components():
    """Three draws of the global sites, unequal numbers of shots."""
    method, observations, _ = on_network(
        prior=bm.priors.LayerScales(0.5), network=network_of(1, (3,)), inner_lr=0.01, global_guide="normal"
    )
    return method, observations, method.adapt(observations, num_theta=3)


def test_log_prob_is_that_of_torch_with_the_dense_matrix():
    method, _, posterior = of_components()
    dense = posterior.precision.dense()
    assert dense.shape == (3, 3, method.program.layout.dim, method.program.layout.dim)
    normal = torch.distributions.MultivariateNormal(posterior.loc, precision_matrix=dense)
    u = posterior.draws(8).u
    each = normal.log_prob(u.unsqueeze(-3))
    torch.testing.assert_close(posterior.log_prob(u), each.logsumexp(-2) - math.log(3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.log_prob(u.reshape(2, 4, 3, -1)).flatten(0, 1), posterior.log_prob(u))
    one = method.adapt(posterior.support, num_theta=1)
    site = one.u_distribution()
    assert (site.batch_shape, site.event_shape) == ((3, 1), (method.program.layout.dim,))
    v = site.rsample((5,))
    torch.testing.assert_close(site.log_prob(v).squeeze(-1), one.log_prob(v.squeeze(-2)), rtol=1e-10, atol=1e-10)
    wide = site.expand((4, 3, 1))
    assert wide.rsample().shape == (4, 3, 1, method.program.layout.dim)
    torch.testing.assert_close(wide.log_prob(v[:4]), site.log_prob(v[:4]))


def test_draws_have_the_covariance():
    """The root times its transpose to rounding; the draws of each component within five standard errors."""
    method, observations, posterior = of_components()
    size, apart = method.program.layout.dim, torch.arange(3.0, dtype=F64)[:, None, None]
    state = posterior.state() | {"loc": posterior.loc + apart}  # components that lie apart
    posterior = bm.KroneckerNormalPosterior(method.program, observations, **state)
    covariance = torch.linalg.inv(posterior.precision.dense())
    eye = torch.eye(size, dtype=F64)[:, None, None].expand(-1, 3, 3, -1)
    root = posterior.precision.spread(eye).movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, covariance, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(posterior.covariance, covariance)
    product = posterior.precision.multiply(posterior.precision.solve(eye))
    torch.testing.assert_close(product, eye, rtol=1e-9, atol=1e-9)
    count = 3 * 20_000 + 2  # not a multiple of the components
    draws = posterior.draws(count, generator=4)
    assert draws.u.shape == (count, 3, size)
    assert torch.equal(draws.theta[4], posterior.theta[1])
    for g in range(3):
        away = draws.u[g::3] - posterior.loc[g]
        found = torch.einsum("sti,stj->tij", away, away) / len(away)
        diagonal = covariance[g].diagonal(dim1=-2, dim2=-1)
        error = ((diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2) + covariance[g].square()) / len(away)).sqrt()
        assert ((found - covariance[g]) / error).abs().max() < 5.0
        assert ((found - covariance[(g + 1) % 3]) / error).abs().max() > 10.0  # control: another component's


def test_as_a_guide():
    method, observations, _ = on_network(inner_steps=2)
    unequal(method.program.prior)
    batch = bm.TaskBatch(observations, observations)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = pyro.poutine.trace(method.guide).get_trace(batch)
        value = trace.nodes["phi"]["value"].squeeze(-2)
        assert trace.log_prob_sum().item() == pytest.approx(method.adapt(observations).log_prob(value).sum().item())
        for kind in (pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO):
            elbo = kind(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
            loss = elbo.differentiable_loss(method.model, method.guide, batch)
            method.zero_grad()
            loss.backward()
            assert method.program.prior.log_scale.grad.isfinite().all()
            assert method.program.prior.log_scale.grad.abs().sum() > 0


def test_saved_and_read_again(tmp_path):
    method, observations, posterior = of_components()
    posterior.save(tmp_path / "posterior")
    again = bm.load_posterior(tmp_path / "posterior", method.program)
    assert isinstance(again, bm.KroneckerNormalPosterior)
    assert torch.equal(again.draws(5, generator=1).u, posterior.draws(5, generator=1).u)
    other = bm.NeuralTaskModel(network_of(1, (5,)), bm.Gaussian(0.5), bm.priors.LayerScales(0.5)).double()
    with pytest.raises(errors.ShapeError, match=r"18 and 10 numbers|numbers a task"):
        bm.load_posterior(tmp_path / "posterior", other)
    with pytest.raises(errors.UnsupportedError, match="NeuralTaskModel; got a TaskProgram"):
        bm.KroneckerNormalPosterior(bm.TaskProgram(TwoSites()), observations, *posterior.state().values())


# -- derivatives ----------------------------------------------------------------------------------------------------


def factors(width, rank, seed):
    """A [2, width, rank] whose square has many eigenvalues 0."""
    return torch.randn(2, width, rank, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_derivatives_where_eigenvalues_are_equal():
    a, g = factors(4, 1, 0), factors(3, 1, 1)
    x = torch.randn(2, 2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def of(a, g):
        return ShiftedKronecker(a @ a.mT, g @ g.mT)

    assert torch.autograd.gradcheck(lambda x, a, g: of(a, g).inverse_root(x), (x, a, g))
    assert torch.autograd.gradcheck(lambda a, g: of(a, g).log_det(), (a, g))
    dense = torch.eye(12, dtype=F64) + torch.kron((g @ g.mT)[1], (a @ a.mT)[1])
    torch.testing.assert_close(of(a, g).log_det()[1], torch.logdet(dense))
    with torch.no_grad():  # exactly 1, 0, 0, 0, which is where the derivative of eigenvectors has 0 / 0
        a.zero_()[:, 0] = 1.0
    assert torch.autograd.gradcheck(lambda a: of(a, g).inverse_root(x), a)
    values, vectors = torch.linalg.eigh(a @ a.mT)
    (slope,) = torch.autograd.grad(((vectors * (1 + values).rsqrt().unsqueeze(-2)) @ vectors.mT)[..., 0].sum(), a)
    assert not slope.isfinite().all()  # control
    for value in (of(a, g).log_det().sum(), of(a, g).inverse_root(x).sum()):
        (first,) = torch.autograd.grad(value, a, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            first.sum().backward()


def test_derivatives_in_slices_are_the_same(monkeypatch):
    a, g = factors(5, 3, 0), factors(4, 2, 1)
    x = torch.randn(3, 2, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(2))

    def slopes():
        value = ShiftedKronecker(a @ a.mT, g @ g.mT).inverse_root(x).pow(3).sum()
        return torch.autograd.grad(value, (a, g))

    whole = slopes()
    for chunk in (1, 2 * 25 * 3):
        monkeypatch.setattr(kronecker, "MAX_CHUNK", chunk)
        for found, wanted in zip(slopes(), whole, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ["predictive", "evidence"])
@pytest.mark.parametrize("kind", ["normal", "layer_scales", "newton"])
def test_meta_gradient_by_finite_differences(kind, objective):
    torch.manual_seed(0)
    prior = bm.priors.LayerScales(0.5) if kind == "layer_scales" else bm.priors.Normal(0.5)
    likelihood = bm.Gaussian(0.8, learn_scale=True)
    model = bm.NeuralTaskModel(network_of(1, (3,), features=1), likelihood, prior).double()
    batch = bm.TaskBatch(batch_of(2, 2, dtype=F64, ragged=True), batch_of(2, 3, seed=1, dtype=F64), population=2)
    method = bm.Laplace(
        model,
        inner_steps=2,
        inner_lr=0.3 if kind == "newton" else 0.05,
        solver="newton" if kind == "newton" else "gradient",
        curvature="kronecker",
        objective=objective,
        global_guide="normal",
        num_particles=3,
    )
    method.prepare(batch)
    if kind != "layer_scales":
        unequal(prior, 0.3)
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        for i in range(min(parameter.numel(), 4)):
            slope = by_finite_differences(method, batch, parameter, i, generator=5)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)
            checked += abs(slope) > 1e-3
    assert checked >= 5


def test_evidence_of_a_linear_layer_is_exact():
    """One whole Newton step from the prior's mean: y ~ N(x̃ m, x̃ x̃ᵀ s² + σ²), and its slope in s and m."""
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(torch.nn.Linear(2, 1), bm.Gaussian(0.5), bm.priors.Normal(0.7)).double()
    unequal(model.prior)
    support, query = batch_of(3, 4, 2, dtype=F64), batch_of(3, 2, 2, seed=1, dtype=F64)
    batch = bm.TaskBatch(support, query)
    method = bm.Laplace(
        model, inner_steps=1, inner_lr=1.0, solver="newton", curvature="kronecker", objective="evidence"
    )
    method.loss(batch).backward()
    everything = batch.union()
    design = torch.cat([everything.x, torch.ones(3, 6, 1, dtype=F64)], -1)
    loc, log_scale = (p.detach().clone().requires_grad_() for p in (model.prior.loc, model.prior.log_scale))
    noise = model.likelihood.scale.square() * torch.eye(6, dtype=F64)
    covariance = design @ (2 * log_scale).exp().diag() @ design.mT + noise
    exact = torch.distributions.MultivariateNormal(design @ loc, covariance).log_prob(everything.y).mean()
    torch.testing.assert_close(method.loss(batch).detach(), -exact.detach(), rtol=1e-10, atol=1e-10)
    (-exact).backward()
    torch.testing.assert_close(model.prior.loc.grad, loc.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.prior.log_scale.grad, log_scale.grad, rtol=1e-8, atol=1e-10)


# -- size and precision ---------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                self.numbers = max(self.numbers, part.numel())
        return out


def test_memory_is_that_of_the_factors(monkeypatch):
    """A network whose covariance would take 5.8 GiB a task: nothing larger than the factors is ever made."""
    network = network_of(1, (165, 165), features=1)
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), bm.priors.Normal(0.1))
    batch = bm.TaskBatch(batch_of(1, 4), batch_of(1, 4, seed=1))
    with pytest.raises(errors.UnsupportedError, match=r"5\.[0-9]+ GiB.*'kronecker'"):
        bm.Laplace(model).adapt(batch.support)
    method = bm.Laplace(model, inner_steps=1, inner_lr=1e-3, curvature="kronecker", num_particles=2)
    entries = LinearLayers(model.flat).num_factor_entries
    monkeypatch.setattr(kronecker, "MAX_CHUNK", entries)
    with Largest() as largest:
        posterior = method.adapt(batch.support)
        posterior.log_prob(posterior.draws(2).u)
        method.loss(batch).backward()
    assert largest.numbers <= 1.1 * entries
    assert entries < model.layout.dim**2 / 1000
    with Largest() as largest:  # control: the mode does see
        torch.zeros(entries, 2)
    assert largest.numbers > 1.1 * entries
    assert model.prior.log_scale.grad.isfinite().all()


def test_single_precision_one_task_and_rank_deficient_factors():
    method, observations, u = on_network()
    precise = method.adapt(observations)
    one = method.adapt(observations.tasks([1]))
    for name, value in one.state().items():
        torch.testing.assert_close(value, precise.state()[name][:, 1:2], rtol=1e-10, atol=1e-12)
    single = method.float().adapt(observations.to(dtype=torch.float32))
    noise = torch.randn(1, 3, u.shape[-1], dtype=F64, generator=torch.Generator().manual_seed(0))
    spread = single.precision.spread(noise.float()).double()
    torch.testing.assert_close(spread, precise.precision.spread(noise), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(single.precision.log_det.double(), precise.precision.log_det, rtol=1e-4, atol=1e-3)
    assert single.precision.log_det.dtype == torch.float32


# -- what it refuses ------------------------------------------------------------------------------------------------


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.linear(x).exp()


def model_of(*modules, prior="normal", **options):
    return bm.NeuralTaskModel(torch.nn.Sequential(*modules), bm.Gaussian(0.5), prior, **options)


REFUSED = {
    "program": (TwoSites, "TaskProgram.*'ggn'"),
    "context": (lambda: bm.ContextTaskModel(network_of(1, features=3), bm.Gaussian(0.5), 2), "is a ContextTaskModel"),
    "layer norm": (
        lambda: model_of(torch.nn.Linear(1, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1)),
        "'phi'.*module '1'.*LayerNorm.*'1.weight', '1.bias' task-specific",
    ),
    "nested": (lambda: model_of(torch.nn.Linear(1, 3), network_of(1, features=3)), "module '1'.*Sequential"),
    "own": (lambda: bm.NeuralTaskModel(Own(), bm.Gaussian(0.5)), "is a Own.*'linear.weight'"),
    "laplace": (lambda: model_of(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1), prior="laplace"), "has Laplace"),
    "low_rank": (lambda: model_of(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1), prior="low_rank"), "LowRankNormal"),
    "mixture": (lambda: model_of(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1), prior="mixture"), "has Mixture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_have_no_kronecker_factors(name):
    make, words = REFUSED[name]
    with pytest.raises(errors.UnsupportedError, match=words):
        bm.Laplace(make(), curvature="kronecker")
    bm.Laplace(make())  # control: of another curvature they are served


def test_a_program_that_has_been_read_is_refused_by_its_sites():
    program = bm.TaskProgram(TwoSites())
    program.prepare(batch_of(2, 3))
    with pytest.raises(errors.UnsupportedError, match="'slope', 'sigma'"):
        bm.Laplace(program, curvature="kronecker")


def test_hooks_are_refused():
    network = network_of(1)
    network[1].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(errors.UnsupportedError, match=r"module '1'.*hooks"):
        bm.Laplace(bm.NeuralTaskModel(network, bm.Gaussian(0.5)), curvature="kronecker")


def test_factors_that_are_too_large_and_a_matrix_that_is():
    model = bm.NeuralTaskModel(torch.nn.Linear(20_000, 1), bm.Gaussian(0.5), "normal")
    method, observations = bm.Laplace(model, curvature="kronecker"), batch_of(3, 2, 20_000)
    gib = 3 * (20_001**2 + 1) * 8 / 2**30
    with pytest.raises(errors.UnsupportedError, match=rf"{gib:.3g} GiB for 3 tasks.*sides.*'diagonal_ggn'"):
        method.adapt(observations)
    model = bm.NeuralTaskModel(network_of(1, (170, 170), features=1), bm.Gaussian(0.5), bm.priors.Normal(0.1))
    method, observations = bm.Laplace(model, curvature="kronecker"), batch_of(2, 2)
    method.prepare(observations)
    with pytest.raises(errors.UnsupportedError, match="D²"):
        method.precision(model.prior.loc.detach().expand(1, 2, -1), observations)


def test_diverged_steps_and_likelihoods_without_a_closed_form():
    for steps in (60, 1):  # not finite at a step; or at the end, in the curvature
        model = bm.NeuralTaskModel(network_of(1, activation="relu"), bm.Gaussian(0.1), "normal")
        method = bm.Laplace(model, inner_steps=steps, inner_lr=1e6 if steps > 1 else 1e18, curvature="kronecker")
        with pytest.raises(errors.NonFiniteDataError, match="diverged"):
            method.adapt(batch_of(2, 5, 2))
    model = bm.NeuralTaskModel(network_of(1), bm.likelihoods.StudentT(4.0, 0.5), "normal")
    with pytest.raises(errors.UnsupportedError, match="StudentT"):
        bm.Laplace(model, curvature="kronecker").adapt(batch_of(2, 5, 2))


def test_layers_as_matrices_and_back():
    shapes = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3)}
    layers = LinearLayers(FlatParameters({name: torch.Size(shape) for name, shape in shapes.items()}))
    u = torch.arange(24.0).reshape(2, 12)
    first, second = layers.matrices(u)
    assert first[0].tolist() == [[0.0, 1.0, 6.0], [2.0, 3.0, 7.0], [4.0, 5.0, 8.0]]
    assert second[1].tolist() == [[21.0, 22.0, 23.0]]
    assert torch.equal(layers.vector([first, second]), u)
    assert layers.num_factor_entries == 9 + 9 + 9 + 1
    scale = torch.ones(12)
    none = [torch.zeros(side, side) for side in (3, 3)], [torch.zeros(side, side) for side in (3, 1)]
    assert torch.equal(KroneckerPrecision(layers, scale, *none).dense(), torch.eye(12))


def test_kronecker_is_nearer_to_the_dense_posterior_than_a_diagonal():
    """What it is for: predictions on new inputs have nearly the dense Gauss–Newton's variance, at the same point."""
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(network_of(1, (8, 8), features=1), bm.Gaussian(0.2), bm.priors.Normal(0.3)).double()
    support, query = batch_of(6, 10, dtype=F64), batch_of(6, 10, seed=1, dtype=F64)
    variances = {}
    for curvature in ("ggn", "kronecker", "diagonal_ggn"):
        posterior = bm.Laplace(model, inner_steps=50, inner_lr=1e-3, curvature=curvature).adapt(support)
        slope = jacobian(lambda v: model.output(v, query.x).squeeze(-1), posterior.loc[0])  # [tasks, shots, D]
        diagonal = curvature == "diagonal_ggn"
        covariance = torch.diag_embed(posterior.scale[0].square()) if diagonal else posterior.covariance[0]
        variances[curvature] = (slope @ covariance * slope).sum(-1)
    away = {kind: (variances[kind] / variances["ggn"]).log().abs().mean() for kind in variances}
    assert away["kronecker"] < 0.5 * away["diagonal_ggn"]
