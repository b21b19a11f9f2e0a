"""The benchmark of neural processes: the figure against processes whose KL is known, the context, rows and bars."""

import argparse

import pytest
import torch

import bayesmeta as bm
from benchmarks import neural_processes as benchmark
from benchmarks._neural_process_models import WAVES, BasisDecoder, BasisEncoder, with_waves
from benchmarks.neural_processes import density, fresh_tasks, normalised_kl

GP = bm.tasks.GPTasks("eq")


class Exact:
    """The true process as a method: its marginals, and its joint where it is asked for."""

    def __init__(self, joint):
        self.joint = joint

    def adapt(self, support, generator=None):
        posterior = Exact(self.joint)
        posterior.support = support
        return posterior

    def predictive(self, query, *, joint=False):
        if joint and self.joint:
            return GP.predictive(self.support, query.x)
        marginals = GP.marginals(self.support, query.x)
        return torch.distributions.Independent(marginals, 1) if joint else marginals


class Latent:
    """A process without a closed form, whose draws of z are functions with independent noise of variance 0.05."""

    def adapt(self, support, generator=None):
        posterior = Latent()
        posterior.support = support
        return posterior

    def predictive(self, query, *, joint=False):
        raise bm.errors.NoClosedFormError("draws alone")

    def log_likelihood(self, query, num_samples, *, generator):
        with torch.random.fork_rng():
            torch.manual_seed(generator)
            f = GP.posterior(self.support, query.x).sample((num_samples,))
        return torch.distributions.Normal(f, 0.05**0.5).log_prob(query.y)


def test_the_true_process_has_no_kl_to_itself():
    batches = fresh_tasks("eq", 31, 0)
    gap = normalised_kl("eq", batches, lambda batch: density(Exact(joint=True), batch, 0))
    assert gap.shape == (31,)
    assert gap.abs().max() < 1e-6
    other = normalised_kl("matern52", batches, lambda batch: density(Exact(joint=True), batch, 0))
    assert other.mean() < -4 * other.std() / 31**0.5  # a control: less likely under the wrong process


def test_its_marginals_have_the_known_kl_which_autoregression_closes():
    batches = fresh_tasks("eq", 310, 0)
    marginal = normalised_kl("eq", batches, lambda batch: density(Exact(joint=False), batch, 0))
    torch.testing.assert_close(
        marginal, normalised_kl("eq", batches, lambda batch: benchmark.ideal_diagonal("eq", batch))
    )
    assert abs(marginal.mean() - 0.40) < 4 * marginal.std() / 310**0.5
    assert marginal.std() / 310**0.5 < 0.03, "the check can see a difference"
    few = fresh_tasks("eq", 31, 0)[::6]
    together = normalised_kl("eq", few, lambda b: benchmark.autoregressive_density(Exact(joint=False), b, 0))
    assert together.abs().max() < 1e-6


@pytest.mark.parametrize(("kernel", "known"), [("eq", 1.19), ("matern52", 1.08)])
def test_the_trivial_predictor_has_the_known_kl(kernel, known):
    gap = normalised_kl(kernel, fresh_tasks(kernel, 310, 1), lambda batch: benchmark.trivial(kernel, batch))
    assert abs(gap.mean() - known) < 4 * gap.std() / 310**0.5 + 0.005  # known to two digits


def test_a_latent_density_is_the_log_of_the_mean_of_the_joint():
    """Many draws of z of an exact process: the KL is small and, as the log of a mean is too low, not negative."""
    batches = [GP.sample(6, support=20, query=2, generator=3)]
    gap = (benchmark.true_density("eq", batches[0]) - density(Latent(), batches[0], 0)).abs()
    assert gap.max() < 0.25  # of 512 draws


def test_the_context_varies_from_batch_to_batch():
    tasks, generator = benchmark.Functions("eq"), torch.Generator().manual_seed(0)
    sizes = [tasks.sample(2, support=3, query=4, generator=generator) for _ in range(60)]
    assert {batch.support.shots for batch in sizes} == {0, 1, 2, 3}
    assert {batch.query.shots for batch in sizes} == {4}
    first, again = (tasks.sample(2, support=3, query=4, generator=5).query.y for _ in range(2))
    assert torch.equal(first, again)


def test_waves_stand_beside_x():
    batch = GP.sample(3, support=5, query=2)
    shown = benchmark.Functions("eq", waves=True).shown(batch)
    assert shown.support.x.shape == (3, 5, 1 + WAVES)
    assert torch.equal(shown.support.x[..., :1], batch.support.x)
    assert torch.equal(shown.support.y, batch.support.y)
    assert torch.equal(shown.query.x, with_waves(batch.query, "eq").x)
    assert shown.query.x[..., 1:].abs().max() <= 1
    moved = bm.Observations(batch.support.x + 0.01, batch.support.y)
    slope = (with_waves(moved, "eq").x - shown.support.x)[..., 1:].abs().max() / 0.01
    assert 1 < slope < 4 * 4.0  # of the fastest of 32 waves whose frequencies have the standard deviation 4
    assert benchmark.Functions("eq").shown(batch) is batch


def test_the_basis_encoder_and_decoder_by_hand():
    batch = GP.sample(3, support=5, query=2)
    encoder = BasisEncoder(1, 4, [8])
    x, y = batch.support.x, batch.support.y.unsqueeze(-1)
    basis = torch.cat([torch.ones_like(x), x], -1)
    pooled = torch.cat([torch.cat([basis, y * basis], -1).mean(1), torch.full((3, 1), 6.0).log()], -1)
    torch.testing.assert_close(encoder(batch.support), encoder.after(pooled))
    empty = encoder(bm.Observations(x[:, :0], batch.support.y[:, :0]))
    torch.testing.assert_close(empty, encoder.after(torch.zeros(3, 5)))
    decoder, context = BasisDecoder(1, 2), torch.randn(3, 2, 4)
    b = decoder.basis(batch.query.x)
    expected = torch.stack([(b * context[..., :2]).sum(-1), (b * context[..., 2:]).sum(-1)], -1)
    torch.testing.assert_close(decoder(torch.cat([batch.query.x, context], -1)), 0.1 * expected)


def test_test_tasks_are_fresh():
    a, b, c = (fresh_tasks("eq", 40, seed) for seed in (0, 0, 1))
    assert [batch.support.shots for batch in a] == list(range(31))
    assert sum(batch.num_tasks for batch in a) == 62  # at least 40, as many at each number
    assert all(torch.equal(x.query.y, y.query.y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].query.y, c[0].query.y)
    assert not torch.equal(a[0].query.x, a[1].query.x)


@pytest.mark.parametrize("name", list(benchmark.RUNS))
def test_rows_of_a_short_run(name, monkeypatch):
    monkeypatch.setattr(benchmark, "DRAWS", 8)
    rows = benchmark.measure(f"{name}:eq", 0, 2, 5, 1, True, published=False, device="cpu")
    found = {row.name: row for row in rows}
    expected = {f"{name}_eq"} | ({f"{name}_ar_eq"} if benchmark.RUNS[name].autoregressive else set())
    assert set(found) == expected
    row = found[f"{name}_eq"]
    assert row.seconds > 0
    assert row.standard_error > 0
    assert (row.bar is not None) == (name in benchmark.BARS)
    assert row.passes is not True  # two steps are not enough


def test_the_command():
    options = {"runs": ["cnp"], "kernels": ["matern52"], "tasks": 5, "steps": 1, "threads": 1, "jobs": 1}
    args = argparse.Namespace(quick=True, seed=0, json=None, full=False, device="cpu", **options)
    rows = [row.name for row in benchmark.run(args)]
    assert rows == ["ideal_diagonal_matern52", "trivial_matern52", "cnp_matern52", "cnp_ar_matern52"]
    assert benchmark.settings(args)["steps_of_runs"] == {"cnp": 1}
    for what, name in (("runs", "lstm"), ("kernels", "cubic")):
        with pytest.raises(SystemExit, match=f"unknown {what[:-1]} {name}"):
            benchmark.run(argparse.Namespace(**{**vars(args), what: [name]}))
