"""Tasks drawn from a model: their moments, what they are drawn from, and an encoder that is trained on them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm

NOISE, MEAN, SPREAD = 0.3, 0.7, 0.5
FLOAT64 = {"dtype": torch.float64}


def slopes(x, y=None, mask=None):
    """y = slope · x + noise, slope ~ N(0.7, 0.5²): all moments are known."""
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(x.new_tensor(MEAN), SPREAD))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), NOISE), obs=y)


def hierarchy(x, y=None, mask=None):
    """The same around a centre that is a global site."""
    centre = pyro.sample("centre", dist.Normal(x.new_zeros(()), 2.0))
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(centre, SPREAD))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), NOISE), obs=y)


def inputs(generator_seed=0, num_tasks=6, shots=5, targets=0.0, **options):
    """Tasks whose inputs do not change: 1, 2, …; ragged if lengths are given."""
    x = torch.arange(1.0, shots + 1, **FLOAT64).expand(num_tasks, shots).unsqueeze(-1)
    y = torch.full((num_tasks, shots), targets, **FLOAT64)
    first, rest = bm.Observations(x[:, :2], y[:, :2]), bm.Observations(x[:, 2:], y[:, 2:], **options)
    return bm.tasks.FixedTasks(bm.TaskBatch(first, rest), split="given")


def drawn(tasks, num_tasks=6, seed=0):
    return tasks.sample(num_tasks, support=2, query=3, generator=seed)


def union_y(batch):
    return batch.union().y


# -- what is drawn ------------------------------------------------------------------------------------------------


def test_targets_have_the_moments_of_the_prior_predictive():
    """Mean m x and covariance τ² x xᵀ + σ² I: support and query share a task's slope, and only that."""
    y = union_y(drawn(bm.SimulatedTasks(inputs(num_tasks=20_000), slopes), 20_000))
    x = torch.arange(1.0, 6.0, **FLOAT64)
    mean, covariance = MEAN * x, SPREAD**2 * x.outer(x) + NOISE**2 * torch.eye(5, **FLOAT64)
    error = (covariance.diagonal() / len(y)).sqrt()
    assert ((y.mean(0) - mean).abs() < 5 * error).all()
    # of a Gaussian's sample covariance: variance (c_ii c_jj + c_ij²) / n
    error = ((covariance.diagonal().outer(covariance.diagonal()) + covariance.square()) / len(y)).sqrt()
    assert ((y.T.cov() - covariance).abs() < 5 * error).all()
    # controls: without a shared slope, and without noise
    assert ((y.T.cov() - covariance.diagonal().diag()).abs() > 5 * error).any()
    assert ((y.T.cov() - SPREAD**2 * x.outer(x)).abs() > 5 * error).any()


def test_inputs_masks_and_covariates_stay_and_targets_are_not_seen():
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[2, 1:] = False
    tasks = bm.SimulatedTasks(inputs(mask=mask), slopes)
    batch, given = drawn(tasks, seed=3), drawn(inputs(mask=mask), seed=3)
    # FixedTasks shuffles its tasks: by the same generator, to the same order
    assert torch.equal(batch.support.x, given.support.x)
    assert torch.equal(batch.query.x, given.query.x)
    assert torch.equal(batch.query.mask, given.query.mask)
    assert (batch.task_id, batch.names, batch.population, tasks.num_tasks) == (None, None, None, None)
    other = drawn(bm.SimulatedTasks(inputs(mask=mask, targets=9.0), slopes), seed=3)
    assert torch.equal(union_y(batch), union_y(other))
    assert not torch.equal(union_y(batch), union_y(given))


def test_covariates_enter_the_prior():
    def program(x, y=None, mask=None, w=None):
        with bm.task_plate(x):
            level = pyro.sample("level", dist.Normal(w, 1e-3))
            with bm.shot_plate(x, mask):
                return pyro.sample("y", dist.Normal(level, 1e-3), obs=y)

    w = torch.arange(4.0).unsqueeze(-1)
    x, y = torch.zeros(4, 2, 1), torch.zeros(4, 2)
    batch = bm.TaskBatch(bm.Observations(x, y, w=w), bm.Observations(x, y, w=w))
    made = bm.SimulatedTasks(bm.tasks.FixedTasks(batch), program).sample(4, support=2, query=2, generator=0)
    torch.testing.assert_close(made.support.y, made.w.expand(4, 2), atol=0.02, rtol=0)


def test_a_seed_gives_the_same_tasks_and_none_twice():
    tasks = bm.SimulatedTasks(inputs(), hierarchy)
    assert torch.equal(union_y(drawn(tasks, seed=4)), union_y(drawn(tasks, seed=4)))
    assert not torch.equal(union_y(drawn(tasks, seed=4)), union_y(drawn(tasks, seed=5)))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(union_y(drawn(tasks, seed=generator)), union_y(drawn(tasks, seed=generator)))
    before = torch.random.get_rng_state()
    drawn(tasks)
    assert torch.equal(before, torch.random.get_rng_state())


# -- θ ------------------------------------------------------------------------------------------------------------


def centres(tasks, num_batches=200):
    """The centre that each batch seems to have: its mean slope, known to 0.5 / √50 and the noise's share of it."""
    batches = [tasks.sample(50, support=2, query=3, generator=seed) for seed in range(num_batches)]
    return torch.stack([(union_y(b) / b.union().x.squeeze(-1)).mean() for b in batches])


def test_global_sites_come_from_their_prior_one_for_each_batch():
    found = centres(bm.SimulatedTasks(inputs(num_tasks=50), hierarchy))
    assert abs(found.mean()) < 5 * 2.0 / 200**0.5
    assert abs(found.std() - 2.0) < 5 * 2.0 / 400**0.5


def test_a_method_is_simulated_from_its_own_posterior_of_theta():
    method = bm.Amortised(hierarchy, global_guide="normal")
    method.prepare(drawn(inputs()))
    with torch.no_grad():
        method.theta_guide.loc.fill_(3.0)
        method.theta_guide.log_scale.fill_(-1.0)
    tasks = bm.SimulatedTasks(inputs(num_tasks=50), method)
    found, spread = centres(tasks), torch.tensor(-1.0).exp()
    total = (spread**2 + SPREAD**2 / 50).sqrt()  # and a little noise
    assert abs(found.mean() - 3.0) < 5 * 1.1 * total / 200**0.5
    assert abs(found.std() - total) < 0.1 * total + 5 * total / 400**0.5
    with torch.no_grad():  # it is read at each draw
        method.theta_guide.loc.fill_(-3.0)
    assert centres(tasks, 5).max() < 0


def test_a_point_is_that_point():
    method = bm.Amortised(hierarchy)
    method.prepare(drawn(inputs()))
    with torch.no_grad():
        method.theta_guide.loc.fill_(3.0)
    found = centres(bm.SimulatedTasks(inputs(num_tasks=50), method), 40)
    assert (found - 3.0).abs().max() < 5 * 1.1 * SPREAD / 50**0.5


def test_given_draws_of_theta_are_taken_row_by_row():
    theta = torch.tensor([[-5.0], [5.0]])
    found = centres(bm.SimulatedTasks(inputs(num_tasks=50), hierarchy, theta=theta), 40)
    assert ((found.abs() - 5.0).abs() < 5 * 1.1 * SPREAD / 50**0.5).all()
    assert 5 < (found > 0).sum() < 35  # a fair coin


def pacoh(particles, **options):
    """PACOH on y = a x + b + noise with these particles: log noise, mean of a and b, log scale of a and b."""
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [], 1, activation="tanh"), bm.Gaussian(0.4, learn_scale=True))
    kind = "map" if len(particles) == 1 else "svgd"
    method = bm.PACOH(model, hyper_posterior=kind, num_particles=len(particles), **options).double()
    shapes = [(name, list(shape)) for name, shape in method.hyper_prior.flat.shapes.items()]
    assert shapes == [("likelihood.log_scale", []), ("prior.loc", [2]), ("prior.log_scale", [2])]
    method.prepare(drawn(inputs()))
    with torch.no_grad():
        method.particles.copy_(torch.tensor(particles))
    return method.eval()


def test_pacoh_is_simulated_from_what_it_has_learned():
    """MAP: with a level of scale e⁵ in its particle, tasks and zero-shot predictions spread alike.

    Control: the program's own first values, from which nothing was drawn that wide.
    """
    method = pacoh([[0.0, 0.0, 0.0, 0.0, 5.0]], posterior_particles=2000)
    count, expected = 2000, (math.exp(10.0) + 1 + 1) ** 0.5  # at x = 1
    made = drawn(bm.SimulatedTasks(inputs(num_tasks=count), method), count)
    simulated = made.support.y[:, 0].std()
    nothing = bm.Observations(made.support.x[:1, :0], made.support.y[:1, :0])
    predicted = method.adapt(nothing).predict(made.support.x[:1, :1], count, generator=1).std()
    for found in (simulated, predicted):
        assert abs(found / expected - 1) < 5 / (2 * count) ** 0.5
    assert method.program.prior.log_scale.exp().max() < 2, "the program's own values are the first"


def test_of_several_particles_each_batch_has_one():
    """Means of the level at −50 and 50: all tasks of a batch on one side, and the sides fall like a coin."""
    means = (-50.0, 50.0)
    method = pacoh([[0.0, 0.0, mean, 0.0, 0.0] for mean in means])
    tasks = bm.SimulatedTasks(inputs(num_tasks=20), method)
    levels = torch.stack([drawn(tasks, 20, seed=seed).support.y[:, 0] for seed in range(40)])
    positive = (levels > 0).double().mean(-1)
    assert set(positive.tolist()) == {0.0, 1.0}
    assert 5 < positive.sum() < 35
    assert (levels.abs() - 50).abs().max() < 6 * 3**0.5
    with torch.no_grad():  # read at each draw
        method.particles[:, 2] += 500.0
    assert drawn(tasks, 20).support.y.min() > 400


def test_pacoh_with_a_gp_is_simulated_from_a_particle():
    """The variance of y is that of its zero-shot prediction; control: the first values'."""
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1, activation="tanh"), bm.Gaussian(0.4, learn_scale=True))
    method = bm.PACOH(model, base_learner="gp", hyper_posterior="map").double()
    method.prepare(drawn(inputs()))
    with torch.no_grad():
        method.particles.add_(0.7)
    count = 4000
    made = drawn(bm.SimulatedTasks(inputs(num_tasks=count), method), count)
    nothing = bm.Observations(made.support.x[:1, :0], made.support.y[:1, :0])
    expected = method.adapt(nothing).predictive(made.support.x[:1]).variance[0]
    assert (made.support.y.var(0) / expected - 1).abs().max() < 5 * (2 / count) ** 0.5
    first = bm.GPPosterior.condition(method.program, nothing).predictive(made.support.x[:1]).variance[0]
    assert (first / expected - 1).abs().min() > 10 * (2 / count) ** 0.5


def test_labels_and_counts_are_drawn_as_such():
    cases = ((bm.likelihoods.Bernoulli(), 1, {0, 1}), (bm.likelihoods.Categorical(3), 3, {0, 1, 2}))
    for likelihood, outputs, kinds in cases:
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], outputs), likelihood, bm.priors.Normal(1.0))
        x = torch.randn(8, 6, 1, generator=torch.Generator().manual_seed(0))
        y = torch.zeros(8, 6, dtype=torch.long if outputs > 1 else torch.float32)
        given = bm.tasks.FixedTasks(bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y)))
        made = bm.SimulatedTasks(given, model).sample(8, support=6, query=6).union().y
        assert set(made.flatten().tolist()) == kinds
        assert made.dtype == y.dtype


# -- training -----------------------------------------------------------------------------------------------------


def test_an_encoder_trained_on_them_approaches_the_exact_posterior():
    """With everything else held: the KL to the exact posterior of tasks with other inputs falls below 0.05 nats."""

    def kl(method, batch):
        q = method.adapt(batch.support)
        x, y = batch.support.x.squeeze(-1), batch.support.y
        precision = 1 / SPREAD**2 + x.square().sum(-1) / NOISE**2
        exact = torch.distributions.Normal(
            (MEAN / SPREAD**2 + (x * y).sum(-1) / NOISE**2) / precision, precision.rsqrt()
        )
        return torch.distributions.kl_divergence(torch.distributions.Normal(q.loc[0, :, 0], q.root[0, :, 0, 0]), exact)

    def lines(num_tasks, shots, generator):
        x = 0.3 * torch.randn(num_tasks, shots, 1, generator=generator)
        return x, torch.zeros(num_tasks, shots)  # no slope of a real task is ever seen

    def model(x, y=None, mask=None):
        tau = pyro.param("tau", x.new_tensor(SPREAD))
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(x.new_tensor(MEAN), tau))
            with bm.shot_plate(x, mask):
                return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), NOISE), obs=y)

    own = bm.tasks.FunctionTasks(lines)
    method = bm.Amortised(model, "product", posterior="full", width=32, subsets=False)
    method.prepare(own.sample(4, support=3, query=3))
    tasks = bm.SimulatedTasks(own, method)
    test = tasks.sample(200, support=4, query=1, generator=77)
    assert kl(method, test).mean() > 0.2  # untrained
    method.requires_grad_(False)
    method.recognition.requires_grad_(True)
    bm.fit(
        method,
        tasks,
        steps=300,
        support=2,
        query=2,
        tasks_per_step=64,
        optimizer=lambda p: torch.optim.Adam(p, 1e-2),
        clip=10.0,
        schedule=bm.schedules.cosine(300),
        device="cpu",
        progress=False,
    )
    assert kl(method, test).mean() < 0.05
    (tau,) = method.program.parameters()
    assert float(tau) == pytest.approx(SPREAD)  # θ stayed


# -- bad input ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused():
    with pytest.raises(bm.errors.OptionError, match="inputs is a int"):
        bm.SimulatedTasks(3, slopes)
    with pytest.raises(bm.errors.ModelError, match="must be callable"):
        bm.SimulatedTasks(inputs(), "slopes")
    with pytest.raises(bm.errors.ShapeError, match=r"\[n, E\].*shape \[1\]"):
        bm.SimulatedTasks(inputs(), hierarchy, theta=torch.zeros(1))
    with pytest.raises(bm.errors.ShapeError, match="got list"):
        bm.SimulatedTasks(inputs(), hierarchy, theta=[[0.0]])
    with pytest.raises(bm.errors.ShapeError, match=r"shape \[2, 3\].*have 1 number"):
        drawn(bm.SimulatedTasks(inputs(), hierarchy, theta=torch.zeros(2, 3)))
    with pytest.raises(bm.errors.ModelError, match="has not seen data yet"):
        drawn(bm.SimulatedTasks(inputs(), bm.Amortised(slopes)))
    with pytest.raises(bm.errors.UnsupportedError, match=r"hyper_prior\.at\(method\.particles\[k\]\)"):
        bm.SimulatedTasks(inputs(), pacoh([[0.0] * 5]).program)
    labels = bm.DeepKernelModel(bm.nets.mlp(1, [4], 1), bm.likelihoods.Bernoulli())
    with pytest.raises(bm.errors.UnsupportedError, match="GP on labels"):
        drawn(bm.SimulatedTasks(inputs(), labels.double()))
    tasks = bm.SimulatedTasks(inputs(), slopes)
    drawn(tasks)
    tasks.inputs = bm.tasks.FunctionTasks(lambda n, s, g: (torch.randn(n, s, 3, generator=g), torch.zeros(n, s)))
    with pytest.raises(bm.errors.ShapeError, match="3 features"):
        drawn(tasks)


def test_an_infinite_draw_is_an_error():
    def wild(x, y=None, mask=None):
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 1.0))
            with bm.shot_plate(x, mask):
                return pyro.sample("y", dist.Normal((1e4 * slope).exp(), 1.0), obs=y)

    with pytest.raises(bm.errors.NonFiniteDataError, match="y is not finite"):
        drawn(bm.SimulatedTasks(inputs(), wild))
