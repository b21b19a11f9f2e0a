"""PEARL: latents anew in each episode, contexts of their own trial, one gradient for all tasks, runs that go on."""

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.data import Observations
from bayesmeta.rl.envs import BernoulliBandit, SparsePointRobot, TensorVectorEnv
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.off_policy.pearl import PEARL, PEARLConfig, explained
from bayesmeta.rl.off_policy.posterior_sampling import extended, inferring, play
from bayesmeta.rl.off_policy.replay import Remembered, Transitions
from bayesmeta.rl.off_policy.sac import SACConfig
from bayesmeta.rl.runs import fit, load_learner
from bayesmeta.train import checkpoint
from tests.faults.driver import contents, difference
from tests.rl_small import Coin, Parabola

SMALL = {
    "sac": SACConfig(gamma=0.9, hidden=(8,), lr=1e-2), "latent": 2, "meta_batch": 2, "batch": 4, "context_batch": 3,
    "updates": 2,
}  # fmt: skip


def robot(tasks=3, episodes=3, seed=0, **options):
    return TensorVectorEnv(SparsePointRobot(horizon=4), tasks, episodes_per_trial=episodes, generator=seed, **options)


def pearl(env=None, seed=0, encoder="product", **options):
    env = robot(seed=seed) if env is None else env
    return PEARL(env, PEARLConfig(**SMALL | options), encoder=encoder, width=8, seed=seed)


# -- trials under latents ----------------------------------------------------------------------------------------------


class Counting:
    """A belief whose latents are the number of transitions known and the sum of their rewards."""

    def __init__(self, tasks):
        self.tasks = tasks

    def infer(self, context, episode, generator):
        known = context.full_mask().to(context.x)
        return torch.stack([known.sum(1), (known * context.y).sum(1), episode.to(known)], -1)


def played(env, **options):
    seen = []

    def act(observation, z, generator):
        seen.append(z)
        action = env.single_action_space.high[0] * (2 * torch.rand(len(z), *env.single_action_space.shape) - 1)
        return action, torch.zeros(len(z))

    spec = ContextSpec.of(env)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rollout = play(env, act, Counting(env.num_tasks).infer, spec, torch.Generator(), **options)
    return rollout, torch.stack(seen)


def test_latents_are_inferred_when_an_episode_begins_from_its_own_trial():
    env = robot(tasks=2, episodes=3, copies=2)
    rollout, z = played(env, episodes=5)
    assert rollout.reward.shape == (20, 4)
    known = torch.tensor([0, 4, 8, 0, 4]).repeat_interleave(4)  # a second trial begins after three episodes
    assert torch.equal(z[..., 0], known[:, None].expand(20, 4).float())
    assert torch.equal(z[..., 2], torch.tensor([0.0, 1, 2, 0, 1]).repeat_interleave(4)[:, None].expand(20, 4))
    for start, end, inside in ((4, 8, slice(0, 4)), (8, 12, slice(0, 8)), (16, 20, slice(12, 16))):
        assert torch.allclose(z[start:end, :, 1], rollout.reward[inside].sum(0).expand(4, 4))
    assert torch.equal(rollout.state, z[-1])
    assert torch.equal(rollout.first_state, z[0])
    assert torch.equal(rollout.moments.observation[1:4], rollout.successor[:3])


def test_episodes_that_end_at_different_times_have_contexts_of_their_own():
    env = TensorVectorEnv(Coin(), 12, episodes_per_trial=2, generator=0)
    rollout, z = played(env, episodes=4)
    lengths = set()
    for index in range(12):
        first, total, begins = 0, 0.0, 0  # where this trial began; what is known at this episode's begin
        for t in range(24):
            assert z[t, index, :2].tolist() == pytest.approx([begins - first, total], abs=1e-4)
            if bool(rollout.ended[t, index]):
                lengths.add(t + 1 - begins)
                begins = t + 1
                if bool(rollout.trial_ended[t, index]):
                    first = begins
                total = float(rollout.reward[first:begins, index].sum())
    assert len(lengths) > 1  # else nothing was tested


def test_a_context_grows_and_is_forgotten():
    first = Observations(torch.ones(2, 3, 1), torch.zeros(2, 3))
    more = Observations(2 * torch.ones(2, 1, 1), torch.ones(2, 1))
    assert extended(first, more, torch.tensor([False, False])).x.squeeze(-1).tolist() == [[1, 1, 1, 2]] * 2
    half = extended(first, more, torch.tensor([True, False]))
    assert half.full_mask().tolist() == [[False] * 4, [True] * 4]
    assert extended(half, more, torch.tensor([False, False])).full_mask().sum(1).tolist() == [1, 5]
    assert extended(half, more, torch.tensor([True, True])).shots == 0


def test_ways_to_explore():
    spec = ContextSpec.of(robot())
    latent = LatentContext.make(spec, 2, "product", width=8, seed=1)
    many = 4000
    x, y = torch.randn(1, 5, 4).expand(many, 5, 4), torch.randn(1, 5).expand(many, 5)
    context, episode = Observations(x, y), torch.arange(many) % 3
    with torch.no_grad():
        q = latent.posterior(context)

    def drawn(**options):
        with torch.no_grad():
            return inferring(latent, **options)(context, episode, torch.Generator().manual_seed(0))

    assert torch.equal(drawn(exploration="mean"), q.mean)
    scale = q.base_dist.scale[0]
    assert float((1 - scale).abs().max()) > 0.1  # the belief is not the prior
    for options, early, late in (
        ({}, scale, scale),
        ({"exploration": "prior"}, torch.ones(2), torch.ones(2)),
        ({"prior_episodes": 2}, torch.ones(2), scale),
    ):
        z = drawn(**options)
        for which, expected in ((episode < 2, early), (episode == 2, late)):
            error = expected / (2 * int(which.sum())) ** 0.5  # of a standard deviation
            assert ((z[which].std(0) - expected).abs() < 4 * error).all()
    empty = inferring(latent)(spec.empty(many, torch.zeros(1)), episode, torch.Generator().manual_seed(0))
    assert torch.equal(empty, latent.sample(latent.prior(many), 1, torch.Generator().manual_seed(0))[0])
    with pytest.raises(errors.OptionError, match="Unknown exploration"):
        inferring(latent, "greedy")
    with pytest.raises(errors.OptionError, match="prior_episodes"):
        inferring(latent, prior_episodes=0)


# -- updates -----------------------------------------------------------------------------------------------------------


def test_the_guide_reads_the_last_rollout_and_the_critics_all():
    learner = pearl(context_batch=300, batch=300)
    learner.train(3)
    assert learner.replay.sizes.tolist() == [36] * 3  # 3 iterations × 3 episodes × 4 steps
    read, seen = [], []
    posterior, update = learner.policy.latent.posterior, learner.updates.update
    learner.policy.latent.posterior = lambda context: read.append(context) or posterior(context)
    learner.updates.update = lambda batch, *args, **options: seen.append(batch) or update(batch, *args, **options)
    rollout = learner.collect()
    learner.store(rollout)
    learner.update()
    last = rollout.moments.observation.flatten(0, 1).unique(dim=0)
    assert read[-1].shots == 300  # the update's; those before are of the trial, the first of them empty
    known = (read[-1].x[..., :2].flatten(0, 1)[:, None] == last).all(-1).any(1)
    assert known.all()
    seen_before = (seen[0].observation.flatten(0, 1)[:, None] == last).all(-1).any(1)
    assert 0.1 < (~seen_before).float().mean() < 0.9


def test_actor_and_critics_learn_from_the_dense_reward_and_contexts_hold_the_sparse_one():
    learner = pearl(train_reward="dense_reward", meta_batch=3)
    learner.train(1)
    seen, read = [], []
    update, posterior = learner.updates.update, learner.policy.latent.posterior

    def spy(batch, *args, **options):
        seen.append(batch)
        return update(batch, *args, **options)

    learner.updates.update = spy
    learner.policy.latent.posterior = lambda context: read.append(context) or posterior(context)
    learner.update()
    assert (seen[0].reward < 0).all()  # minus the distance
    assert (read[0].y == 0).all()  # nobody is near a goal after four steps
    assert read[0].y.shape == (3, 3)
    assert seen[0].reward.shape == (3, 4)


@pytest.mark.parametrize("critic_gradient", [True, False])
def test_what_the_guide_learns_from(critic_gradient):
    """Without a KL and the critics' gradient nothing but the decoder's likelihood moves the guide."""
    options = {"kl_weight": 0.0, "reconstruction": "reward", "reconstruction_weight": 0.0}
    learner = pearl(critic_gradient=critic_gradient, warmup=2, **options)
    learner.train(1)
    guide = list(learner.policy.latent.parameters())
    before = [p.clone() for p in guide]
    learner.update()
    moved = any(not torch.equal(p, q) for p, q in zip(guide, before))
    assert moved == critic_gradient
    actor = learner.updates.optimizers["actor"].param_groups
    assert not {id(p) for group in actor for p in group["params"]} & {id(p) for p in guide}


def test_the_kl_is_told_in_nats_and_weighs_as_asked():
    told, losses = {}, {}
    for weight in (0.0, 1.0, 3.0):
        learner = pearl(kl_weight=weight)
        learner.store(learner.collect())
        update = learner.updates.update
        learner.updates.update = lambda *a, extra, update=update, weight=weight, **o: (
            losses.setdefault(weight, float(extra.detach())), update(*a, extra=extra, **o))[1]  # fmt: skip
        told[weight] = float(learner.update()["kl"])
    assert told[0.0] > 1e-3
    assert told[0.0] == pytest.approx(told[1.0]) == pytest.approx(told[3.0])
    assert [losses[w] for w in (0.0, 1.0, 3.0)] == pytest.approx([0.0, told[1.0], 3 * told[1.0]])


@pytest.mark.parametrize("reconstruction", ["reward", "transition"])
def test_a_decoder_can_be_asked_for(reconstruction):
    learner = pearl(reconstruction=reconstruction, reconstruction_weight=1.0)
    told = learner.train(3)[-1]
    assert {"kl", "log_likelihood", "critic", "entropy"} <= told.keys()
    spec = explained(learner.spec, reconstruction)
    assert learner.policy.decoder.spec == spec
    assert (spec.features, spec.outputs) == {"reward": (6, 1), "transition": (4, 3)}[reconstruction]
    plain = pearl()
    assert plain.policy.decoder is None
    assert "log_likelihood" not in plain.train(1)[0]


def test_a_latent_tells_where_the_best_action_is():
    """One step, whose reward says where the best action is: the second episode is better than the first."""
    env = TensorVectorEnv(Parabola(), 15, copies=4, episodes_per_trial=4, generator=0)
    sac = SACConfig(lr=1e-2, hidden=(32, 32), polyak=0.1, gamma=0.0)
    config = PEARLConfig(
        sac=sac, latent=1, meta_batch=15, batch=8, context_batch=4, updates=12, kl_weight=0.01,
        reconstruction="reward",
    )  # fmt: skip
    learner = PEARL(env, config, width=32)
    learner.train(15)
    held_out = TensorVectorEnv(Parabola(), 8, copies=20, episodes_per_trial=5, generator=1)
    curve = learner.curve(held_out).mean()
    blind = learner.curve(held_out, exploration="prior").mean()
    assert curve[-1] > -0.35
    assert curve[-1] > blind[-1] + 0.15  # control: the same policy under latents that know nothing
    assert curve[-1] > curve[0] + 0.15


# -- the learner -------------------------------------------------------------------------------------------------------


def held_out(tasks=4):
    return robot(tasks=tasks, seed=9, split="validation")


def run(learner, iterations, out=None, **options):
    options = {"validate_every": 2, "checkpoint_every": 2, "progress": False, "validation": held_out()} | options
    return fit(learner, iterations=iterations, out=out, **options)


@pytest.mark.parametrize("encoder", ["product", "recurrent", "mean", "attention"])
def test_encoders(encoder):
    learner = pearl(encoder=encoder)
    learner.train(2)
    curve = learner.curve(held_out())
    assert curve.returns.shape == (3, 4)
    assert curve.unit == "episode"
    assert curve.lengths.tolist() == [[4.0] * 4] * 3
    assert torch.equal(curve.returns, learner.curve(held_out()).returns)  # seed 0


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    for name, parts in (("whole", (4,)), ("parts", (1, 3, 4))):
        for number, until in enumerate(parts):
            run(pearl(reconstruction="reward"), until, tmp_path / name, resume=number > 0)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for content in (whole, parts):  # a part's last iteration is measured too
        content["log"] = [{k: v for k, v in row.items() if not k.startswith("return")} for row in content["log"]]
        content["checkpoint.pt"].pop("curves")
        content.pop("checkpoint.previous.pt")
    assert difference(whole, parts) is None
    run(pearl(reconstruction="reward", seed=1), 4, tmp_path / "other")
    assert difference(whole, contents(tmp_path / "other")) is not None
    with pytest.raises(errors.CheckpointError, match="kl_weight"):
        run(pearl(reconstruction="reward", kl_weight=2.0), 5, tmp_path / "whole", resume=True)
    again = load_learner(tmp_path / "whole", pearl(reconstruction="reward", seed=5))
    trained = pearl(reconstruction="reward")
    trained.train(4)
    assert torch.equal(again.curve(held_out()).returns, trained.curve(held_out()).returns)
    assert again.iteration == 0
    elsewhere = pearl(robot(seed=1), reconstruction="reward")  # other goals: a state brings its own
    assert difference(elsewhere.env.state_dict(), trained.env.state_dict()) is not None
    elsewhere.load_state_dict(trained.state_dict())
    assert difference(elsewhere.env.state_dict(), trained.env.state_dict()) is None


def test_numbers_of_another_precision():
    learner = pearl(robot(dtype=torch.float64), reconstruction="transition")
    told = learner.train(2)[-1]
    assert all(torch.tensor(value).isfinite() for value in told.values())
    assert {p.dtype for p in learner.policy.parameters()} == {torch.float64}
    assert learner.curve(robot(dtype=torch.float64)).returns.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_the_device():
    learner = pearl(robot(device="cuda"), reconstruction="reward")
    learner.train(2)
    assert {p.device.type for p in learner.policy.parameters()} == {"cuda"}
    assert learner.curve(robot(device="cuda")).returns.device.type == "cuda"


def test_episodes_are_watched():
    learner = pearl()
    seen = bm.rl.watch(learner, held_out(tasks=2))
    assert len(seen.paths) == 2
    assert [len(path) for path in seen.paths[0]] == [5, 5, 5]


def test_an_update_that_is_not_finite_leaves_the_learner_as_it_was():
    learner = pearl()
    learner.train(1)
    before = learner.state_dict()
    reward = learner.replay._fields["reward"]
    learner.replay._fields["reward"] = torch.full_like(reward, torch.nan)
    with pytest.raises(errors.NonFiniteLossError, match="iteration 2"):
        learner.train(1)
    after = learner.state_dict()
    assert difference(before["policy"], after["policy"]) is None
    assert difference(before["updates"], after["updates"]) is None
    learner.replay._fields["reward"] = reward
    learner.train(1)
    assert difference(before["policy"], learner.state_dict()["policy"]) is not None  # control


def test_a_run_copies_the_buffer_only_where_it_is_saved(tmp_path, monkeypatch):
    whole, copies = pearl(), []
    fit(whole, iterations=7, progress=False)
    given = Remembered.__call__
    monkeypatch.setattr(Remembered, "__call__", lambda self: copies.append(int(self._size[0])) or given(self))
    run(pearl(), 7, tmp_path, checkpoint_every=3)
    assert copies == [0, 36, 72, 84]  # the options of the run at its begin, and 12 steps an iteration
    again = pearl()
    fit(again, iterations=8, out=tmp_path, checkpoint_every=8, resume=True, progress=False)
    assert copies[4:] == [0, 96]
    fit(whole, iterations=8, progress=False)
    assert difference(whole.state_dict(), again.state_dict()) is None


def test_what_was_done_before_a_failure_is_saved_with_its_buffer(tmp_path):
    learner = pearl(capacity=30)  # the ring is full when it fails
    update = learner.update

    def fails():
        if learner.iteration == 4:
            raise RuntimeError("a wire is broken")
        return update()

    learner.update = fails
    with pytest.raises(RuntimeError, match="a wire is broken"):
        fit(learner, iterations=6, out=tmp_path, checkpoint_every=3, progress=False)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 4
    fit(same := pearl(capacity=30), iterations=4, progress=False)
    assert difference(same.state_dict(), saved["learner"]) is None
    assert difference(same.replay.state_dict(), learner.replay.state_dict()) is not None  # control


def test_bad_input_is_refused():
    for options in (
        {"latent": 0}, {"meta_batch": 0}, {"batch": 0.5}, {"updates": True}, {"warmup": 0}, {"prior_episodes": 0},
        {"reconstruction": "all"}, {"kl_weight": -1.0}, {"reconstruction_weight": float("inf")}, {"encoder_lr": 0.0},
        {"critic_gradient": False},
    ):  # fmt: skip
        with pytest.raises(errors.OptionError):
            PEARLConfig(**options)
    with pytest.raises(errors.OptionError, match="a latent of size 0 says nothing"):
        PEARLConfig(latent=0)
    with pytest.raises(errors.OptionError, match="new_tasks"):
        pearl(robot(new_tasks=True))
    with pytest.raises(errors.SpaceError, match="needs a Box"):
        pearl(TensorVectorEnv(BernoulliBandit(arms=2, horizon=2), 2, generator=0))
    with pytest.raises(errors.ReplayError, match="no steps of task"):
        pearl().update()
    with pytest.raises(errors.OptionError, match="nothing named 'dense'"):
        pearl(train_reward="dense").train(1)
    learner = pearl()
    learner.train(1)
    for other in (BernoulliBandit(arms=2, horizon=2), Parabola()):  # of other spaces, and of other bounds
        elsewhere = TensorVectorEnv(other, 2, generator=0)
        with pytest.raises(errors.ContextError, match="another task family"):
            learner.curve(elsewhere)
        with pytest.raises(errors.ContextError, match="another task family"):
            PEARL(robot(), PEARLConfig(**SMALL), spec=ContextSpec.of(elsewhere))
    with pytest.raises(errors.ContextError):  # of another family
        learner.policy.latent.posterior(Observations(torch.zeros(1, 2, 7), torch.zeros(1, 2)))
    short = PEARL(robot(), PEARLConfig(**SMALL), spec=ContextSpec.of(robot(), max_context=4), width=8)
    with pytest.raises(errors.ContextError, match="max_context=4"):
        short.curve(held_out())
    with pytest.raises(errors.CheckpointError, match="other networks"):
        pearl(latent=3).load_learned(learner.state_dict())


def test_transitions_of_a_rollout_are_kept_with_what_was_asked():
    learner = pearl(train_reward="dense_reward")
    steps = Transitions.of_rollout(learner.collect(), ("dense_reward",))
    distance = (steps.successor - learner.env.tasks.goal[:, None]).norm(dim=-1)
    assert torch.allclose(steps.extra["dense_reward"], -distance)
