"""Amortised inference: the exact posterior reached by training, Pyro's ELBO, densities of flows, what q may read."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt.amortised import batch_distribution
from bayesmeta.models.flows import ConditionalFlow
from tests.programs import LinearHierarchy, TwoSites, batch_of

F64 = torch.float64
FAMILIES = ["diagonal", "full", "flow"]


def ragged(tasks=4, dtype=F64, features=1):
    support = batch_of(tasks, 5, features, dtype=dtype, ragged=True)
    return bm.TaskBatch(support, batch_of(tasks, 4, features, seed=1, dtype=dtype, ragged=True), population=tasks)


def stirred(method, batch, size=0.2):
    """The method with weights that are no first ones."""
    method.prepare(batch)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.recognition.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return method


def train(method, tasks, steps, lr, *, tasks_per_step=64, support=3, query=3):
    method.prepare(tasks.sample(4, support=support, query=query))
    optimizer = torch.optim.Adam(method.recognition.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        method.loss(
            tasks.sample(tasks_per_step, support=support, query=query, generator=step), generator=step
        ).backward()
        optimizer.step()
        schedule.step()
    return method.eval()


# -- the exact posterior ------------------------------------------------------------------------------------------


class Bounded(bm.tasks.LinearGaussian):
    """Inputs from U(−2, 2): where a network has seen nothing, its KL is that of its extrapolation."""

    def sample(self, num_tasks, *, support, query, generator=None):
        everything = super().sample(num_tasks, support=support, query=query, generator=generator).union()
        noise = torch.Generator().manual_seed(0 if generator is None else generator + 1)
        x = everything.x.clone()
        x[..., 1:] = 4 * torch.rand(x[..., 1:].shape, generator=noise) - 2
        phi = torch.randn(num_tasks, x.shape[-1], 1, generator=noise)
        y = (x @ phi).squeeze(-1) + self.noise * torch.randn(x.shape[:2], generator=noise)
        first, rest = (bm.Observations(x[:, part], y[:, part]) for part in (slice(support), slice(support, None)))
        return bm.TaskBatch(first, rest)


def linear(size, noise=0.5):
    """Linear-Gaussian tasks whose θ is known, and the network model that generates them."""
    tasks = Bounded(torch.zeros(size), torch.eye(size), noise)
    model = bm.NeuralTaskModel(nn.Linear(size, 1, bias=False), bm.Gaussian(noise), bm.priors.Normal(1.0))
    with torch.no_grad():
        model.prior.loc.zero_()
    return tasks, model.requires_grad_(False)


def kl_to_exact(method, tasks, shots, num_tasks=400):
    """Mean over fresh tasks of KL(q ‖ exact), by closed form for Gaussians."""
    support = tasks.sample(num_tasks, support=shots, query=0, generator=999).support
    q, exact = batch_distribution(method.adapt(support)), tasks.posterior(support)
    if not isinstance(q, MultivariateNormal):
        q = MultivariateNormal(q.mean, scale_tril=q.stddev.diag_embed())
    return kl_divergence(q, exact).mean().item()


@pytest.mark.parametrize("encoder", ["mean", "product"])
def test_a_short_training_reaches_the_exact_posterior_of_a_level(encoder):
    """y = φ + noise: at any number of shots up to those of training, the subsets see to that."""
    tasks, model = linear(1, noise=1.0)
    method = bm.Amortised(model, encoder, width=16)
    method.prepare(tasks.sample(4, support=3, query=3))
    assert kl_to_exact(method, tasks, 3) > 1  # control: untrained
    train(method, tasks, 300, 0.02)
    for shots in (1, 3, 6):
        assert kl_to_exact(method, tasks, shots) < 0.05
    assert kl_to_exact(method, tasks, 0) < 1e-6  # and the prior


def test_without_subsets_other_numbers_of_shots_are_not_learned():
    tasks, model = linear(1, noise=1.0)
    method = train(bm.Amortised(model, "mean", width=16, subsets=False), tasks, 250, 0.02)
    assert kl_to_exact(method, tasks, 6) < 0.05
    assert kl_to_exact(method, tasks, 1) > 0.1


@pytest.mark.slow
def test_on_weights_the_mean_of_single_observations_learns_slowly_and_can_collapse():
    """As docs/amortised.md has it: with a small rate adapting helps; with a large one q ends at a narrow prior."""
    tasks, gains = bm.tasks.Sinusoid(noise=0.1), {}
    held_out = tasks.sample(60, support=10, query=40, generator=99)
    nothing = bm.TaskBatch(held_out.support.points(slice(0)), held_out.query)
    for steps, rate in ((1000, 3e-3), (2000, 1e-2)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = bm.nets.mlp(1, [16, 16], 1, activation="tanh")
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), "normal", task_modules="head")
        method = bm.Amortised(model, width=32)
        bm.fit(method, tasks, steps=steps, optimizer=lambda p, r=rate: torch.optim.Adam(p, r), progress=False)
        adapted, started = (bm.scores(method.adapt(b.support), b, num_samples=100) for b in (held_out, nothing))
        gains[rate] = started.per_task["nll"] - adapted.per_task["nll"]
    assert gains[3e-3].mean() > 2 * gains[3e-3].std() / 60**0.5
    assert gains[3e-3].mean() > 0.5
    assert gains[1e-2].abs().mean() < 0.2


@pytest.mark.slow
def test_a_full_gaussian_reaches_the_exact_posterior_of_a_line():
    tasks, model = linear(2)
    method = bm.Amortised(model, "product", posterior="full", num_particles=8)
    method.prepare(tasks.sample(4, support=3, query=3))
    assert kl_to_exact(method, tasks, 6) > 1  # control: untrained
    train(method, tasks, 800, 0.01)
    for shots in (1, 3, 6):
        assert kl_to_exact(method, tasks, shots) < 0.05
    # control: correlations are needed; the best diagonal Gaussian has the precision's diagonal
    precision = tasks.posterior(tasks.sample(400, support=1, query=0, generator=999).support).precision_matrix
    best = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))
    assert best.mean() > 0.05


@pytest.mark.parametrize("encoder", ["mean", "sum", "max", "attention", "transformer", "recurrent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_is_the_prior(encoder, family):
    batch = ragged()
    method = bm.Amortised(TwoSites().double(), encoder, posterior=family, width=16)
    method.prepare(batch)
    loc, scale = method.program.prior_moments(batch.support, method.theta_guide.centre())
    posterior = method.adapt(batch.support)
    z = torch.randn(20, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = loc + z * scale
    expected = torch.distributions.Normal(loc, scale).log_prob(u).sum(-1)
    # Pyro's spline keeps a slope of 0.999 at its ends in place of 1, in each coordinate of each of its layers
    off = 2e-3 * (1.0 + z.square()).sum(-1) if family == "flow" else torch.tensor(1e-10, dtype=F64)
    assert ((posterior.log_prob(u) - expected).abs() < off).all()
    other = stirred(method, batch).adapt(batch.support)  # control
    assert (other.log_prob(u) - expected).abs().max() > 0.1


@pytest.mark.parametrize("encoder", ["mean", "recurrent", "product"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_it_stays_the_prior_where_there_is_no_support(encoder, family):
    batch = ragged()
    mask = batch.support.mask.clone()
    mask[1] = False
    support = bm.Observations(batch.support.x, batch.support.y, mask)
    method = stirred(bm.Amortised(TwoSites().double(), encoder, posterior=family, width=16), batch)
    loc, scale = method.program.prior_moments(support, method.theta_guide.centre())
    u = loc + torch.randn(20, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * scale
    expected = torch.distributions.Normal(loc, scale).log_prob(u).sum(-1)
    found = method.adapt(support).log_prob(u)
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=1e-10, atol=1e-10)
    assert (found[:, 0] - expected[:, 0]).abs().max() > 0.05


# -- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["program", "network", "global"])
def test_pyros_elbo_agrees_with_the_loss(kind, family):
    """On support ∪ query, as the ELBO of method.model and method.guide."""
    batch = ragged(3)
    if kind == "program":
        model = LinearHierarchy(torch.zeros(1), torch.ones(1), 0.7).double()
    elif kind == "network":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = bm.nets.mlp(1, [3], 1, activation="tanh")
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), bm.priors.Normal(0.3), task_modules="head").double()
    else:
        model = TwoSites().double()
    method = bm.Amortised(model, posterior=family, width=8, num_particles=1, global_guide="normal")
    stirred(method, batch, 0.1)
    n, everything, elbo = 60, batch.union(), Trace_ELBO()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        ours = torch.stack([3 * method.loss(batch, generator=i) for i in range(n)])
        theirs = torch.tensor([elbo.loss(method.model, method.guide, everything) for _ in range(n)])
        method.recognition.head[-1].bias[0] += 8.0  # control: another guide has another ELBO
        other = torch.tensor([elbo.loss(method.model, method.guide, everything) for _ in range(n)])
    error = math.sqrt(float(ours.var() + theirs.var()) / n)
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    error = math.sqrt(float(other.var() + theirs.var()) / n)
    assert abs(float(other.mean() - theirs.mean())) > 6 * error
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_vectorised_particles_are_independent_draws(family):
    batch = ragged(3)
    method = bm.Amortised(TwoSites().double(), posterior=family, width=8, global_guide="normal")
    stirred(method, batch, 0.1)
    n, everything = 60, batch.union()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        one = torch.tensor([Trace_ELBO().loss(method.model, method.guide, everything) for _ in range(n)])
        many = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
        four = torch.tensor([many.loss(method.model, method.guide, everything) for _ in range(n // 2)])
    error = math.sqrt(float(one.var()) / n + float(four.var()) / len(four))
    assert abs(float(one.mean() - four.mean())) < 4 * error
    assert four.var() < one.var()


def by_finite_differences(method, batch, parameter, index):
    flat, values = parameter.data.view(-1), []
    for sign in (1, -1):
        flat[index] += sign * 1e-6
        values.append(method.loss(batch, generator=5).item())  # the same noise
        flat[index] -= sign * 1e-6
    return (values[0] - values[1]) / 2e-6


@pytest.mark.parametrize("objective", ["elbo", "predictive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_by_finite_differences(family, objective):
    batch = ragged()
    method = bm.Amortised(
        TwoSites().double(), posterior=family, objective=objective, width=8, global_guide="normal", num_particles=2
    )
    stirred(method, batch).eval()  # in training, the encoder's gradient is not that of the value
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        for index in (0, parameter.numel() - 1):
            slope = by_finite_differences(method, batch, parameter, index)
            found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[index].item()
            assert found == pytest.approx(slope, rel=1e-5, abs=1e-5)
            checked += abs(slope) > 1e-3
    assert checked >= 8


def test_subsets_train_the_encoder_alone_and_leave_the_value():
    batch = ragged()
    method = stirred(bm.Amortised(TwoSites().double(), width=8), batch)

    def gradients(training):
        method.train(training).zero_grad()
        value = method.loss(batch, generator=5)
        value.backward()
        return value.item(), {name: p.grad for name, p in method.named_parameters()}

    (value, with_parts), (plain, without) = gradients(True), gradients(False)
    assert value == pytest.approx(plain, rel=1e-12)
    for name in with_parts:
        if name.startswith("recognition"):
            continue
        torch.testing.assert_close(with_parts[name], without[name], rtol=1e-12, atol=1e-12)
    heads = [name for name in with_parts if name.startswith("recognition.head")]
    assert all(not torch.allclose(with_parts[name], without[name]) for name in heads)
    assert all(p.requires_grad for p in method.program.parameters())


def test_the_predictive_objective_by_hand():
    batch = ragged()
    method = bm.Amortised(LinearHierarchy(torch.zeros(1), torch.ones(1), 0.7).double(), objective="predictive", width=8)
    stirred(method, batch).eval()
    method.num_particles = 4000
    q = method.adapt(batch.support)
    mean, variance = q.loc[0, :, 0], q.scale[0, :, 0].square()
    total = torch.zeros(4, dtype=F64)
    for task in range(4):
        keep = batch.query.mask[task]
        x, y = batch.query.x[task, keep, 0], batch.query.y[task, keep]
        covariance = variance[task] * x.outer(x) + 0.49 * torch.eye(len(x), dtype=F64)
        total[task] = -MultivariateNormal(x * mean[task], covariance).log_prob(y)
    # Monte Carlo error of a log mean: below 0.03 for a likelihood whose log has standard deviation of order 1
    assert method.loss(batch, generator=0).item() == pytest.approx(total.mean().item(), abs=0.03)


# -- flows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_flows_log_determinant_by_autograd_and_its_inverse(size):
    torch.manual_seed(0)
    flow = ConditionalFlow(size, 3, hidden=8).double()
    noise, context = 2 * torch.randn(5, 7, size, dtype=F64), torch.randn(7, 3, dtype=F64)
    value, log_det = flow(noise, context)
    # the identity at first, but for Pyro's slope of 0.999 at the ends of a spline
    torch.testing.assert_close(value, noise, rtol=0, atol=1e-3)
    for parameter in flow.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    value, log_det = flow(noise, context)
    assert (value - noise).abs().max() > 0.5
    back, same = flow.inverse(value, context)
    torch.testing.assert_close(back, noise, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(same, log_det, rtol=1e-6, atol=1e-6)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda z: flow(z, context[i])[0], noise[i, i])  # noqa: B023
        expected = torch.linalg.slogdet(jacobian)
        assert expected.sign == 1
        torch.testing.assert_close(log_det[i, i], expected.logabsdet, rtol=1e-8, atol=1e-8)
    other, _ = flow(noise, context.flip(0))  # control: the context is read
    assert (other - value).abs().max() > 0.1


def test_a_flow_posterior_is_a_density_and_draws_from_it():
    """Its density integrates to 1 on a grid, and its draws have the mean that the density says."""
    method = bm.Amortised(LinearHierarchy(torch.zeros(2), torch.ones(2), 0.7).double(), posterior="flow", width=8)
    batch = ragged(3, features=2)
    posterior = stirred(method, batch, 0.1).adapt(batch.support)
    line = torch.linspace(-10, 10, 201, dtype=F64)
    grid = torch.cartesian_prod(line, line)
    density = posterior.log_prob(grid.unsqueeze(1).expand(-1, 3, -1)).exp() * (line[1] - line[0]) ** 2
    torch.testing.assert_close(density.sum(0), torch.ones(3, dtype=F64), rtol=0, atol=0.01)
    mean = (density.unsqueeze(-1) * grid.unsqueeze(1)).sum(0)
    u = posterior.draws(20_000).u
    error = u.std(0) / 20_000**0.5
    assert ((u.mean(0) - mean).abs() < 5 * error + 0.01).all()
    assert (mean.abs() > 0.05).any()


def test_a_flow_beats_a_gaussian_where_the_posterior_is_none_and_stays_below_the_evidence():
    """y = φ² + noise, which has two skewed modes; the evidence by quadrature."""

    def program(x, y=None, mask=None):
        with bm.task_plate(x):
            phi = pyro.sample("phi", dist.Normal(x.new_zeros(()), x.new_ones(())))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(phi.square() + 0 * x.squeeze(-1), 1.0), obs=y)

    x, y = torch.zeros(4, 3, 1), torch.full((4, 3), 2.0)
    batch = bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y))
    values = {}
    for family in ("diagonal", "flow"):
        method = bm.Amortised(program, posterior=family, width=8, subsets=False, num_particles=64)
        method.prepare(batch)
        optimizer = torch.optim.Adam(method.parameters(), 0.02)
        for step in range(150):
            optimizer.zero_grad()
            method.loss(batch, generator=step).backward()
            optimizer.step()
        method.num_particles = 10_000
        values[family] = method.loss(batch, generator=0).item()
    grid = torch.linspace(-6, 6, 2001, dtype=F64)
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    log_joint = normal.log_prob(grid) + 6 * normal.log_prob(2.0 - grid.square())
    evidence = (log_joint.logsumexp(0) + math.log(grid[1] - grid[0])).item()
    assert values["flow"] < values["diagonal"] - 0.1
    # the error of the estimate: its terms have standard deviations of order 1
    assert values["diagonal"] > -evidence - 0.03
    assert values["flow"] > -evidence - 0.03


# -- what q reads -------------------------------------------------------------------------------------------------


def test_with_random_global_sites_q_depends_on_their_draw():
    batch = ragged()
    for encoder in ("mean", "product"):
        method = stirred(bm.Amortised(TwoSites().double(), encoder, width=8, global_guide="normal"), batch)
        posterior = method.adapt(batch.support, num_theta=3)
        assert posterior.loc.shape == (3, 4, 2)
        loc, scale = method.program.prior_moments(batch.support, posterior.theta)
        offsets = (posterior.loc - loc) / scale  # beyond the prior's own dependence
        assert (offsets[0] - offsets[1]).abs().min() > 1e-6
        point = stirred(bm.Amortised(TwoSites().double(), encoder, width=8), batch)
        assert point.recognition.given == 0


def test_task_covariates_reach_q():
    batch = ragged()
    w = torch.randn(4, 2, dtype=F64)
    with_w = bm.Observations(batch.support.x, batch.support.y, batch.support.mask, w)
    network = bm.NeuralTaskModel(nn.Linear(1, 1), bm.Gaussian(0.5), "normal", covariates=2).double()
    method = bm.Amortised(network, width=8)
    method.prepare(with_w)
    stirred(method, with_w)
    first = method.adapt(with_w).loc
    other = method.adapt(bm.Observations(with_w.x, with_w.y, with_w.mask, w.flip(0))).loc
    assert (first - other).abs().min() > 1e-6
    with pytest.raises(errors.DataError):
        method.adapt(batch.support)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "option"),
    [
        (bm.likelihoods.Categorical(3), 3, ("classes", 3)),
        (bm.likelihoods.Bernoulli(), 1, ("classes", None)),
        (bm.likelihoods.Poisson(), 1, ("counts", True)),
    ],
)
def test_labels_and_counts_are_read_as_such(likelihood, outputs, option):
    model = bm.NeuralTaskModel(nn.Linear(2, outputs), likelihood, "normal")
    observations = batch_of(3, 6, 2)
    y = (torch.arange(18).reshape(3, 6) % max(outputs, 2)).float()
    method = bm.Amortised(model, width=8)
    batch = bm.TaskBatch(observations.with_y(y), observations.with_y(y))
    assert method.loss(batch).isfinite()
    assert getattr(method.recognition.encoder, option[0]) == option[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_posterior_is_saved_and_does_not_follow_later_training(family, tmp_path):
    batch = ragged()
    method = stirred(bm.Amortised(TwoSites().double(), posterior=family, width=8), batch)
    posterior = method.adapt(batch.support)
    posterior.save(tmp_path / "q.pt")
    u = posterior.draws(5).u
    before = posterior.log_prob(u)
    stirred(method, batch)
    assert torch.equal(posterior.log_prob(u), before)
    again = bm.load_posterior(tmp_path / "q.pt", method.program)
    torch.testing.assert_close(again.log_prob(u), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again.draws(5).u, u, rtol=1e-10, atol=1e-10)


def test_an_encoder_of_ones_own():
    class Moments(nn.Module):
        size = 3

        def forward(self, observations):
            keep = observations.full_mask().to(observations.x)
            y = observations.y * keep
            return torch.stack([keep.sum(-1), y.sum(-1), (y * observations.x.squeeze(-1)).sum(-1)], -1)

    batch = ragged()
    method = bm.Amortised(TwoSites().double(), Moments(), width=8)
    assert method.loss(batch).isfinite()
    assert method.config()["encoder"] == "Moments"
    Moments.size = 4
    with pytest.raises(errors.ShapeError, match=r"gave shape \[4, 3\]; expected \[4, 4\]"):
        bm.Amortised(TwoSites().double(), Moments(), width=8).loss(batch)
    Moments.size = None
    with pytest.raises(errors.OptionError, match="size"):
        bm.Amortised(TwoSites().double(), Moments(), width=8).loss(batch)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_what_q_cannot_reach():
    batch = ragged(dtype=torch.float32)

    def discrete(x, y=None, mask=None):
        with bm.task_plate(x):
            kind = pyro.sample("kind", dist.Bernoulli(x.new_tensor(0.5)))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(kind + 0 * x.squeeze(-1), 1.0), obs=y)

    with pytest.raises(errors.SiteError, match="marginalise a discrete"):
        bm.Amortised(discrete).loss(batch)

    def of_each_shot(x, y=None, mask=None):
        with bm.task_plate(x):
            level = pyro.sample("level", dist.Normal(x.new_zeros(()), 1.0))
            with bm.shot_plate(x, mask):
                error = pyro.sample("error", dist.Normal(0 * x.squeeze(-1), 1.0))
                pyro.sample("y", dist.Normal(level + error, 1.0), obs=y)

    with pytest.raises(errors.PlateError, match="'error' is inside the shot plate"):
        bm.Amortised(of_each_shot).loss(batch)

    def of_no_task(x, y=None, mask=None):
        level = pyro.sample("level", dist.Normal(x.new_zeros(()), 1.0))
        with bm.task_plate(x), bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(level + 0 * x.squeeze(-1), 1.0), obs=y)

    with pytest.raises(errors.ModelError, match="nothing to adapt"):
        bm.Amortised(of_no_task).loss(batch)
    context = bm.ContextTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(), 0)
    with pytest.raises(errors.UnsupportedError, match="size 0"):
        bm.Amortised(context).loss(batch)
    gp = bm.DeepKernelModel(bm.nets.mlp(1, [4], 1), bm.Gaussian())
    with pytest.raises(errors.UnsupportedError):
        bm.Amortised(gp).loss(batch)
    with pytest.raises(errors.UnsupportedError, match="Point"):
        bm.Amortised(bm.NeuralTaskModel(nn.Linear(1, 1), bm.Gaussian(), "point"))
    product = bm.encoders.ProductEncoder(1, 1, 3)
    with pytest.raises(errors.ShapeError, match="latent of size 3; the model has 2"):
        bm.Amortised(TwoSites(), product).loss(batch)
    with pytest.raises(errors.OptionError, match="covariance='diagonal'"):
        bm.Amortised(TwoSites(), bm.encoders.ProductEncoder(1, 1, 2), posterior="full").loss(batch)
    with pytest.raises(errors.ShapeError, match=r"reads 2 feature\(s\)"):
        bm.Amortised(TwoSites(), bm.encoders.PooledEncoder(2)).loss(batch)
    with pytest.raises(errors.ShapeError, match="here there are 0"):
        bm.Amortised(TwoSites(), bm.encoders.PooledEncoder(1, given=2)).loss(batch)
    wide = bm.NeuralTaskModel(bm.nets.mlp(1, [64, 64], 1), bm.Gaussian(), "normal")
    with pytest.raises(errors.UnsupportedError, match="limit is 1000000"):
        bm.Amortised(wide, posterior="full").loss(batch)
    with pytest.raises(errors.ShapeError, match="max_shots=4"):
        bm.Amortised(TwoSites(), "transformer", max_shots=4).loss(batch)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encoder": "median"}, "Unknown encoder 'median'"),
        ({"posterior": "low_rank"}, "Unknown posterior 'low_rank'"),
        ({"objective": "likelihood"}, "Unknown objective 'likelihood'"),
        ({"num_particles": 0}, "num_particles"),
        ({"width": 0}, "width"),
        ({"encoder": nn.Linear(1, 1), "max_shots": 3}, "your own encoder"),
    ],
)
def test_unknown_options(options, match):
    with pytest.raises(errors.OptionError, match=match):
        bm.Amortised(TwoSites(), **options)


def test_the_guide_and_adapt_see_the_support_alone():
    batch = ragged()
    method = stirred(bm.Amortised(TwoSites().double(), width=8), batch)
    with pytest.raises(errors.OptionError, match="support alone"):
        method.adapt(batch)
    other = bm.TaskBatch(batch.support, batch.query.with_y(batch.query.y + 3.0), population=4)

    def sites(b):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return pyro.poutine.trace(method.guide).get_trace(b).nodes["slope"]["value"]

    assert torch.equal(sites(batch), sites(other))
    moved = bm.TaskBatch(batch.support.with_y(batch.support.y + 3.0), batch.query, population=4)
    assert not torch.equal(sites(batch), sites(moved))
