"""Laplace against the exact linear-Gaussian posterior and evidence, and its curvature against finite differences."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.curvature import factorise, hessian, jacobian
from tests.numerics import by_finite_differences
from tests.programs import LinearHierarchy, TwoSites, batch_of

F64 = torch.float64
KINDS = ["full", "ggn", "diagonal", "diagonal_ggn"]


def hierarchy(num_tasks=5, support=6, query=4):
    """A method on the linear-Gaussian hierarchy, its tasks, and their oracle."""
    mean, scale = torch.tensor([0.3, -0.2, 0.5], dtype=F64), torch.tensor([1.0, 1.5, 0.4], dtype=F64)
    oracle = bm.tasks.LinearGaussian(mean, torch.diag(scale**2), 0.7)
    return (
        LinearHierarchy(mean, scale, 0.7).double(),
        oracle.sample(num_tasks, support=support, query=query, generator=3),
        oracle,
    )


def by_differences(function, at, step=1e-4):
    """Hessian of ``[D]`` to a number, by second differences in float64."""
    size = len(at)
    eye = step * torch.eye(size, dtype=F64)
    found = torch.zeros(size, size, dtype=F64)
    for i in range(size):
        for j in range(size):
            corners = [function(at + a * eye[i] + b * eye[j]) * a * b for a in (1, -1) for b in (1, -1)]
            found[i, j] = sum(corners) / (4 * step**2)
    return found


# -- the linear-Gaussian hierarchy, where it is exact ---------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["full", "ggn"])
@pytest.mark.parametrize("solver", ["newton", "gradient"])
def test_posterior_of_the_linear_gaussian_hierarchy_is_exact(curvature, solver):
    program, batch, oracle = hierarchy()
    steps, rate = (1, 1.0) if solver == "newton" else (800, 0.2)
    method = bm.Laplace(program, inner_steps=steps, inner_lr=rate, solver=solver, curvature=curvature)
    posterior, exact = method.adapt(batch.support), oracle.posterior(batch.support)
    torch.testing.assert_close(posterior.loc[0], exact.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.covariance[0], exact.covariance_matrix, rtol=1e-8, atol=1e-8)
    u = posterior.draws(20).u
    torch.testing.assert_close(posterior.log_prob(u), exact.log_prob(u), rtol=1e-5, atol=1e-5)
    method.inner_steps, method.inner_lr = 1, 0.3  # control: not yet at the mode
    assert (method.adapt(batch.support).loc[0] - exact.mean).abs().max() > 1e-2


@pytest.mark.parametrize("curvature", ["full", "ggn"])
def test_evidence_of_the_linear_gaussian_hierarchy_is_exact(curvature):
    program, batch, oracle = hierarchy()
    method = bm.Laplace(
        program, inner_steps=1, inner_lr=1.0, solver="newton", curvature=curvature, objective="evidence"
    )
    exact = oracle.log_evidence(batch.union())
    torch.testing.assert_close(method.loss(batch).detach(), -exact.mean(), rtol=1e-10, atol=1e-10)
    method.curvature = "diagonal"  # control: the determinant of another matrix
    method.inner_steps, method.inner_lr, method.solver = 300, 0.2, "gradient"
    with torch.no_grad():
        assert abs(method.loss(batch).item() + exact.mean().item()) > 0.05


def test_gradient_of_the_evidence_is_that_of_the_exact_one():
    """Through the inner steps and through the curvature: the slope in the prior's mean and scale."""
    program, batch, _ = hierarchy()
    method = bm.Laplace(program, inner_steps=1, inner_lr=1.0, solver="newton", objective="evidence")
    method.loss(batch).backward()
    grads = {name: p.grad for name, p in method.named_parameters()}
    mean = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    log_scale = torch.tensor([1.0, 1.5, 0.4], dtype=F64).log().requires_grad_()
    everything = batch.union()
    covariance = everything.x @ torch.diag((2 * log_scale).exp()) @ everything.x.mT
    covariance = covariance + 0.49 * torch.eye(10, dtype=F64)
    marginal = torch.distributions.MultivariateNormal((everything.x @ mean), covariance)
    (-marginal.log_prob(everything.y).mean()).backward()
    found = {name.rpartition(".")[2]: value for name, value in grads.items()}
    torch.testing.assert_close(found["mean"], mean.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found["scale_unconstrained"], log_scale.grad, rtol=1e-8, atol=1e-10)


def test_diagonals_are_those_of_the_precision_and_miss_the_correlation():
    program, batch, oracle = hierarchy()
    exact = oracle.posterior(batch.support)
    for curvature in ("diagonal", "diagonal_ggn"):
        method = bm.Laplace(program, inner_steps=800, inner_lr=0.2, curvature=curvature)
        posterior = method.adapt(batch.support)
        assert isinstance(posterior, bm.NormalPosterior)
        torch.testing.assert_close(posterior.loc[0], exact.mean, rtol=1e-6, atol=1e-6)
        precision = exact.precision_matrix.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(posterior.scale[0], precision.rsqrt(), rtol=1e-8, atol=1e-8)
        assert (posterior.scale[0] - exact.stddev).abs().max() > 0.01  # control: not the marginal deviation


# -- the curvature --------------------------------------------------------------------------------------------------


def test_full_curvature_of_a_program_with_positive_and_global_sites():
    """Against second differences of the joint, for each draw of the global site."""
    observations = batch_of(3, 5, dtype=F64, ragged=True)
    method = bm.Laplace(TwoSites().double(), curvature="full")
    method.prepare(observations)
    theta = torch.tensor([[0.4], [-1.0]], dtype=F64)
    u = torch.randn(2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) - 0.5
    found = method.precision(u, observations, theta)
    for g in range(2):
        for t in range(3):

            def energy(v, g=g, t=t):
                moved = u.clone()
                moved[g, t] = v
                return -method.program.log_joint(moved, observations, theta)[g, t].detach()

            torch.testing.assert_close(found[g, t], by_differences(energy, u[g, t]), rtol=1e-5, atol=1e-5)
    method.curvature = "diagonal"
    torch.testing.assert_close(method.precision(u, observations, theta), found.diagonal(dim1=-2, dim2=-1))


def test_fisher_information_of_a_program_in_closed_form():
    """y ~ N(slope x, σ²) in (slope, log σ): diag(Σx²/σ², 2n), and the priors' own precisions; unlike the Hessian."""
    observations = batch_of(3, 5, dtype=F64, ragged=True)
    method = bm.Laplace(TwoSites().double())
    method.prepare(observations)
    theta = torch.tensor([[0.4], [-1.0]], dtype=F64)
    u = torch.randn(2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) - 0.5
    found = method.precision(u, observations, theta)
    square = torch.where(observations.mask, observations.x.squeeze(-1), 0.0).square().sum(-1)
    first = square * (-2 * u[..., 1]).exp() + 1.0
    second = (2.0 * observations.counts() + 0.25**-2).expand(2, 3)
    torch.testing.assert_close(found, torch.diag_embed(torch.stack([first, second], -1)), rtol=1e-9, atol=1e-9)
    method.curvature = "diagonal_ggn"
    torch.testing.assert_close(method.precision(u, observations, theta), torch.stack([first, second], -1))
    method.curvature = "full"  # control
    assert (method.precision(u, observations, theta) - found).abs().max() > 0.1


LIKELIHOODS = {
    "gaussian": (bm.Gaussian(0.5), 1, lambda g, s: torch.randn(*s, generator=g, dtype=F64)),
    "two outputs": (bm.Gaussian([0.5, 2.0]), 2, lambda g, s: torch.randn(*s, 2, generator=g, dtype=F64)),
    "heteroscedastic": (
        bm.likelihoods.HeteroscedasticGaussian(),
        2,
        lambda g, s: torch.randn(*s, generator=g, dtype=F64),
    ),
    "bernoulli": (bm.likelihoods.Bernoulli(), 1, lambda g, s: (torch.rand(*s, generator=g) < 0.4).to(F64)),
    "categorical": (bm.likelihoods.Categorical(3), 3, lambda g, s: torch.randint(3, s, generator=g).to(F64)),
    "poisson": (bm.likelihoods.Poisson(), 1, lambda g, s: torch.randint(5, s, generator=g).to(F64)),
}


def on_network(likelihood, outputs, targets, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [4], outputs, activation="tanh")
    generator = torch.Generator().manual_seed(5)
    y = targets(generator, (3, 6))
    observations = bm.Observations(batch_of(3, 6, dtype=F64).x, y, batch_of(3, 6, ragged=True).mask)
    method = bm.Laplace(bm.NeuralTaskModel(network, likelihood, bm.priors.Normal(0.5)).double(), **options)
    method.prepare(observations)
    u, _ = method.program.sample_prior(1, observations, 1)
    return method, observations, u


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gauss_newton_of_networks_two_ways(name):
    """Through the outputs, and as the Hessian of the divergence in φ; the diagonal is that of the matrix."""
    method, observations, u = on_network(*LIKELIHOODS[name])
    found = method.precision(u, observations)
    other = hessian(lambda v: method._divergence(u, v, observations, None), u)
    prior = torch.eye(u.shape[-1], dtype=F64) * 4.0
    torch.testing.assert_close(found, other + prior, rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(found).min() > 3.99  # the prior's precision, and never less
    method.curvature = "diagonal_ggn"
    torch.testing.assert_close(method.precision(u, observations), found.diagonal(dim1=-2, dim2=-1))
    method.curvature = "full"  # control
    assert (method.precision(u, observations) - found).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gaussian", "categorical", "poisson"])
def test_gauss_newton_is_the_hessian_where_outputs_are_linear(name):
    """For natural parameters that are linear in φ the two agree whatever y is (Martens 2020, section 9)."""
    likelihood, outputs, targets = LIKELIHOODS[name]
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], outputs), likelihood, bm.priors.Normal(0.7), task_modules="head")
    x, y = batch_of(3, 6, dtype=F64).x, targets(torch.Generator().manual_seed(5), (3, 6))
    method, observations = bm.Laplace(model.double()), bm.Observations(x, y)
    method.prepare(observations)
    u, _ = method.program.sample_prior(1, observations, 1)
    found = method.precision(u, observations)
    method.curvature = "full"
    torch.testing.assert_close(found, method.precision(u, observations), rtol=1e-9, atol=1e-9)


def test_operators_on_functions_with_known_derivatives():
    at = torch.randn(2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    square = matrix @ matrix.T
    found = hessian(lambda v: 0.5 * (v @ square * v).sum(-1) + v.pow(3).sum(-1), at)
    torch.testing.assert_close(found, square + torch.diag_embed(6 * at))
    torch.testing.assert_close(hessian(lambda v: v.pow(3).sum(-1) + v.prod(-1), at, diagonal=True), 6 * at)
    assert (hessian(lambda v: v.sum(-1), at) == 0).all()
    assert (hessian(lambda v: v.sum(-1), at, diagonal=True) == 0).all()
    torch.testing.assert_close(jacobian(lambda v: v @ matrix.T, at), matrix.expand(2, 3, 4, 4))
    point = at.clone().requires_grad_()  # a third derivative, through the point
    (third,) = torch.autograd.grad(hessian(lambda v: v.pow(3).sum(-1), point, create_graph=True).sum(), point)
    torch.testing.assert_close(third, torch.full_like(at, 6.0))
    precision = square.expand(2, 4, 4).clone()
    precision[1] = -precision[1]
    factor = factorise(precision, 1e-6)
    assert factor.failed.tolist() == [False, True]
    torch.testing.assert_close(factor.root()[0] @ factor.root()[0].T, torch.linalg.inv(square))
    torch.testing.assert_close(factor.log_det[0], torch.logdet(square))
    torch.testing.assert_close(factor.solve(at[:, 0])[0], torch.linalg.solve(square, at[0, 0]))
    singular = torch.zeros(1, 2, 2)
    singular[0, 0, 0] = 1.0
    assert factorise(singular, 0.0).failed.all()
    repaired = factorise(singular, 1e-3)
    torch.testing.assert_close(repaired.log_det, torch.tensor([1.0005 * 0.0005], dtype=F64).log())


# -- the losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["predictive", "evidence"])
@pytest.mark.parametrize("kind", ["program", "network full", "network ggn", "network diagonal_ggn"])
def test_meta_gradient_by_finite_differences(kind, objective):
    torch.manual_seed(0)
    if kind == "program":
        model, curvature = TwoSites().double(), "ggn"
    else:
        head = "head" if kind.endswith("full") else "all"
        network = bm.nets.mlp(1, [3], 1, activation="tanh")
        likelihood = bm.Gaussian(0.8, learn_scale=True)
        model = bm.NeuralTaskModel(network, likelihood, bm.priors.Normal(0.5), task_modules=head).double()
        curvature = kind.split()[1]
    batch = bm.TaskBatch(batch_of(2, 4, dtype=F64, ragged=True), batch_of(2, 3, seed=1, dtype=F64), population=2)
    solver = "newton" if kind == "network full" else "gradient"
    method = bm.Laplace(
        model,
        inner_steps=2,
        inner_lr=0.05,
        solver=solver,
        curvature=curvature,
        objective=objective,
        global_guide="normal",
    )
    method.prepare(batch)
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        for i in range(min(parameter.numel(), 3)):
            slope = by_finite_differences(method, batch, parameter, i, generator=5)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)
            checked += abs(slope) > 1e-3
    assert checked >= 3


def test_predictive_loss_is_the_exact_predictive():
    """With many draws, on the hierarchy: −log p(Q | S) of the oracle, within four standard errors."""
    program, batch, oracle = hierarchy(3, 6, 2)
    method = bm.Laplace(program, inner_steps=1, inner_lr=1.0, solver="newton", num_particles=4000)
    exact = oracle.predictive(batch.support, batch.query.x).log_prob(batch.query.y)
    with torch.no_grad():
        found = torch.stack([method.loss(batch, generator=seed) for seed in range(12)])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() + exact.mean()) < 4 * error
    method.inner_steps = 0  # control: the posterior around the prior's mean is another
    with torch.no_grad():
        assert abs(method.loss(batch) + exact.mean()) > 20 * error


def test_global_sites_have_a_posterior_each():
    observations = batch_of(4, 5, dtype=F64, ragged=True)
    method = bm.Laplace(TwoSites().double(), inner_steps=20, inner_lr=0.05, global_guide="normal")
    posterior = method.adapt(observations, num_theta=6)
    assert posterior.loc.shape == (6, 4, 2)
    assert posterior.covariance.shape == (6, 4, 2, 2)
    alone = bm.Laplace(TwoSites().double(), inner_steps=20, inner_lr=0.05)
    alone.prepare(observations)
    with torch.no_grad():
        alone.theta_guide.loc.copy_(posterior.theta[3])
    torch.testing.assert_close(alone.adapt(observations).loc[0], posterior.loc[3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone.adapt(observations).covariance[0], posterior.covariance[3], rtol=1e-9, atol=1e-12)
    assert (posterior.sample(12)["sigma"] > 0).all()


def test_precision_is_the_same_in_single_and_for_one_task():
    method, observations, u = on_network(*LIKELIHOODS["gaussian"])
    found = method.precision(u, observations)
    one = method.precision(u[:, 1:2], observations.tasks([1]))
    torch.testing.assert_close(one, found[:, 1:2], rtol=1e-10, atol=1e-10)
    single = method.float().precision(u.float(), observations.to(dtype=torch.float32))
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-3)


# -- what it refuses ------------------------------------------------------------------------------------------------


def hump(x, y=None, mask=None):
    """A likelihood whose curvature is negative away from its mode, and a second site that is harmless."""
    with bm.task_plate(x):
        calm = pyro.sample("calm", dist.Normal(x.new_zeros(()), 1.0))
        wild = pyro.sample("wild", dist.Normal(x.new_zeros(()), 3.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.StudentT(1.0, wild + 0 * calm, x.new_tensor(0.3)), obs=y)


def test_a_curvature_that_is_not_positive_definite_names_task_and_site():
    y = torch.tensor([[0.0, 0.1], [4.0, 4.1], [0.1, 0.0]], dtype=F64)
    observations = bm.Observations(torch.zeros(3, 2, 1, dtype=F64), y)
    for curvature, advice in (("full", "'ggn'"), ("diagonal", "'diagonal_ggn'")):
        method = bm.Laplace(hump, inner_steps=0, curvature=curvature)
        with pytest.raises(errors.UnsupportedError, match=f"task 1 .*site 'wild'.*{advice}"):
            method.adapt(observations)
        method.inner_steps, method.inner_lr = 300, 0.1  # at the mode all is well
        assert numbers_are_fine(method.adapt(observations))
        assert numbers_are_fine(bm.Laplace(hump, inner_steps=0, curvature=curvature).adapt(observations.tasks([0, 2])))


def numbers_are_fine(posterior):
    return all(value.isfinite().all() for value in posterior.state().values())


def test_a_prior_without_curvature_is_named():
    model = bm.NeuralTaskModel(torch.nn.Linear(3, 1), bm.Gaussian(0.5), "laplace").double()
    support = batch_of(2, 9, 3, dtype=F64)
    for curvature in ("ggn", "diagonal_ggn"):
        method = bm.Laplace(model, inner_steps=0, curvature=curvature)
        nothing = bm.Observations(support.x, support.y, torch.arange(9) < torch.tensor([[9], [0]]))
        with pytest.raises(errors.UnsupportedError, match=r"task 1 .*prior has no positive curvature"):
            method.adapt(nothing)
        assert numbers_are_fine(method.adapt(support))  # control: enough data


def test_a_likelihood_without_a_closed_fisher_information():
    observations = batch_of(2, 4, dtype=F64)
    with pytest.raises(errors.UnsupportedError, match=r"StudentT.*'full'"):
        bm.Laplace(hump).adapt(observations)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.likelihoods.StudentT(4.0, 0.5), "normal").double()
    with pytest.raises(errors.UnsupportedError, match="StudentT"):
        bm.Laplace(model).adapt(observations)


def test_more_parameters_than_a_covariance_can_hold():
    model = bm.NeuralTaskModel(torch.nn.Linear(20_000, 1), bm.Gaussian(0.5), "normal")
    observations = batch_of(3, 2, 20_000)
    gib = 3 * 20_001**2 * 8 / 2**30
    with pytest.raises(errors.UnsupportedError, match=rf"{gib:.3g} GiB for 3 tasks.*4 GiB.*diagonal_ggn"):
        bm.Laplace(model).adapt(observations)
    posterior = bm.Laplace(model, inner_lr=1e-5, curvature="diagonal_ggn").adapt(observations)
    assert posterior.scale.shape == (1, 3, 20_001)


def test_steps_that_diverge_are_named():
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.1), "normal").double()
    with pytest.raises(errors.NonFiniteDataError, match="diverged"):
        bm.Laplace(model, inner_steps=60, inner_lr=1e6).adapt(batch_of(2, 5, dtype=F64))


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "kfac"},
        {"solver": "lbfgs"},
        {"objective": "elbo"},
        {"inner_steps": -1},
        {"inner_steps": 2.5},
        {"inner_lr": 0.0},
        {"inner_lr": math.inf},
        {"num_particles": 0},
        {"jitter": -1e-3},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(errors.OptionError):
        bm.Laplace(TwoSites(), **options)


def test_a_start_without_a_density_is_refused():
    with pytest.raises(errors.UnsupportedError, match="Point"):
        bm.Laplace(bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.5), "point"))


def test_saved_and_read_again(tmp_path):
    method = bm.Laplace(TwoSites().double(), inner_steps=3)
    posterior = method.adapt(batch_of(2, 4, dtype=F64))
    posterior.save(tmp_path / "posterior")
    again = bm.load_posterior(tmp_path / "posterior", method.program)
    assert torch.equal(again.root, posterior.root)
