"""Contexts of transitions: by hand, which trial counts, prefixes, bad input."""

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl.latent.contexts import ContextSpec, prefix
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.rollout import Acted, collect
from tests import rl_latent_truth as truth
from tests.rl_envs import Counting

MOVES = 5


def counted(steps=6, start=None, env=None):
    """A rollout whose every number is known."""
    env = Counting() if env is None else env
    actor = lambda m, s, g: Acted((m.clock + torch.arange(6)) % MOVES, torch.zeros(6, dtype=torch.float64))  # noqa: E731
    return collect(env, actor, steps, generator=torch.Generator(), start=start)


def test_rows_by_hand():
    rollout = counted(4)
    spec = ContextSpec.of(Counting(), inputs=("state", "action", "successor"), reward_shift=1.0, reward_scale=2.0)
    context = spec.of_rollout(rollout)
    assert context.x.shape == (6, 4, 7)
    assert (spec.features, spec.outputs) == (7, 1)
    env, t = 4, 2  # task 1, copy 1
    action = (t % 2 + env) % MOVES
    expected = [110.0 + t, *[float(a == action) for a in range(MOVES)], 110.0 + t + 0.5]
    assert context.x[env, t].tolist() == expected
    assert context.y[env, t].item() == (action - 1.0) / 2.0
    change = ContextSpec.of(Counting(), targets=("reward", "change")).of_rollout(rollout)
    assert change.y.shape == (6, 4, 2)
    assert (change.y[..., 1] == 0.5).all()
    after = ContextSpec.of(Counting(), inputs=("action",), targets=("successor",)).of_rollout(rollout)
    assert after.y[env, t].item() == 110.0 + t + 0.5


def test_which_trial_counts():
    rollout = counted(6)  # trials of 4 steps: one whole and half a second
    spec = ContextSpec.of(Counting())
    first, current, every = (spec.of_rollout(rollout, trial=t) for t in ("first", "current", "all"))
    assert first.mask[3].tolist() == [True] * 4 + [False] * 2
    assert current.mask[3].tolist() == [False] * 4 + [True] * 2
    assert every.mask is None
    ended = counted(4)
    assert not spec.of_rollout(ended, trial="current").mask.any()  # the next has not begun
    later = counted(4, start=counted(2, env=(env := Counting())).after, env=env)  # from the middle of the first on
    assert spec.of_rollout(later, trial="current").mask[3].tolist() == [False] * 2 + [True] * 2


def test_a_part_of_a_trial_is_refused():
    env = Counting()
    begin = counted(2, env=env)
    rest = counted(2, start=begin.after, env=env)
    spec = ContextSpec.of(env)
    for trial in ("first", "current"):
        if trial == "current":
            rest = counted(1, start=counted(2, env=(other := Counting())).after, env=other)
        with pytest.raises(errors.ContextError, match=f"begin of the {trial} trial of environment 0"):
            spec.of_rollout(rest, trial=trial)
    assert spec.of_rollout(rest, trial="all").shots == 1


def test_by_task_puts_copies_behind_each_other():
    spec = ContextSpec.of(Counting())
    rollout = counted(6)
    each, together = spec.of_rollout(rollout), spec.of_rollout(rollout, by_task=True)
    assert together.x.shape == (2, 18, 6)
    assert torch.equal(together.x[1, 6:12], each.x[4])
    assert torch.equal(together.y[1, 12:], each.y[5])
    assert torch.equal(together.mask[0, :6], each.mask[0])


def test_binary_rewards_are_zero_or_one_to_the_bit():
    env = bm.rl.TensorVectorEnv(bm.rl.Grid(), 40, generator=0)
    spec = ContextSpec.of(env, inputs=("successor",), reward_shift=-0.1, reward_scale=1.1, binary=True)
    rollout = collect(env, truth.Uniform(5), 15, generator=torch.Generator().manual_seed(0))
    y = spec.of_rollout(rollout).y
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(y.T == 1, rollout.reward > 0)


def test_encoded_states():
    def one_hot(cell):
        index = (cell[..., 0] * 5 + cell[..., 1]).long()
        return torch.nn.functional.one_hot(index, 25).float()

    env = bm.rl.TensorVectorEnv(bm.rl.Grid(), 4, generator=0)
    spec = ContextSpec.of(env, inputs=("state", "successor"), encode=one_hot, encoded=25)
    rollout = collect(env, truth.Uniform(5), 15, generator=torch.Generator().manual_seed(0))
    context = spec.of_rollout(rollout)
    assert context.x.shape == (4, 15, 50)
    assert (context.x.sum(-1) == 2).all()
    wrong = ContextSpec.of(env, inputs=("state",), encode=one_hot, encoded=24)
    with pytest.raises(errors.ContextError, match="encoded=24"):
        wrong.of_rollout(rollout)


def test_prefixes():
    _, context = truth.pulls(3, 6)
    assert prefix(context, 2).shots == 2
    some = prefix(context, torch.tensor([0, 2, 6]))
    assert some.shots == 6
    assert some.mask.sum(-1).tolist() == [0, 2, 6]
    assert some.mask[1].tolist() == [True, True, False, False, False, False]
    latent = LatentContext.make(truth.a_spec(), 2, "mean", dtype=torch.float64)
    latent.recognition.head[-1].bias.data.fill_(0.3)
    torch.testing.assert_close(
        latent.posterior(some).mean[1], latent.posterior(prefix(context, 2)).mean[1], rtol=1e-12, atol=1e-14
    )
    for bad in (-1, 7, torch.tensor([0, 1, 7])):
        with pytest.raises(errors.ContextError, match="prefix"):
            prefix(context, bad)


def test_contexts_of_another_family_are_refused():
    spec = truth.a_spec()
    latent = LatentContext.make(spec, 2, dtype=torch.float64)
    other = ContextSpec.of(Counting()).of_rollout(counted(4))
    for call in (latent.posterior, latent.kl, latent.beliefs):
        with pytest.raises(errors.ContextError, match="another task family"):
            call(other)
    with pytest.raises(errors.ContextError, match="another task family"):
        latent.step(latent.first_state(6), other)
    with pytest.raises(errors.ContextError, match="no targets"):
        latent.posterior(truth.pulls(2)[1].with_y(None))
    with pytest.raises(errors.ContextError, match="type Tensor"):
        latent.posterior(torch.zeros(2, 3, 3))
    with pytest.raises(errors.ContextError, match="another task family"):
        spec.check_env(bm.rl.TensorVectorEnv(bm.rl.GaussianBandit(arms=4), 2, generator=0))
    spec.check_env(truth.bandit_env(2))


def test_longer_than_memory_is_refused_and_padding_is_not_counted():
    spec = truth.a_spec(max_context=4)
    latent = LatentContext.make(spec, 2, dtype=torch.float64)
    _, context = truth.pulls(3, 6)
    with pytest.raises(errors.ContextError, match="6 transitions; memory is for max_context=4"):
        latent.posterior(context)
    latent.posterior(prefix(context, 4))
    latent.posterior(prefix(context, torch.tensor([4, 0, 2])))


def test_bad_options():
    env = truth.bandit_env(1)
    bad = [
        {"inputs": ("action", "state")}, {"inputs": ()}, {"inputs": ("goal",)}, {"targets": ()},
        {"targets": ("successor", "change")}, {"inputs": ("successor",), "targets": ("change",)},
        {"encoded": 3}, {"reward_scale": 0.0}, {"max_context": 0}, {"binary": True, "targets": ("successor",)},
    ]  # fmt: skip
    for options in bad:
        with pytest.raises(errors.OptionError):
            ContextSpec.of(env, **options)
    with pytest.raises(errors.OptionError, match="Unknown trial"):
        ContextSpec.of(Counting()).of_rollout(counted(2), trial="last")
    with pytest.raises(errors.UnsupportedError, match="one likelihood"):
        bm.rl.latent.decoder.TransitionDecoder(ContextSpec.of(env, targets=("reward", "successor"), binary=True), 2)
