"""The multilevel benchmark's amortised guide: what it is trained on, its moments, and its rows."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

import bayesmeta as bm
from benchmarks import _multilevel_amortised as amortised
from benchmarks import _multilevel_reference as ref
from benchmarks import multilevel
from benchmarks._multilevel_model import Multilevel

FLOAT64 = {"dtype": torch.float64}


def simulate(num_tasks: int = 10, seed: int = 0) -> bm.Observations:
    """Ragged tasks: whether there is a basement, and a second column that is the same for all rows of a task."""
    generator = torch.Generator().manual_seed(seed)
    xs, ys = [], []
    for i in range(num_tasks):
        rows = 2 + i % 5
        x = torch.stack([(torch.arange(rows) % 2).double(), torch.full((rows,), i / num_tasks, **FLOAT64)], -1)
        effect = torch.tensor([0.3, -0.4]) + 0.4 * torch.randn(2, generator=generator, **FLOAT64)
        noise = 0.5 * torch.randn(rows, generator=generator, **FLOAT64)
        xs.append(x)
        ys.append(effect[0] + effect[1] * x[:, 0] + 0.2 * x[:, 1] + noise)
    return bm.collate(xs, ys)


def some_theta(num_draws: int = 50, seed: int = 1) -> torch.Tensor:
    """Near what :func:`simulate` has: mean, fixed effect, log scales, correlation, log noise."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.tensor([0.3, -0.4, 0.2, -0.9, -0.9, 0.2, -0.7], **FLOAT64)
    return centre + 0.2 * torch.randn(num_draws, 7, generator=generator, **FLOAT64)


def test_a_fifth_is_held_out():
    known, unseen = amortised.hold_out(85, 0)
    assert (len(known), len(unseen)) == (68, 17)
    assert sorted([*known.tolist(), *unseen.tolist()]) == list(range(85))
    assert not torch.equal(unseen, amortised.hold_out(85, 1)[1])
    assert torch.equal(unseen, amortised.hold_out(85, 0)[1])
    assert [len(part) for part in amortised.hold_out(3, 0)] == [2, 1]


def test_inputs_are_like_those_of_the_training_tasks():
    data = simulate()
    batch = amortised.ResampledInputs(data).sample(4000, support=0, query=None, generator=0)
    x, mask, sizes = batch.query.x, batch.query.mask, batch.query.counts()
    assert batch.support.shots == 0
    assert x.dtype == torch.float64
    assert (sizes.min(), sizes.max()) == (1, amortised.LONGEST)
    # log-uniform on [1, 151): half of the tasks have up to √151 = 12.3 rows
    assert (
        abs((sizes <= 12).double().mean() - torch.tensor(13.0).log() / torch.tensor(151.0).log()) < 5 * 0.5 / 4000**0.5
    )
    assert set(x[..., 0][mask].tolist()) == {0.0, 1.0}
    assert (x[..., 1] == x[:, :1, 1]).all()  # a property of the task
    levels = torch.arange(10) / 10
    spread = (levels.var(correction=0) + 0.2**2).sqrt()
    assert abs(x[:, 0, 1].std() - spread) < 5 * spread / (2 * 4000) ** 0.5
    again = amortised.ResampledInputs(data).sample(4000, support=0, query=None, generator=0)
    assert torch.equal(x, again.query.x)


def test_padding_of_the_training_tasks_is_never_drawn():
    data = simulate()
    x = torch.where(data.mask.unsqueeze(-1), data.x, 77.0)
    batch = amortised.ResampledInputs(replace(data, x=x)).sample(500, support=0, query=None, generator=0)
    assert batch.query.x.max() < 10


def test_theta_is_given_the_moments_of_its_draws():
    data, theta = simulate(), some_theta(200)
    method = bm.Amortised(Multilevel(), global_guide=amortised.AutoMultivariateNormal)
    method.prepare(data)
    amortised.set_theta(method, theta)
    q = method.theta_guide.distribution()
    torch.testing.assert_close(q.mean, theta.mean(0))
    torch.testing.assert_close(q.covariance_matrix, theta.T.cov())


class Exact:
    """A method whose posterior over ε given θ is the exact one, found in the effects' own space."""

    def __init__(self, data: bm.Observations) -> None:
        self.program = bm.noncentred(Multilevel()).prepare(data)

    def infer(self, data: bm.Observations, theta: torch.Tensor) -> bm.MultivariateNormalPosterior:
        loc, covariance = ref.Marginal(ref.Sums.of(data)).conditional(theta)
        scale, rho = theta[:, 3:5].exp(), theta[:, 5].tanh()
        corr = torch.stack([torch.ones_like(rho), torch.zeros_like(rho), rho, (1 - rho**2).sqrt()], -1)
        inverse = torch.linalg.inv(scale.unsqueeze(-1) * corr.unflatten(-1, (2, 2))).unsqueeze(1)
        noise = (inverse @ (loc - theta[:, None, :2]).unsqueeze(-1)).squeeze(-1)
        root = inverse @ torch.linalg.cholesky(covariance)
        return bm.MultivariateNormalPosterior(self.program, data, noise, root, theta)


def test_moments_of_an_exact_guide_are_exact():
    """The way back from ε to effects, and which number of θ is which."""
    data, theta = simulate(), some_theta()
    found = amortised.amortised_moments(Exact(data), data, theta)
    truth = ref.Moments.of_mixture(*ref.Marginal(ref.Sums.of(data)).conditional(theta))
    torch.testing.assert_close(found.mean, truth.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sd, truth.sd, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.correlation, truth.correlation, rtol=1e-9, atol=1e-9)
    other = amortised.amortised_moments(Exact(data), data, some_theta(seed=2))  # control: other draws of θ
    assert float(other.mean_error(truth).max()) > 1e-3


def test_training_sees_no_targets_and_moves_the_encoder_alone():
    data, theta = simulate().to(dtype=torch.float32), some_theta()
    plan = amortised.Plan(steps=3, tasks=4, width=8)
    method = amortised.fit_amortised(data, theta, plan)
    blind = amortised.fit_amortised(data.with_y(torch.zeros_like(data.y)), theta, plan)
    ours, theirs = method.state_dict(), blind.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(method.theta_guide.distribution().mean, theta.mean(0).float())
    unmoved = amortised.fit_amortised(data, theta, replace(plan, steps=1, rate=0.0)).state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], unmoved[name])}
    assert changed
    assert all("recognition" in name for name in changed)


def arguments(tmp_path, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    multilevel.add_arguments(parser)
    return parser.parse_args([*argv, "--cache", str(tmp_path)])


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(multilevel, "HELD_OUT", ref.Settings(chains=2, warmup=5, draws=8))
    monkeypatch.setattr(multilevel, "Plan", lambda: amortised.Plan(steps=2, tasks=4, width=8))
    monkeypatch.setattr(multilevel, "microseconds", lambda adapt, repeats=1: float(adapt() is not None))
    data = simulate()
    on_all = ref.Moments.of_mixture(*ref.Marginal(ref.Sums.of(data)).conditional(some_theta()))
    args = arguments(tmp_path, "--approximations", "amortised")
    rows = {row.name: row for row in multilevel.amortised_rows("radon", data, on_all, args)}
    assert {name for name, row in rows.items() if row.bar is not None} == {"radon_amortised_effects"}
    assert rows["radon_amortised_effects"].passes is False  # two steps are not enough
    assert rows["radon_amortised_us_per_task_of_2_theta_20"].ours == pytest.approx(1 / 2)
    assert {"radon_nuts_us_per_task", "radon_abml_us_per_task_of_1000_theta_1"} <= set(rows)
    assert rows["radon_amortised_sd_ratio_min"].ours <= rows["radon_amortised_sd_ratio_max"].ours


@pytest.mark.slow
def test_a_trained_guide_is_near_the_exact_posterior():
    data, theta, test = simulate().to(dtype=torch.float32), some_theta(), simulate(12, seed=9)
    truth = ref.Moments.of_mixture(*ref.Marginal(ref.Sums.of(test)).conditional(theta))
    small = test.to(dtype=torch.float32)
    errors = [
        float(amortised.amortised_moments(method, small, theta).mean_error(truth).mean())
        for method in (amortised.fit_amortised(data, theta, amortised.Plan(steps=steps)) for steps in (1, 500))
    ]
    assert errors[0] > 0.4
    assert errors[1] < 0.2
