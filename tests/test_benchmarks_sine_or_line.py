"""The benchmark on sine or line: the rule that tells the two apart, exact draws, shares, rows, the picture."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import pytest
import torch

import bayesmeta as bm
from benchmarks import sine_or_line as benchmark

GRID = benchmark.GRID


def family_functions(count, seed):
    """Functions of the family on the grid, and which are lines."""
    _, truth = bm.tasks.SineOrLine().sample_with_truth(count, support=1, query=1, generator=seed)
    part = {name: value.double() for name, value in truth.items() if name != "is_line"}
    sine = part["amplitude"].reshape(-1, 1) * torch.sin(GRID - part["phase"].reshape(-1, 1))
    line = part["slope"].reshape(-1, 1) * GRID + part["intercept"].reshape(-1, 1)
    is_line = truth["is_line"].flatten()
    return torch.where(is_line[:, None], line, sine), is_line


def test_the_rule_is_right_on_the_family_and_near_it():
    values, is_line = family_functions(3000, 1)
    assert (benchmark.line_like(values) == is_line).all()
    # smooth errors of root mean square 0.15, half the noise, of length scale 1, as a network may make
    kernel = torch.exp(-0.5 * (GRID[:, None] - GRID).square()) + 1e-6 * torch.eye(101, dtype=torch.float64)
    noise = torch.randn(3000, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bent = values + 0.15 * noise @ torch.linalg.cholesky(kernel).mT
    assert (benchmark.line_like(bent) == is_line).double().mean() > 0.97
    # controls: errors as large as the functions are seen, and so is a sinusoid of another frequency
    assert (benchmark.line_like(values + 3 * (bent - values) / 0.15) == is_line).double().mean() < 0.97
    assert benchmark.line_like(torch.sin(0.3 * GRID)[None]).all()


def test_exact_draws_are_the_exact_posterior():
    """Their share of lines is the oracle's p, their mean its predictive mean; both within the error of sampling."""
    known = benchmark.ambiguous_tasks(4, 3)
    support = known.batch.support
    draws = benchmark.exact_draws(support, 2000, 5)
    # candidates are few where the likelihood is sharp: as if by a tenth of the draws
    error = (known.line * (1 - known.line) / 200).sqrt()
    share = benchmark.line_like(draws).double().mean(0)
    assert ((share - known.line).abs() < 4 * error).all()
    assert (share - known.line).abs().min() < 4 * error.min() < 0.15, "the check can see a difference"
    x = GRID.reshape(1, -1, 1).expand(4, -1, 1)
    mean = bm.tasks.SineOrLine().predictive_mean(support, x)
    tolerance = 4 * draws.std(0) / math.sqrt(200)
    assert ((draws.mean(0) - mean).abs() < tolerance).all()
    other = bm.tasks.SineOrLine().predictive_mean(support.tasks([1, 2, 3, 0]), x)
    assert not ((draws.mean(0) - other).abs() < tolerance).all(1).any(), "control: other supports"


def test_ambiguous_supports_are_ambiguous_and_fresh():
    known, other = benchmark.ambiguous_tasks(4, 3), benchmark.ambiguous_tasks(4, 4)
    assert known.batch.support.x.shape == (4, 5, 1)
    assert known.batch.query.x.shape == (4, benchmark.QUERY, 1)
    oracle = bm.tasks.SineOrLine().probability_line(known.batch.support)
    torch.testing.assert_close(oracle, known.line)
    assert ((oracle >= 0.3) & (oracle <= 0.7)).all()
    assert (known.batch.support.x - other.batch.support.x).abs().min() > 0
    assert benchmark.ambiguous_tasks(4, 3) is known, "the oracle is asked once"


def test_references_are_the_oracles():
    """In nats a point; the joint log score is better than that of the points each by itself."""
    known = benchmark.fresh_tasks(50, 2)
    family, support, query = bm.tasks.SineOrLine(), known.batch.support, known.batch.query
    chain, seen = torch.zeros(50, dtype=torch.float64), support
    for q in range(benchmark.QUERY):
        point = bm.Observations(query.x[:, q : q + 1], query.y[:, q : q + 1])
        chain += family.predictive_log_prob(seen, point).squeeze(-1)
        seen = bm.union(seen, point)
    assert known.reference["joint_nll"] == pytest.approx(float(-chain.mean()) / benchmark.QUERY, abs=1e-6)
    assert 0.3**2 < known.reference["mse"] < 1.0
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.09)  # of the noise, which nobody can be below by much
    assert entropy - 0.1 < known.reference["joint_nll"] < known.reference["nll"] < 2.0


class Guess:
    """Draws of a line with probability p, else of a sinusoid: a posterior whose share is known."""

    def __init__(self, p):
        self.p = p

    def adapt(self, support, generator=None):
        posterior = Guess(self.p)
        posterior.support, posterior.num_tasks, posterior.program = support, support.num_tasks, posterior
        return posterior

    def draws(self, num_samples, seed):
        uniform = torch.rand(num_samples, self.num_tasks, generator=torch.Generator().manual_seed(seed))
        found = SimpleNamespace(u=uniform < self.p, theta=None, num_samples=num_samples)
        found.slices = lambda: [found]
        return found

    def predictive(self, u, observations, theta):
        x = observations.x.squeeze(-1)
        return SimpleNamespace(mean=torch.where(u.unsqueeze(-1), 2 * x + 1, 3 * torch.sin(x - 1)))


def test_shares_of_a_posterior_that_is_known():
    known = benchmark.ambiguous_tasks(4, 3)
    share, draws = benchmark.line_share(Guess(known.line), known, 0)
    assert draws.shape == (benchmark.DRAWS, 4, 101)
    assert ((share - known.line).abs() < 4 * (0.25 / benchmark.DRAWS) ** 0.5).all()
    for p in (0.0, 1.0):
        torch.testing.assert_close(benchmark.line_share(Guess(p), known, 0)[0], torch.full((4,), p).double())


def test_correlation():
    a = torch.tensor([0.0, 1.0, 2.0])
    assert benchmark.correlation(a, 3 * a + 1) == pytest.approx(1.0)
    assert benchmark.correlation(a, -a) == pytest.approx(-1.0)
    assert benchmark.correlation(a, torch.ones(3)) == 0.0


def test_supports_of_fewer_shots():
    tasks = benchmark.FewerShots(2)
    batch = tasks.sample(3000, support=5, query=3, generator=7)
    counts = batch.support.counts()
    for count in (2, 3, 4, 5):
        assert abs(float((counts == count).double().mean()) - 0.25) < 5 * (0.1875 / 3000) ** 0.5
    assert counts.min() == 2
    assert batch.query.mask is None
    torch.testing.assert_close(tasks.sample(3000, support=5, query=3, generator=7).support.x, batch.support.x)
    whole = benchmark.FewerShots(5).sample(10, support=5, query=3, generator=7)
    assert (whole.support.counts() == 5).all()


@pytest.mark.parametrize("name", list(benchmark.RUNS))
def test_rows_of_a_short_run(name, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "NUM_AMBIGUOUS", 4)
    monkeypatch.setattr(benchmark, "DRAWS", 10)
    rows = {row.name: row for row in benchmark.measure(name, 3, 2, 4, 1, True, tmp_path)}
    expected = {"mse", "nll", "joint_nll", "crps", "coverage90", "ambiguous_nll", "ambiguous_coverage90", "seconds"}
    shares = {"line_share_gap", "line_share_bias", "line_share_correlation", "line_share_gap_all"}
    has_draws = benchmark.RUNS[name].has_draws
    assert set(rows) == {f"{name}_{row}" for row in (expected | shares if has_draws else expected)}
    assert {row for row in rows if rows[row].bar is not None} == {f"{name}_{row}" for row in benchmark.RUNS[name].bars}
    assert rows[f"{name}_mse"].reference < rows[f"{name}_mse"].ours, "two steps are not the exact posterior"
    assert (tmp_path / f"sine_or_line_{name}.pt").exists() == has_draws


def test_point_methods_have_one_answer():
    """The control of the share: one function a task gives 0 or 1, and a gap near a half."""
    method, _ = benchmark.train("maml", 0, 2)
    known = benchmark.ambiguous_tasks(4, 3)
    share = benchmark.line_share(method, known, 0)[0]
    assert set(share.tolist()) <= {0.0, 1.0}
    assert (share - known.line).abs().min() >= 0.3


def test_a_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "NUM_AMBIGUOUS_QUICK", 4)
    monkeypatch.setattr(benchmark, "DRAWS", 10)
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    args = parser.parse_args(["--runs", "last_layer", "deep_kernel", "--tasks", "4", "--steps", "2"])
    args.plots, args.seed, args.quick = tmp_path, 3, True
    assert len(benchmark.run(args)) == 8 + 12
    assert (tmp_path / "sine_or_line.png").read_bytes()[:4] == b"\x89PNG"
