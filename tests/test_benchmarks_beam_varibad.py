"""VariBAD on beam steering: the decoder is the line's own law, and coverage is that of the next readings."""

import argparse

import pytest
import torch

from bayesmeta.data import Observations
from bayesmeta.rl.envs import BeamSteering, Machines, TensorVectorEnv
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.rollout import Acted, collect
from benchmarks import _beam_varibad as bench
from benchmarks import beam_steering
from benchmarks.beam_steering import CONFIG

FAMILY = BeamSteering(Machines.built_in(20), horizon=6)


def actions(moment, state, generator):
    """Small ones and some beyond the limit; the beam hardly moves, so that it hits no wall."""
    draws = torch.randn(6, 10, generator=generator)
    return Acted(draws * torch.tensor([0.02, 0.1, 1.0, 2.0, 0.05, 0.5]).unsqueeze(-1), torch.zeros(6))


def test_the_decoder_can_say_what_the_line_does():
    """With R for its matrix it foresees the change of every reading; without the limit of an action it does not."""
    env = TensorVectorEnv(FAMILY, 6, generator=0)
    rollout = collect(env, actions, 1, generator=torch.Generator().manual_seed(0))
    assert (rollout.successor.abs() < 1).all()
    spec = ContextSpec.of(env, inputs=("action",), targets=("change",))
    context = spec.of_rollout(rollout)
    for task in range(6):
        decoder = bench.SteeringDecoder(spec, 2, hidden=(), offset=False)
        with torch.no_grad():
            decoder.network[0].weight.zero_()
            decoder.network[0].bias.copy_(0.01 * env.tasks.response[task].flatten())  # 100 of the units, 1e-4 of a step
        got = decoder.output(torch.zeros(6, 2), context.x)[task]
        torch.testing.assert_close(got, context.y[task], rtol=1e-3, atol=1e-5)
        plain = super(bench.SteeringDecoder, decoder).output(torch.zeros(6, 2), context.x)[task]
        beyond = bool(context.x[task].abs().max() > 1)
        assert torch.allclose(plain, context.y[task], rtol=1e-3, atol=1e-5) == (not beyond)


def test_a_quick_training_has_its_row_and_the_bar_judges_it():
    run = bench.untrained(FAMILY, CONFIG, 0, quick=True)
    run.train(1)
    env = TensorVectorEnv(FAMILY, 4, episodes_per_trial=2, split="test", generator=1)
    row = bench.coverage_rows(run, env, 0, {"coverage": bench.COVERAGE})[0]
    assert (row.name, row.reference) == ("varibad_next_readings_coverage", 0.9)
    # at first the policy hardly acts, and the noise is assumed to be wide: everything is covered, too widely
    assert row.ours > 0.95
    assert row.passes is False


@pytest.mark.parametrize(("noise", "low", "high"), [(1e-5, 0.0, 0.7), (2.0, 0.99, 1.0)])
def test_coverage_is_low_for_a_belief_that_is_too_sure_and_high_for_one_that_is_not_sure_enough(noise, low, high):
    run = bench.untrained(FAMILY, CONFIG, 0, quick=True)
    with torch.no_grad():
        run.policy.act_layer.weight *= 30  # else it hardly acts
        run.decoder.network[0].weight.zero_()
        run.decoder.network[0].bias.zero_()
        run.decoder.likelihood.log_scale.fill_(torch.tensor(noise).log())
    env = TensorVectorEnv(FAMILY, 8, episodes_per_trial=2, split="test", generator=1)
    row = bench.coverage_rows(run, env, 0, {})[0]
    assert low <= row.ours <= high
    assert row.passes is None


def steered(known):
    """What one trial of each machine brings, and a path of beliefs that know z from the first step on, or nothing."""
    run = bench.untrained(FAMILY, CONFIG, 0, quick=True)
    with torch.no_grad():
        run.decoder.likelihood.log_scale.fill_(-1.0)
    env = TensorVectorEnv(FAMILY, 6, generator=0)
    rollout = collect(env, actions, 4, generator=torch.Generator().manual_seed(0))
    context = ContextSpec.of(env, inputs=("action",), targets=("change",)).of_rollout(rollout)
    z = torch.randn(6, bench.LATENT, generator=torch.Generator().manual_seed(1))
    y = run.decoder.output(z, context.x).detach()
    context = Observations(context.x, y, context.mask)
    shape = (context.shots + 1, 6, bench.LATENT)
    loc, scale = torch.zeros(shape), torch.ones(shape)
    if known:
        loc[1:], scale[1:] = z, 0.1
    return run, BeliefPath(run.decoder.program(), context, loc, scale)


def test_a_dead_belief_gains_nothing_and_one_that_knows_gains():
    run, dead = steered(known=False)
    assert (bench.log_score_gained(dead, run.decoder) == 0).all()
    run, sharp = steered(known=True)
    gained = bench.log_score_gained(sharp, run.decoder)
    assert (gained > 0.01).all()
    wrong = BeliefPath(sharp.program, sharp.context, -3 * sharp.loc, sharp.scale)  # control
    assert bench.log_score_gained(wrong, run.decoder).mean() < 0


def test_the_log_density_is_that_of_many_draws():
    run, path = steered(known=True)
    with torch.no_grad():
        run.decoder.likelihood.log_scale.fill_(0.5)  # wide, so that draws need not be many
    loc, scale = path.loc[:-1].transpose(0, 1), 0.5 * torch.ones(6, path.steps, bench.LATENT)
    exact = bench.log_density_of_next(path, run.decoder, loc, scale)
    n = 20_000
    noise = torch.randn(n, 6, bench.LATENT, generator=torch.Generator().manual_seed(2))
    for step in (0, path.steps - 1):
        data = path.context.points(slice(step, step + 1))
        each = run.decoder.log_prob(loc[:, step] + 0.5 * noise, data).detach().double().squeeze(-1).exp()
        error = each.std(0) / each.mean(0) / n**0.5
        assert (error < 0.05).all()
        assert ((each.mean(0).log() - exact[:, step]).abs() < 5 * error + 1e-5).all()


def test_the_benchmark_has_the_rows_of_both_episodes(monkeypatch):
    monkeypatch.setattr(beam_steering, "family_of", lambda: FAMILY)
    args = argparse.Namespace(quick=True, seed=0, starts=2, split="test", threads=1, policies=["varibad"])
    rows = {row.name: row for row in beam_steering.run(args)}
    expected = [f"varibad_episode_{n}_{what}" for n in (1, 2) for what in ("length", "success")]
    assert list(rows) == [*expected, *(f"varibad_next_readings_{what}" for what in ("coverage", "log_score_gained"))]
    assert all(row.passes is None for row in rows.values())
    assert rows["varibad_episode_1_length"].seconds > 0
