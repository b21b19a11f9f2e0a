"""Pyro's AutoGuides over task parameters: for fixed tasks that are told apart, and no others."""

import dataclasses
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.train.known_tasks import fingerprints

F64 = torch.float64
NOISE = 0.5


def model(x, y=None, mask=None):
    """mu ~ N(0, 1), φ ~ N(mu, 0.8²), y ~ N(x · φ, 0.5²)."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(mu, x.new_full((2,), 0.8)).to_event(1))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal((x * phi).sum(-1), NOISE), obs=y)


def local(x, y=None, mask=None):
    """φ ~ N(0, 1) alone."""
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(()), x.new_ones(())))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(x[..., 0] * phi, NOISE), obs=y)


def tasks_batch(num_tasks=4, support=3, query=2, seed=0, first_id=10):
    generator = torch.Generator().manual_seed(seed)
    shots = support + query
    x = torch.randn(num_tasks, shots, 2, generator=generator, dtype=F64)
    x[..., 0] += 1
    phi = torch.randn(num_tasks, 1, 2, generator=generator, dtype=F64)
    y = (x * phi).sum(-1) + NOISE * torch.randn(num_tasks, shots, generator=generator, dtype=F64)
    ids = torch.arange(first_id, first_id + num_tasks)
    return bm.TaskBatch(
        bm.Observations(x[:, :support], y[:, :support]), bm.Observations(x[:, support:], y[:, support:]), ids
    )


def no_query(batch):
    empty = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    return dataclasses.replace(batch, query=empty)


def trained(svi, batches, steps, lr=0.05):
    """Steps with a rate that falls to a hundredth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(steps):
            svi.step(next(batches))
            svi.optimizer.param_groups[0]["lr"] = lr * 0.01 ** (step / steps)
    return svi


def meta_svi(model, guide, elbo=None, lr=0.05):
    return bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, lr), elbo or Trace_ELBO())


def shuffled(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield batch.tasks(torch.randperm(batch.num_tasks, generator=generator))


# -- truth --------------------------------------------------------------------------------------------------------


def exact_joint(observations):
    """Mean and covariance of (mu, φ_1, …) given everything, from the precision of the joint Gaussian."""
    tasks = observations.num_tasks
    precision = torch.zeros(2 + 2 * tasks, 2 + 2 * tasks, dtype=F64)
    right = torch.zeros(2 + 2 * tasks, dtype=F64)
    eye = torch.eye(2, dtype=F64)
    precision[:2, :2] = eye * (1 + tasks / 0.64)
    for task in range(tasks):
        own = slice(2 + 2 * task, 4 + 2 * task)
        x, y = observations.x[task], observations.y[task]
        precision[own, own] = eye / 0.64 + x.mT @ x / NOISE**2
        precision[:2, own] = precision[own, :2] = -eye / 0.64
        right[own] = x.mT @ y / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ right, covariance


def distance(posterior, mean, covariance):
    """Largest error of a mean and of a standard deviation, in standard deviations, and of a correlation."""
    draws = torch.cat([posterior.theta, posterior.u.flatten(1)], -1)
    sd = covariance.diagonal().sqrt()
    correlation = covariance / sd[:, None] / sd
    return (
        float(((draws.mean(0) - mean) / sd).abs().max()),
        float((draws.std(0) / sd).log().abs().max()),
        float((torch.corrcoef(draws.mT) - correlation).abs().max()),
    )


def test_a_full_covariance_reaches_the_exact_posterior_whatever_the_order():
    """Support and query together; each step has the tasks in another order, and the guide has its own."""
    batch, draws = tasks_batch(3), 300
    mean, covariance = exact_joint(batch.union())
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=2)
    svi = meta_svi(model, AutoMultivariateNormal(model), elbo)
    svi.step(batch)
    untrained = svi.posterior(batch, 100)
    trained(svi, shuffled(batch), 350, lr=0.1)
    posterior = svi.posterior(batch, draws, generator=1)
    assert posterior.support.shots == 5
    # 4 standard errors of 300 draws: of a mean .23, of a log deviation .16, of a correlation .23; and of training 0.07
    location, spread, correlation = distance(posterior, mean, covariance)
    assert location < 0.3
    assert spread < 0.23
    assert correlation < 0.3
    location, spread, _ = distance(untrained, mean, covariance)  # control
    assert location > 1
    assert spread > 0.5
    order = torch.tensor([2, 0, 1])
    turned = svi.posterior(batch.tasks(order), 20, generator=1)
    torch.testing.assert_close(turned.u, posterior.u[:20, order])
    for known in (batch, dataclasses.replace(batch, task_id=None)):  # without ids, by its data
        some = svi.posterior(known.tasks([1]), 20, generator=1)
        torch.testing.assert_close(some.u, posterior.u[:20, [1]])
    mean, covariance = exact_joint(batch.tasks(order).union())
    assert distance(posterior, mean, covariance)[0] > 1  # control: a task with another's posterior
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger])
def test_some_tasks_at_a_time_reach_the_exact_posterior(kind):
    """One parameter a task, so that a Normal is exact; a step has 3 of 7 tasks."""
    fixed = bm.tasks.FixedTasks(tasks_batch(7, first_id=40), split="random")
    generator = torch.Generator().manual_seed(3)
    batches = (fixed.sample(3, support=2, generator=generator) for _ in itertools.count())
    svi = trained(meta_svi(local, kind(local)), batches, 300, lr=0.2)
    batch = fixed.batch
    data = batch.union()
    precision = 1 + data.x[..., 0].square().sum(-1) / NOISE**2
    mean = (data.x[..., 0] * data.y).sum(-1) / NOISE**2 / precision
    posterior = svi.posterior(batch.tasks([6, 2, 0, 5]), 300, generator=0)
    u, rows = posterior.u.squeeze(-1), torch.tensor([6, 2, 0, 5])
    error = (u.mean(0) - mean[rows]) * precision[rows].sqrt()
    assert error.abs().max() < 4 / 300**0.5 + 0.1  # draws, and noise of the last steps
    assert (u.std(0) * precision[rows].sqrt()).log().abs().max() < 4 / 600**0.5 + 0.1
    turned = svi.posterior(batch.tasks([3, 1, 0, 2, 6, 5, 4]), 20, generator=0).u  # all, in another order
    torch.testing.assert_close(turned, svi.posterior(batch, 20, generator=0).u[:, [3, 1, 0, 2, 6, 5, 4]])
    wrong = (u.mean(0) - mean[:4]) * precision[:4].sqrt()
    assert wrong.abs().max() > 1  # control: of other tasks
    assert len(pyro.get_param_store()) == 0


def test_some_tasks_at_a_time_have_the_loss_of_all_on_average():
    """A point has no noise: the mean over all choices of 2 of 4 tasks is the loss of all, a hyperprior once in each."""
    batch = dataclasses.replace(tasks_batch(4), population=4)
    svi = meta_svi(model, AutoDelta(model))
    svi.evaluate_loss(batch.tasks([0, 1]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for pair in itertools.islice(itertools.cycle(itertools.combinations(range(4), 2)), 12):
            svi.step(batch.tasks(list(pair)))
    whole = svi.evaluate_loss(batch)
    each = [svi.evaluate_loss(batch.tasks(list(pair))) for pair in itertools.combinations(range(4), 2)]
    assert sum(each) / 6 == pytest.approx(whole, rel=1e-9)
    assert max(each) - min(each) > 0.1 * whole  # control: they differ
    assert svi.evaluate_loss(batch.tasks([3, 1, 0, 2])) == pytest.approx(whole, rel=1e-9)


def test_only_the_tasks_of_a_step_move():
    batch = dataclasses.replace(tasks_batch(4), population=4)
    guide = AutoNormal(local)
    svi = bm.MetaSVI(local, guide, lambda p: torch.optim.SGD(p, 1e-3), Trace_ELBO())
    svi.step(batch.tasks([2, 3]))  # rows 0 and 1 of the guide
    before = guide.locs.phi.detach().clone()
    svi.step(batch.tasks([0, 2]))  # rows 2 and 0
    moved = (guide.locs.phi.detach() != before).flatten()
    assert moved.tolist() == [True, False, True, False]
    assert guide.create_plates is None


# -- what it was trained on ---------------------------------------------------------------------------------------


def test_the_posterior_says_what_it_was_given():
    """Trained on supports, it may be judged on queries; trained on everything, it has no query left."""
    batch = tasks_batch()
    for given, shots in ((no_query(batch), 3), (batch.support, 3), (batch, 5), (batch.union(), 5)):
        svi = meta_svi(model, AutoDiagonalNormal(model))
        with torch.random.fork_rng():
            svi.step(given)
        assert svi.posterior(batch, 2).support.shots == shots
        assert svi.posterior(given, 2).support.shots == shots
    assert svi.posterior(batch.union(), 2).support.shots == 5
    with pytest.raises(errors.DataError, match="cannot be told"):
        svi.posterior(batch.support, 2)


def test_a_batch_without_ids_is_known_by_its_data():
    batch = dataclasses.replace(tasks_batch(), task_id=None)
    svi = meta_svi(model, AutoLowRankMultivariateNormal(model))
    copy = dataclasses.replace(batch, support=batch.support.with_y(batch.support.y.clone()))
    with torch.random.fork_rng():
        svi.step(batch)
        svi.step(copy)
        svi.step(batch.union())
        with pytest.raises(errors.DataError, match="no task_id and other data"):
            svi.step(tasks_batch(seed=1).union())
        with pytest.raises(errors.DataError, match="no task_id and other data"):
            svi.step(batch.tasks([1, 0, 2, 3]))
        with pytest.raises(errors.DataError, match="first step had no task_id"):
            svi.step(tasks_batch(seed=1))
        with pytest.raises(errors.ShapeError, match="knows only the tasks"):
            svi.step(batch.tasks([0, 1]))
    assert svi.steps == 3
    with pytest.raises(errors.DataError, match="knows only the tasks"):
        svi.posterior(tasks_batch(seed=1), 2)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta, AutoMultivariateNormal, AutoNormalMessenger])
def test_other_tasks_are_refused(kind):
    batch = tasks_batch()
    svi = meta_svi(model, kind(model))
    with torch.random.fork_rng():
        svi.step(batch)
        after = svi.state_dict()["params"]
        with pytest.raises(errors.DataError, match=r"task_id 50, 51, 52, 53.*ABML"):
            svi.step(tasks_batch(seed=1, first_id=50))
        with pytest.raises(errors.DataError, match=r"4 task\(s\) have other observations.*task_id 10"):
            svi.step(tasks_batch(seed=1))
        with pytest.raises(errors.DataError, match="have other observations"):
            svi.step(no_query(batch))
        with pytest.raises(errors.DataError, match="2 times"):
            svi.step(batch.tasks([0, 1, 1, 2]))
        with pytest.raises(errors.DataError, match="no task_id"):
            svi.step(tasks_batch(seed=1).union())
        with pytest.raises(errors.DataError, match="not among"):
            svi.posterior(tasks_batch(seed=1, first_id=50), 2)
        with pytest.raises(errors.DataError, match="other observations"):
            svi.posterior(tasks_batch(seed=1), 2)
    for name, value in svi.state_dict()["params"].items():
        torch.testing.assert_close(value, after[name])
    assert svi.steps == 1


def test_random_cuts_that_leave_something_out_are_refused():
    fixed = bm.tasks.FixedTasks(tasks_batch())
    svi = meta_svi(model, AutoNormal(model))
    generator = torch.Generator().manual_seed(0)
    batches = [fixed.sample(4, support=2, query=1, generator=generator) for _ in range(2)]
    with torch.random.fork_rng():
        svi.step(batches[0])
        with pytest.raises(errors.DataError, match="query=None"):
            svi.step(batches[1])


def test_some_tasks_for_a_guide_of_all():
    batch = tasks_batch()
    some = dataclasses.replace(batch, population=9)
    with pytest.raises(errors.UnsupportedError, match=r"4 of 9 tasks.*population=None"):
        meta_svi(model, AutoMultivariateNormal(model)).step(some)
    svi = meta_svi(model, AutoMultivariateNormal(model))
    with torch.random.fork_rng():
        svi.step(batch)
        with pytest.raises(errors.UnsupportedError, match="2 of the guide's 4"):
            svi.step(batch.tasks([0, 1]))
        normal = meta_svi(model, AutoNormal(model))
        normal.step(some)
        with pytest.raises(errors.DataError, match="guide's 9"):
            normal.step(dataclasses.replace(tasks_batch(6, first_id=50), population=9))


def test_a_plate_that_knows_nothing_of_the_others():
    def own_plate(x, y=None, mask=None):
        with pyro.plate("tasks", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(x.new_zeros(()), 1.0))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(x[..., 0] * phi, NOISE), obs=y)

    batch = tasks_batch()
    with pytest.raises(errors.PlateError, match=r"bm\.task_plate"):
        meta_svi(own_plate, AutoNormal(own_plate)).step(dataclasses.replace(batch, population=9))
    with torch.random.fork_rng():
        meta_svi(own_plate, AutoNormal(own_plate)).step(batch)


def test_compiled_elbos_take_all_tasks():
    batch = tasks_batch()
    full = [dataclasses.replace(part, mask=part.full_mask()) for part in (batch.support, batch.query)]
    batch = dataclasses.replace(batch, support=full[0], query=full[1])  # no None in what is compiled
    svi = meta_svi(local, AutoNormal(local), JitTrace_ELBO(ignore_jit_warnings=True))
    with torch.random.fork_rng():
        with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
            svi.step(batch)
        svi.step(batch)
        svi.step(batch.tasks([1, 0, 2, 3]))  # put into the guide's order
        with pytest.raises(errors.UnsupportedError, match="without Jit"):
            svi.step(batch.tasks([1, 0]))


def test_a_step_comes_first():
    with pytest.raises(errors.DataError, match="take a step first"):
        meta_svi(model, AutoNormal(model)).posterior(tasks_batch(), 2)
    guide = AutoNormal(local)
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        guide(tasks_batch(2).support.x, tasks_batch(2).support.y)
    with pytest.raises(errors.ShapeError, match=r"run on \{2\} tasks before"):
        meta_svi(local, guide).step(tasks_batch(4))


# -- guides without parameters for each task ----------------------------------------------------------------------


def amortised(x, y=None, mask=None):
    with bm.task_plate(x):
        scale = pyro.param("scale", torch.full((2,), 0.5, dtype=F64))
        pyro.sample("phi", dist.Normal((x * y.unsqueeze(-1)).mean(-2, keepdim=True), scale).to_event(1))


class Mixed(PyroModule):
    """A guide of a user's own with an AutoGuide inside."""

    def __init__(self, part, rest):
        super().__init__()
        self.part, self.rest = part, rest

    def forward(self, x, y=None, mask=None):
        self.part(x, y, mask)
        self.rest(x, y, mask)


def test_global_sites_alone_take_any_tasks():
    inside = Mixed(AutoNormal(poutine.block(model, hide=["phi"])), amortised)
    shared = AutoNormalMessenger(model, amortized_plates=("tasks",))
    for guide in (inside, shared):
        svi = meta_svi(model, guide)
        with torch.random.fork_rng():
            svi.step(tasks_batch())
            svi.step(tasks_batch(6, seed=1, first_id=50))
            svi.step(dataclasses.replace(tasks_batch(6, seed=1), population=30))
        assert svi.state_dict()["tasks"] is None
        assert svi.posterior(tasks_batch(2, seed=5), 3).u.shape == (3, 2, 2)


def test_an_autoguide_inside_a_guide_is_found():
    guide = Mixed(AutoNormal(poutine.block(model, expose=["phi"])), AutoDelta(poutine.block(model, hide=["phi"])))
    svi, batch = meta_svi(model, guide), tasks_batch()
    with torch.random.fork_rng():
        svi.step(batch)
        svi.step(batch.tasks([2, 1, 0, 3]))
        with pytest.raises(errors.DataError, match="not among"):
            svi.step(tasks_batch(first_id=50))
        with pytest.raises(errors.UnsupportedError, match="2 of the guide's 4"):
            svi.step(batch.tasks([0, 1]))
    posterior = svi.posterior(batch.tasks([3, 1]), 3, generator=0)
    torch.testing.assert_close(posterior.u, svi.posterior(batch, 3, generator=0).u[:, [3, 1]])


def test_a_model_of_another_form_with_global_sites_alone():
    def plain(data):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(data)):
            pyro.sample("obs", dist.Normal(level, 1.0), obs=data)

    svi = meta_svi(plain, AutoNormal(plain))
    with torch.random.fork_rng():
        assert svi.step(torch.ones(3)) > 0
        assert svi.step(torch.ones(5)) > 0

    def keyword(x, y=None, mask=None, extra=None):
        return local(x, y, mask)

    with pytest.raises(errors.OptionError, match="extra"):
        meta_svi(keyword, AutoNormal(keyword)).step(tasks_batch().support.x, extra=1)


# -- state and fingerprints ---------------------------------------------------------------------------------------


def test_the_state_holds_the_tasks(tmp_path):
    batch = dataclasses.replace(tasks_batch(5), population=5)
    make = lambda: meta_svi(local, AutoNormal(local))  # noqa: E731
    svi = make()
    with torch.random.fork_rng():
        for rows in ([4, 1], [0, 4], [3, 2]):
            svi.step(batch.tasks(rows))
        torch.save(svi.state_dict(), tmp_path / "svi.pt")
        again = make()
        again.evaluate_loss(batch.tasks([0, 1]))  # other rows than in the state
        again.load_state_dict(torch.load(tmp_path / "svi.pt", weights_only=True))
        torch.manual_seed(0)
        expected = svi.evaluate_loss(batch)
        torch.manual_seed(0)
        assert again.evaluate_loss(batch) == expected
    torch.testing.assert_close(again.posterior(batch, 3).u, svi.posterior(batch, 3).u)
    old = {k: v for k, v in svi.state_dict().items() if k != "tasks"}  # of an earlier version
    again.load_state_dict(old)


def test_fingerprints_see_the_data_and_not_their_order():
    batch = tasks_batch(6)
    prints = fingerprints(batch.union())
    assert len(prints.unique()) == 6
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    whole = batch.union()
    assert fingerprints(bm.Observations(whole.x[:, order], whole.y[:, order])).equal(prints)
    padded = bm.concatenate([no_query(tasks_batch(1, 9)), no_query(batch.tasks([2]))])
    assert fingerprints(padded.union())[1] == fingerprints(no_query(batch).union())[2]
    assert not (fingerprints(bm.Observations(whole.x[:, order], whole.y)) == prints).any()
    assert not (fingerprints(bm.Observations(whole.x.flip(-1), whole.y)) == prints).any()
    changed = whole.y.clone()
    changed[3, 1] *= 1 + 1e-15
    assert (fingerprints(whole.with_y(changed)) == prints).tolist() == [True] * 3 + [False] + [True] * 2
    twice = bm.Observations(torch.cat([whole.x] * 2, 1), torch.cat([whole.y] * 2, 1))
    assert not (fingerprints(twice) == prints).any()
    with_w = [bm.Observations(whole.x, whole.y, w=torch.full((6, 1), v)) for v in (0.0, -0.0, 1.0)]
    zero, minus, one = (fingerprints(o) for o in with_w)
    assert zero.equal(minus)
    assert not (zero == one).any()
