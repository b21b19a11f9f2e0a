"""Autoregressive prediction: the joint of exact methods in any order, draws of a GP, what it costs, bad input."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors

F64 = torch.float64
TASKS, SHOTS, QUERY = 3, 4, 5


def gp_batch(ragged=False, query=QUERY, tasks=TASKS):
    batch = bm.tasks.GPTasks(length_scale=0.8).sample(tasks, support=SHOTS, query=query, generator=3)
    support, query = (part.to(dtype=F64) for part in (batch.support, batch.query))
    if ragged:
        support = bm.Observations(support.x, support.y, torch.arange(SHOTS) < torch.tensor([[2], [0], [4]]))
        query = bm.Observations(
            query.x, query.y, torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]) == 1
        )
    return bm.TaskBatch(support, query)


def deep_kernel():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.3), prior="point").double()
    return bm.DeepKernel(model, inputs="raw")


class AnalyticDecoder:
    """What a conditional neural process tends to: the exact conditional of a GP at each point by itself."""

    gp = bm.tasks.GPTasks(length_scale=0.8)

    def adapt(self, support, *, generator=None):
        return AnalyticPosterior(support)


class AnalyticPosterior:
    def __init__(self, support):
        self.support = support

    def predictive(self, x, joint=False):
        return AnalyticDecoder.gp.marginals(self.support, x.x)


class WithoutClosedForm:
    """A method whose posterior is asked for draws alone."""

    def __init__(self, method):
        self.method = method

    def adapt(self, support, *, generator=None):
        posterior = self.method.adapt(support, generator=generator)

        def refuse(x, *, joint=False):
            raise errors.NoClosedFormError("asked for draws alone")

        posterior.predictive = refuse
        return posterior


def last_layer(outputs=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [5], outputs)
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.3), bm.priors.Normal(1.0), task_modules="2").double()
    return bm.BayesianLastLayer(model)


ORDERS = {
    "given": "given",
    "random": "random",
    "one": torch.tensor([4, 2, 0, 1, 3]),
    "each": torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]]),
}


# -- density ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [deep_kernel, last_layer])
def test_of_an_exact_method_it_is_the_joint_density_in_any_order(make, order):
    method, batch = make(), gp_batch()
    found = bm.autoregressive(method, batch.support).log_likelihood(batch.query, order=ORDERS[order])
    posterior = method.adapt(batch.support)
    expected = posterior.predictive(batch.query.x, joint=True).log_prob(batch.query.y)
    # a deep kernel adds 1e-8 to the variances of the function at what it conditions on, which then are not the same
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 if make is last_layer else 1e-6)
    # negative control: the product of the marginals, every target blind to the others
    marginal = posterior.predictive(batch.query.x).log_prob(batch.query.y).sum(-1)
    assert (marginal - expected).abs().min() > 1e-3


@pytest.mark.parametrize("chunk", [None, 1, 2, 7])
def test_padding_counts_nothing_and_chunks_change_nothing(chunk):
    """The oracle's evidence of ragged tasks: without support, without targets, with padding in the middle."""
    batch, gp = gp_batch(ragged=True), AnalyticDecoder.gp
    found = bm.autoregressive(AnalyticDecoder(), batch.support, chunk=chunk).log_likelihood(batch.query)
    expected = gp.log_evidence(batch.union()) - gp.log_evidence(batch.support)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found[2] == 0
    other = bm.Observations(batch.query.x + 1, batch.query.y + 9, batch.query.mask)
    assert (bm.autoregressive(AnalyticDecoder(), batch.support).log_likelihood(other) - found)[:2].abs().min() > 0.1


def test_what_stands_at_padding_does_not_count():
    batch = gp_batch(ragged=True)
    query, keep = batch.query, batch.query.mask
    moved = bm.Observations(torch.where(keep[..., None], query.x, 7.0), torch.where(keep, query.y, -50.0), keep)
    predict = bm.autoregressive(deep_kernel(), batch.support)
    first, second = (predict.log_likelihood(q, order="given") for q in (query, moved))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def trained_by_hand(method, batch, order):
    """Σ log q(y_i | S, y_<i), one target and one task at a time."""
    total = torch.zeros(batch.num_tasks, dtype=F64)
    for task in range(batch.num_tasks):
        support, query = (part.tasks([task]) for part in (batch.support, batch.query))
        for place in order:
            one = bm.Observations(query.x[:, [place]], query.y[:, [place]])
            total[task] += method.adapt(support).predictive(one).log_prob(one.y).sum()
            support = bm.union(support, one)
    return total


@pytest.mark.parametrize("name", ["maml", "conditional"])
def test_of_an_inexact_method_the_order_counts_and_is_the_one_asked_for(name):
    batch = gp_batch()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        likelihood = bm.likelihoods.HeteroscedasticGaussian(0.01)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [6], 2), likelihood, "point").double()
        method = bm.MAML(model, inner_lr=0.3) if name == "maml" else bm.ConditionalNeuralProcess(model, width=8)
        method.prepare(batch)
        for parameter in method.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    predict, order = bm.autoregressive(method, batch.support), [2, 0, 4, 1, 3]  # not its own inverse
    found = predict.log_likelihood(batch.query, order=torch.tensor(order))
    torch.testing.assert_close(found, trained_by_hand(method, batch, order), rtol=1e-9, atol=1e-9)
    given = predict.log_likelihood(batch.query, order="given")
    torch.testing.assert_close(given, trained_by_hand(method, batch, range(QUERY)), rtol=1e-9, atol=1e-9)
    assert (given - found).abs().min() > 1e-6


def test_several_orders_are_a_mixture():
    """Of two points there are two orders; among 400 random ones each is as frequent as the other, up to chance.

    With the small noise the two differ by more than a nat, so that a mean of logs is no share near one half.
    """
    batch = gp_batch(query=2, tasks=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [6], 1), bm.Gaussian(0.1), "point").double()
    method = bm.MAML(model, inner_lr=0.005)
    predict = bm.autoregressive(method, batch.support)
    there, back = (predict.log_likelihood(batch.query, order=torch.tensor(o)).item() for o in ([0, 1], [1, 0]))
    found = predict.log_likelihood(batch.query, num_orders=400, generator=1).item()
    low, high = math.exp(min(there, back)), math.exp(max(there, back))
    share = (math.exp(found) - low) / (high - low)  # of the orders that are the better one
    assert abs(share - 0.5) < 4 * 0.5 / 20
    assert abs(there - back) > 1
    geometric = (math.exp((there + back) / 2) - low) / (high - low)  # control: the mean of the logs
    assert abs(geometric - 0.5) > 4 * 0.5 / 20


def test_without_a_closed_form_the_density_is_a_mean_over_draws():
    method, batch = last_layer(), gp_batch()
    exact = bm.autoregressive(method, batch.support).log_likelihood(batch.query)
    sampled = bm.autoregressive(WithoutClosedForm(method), batch.support)
    found = torch.stack([sampled.log_likelihood(batch.query, num_samples=2000, generator=i) for i in range(10)])
    error = found.std(0) / 10**0.5
    assert error.max() < 0.1
    assert ((found.mean(0) - exact).abs() < 4 * error + 0.01).all()


# -- draws --------------------------------------------------------------------------------------------------------


def moments(draws):
    """Mean and covariance of draws ``[n, M]``, and the standard errors of both."""
    n, mean = len(draws), draws.mean(0)
    products = (draws - mean).unsqueeze(-1) * (draws - mean).unsqueeze(-2)
    return mean, products.mean(0), draws.std(0) / n**0.5, products.std(0) / n**0.5


@pytest.mark.parametrize("order", ["random", "given", "each"])
@pytest.mark.parametrize("kind", ["gp", "analytic", "draws"])
def test_draws_have_the_joint_mean_and_covariance(kind, order):
    batch = gp_batch()
    if kind == "analytic":
        method, gp = AnalyticDecoder(), AnalyticDecoder.gp
        exact = gp.predictive(batch.support, batch.query.x)
    else:
        method = deep_kernel() if kind == "gp" else last_layer()
        exact = method.adapt(batch.support).predictive(batch.query.x, joint=True)
        method = WithoutClosedForm(method) if kind == "draws" else method
    y = bm.autoregressive(method, batch.support).predict(batch.query, 4000, order=ORDERS[order], generator=5)
    assert y.shape == (4000, TASKS, QUERY)
    for task in range(TASKS):
        mean, covariance, mean_error, covariance_error = moments(y[:, task])
        assert ((mean - exact.mean[task]).abs() < 4.5 * mean_error).all()
        assert ((covariance - exact.covariance_matrix[task]).abs() < 4.5 * covariance_error).all()


def test_independent_draws_miss_the_covariance():
    """Negative control of the test above: draws of the marginals, as the method gives without autoregression."""
    batch = gp_batch()
    exact = AnalyticDecoder.gp.predictive(batch.support, batch.query.x)
    marginals = AnalyticDecoder().adapt(batch.support).predictive(batch.query)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        y = marginals.sample((4000,))
    misses = 0
    for task in range(TASKS):
        _, covariance, _, error = moments(y[:, task])
        misses += int(((covariance - exact.covariance_matrix[task]).abs() > 4.5 * error).any())
    assert misses == TASKS


def test_draws_of_a_task_without_support_are_those_of_the_prior():
    batch = gp_batch()
    empty = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    y = bm.autoregressive(AnalyticDecoder(), empty).predict(batch.query.x, 4000)
    exact = AnalyticDecoder.gp.predictive(empty, batch.query.x)
    _, covariance, _, error = moments(y[:, 0])
    assert ((covariance - exact.covariance_matrix[0]).abs() < 4.5 * error).all()


def test_each_draw_has_its_own_global_sites():
    """Rows of a step share the draws of θ in adapt; each must choose its own, else all draws move together."""

    class Shifted:
        """y = θ_g for all rows of component g, θ ∈ {0, 1}."""

        theta = torch.tensor([[0.0], [1.0]])

        def __init__(self, rows):
            self.rows = rows

        def adapt(self, support, *, generator=None):
            return Shifted(support.num_tasks)

        def predictive(self, x):
            raise errors.NoClosedFormError("a mixture")

        def predict(self, x, num_samples, *, generator):
            return self.theta[torch.arange(num_samples) % 2].unsqueeze(-1).expand(num_samples, self.rows, 1)

    support = bm.Observations(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    y = bm.autoregressive(Shifted(1), support).predict(torch.zeros(1, 2, 1), 1000)
    assert abs(y.mean().item() - 0.5) < 4 * 0.5 / 2000**0.5
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_draws_are_reproducible_and_leave_torch_alone():
    batch, predict = gp_batch(), bm.autoregressive(deep_kernel(), gp_batch().support, chunk=5)
    state = torch.random.get_rng_state()
    first, again, other = (predict.predict(batch.query, 4, generator=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad


def test_real_draws_beside_integer_targets():
    """Integer y under a likelihood of real numbers: draws are not cut, and the next step sees them as they are."""
    batch = gp_batch()
    support = bm.Observations(batch.support.x, (4 * batch.support.y).round().long())
    seen = []

    class Noise:
        def adapt(self, support, *, generator=None):
            seen.append(support.y)
            return self

        def predictive(self, x):
            return torch.distributions.Normal(torch.zeros(x.x.shape[:2], dtype=F64), 0.3)

    y = bm.autoregressive(Noise(), support).predict(batch.query, 500, order="given", generator=1)
    assert y.dtype == F64
    assert abs(y.std() - 0.3) < 4 * 0.3 / (2 * y.numel()) ** 0.5
    assert seen[0].dtype == torch.int64
    rows = seen[-1].reshape(500, TASKS, -1)
    assert torch.equal(rows[..., :SHOTS], support.y.double().expand(500, -1, -1))
    assert torch.equal(rows[..., SHOTS:], y[..., :-1])


def test_classes_and_several_outputs():
    batch = gp_batch()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [6], 3)
        classes = bm.NeuralTaskModel(network, bm.likelihoods.Categorical(3), "point").double()
        pairs = bm.NeuralTaskModel(bm.nets.mlp(1, [6], 2), bm.Gaussian(0.3), "point").double()
    labels = bm.Observations(batch.support.x, (batch.support.y > 0).long())
    predict = bm.autoregressive(bm.ConditionalNeuralProcess(classes, width=8), labels)
    y = predict.predict(batch.query, 50)
    assert y.dtype == torch.int64
    assert set(y.unique().tolist()) <= {0, 1, 2}
    value = predict.log_likelihood(bm.Observations(batch.query.x, y[0]))
    assert (value < 0).all()
    with pytest.raises(errors.DataError):
        predict.log_likelihood(bm.Observations(batch.query.x, y[0] + 7))
    both = bm.Observations(batch.support.x, torch.stack([batch.support.y, -batch.support.y], -1))
    predict = bm.autoregressive(bm.MAML(pairs), both)
    assert predict.predict(batch.query.x, 7).shape == (7, TASKS, QUERY, 2)
    assert predict.log_likelihood(bm.Observations(batch.query.x, both.y[:, [0, 1, 2, 3, 0]])).shape == (TASKS,)
    with pytest.raises(errors.ShapeError, match="outputs"):
        predict.log_likelihood(batch.query)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input():
    batch, method = gp_batch(), deep_kernel()
    with pytest.raises(errors.OptionError, match="has adapt"):
        bm.autoregressive(method.adapt(batch.support), batch.support)
    with pytest.raises(errors.OptionError, match=r"batch\.support"):
        bm.autoregressive(method, batch)
    with pytest.raises(errors.DataError, match="targets"):
        bm.autoregressive(method, batch.support.with_y(None))
    with pytest.raises(errors.OptionError, match="chunk"):
        bm.autoregressive(method, batch.support, chunk=0)
    predict = bm.autoregressive(method, batch.support)
    with pytest.raises(errors.OptionError, match="num_samples"):
        predict.predict(batch.query, 0)
    with pytest.raises(errors.OptionError, match="num_orders"):
        predict.log_likelihood(batch.query, num_orders=0)
    with pytest.raises(errors.OptionError, match="one fixed order"):
        predict.log_likelihood(batch.query, num_orders=2, order="given")
    with pytest.raises(errors.DataError, match="y=None"):
        predict.log_likelihood(batch.query.with_y(None))
    with pytest.raises(errors.OptionError, match=r"got Tensor\. Give batch\.query"):
        predict.log_likelihood(batch.query.x)
    with pytest.raises(errors.EmptyTaskError, match="no point"):
        predict.predict(batch.query.x[:, :0])
    for x in (batch.query.x[:2], batch.query.x.expand(-1, -1, 2)):
        with pytest.raises(errors.ShapeError, match="tasks and features"):
            predict.predict(x)
    with pytest.raises(errors.NonFiniteDataError):
        predict.log_likelihood(batch.query.with_y(batch.query.y / 0))


@pytest.mark.parametrize(
    "order",
    ["backwards", [0, 1, 2, 3, 4], torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 3]), torch.arange(5.0)],
)
def test_an_order_that_is_none(order):
    batch = gp_batch()
    with pytest.raises(errors.OptionError, match="permutation"):
        bm.autoregressive(deep_kernel(), batch.support).predict(batch.query, 2, order=order)


def test_more_points_than_max_shots():
    """Known before the first step: the last one conditions on the support and all real targets but one.

    Of these two tasks one has 2 observations and 3 targets, the other 0 and 5; draws are also made of padding, given
    all real targets.
    """
    batch = gp_batch(ragged=True)
    batch = bm.TaskBatch(batch.support.tasks([0, 1]), batch.query.tasks([0, 1]))
    few = bm.Observations(batch.support.x[:, :2], batch.support.y[:, :2])
    for bound, draws, density in ((5, True, True), (4, False, True), (3, False, False)):
        method = bm.AttentiveNeuralProcess(width=8, max_shots=bound).double()
        method.prepare(bm.TaskBatch(few, few))
        predict = bm.autoregressive(method, batch.support)
        asks = (
            (lambda p=predict: p.predict(batch.query, 2), draws),
            (lambda p=predict: p.log_likelihood(batch.query), density),
        )
        for ask, fits in asks:
            if fits:
                assert ask().isfinite().all()
        method.adapt = None  # so that nothing can be adapted to
        for ask, fits in asks:
            if not fits:
                with pytest.raises(errors.ShapeError, match=rf"observations, given.*max_shots={bound}"):
                    ask()


def test_a_chunk_is_no_more_than_some_thousands_of_rows():
    """A convolution holds a grid for each row, however short the tasks are."""
    batch, rows = gp_batch(query=1), []

    class Counting(AnalyticDecoder):
        def adapt(self, support, *, generator=None):
            rows.append(support.num_tasks)
            return super().adapt(support)

    bm.autoregressive(Counting(), batch.support).predict(batch.query, 3000)
    assert rows == [4096, 4096, 808]  # of 3 tasks × 3000 draws


def test_the_memory_bound_names_chunk():
    batch = gp_batch()
    many = torch.zeros(TASKS, 3000, 1, dtype=F64)
    with pytest.raises(errors.OptionError, match="chunk="):
        bm.autoregressive(deep_kernel(), batch.support).predict(many, 1)
