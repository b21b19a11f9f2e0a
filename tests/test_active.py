"""Active choice, against closed forms of Bayesian linear regression, brute force and sums by hand."""

import math

import pyro.distributions as dist
import pytest
import torch
from forecast_cases import Labels, Linear, Phi, label_tasks, linear_tasks

import bayesmeta as bm
from bayesmeta.errors import DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError, UnsupportedError

F64 = torch.float64


def line_tasks(num_tasks, points=9, noise=0.5, ends=(-1.0, 1.5)):
    """Lines on a grid: a family with support of two points near the middle, and the grid as candidates."""
    family = bm.tasks.LinearGaussian(torch.zeros(2, dtype=F64), torch.diag(torch.tensor([1.0, 2.0], dtype=F64)), noise)
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(num_tasks, 2, generator=generator, dtype=F64) * torch.tensor([1.0, 2.0], dtype=F64).sqrt()

    def at(x):
        design = torch.stack([torch.ones_like(x), x], -1)
        y = torch.einsum("tsd,td->ts", design, phi)
        return bm.Observations(design, y + noise * torch.randn(y.shape, generator=generator, dtype=F64))

    grid = torch.linspace(*ends, points, dtype=F64).expand(num_tasks, points)
    return family, at(0.2 * torch.randn(num_tasks, 2, generator=generator, dtype=F64)), at(grid)


def information(family, support, x, chosen):
    """I(y_A; φ | S) of one task by determinants: ½ log det(I + X Σ Xᵀ / σ²)."""
    design = x[chosen]
    covariance = family.posterior(support).covariance_matrix[0]
    return 0.5 * torch.logdet(torch.eye(len(chosen), dtype=F64) + design @ covariance @ design.T / family.noise**2)


def test_greedy_information_is_the_closed_form():
    family, support, candidates = line_tasks(6)
    found = bm.choose(Linear(family, support), candidates, size=4)
    assert found.closed_form
    for task in range(6):
        own, x, before = support.tasks([task]), candidates.x[task], []
        for place, gain in zip(found.index[task].tolist(), found.gains[task].tolist(), strict=True):
            base = information(family, own, x, before) if before else 0.0
            gains = {k: float(information(family, own, x, [*before, k]) - base) for k in range(9) if k not in before}
            assert gain == pytest.approx(gains[place], rel=1e-6)
            assert gains[place] == pytest.approx(max(gains.values()), rel=1e-6)
            before.append(place)
    assert found.take(candidates).x.equal(torch.stack([candidates.x[t][found.index[t]] for t in range(6)]))


def test_the_first_point_is_the_end_of_largest_leverage():
    family, support, candidates = line_tasks(20)
    leverage = candidates.x @ family.posterior(support).covariance_matrix @ candidates.x.mT
    expected = leverage.diagonal(dim1=-2, dim2=-1).argmax(-1)
    assert set(expected.tolist()) <= {0, 8}
    assert (expected == 8).any()
    for criterion in ("information", "variance"):
        found = bm.choose(Linear(family, support), candidates, criterion=criterion)
        assert found.index[:, 0].equal(expected)
    control = bm.choose(Linear(family, support), candidates, criterion="random")
    assert not control.index[:, 0].equal(expected)
    assert control.gains.isnan().all()


def test_a_batch_is_chosen_together():
    """Three points, two of them at one place: singly the two best are the same place, together they are not."""
    family, support, _ = line_tasks(1, noise=0.1)
    x = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [1.0, -1.5]]], dtype=F64)
    both = bm.choose(Linear(family, support), bm.Observations(x), size=2)
    assert set(both.index[0].tolist()) in ({0, 2}, {1, 2})
    one = bm.choose(Linear(family, support), bm.Observations(x), size=1)
    assert one.index[0, 0] in (0, 1)
    assert both.gains[0, 1] < both.gains[0, 0]


def test_variance_counts_what_is_chosen_already():
    family, support, candidates = line_tasks(3)
    exact = Linear(family, support)
    found = bm.choose(exact, candidates, size=3, criterion="variance")
    covariance = exact.predictive(candidates, joint=True).covariance_matrix
    for task in range(3):
        a, b = found.index[task, :2].tolist()
        left = covariance[task, b, b] - covariance[task, a, b] ** 2 / covariance[task, a, a]
        assert found.gains[task, 1].item() == pytest.approx(left.item(), rel=1e-9)
    drawn = bm.choose(Linear(family, support, closed=False), candidates, size=2, criterion="variance", num_samples=2000)
    assert not drawn.closed_form
    torch.testing.assert_close(drawn.gains, found.gains[:, :2], rtol=5 * math.sqrt(2 / 20000), atol=0)


def test_draws_give_the_closed_form_information():
    family, support, candidates = line_tasks(40, points=4)
    exact = bm.choose(Linear(family, support), candidates, size=2)
    drawn = bm.choose(Linear(family, support, closed=False), candidates, size=2, num_samples=1000, num_outcomes=200)
    assert not drawn.closed_form
    error = drawn.gains - exact.gains
    for step in range(2):
        assert abs(error[:, step].mean()) < 5 * error[:, step].std() / math.sqrt(40) + 0.02
    first = (drawn.index[:, 0] == exact.index[:, 0]).double().mean()
    assert first > 0.8
    narrow = bm.choose(Linear(family, support, 0.3, closed=False), candidates, size=1, num_samples=300)
    wide = drawn.gains[:, 0].mean()
    # noise and φ are narrowed alike here, so that information stays: a control of the units, not of the size
    assert abs(narrow.gains.mean() - wide) < 0.1 * wide


def test_the_information_of_draws_is_that_of_decompose():
    family, support, candidates = line_tasks(30)
    posterior = Linear(family, support, closed=False)
    parts = bm.decompose(posterior, candidates, num_samples=500, num_outcomes=300)
    found = bm.choose(posterior, candidates, num_samples=500, num_outcomes=300, generator=1)
    at = parts.mutual_information.gather(1, found.index)
    assert (found.gains - at).mean().abs() < 0.05


class Heteroscedastic(Linear):
    """Noise that grows with |x|, so that variance and information part ways."""

    def _noise(self, x):
        return 0.1 + 3.0 * self._x(x)[..., 1].abs()

    def log_likelihood(self, observations, *, draws):
        return dist.Normal(self._function(observations, draws), self._noise(observations)).log_prob(observations.y)

    def predictive(self, x, *, joint=False):
        x_ = self._x(x)
        covariance = x_ @ self.covariance @ x_.mT + torch.diag_embed(self._noise(x).square())
        mean = (x_ @ self.mean.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(mean, covariance) if joint else dist.Normal(mean, 1.0)


def test_noise_is_no_information():
    family, _, candidates = line_tasks(5)
    support = bm.Observations(candidates.x[:, :1], candidates.y[:, :1])
    posterior = Heteroscedastic(family, support)
    by_variance = bm.choose(posterior, candidates, criterion="variance").index
    found = bm.choose(posterior, candidates)
    assert found.closed_form
    x = candidates.x
    gains = 0.5 * torch.log1p((x @ posterior.covariance @ x.mT).diagonal(dim1=1, dim2=2) / posterior._noise(x) ** 2)
    assert found.index[:, 0].equal(gains.argmax(-1))
    torch.testing.assert_close(found.gains[:, 0], gains.max(-1).values)
    assert (by_variance[:, 0] == 8).all()
    assert not found.index.equal(by_variance)


class TwoLabels(Labels):
    """Two particles of opposite logits."""

    num_draws = 2

    def draws(self, num_samples, generator=None):
        return Phi(torch.zeros(2, self.num_tasks, 1, dtype=F64))

    def _both(self, x):
        return torch.stack([self._at(x), -self._at(x)])

    def predict(self, x, num_samples=0, *, draws=None, generator=None):
        p = self._both(x).softmax(-1)
        flat = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        return flat.reshape(p.shape[:-1]).to(F64)

    def log_likelihood(self, observations, *, draws):
        return dist.Categorical(logits=self._both(observations)).log_prob(observations.y)


def test_classes_by_sums():
    batch, logits = label_tasks(3, classes=2, query=4)
    posterior = TwoLabels(batch.support, logits)
    found = bm.choose(posterior, batch.query, size=2, num_samples=2, num_outcomes=4000)
    p = torch.stack([logits, -logits]).softmax(-1)  # [2, tasks, points, classes]

    def entropy(q):
        return -(q * q.log()).sum()

    for task in range(3):
        mutual = [entropy(p[:, task, k].mean(0)) - 0.5 * sum(map(entropy, p[:, task, k])) for k in range(4)]
        a, b = found.index[task].tolist()
        assert float(mutual[a]) == pytest.approx(max(map(float, mutual)), abs=0.05)
        assert found.gains[task, 0].item() == pytest.approx(float(mutual[a]), abs=0.05)
        pair = torch.einsum("ia,ib->iab", p[:, task, a], p[:, task, b])
        together = entropy(pair.mean(0)) - 0.5 * sum(map(entropy, pair))
        assert found.gains[task].sum().item() == pytest.approx(float(together), abs=0.05)
        assert together <= math.log(2)


def test_masked_candidates_are_never_chosen():
    family, support, candidates = line_tasks(4)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[:, 0] = mask[:, 8] = mask[2, 5] = False
    masked = bm.Observations(candidates.x, None, mask)
    for criterion in ("information", "variance", "random"):
        for closed in (True, False):
            found = bm.choose(Linear(family, support, closed=closed), masked, size=6, criterion=criterion)
            assert mask.gather(1, found.index).all()
            assert all(len(set(row)) == 6 for row in found.index.tolist())


def test_a_real_method_in_float32():
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.3), bm.priors.Normal(1.0), task_modules="head")
    method = bm.BayesianLastLayer(model)
    batch = bm.tasks.Sinusoid(noise=0.1).sample(10, support=3, query=12, generator=0)
    method.prepare(batch)
    posterior = method.adapt(batch.support)
    found = bm.choose(posterior, batch.query, size=3)
    assert found.closed_form
    variance = posterior.predictive(batch.query).variance.double()
    gains = 0.5 * (variance / 0.09).log()
    torch.testing.assert_close(found.gains[:, 0], gains.max(-1).values, rtol=1e-3, atol=1e-3)
    drawn = bm.choose(posterior, batch.query, exact=False, num_samples=500, num_outcomes=200)
    assert (drawn.gains[:, 0] - found.gains[:, 0]).mean().abs() < 0.15
    after = method.adapt(bm.union(batch.support, found.take(batch.query)))
    gained = 0.5 * (torch.logdet(posterior.covariance) - torch.logdet(after.covariance)).double()
    torch.testing.assert_close(found.gains.sum(-1), gained, rtol=1e-2, atol=1e-2)


# -- learning curve -----------------------------------------------------------------------------------------------


def test_the_curve_of_lines_is_below_that_of_random_choice():
    family, support, pool = line_tasks(300, points=15)
    batch = bm.TaskBatch(support, bm.Observations(pool.x, torch.einsum("tsd,td->ts", pool.x, truth(family, pool))))
    curve = bm.learning_curve(lambda s: Linear(family, s), batch, pool, steps=4, repeats=2)
    mean, error = curve.difference()
    assert curve.labels == (0, 1, 2, 3, 4)
    assert mean[0] == 0
    assert (mean[1:3] < -3 * error[1:3]).all(), "chosen points are worth more"
    assert curve.chosen.mean(1).diff().max() < 0
    value = curve.random[4].mean().item()
    assert curve.points_to_reach(value) < curve.points_to_reach(value, random=True) == 4
    assert curve.points_to_reach(-1.0) is None
    assert len(str(curve).splitlines()) == 7
    assert all(len(set(row)) == 4 for row in curve.index.tolist())
    nothing = bm.learning_curve(lambda s: Linear(family, s), batch, pool, steps=2, criterion="random", repeats=2)
    mean, error = nothing.difference()
    assert (mean[1:].abs() < 4 * error[1:]).all(), "control: random beside random"


def truth(family, pool):
    """Least squares on the whole pool, which has far more points than are labelled."""
    return torch.linalg.lstsq(pool.x, pool.y.unsqueeze(-1)).solution.squeeze(-1)


def test_adapt_sees_what_was_chosen_and_nothing_else():
    family, support, pool = line_tasks(3)
    seen = []

    def adapt(labelled):
        seen.append(labelled)
        return Linear(family, labelled)

    curve = bm.learning_curve(adapt, bm.TaskBatch(support, pool), pool, steps=2, size=2, score="nll", repeats=1)
    assert [s.shots for s in seen] == [2, 4, 6] * 2
    expected = torch.stack([pool.y[t][curve.index[t]] for t in range(3)])
    assert seen[2].y[:, 2:].equal(expected)
    by_hand = bm.scores(Linear(family, seen[2]), bm.TaskBatch(support, pool)).per_task["nll"]
    torch.testing.assert_close(curve.chosen[2], by_hand)
    assert curve.labels == (0, 2, 4)


# -- padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("criterion", "closed"), [("information", True), ("information", False), ("variance", True),
                                                   ("variance", False), ("random", True)])  # fmt: skip
def test_padding_tasks_need_no_candidate(criterion, closed):
    family, support, candidates = line_tasks(4)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[2] = False
    padded = bm.Observations(candidates.x, candidates.y, mask)
    posterior = Linear(family, support, closed=closed)
    with pytest.raises(EmptyTaskError, match=r"Task 2 .* has 0 candidate"):
        bm.choose(posterior, padded, size=2, criterion=criterion)
    for given in (padded, candidates):  # padding that no mask tells of is padding too
        real = torch.tensor([True, True, False, True])
        found = bm.choose(posterior, given, size=2, criterion=criterion, real=real)
        assert found.gains.isnan().any(-1).tolist() == [criterion == "random"] * 2 + [True] + [criterion == "random"]
        assert found.take(given).full_mask().tolist() == [[True] * 2, [True] * 2, [False] * 2, [True] * 2]
        if closed and criterion != "random":
            whole = bm.choose(posterior, candidates, size=2, criterion=criterion)
            assert found.index[real].equal(whole.index[real])
            torch.testing.assert_close(found.gains[real], whole.gains[real])
    with pytest.raises(EmptyTaskError, match="No task"):
        bm.choose(posterior, padded, criterion=criterion, real=torch.zeros(4, dtype=torch.bool))
    for wrong in (real[:3], real.double(), "all"):
        with pytest.raises(ShapeError, match="real is"):
            bm.choose(posterior, padded, criterion=criterion, real=wrong)


def test_padding_tasks_do_not_count_in_a_curve():
    family, support, pool = line_tasks(5, points=8)
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[4] = False
    empty = torch.zeros(5, 2, dtype=torch.bool).index_fill(0, torch.arange(4), True)
    batch = bm.TaskBatch(
        bm.Observations(support.x, support.y, empty), bm.Observations(pool.x, pool.y, mask),
        task_id=torch.tensor([3, 1, 0, 2, -1]),
    )  # fmt: skip
    curve = bm.learning_curve(lambda s: Linear(family, s), batch, bm.Observations(pool.x, pool.y, mask), steps=2)
    assert curve.chosen.isnan().any(0).tolist() == [False] * 4 + [True]
    alone = bm.TaskBatch(support.tasks(slice(4)), pool.tasks(slice(4)))
    expected = bm.learning_curve(lambda s: Linear(family, s), alone, pool.tasks(slice(4)), steps=2)
    torch.testing.assert_close(curve.chosen[:, :4], expected.chosen)
    torch.testing.assert_close(curve.difference()[0][1:], (curve.chosen - curve.random)[1:, :4].mean(1))
    nobody = bm.TaskBatch(batch.support, batch.query, task_id=torch.full((5,), -1))
    with pytest.raises(EmptyTaskError, match="pool"):
        bm.learning_curve(lambda s: Linear(family, s), nobody, pool, steps=2)


def test_the_error_of_a_curve_is_in_raw_units_and_that_of_the_scores():
    """Of a mean in closed form exactly; of draws within their noise; a standardizer multiplies it by its square."""
    family, support, pool = line_tasks(6)
    batch = bm.TaskBatch(support, pool)
    by_hand = bm.scores(Linear(family, support), batch).per_task["rmse"].square()
    for factor in (1.0, 3.0):
        scaled = bm.TaskBatch(support, pool, standardizer=standardizer(factor))
        curve = bm.learning_curve(lambda s: Linear(family, s), scaled, pool, steps=1, repeats=1)
        torch.testing.assert_close(curve.chosen[0], factor**2 * by_hand)
    drawn = bm.learning_curve(lambda s: Linear(family, s, closed=False), batch, pool, steps=1, repeats=1)
    torch.testing.assert_close(drawn.chosen[0], by_hand, rtol=0.2, atol=0.02)
    assert not drawn.chosen[0].equal(by_hand)


def standardizer(factor):
    one = torch.ones(2, dtype=F64)
    return bm.Standardizer(0 * one, one, torch.zeros((), dtype=F64), torch.tensor(factor, dtype=F64))


def test_errors_are_typed():
    family, batch = linear_tasks(4)
    posterior = Linear(family, batch.support)
    with pytest.raises(OptionError, match="criterion='best'"):
        bm.choose(posterior, batch.query, criterion="best")
    with pytest.raises(OptionError, match="size=0"):
        bm.choose(posterior, batch.query, size=0)
    with pytest.raises(OptionError, match="num_samples=1"):
        bm.choose(posterior, batch.query, num_samples=1)
    with pytest.raises(ShapeError, match="3 tasks"):
        bm.choose(posterior, batch.query.tasks([0, 1, 2]))
    with pytest.raises(EmptyTaskError, match=r"6 candidate\(s\), but 7"):
        bm.choose(posterior, batch.query, size=7)
    maml = bm.MAML(bm.NeuralTaskModel(torch.nn.Linear(2, 1), bm.Gaussian(0.3), "point"), inner_steps=1, inner_lr=0.1)
    with pytest.raises(UnsupportedError, match="point estimate"):
        bm.choose(maml.adapt(batch.support.to(dtype=torch.float32)), batch.query)
    labels, logits = label_tasks(4)
    with pytest.raises(UnsupportedError, match="no variance"):
        bm.choose(Labels(labels.support, logits), labels.query, criterion="variance")
    corrected = bm.recalibrate(posterior, batch)(posterior)
    with pytest.raises(UnsupportedError, match="recalibrated"):
        bm.choose(corrected, batch.query)
    broken = Linear(family, batch.support, closed=False)
    broken.mean[1] = math.nan
    for criterion in ("information", "variance"):
        with pytest.raises(NonFiniteDataError, match="task 1"):
            bm.choose(broken, batch.query, criterion=criterion)
    for options, error, match in (
        ({"steps": 0}, OptionError, "steps=0"),
        ({"score": "coverage_90"}, OptionError, "ranks"),
        ({"score": "accuracy", "steps": 1}, OptionError, "unknown here"),
        ({"steps": 7}, EmptyTaskError, "6 points in the pool"),
    ):
        with pytest.raises(error, match=match):
            bm.learning_curve(lambda s: Linear(family, s), batch, batch.query, **options)
    with pytest.raises(DataError, match="y=None"):
        bm.learning_curve(lambda s: Linear(family, s), batch, batch.query.with_y(None))
