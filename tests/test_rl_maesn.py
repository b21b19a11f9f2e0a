"""MAESN: latents are held and fresh, new tasks begin at the prior, the bound is kept, learning, resume, bad input."""

import dataclasses
import math

import pytest
import torch
from test_rl_maesn_truth import Quadratic, Targets, small
from torch import nn

import bayesmeta as bm
from bayesmeta import nets
from bayesmeta.errors import CheckpointError, HorizonError, ModelError, OptionError, ShapeError
from bayesmeta.rl.envs import Navigation, SparsePointRobot, TensorVectorEnv
from bayesmeta.rl.envs.points import GoalTasks
from bayesmeta.rl.maesn.config import MAESNConfig
from bayesmeta.rl.maesn.learner import MAESN
from bayesmeta.rl.maesn.policy import LOG_SCALES, LatentPolicy, latent_distribution, latents
from bayesmeta.rl.maesn.setups import POINT_ROBOT
from bayesmeta.rl.maesn.trials import _adapted
from bayesmeta.rl.policies import CategoricalHead, GaussianHead, kl
from bayesmeta.rl.setups import Setup
from benchmarks._sparse_maesn import maesn
from tests.faults.driver import contents, difference

# -- latents --------------------------------------------------------------------------------------------------------


def seen_latents(learner, calls):
    """The latents that the policy reads in each step of each call."""
    found, distribution = [], learner.policy.distribution

    def watch(theta, features, z):
        found.append(z.clone())
        return distribution(theta, features, z)

    learner.policy.distribution = watch
    episodes = [learner.episodes(learner.env, learner.omega[:3], learner.generator, inner=True) for _ in range(calls)]
    del learner.policy.distribution
    return torch.stack(found).unflatten(0, (calls, -1)), episodes


def test_a_latent_is_held_through_its_episode_and_fresh_in_the_next():
    z, episodes = seen_latents(small(horizon=5), 2)
    assert z.shape == (2, 5, 3, 4, 2)
    assert torch.equal(z, z[:, :1].expand_as(z))  # constant in time
    assert torch.equal(z[0, 0], episodes[0].z)
    flat = z[:, 0].flatten(0, 2)  # all episodes of all tasks and calls
    distance = (flat[:, None] - flat[None]).abs().sum(-1) + torch.eye(len(flat))
    assert distance.min() > 1e-6


def test_latents_are_draws_of_their_own_tasks_gaussian():
    """Means and variances of 4000 episodes for each of three tasks, in standard errors; the prior (control) is far."""
    learner = small(copies=4000, horizon=1)
    z = learner.episodes(learner.env, learner.omega[:3], learner.generator, inner=True).z
    q = latent_distribution(learner.omega[:3]).base_dist
    assert ((z.mean(1) - q.loc).abs() * math.sqrt(4000) / q.scale).max() < 4
    assert ((z.var(1) / q.scale.square() - 1).abs() * math.sqrt(4000 / 2)).max() < 4
    assert (z.mean(1).abs() * math.sqrt(4000)).max() > 8


def test_log_scales_stay_in_their_range():
    omega = torch.tensor([[0.0, -50.0], [0.0, 50.0]], dtype=torch.float64)
    z = latents(omega, torch.ones(2, 1, 1).double()).flatten()
    assert z.log().tolist() == pytest.approx(LOG_SCALES)


def test_a_new_task_begins_at_the_prior_whatever_the_training_tasks_learned():
    learner = small()
    env = TensorVectorEnv(Navigation(horizon=4), 6, copies=5, generator=2, dtype=torch.float64)
    first = learner.evaluate(env, inner_steps=2)
    learner.omega = learner.omega + 3.0
    assert torch.equal(learner.evaluate(env, inner_steps=2), first)
    seen = []
    episodes = learner.episodes
    learner.episodes = lambda env, phi, *rest, **options: seen.append(phi) or episodes(env, phi, *rest, **options)
    learner.evaluate(env, inner_steps=1)
    assert torch.equal(seen[0], torch.zeros(6, 4).double())  # mean 0, log σ 0
    assert seen[1].abs().max() > 1e-3
    prior = latent_distribution(seen[0])
    assert torch.equal(prior.base_dist.scale, torch.ones(6, 2).double())


def test_evaluation_changes_nothing_and_reads_the_environments_own_reward():
    learner = small(inner_reward="dense_reward", train_reward="dense_reward")  # which this environment has not
    state = learner.state_dict()
    env = TensorVectorEnv(Navigation(horizon=4), 6, copies=3, generator=2, dtype=torch.float64)
    assert learner.evaluate(env, inner_steps=3).shape == (4, 6)
    assert difference(state, learner.state_dict()) is None
    with pytest.raises(OptionError, match="dense_reward"):
        learner.train(1)


def test_later_steps_are_smaller():
    learner = small(copies=3, later_rates=0.25)
    shares = []
    step = learner.step
    learner.step = lambda *args, **options: shares.append(options["share"]) or step(*args, **options)
    env = TensorVectorEnv(Navigation(horizon=4), 6, copies=3, generator=2, dtype=torch.float64)
    learner.evaluate(env, inner_steps=3)
    assert shares == [1.0, 0.25, 0.0625]
    with pytest.raises(OptionError, match="a share for each of 2 steps"):
        learner.evaluate(env, inner_steps=2, shares=[1.0])


def test_adapted_policies_at_the_mean_read_no_noise():
    """What the inner step reads is drawn all the same."""
    learner = small(adapted="mean")
    inner, outer = (learner.episodes(learner.env, learner.omega[:3], learner.generator, inner=i) for i in (True, False))
    assert torch.equal(outer.z, learner.omega[:3, None, :2].expand(3, 4, 2))
    assert inner.noise.abs().min() > 0


# -- what a run does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("omega_lr", [0.0, 0.2])
def test_outer_steps_keep_their_bound(omega_lr):
    """The divergence of the adapted policies, computed here from what they do, is at most the bound; with plain steps
    of ω it is that of θ and the rates alone."""
    learner = small(copies=5, max_kl=0.02, omega_lr=omega_lr, curvature_episodes=2)
    for _ in range(3):
        theta, omega, kept = learner.theta.clone(), learner.omega.clone(), {}
        objectives = learner.objectives

        def keep(rows, own, before, after, kept=kept, objectives=objectives):
            kept.setdefault("data", (rows, before, after))
            return objectives(rows, own, before, after)

        learner.objectives = keep
        (told,) = learner.train(1)
        learner.objectives = objectives
        rows, before, after = kept["data"]
        pair = []
        for at, start in ((theta, omega), (learner.theta, learner.omega if omega_lr == 0 else omega)):
            found = learner.path(at, start[rows], before, create_graph=False)
            z = latents(found, after.noise)
            pair.append(learner.policy.distribution(learner.parts(at)[0], after.steps.features, z))
        reached = kl(*pair).mean().item()
        assert told["accepted"] == 1
        assert 0 < reached <= 0.02
        assert reached == pytest.approx(told["kl"], rel=1e-6)
        assert torch.equal(learner.policy.theta, learner.parts(learner.theta)[0])
        moved = (learner.omega != omega).any(1)
        assert moved[rows].all()
        assert moved.sum() == 3  # tasks that took no part keep their ω
        if omega_lr > 0:
            assert (learner.omega - omega).norm(dim=1).max() <= omega_lr * (1 + 1e-9)


def test_tasks_adapt_each_by_itself():
    learner = small()
    episodes = learner.episodes(learner.env, learner.omega[:3], learner.generator, inner=True)
    phi = learner.path(learner.theta, learner.omega[:3], [episodes], create_graph=False)
    other = episodes._replace(credit=episodes.credit.clone())
    other.credit[1] *= -3
    again = learner.path(learner.theta, learner.omega[:3], [other], create_graph=False)
    assert torch.equal(phi[[0, 2]], again[[0, 2]])
    assert (phi[1] - again[1]).abs().max() > 1e-3


def test_policies_may_adapt_too():
    learner = small(policy_lr=0.1)
    start = learner.begin(learner.theta, learner.omega[:3])
    episodes = learner.episodes(learner.env, start, learner.generator, inner=True)
    phi = learner.path(learner.theta, learner.omega[:3], [episodes], create_graph=False)
    shared = learner.parts(learner.theta)[0]
    assert phi.shape == (3, 4 + learner.policy.size)
    assert ((phi[:, 4:] - shared).abs().amax(1) > 1e-4).all()
    whole, alone = (
        learner.policy.distribution(t, episodes.steps.features, episodes.z).mean for t in (shared.expand(3, -1), shared)
    )
    torch.testing.assert_close(whole, alone)  # one θ for each task, or one for all
    assert all(math.isfinite(x) for row in learner.train(2) for x in row.values())


def trained(iterations, **options):
    """Targets that are not seen, around 0: no one action brings more than 0, less the mean square of the targets."""
    targets = Targets(torch.linspace(-1.5, 1.5, 20))
    env = TensorVectorEnv(Quadratic(), 20, copies=20, tasks=targets, generator=0)
    torch.manual_seed(0)
    policy = LatentPolicy(nets.mlp(2, [16], 1, activation="tanh"), GaussianHead(1, log_std=-1.0), 1)
    options = {"max_kl": 0.1, "cg_steps": 5, "inner_lr": 1.0, "kl_weight": 0.02, **options}
    learner = MAESN(env, policy, MAESNConfig(**options), tasks=targets)
    learner.train(iterations)
    test = Targets(torch.linspace(-1.4, 1.4, 101))
    return learner, TensorVectorEnv(Quadratic(), 101, copies=20, tasks=test, generator=3)


def test_it_learns_to_adapt():
    """After one step from the prior new tasks bring more than any one action could; an ω that adapted to another task
    (the control) is worse than none."""
    learner, env = trained(30)
    before, after = learner.evaluate(env, generator=1)
    best = -env.tasks.best.square().mean()
    assert before.mean() < best
    assert after.mean() > best + 3 * after.std() / math.sqrt(101)
    assert after.mean() > before.mean() + 0.3
    prior, (first, second) = torch.zeros(101, 2), (torch.Generator().manual_seed(seed) for seed in (5, 6))
    episodes = learner.episodes(env, prior, first, inner=True)
    phi = learner.path(learner.theta, prior, [episodes], create_graph=False)
    others = learner.episodes(env, phi.flip(0), second, inner=True).steps.returns.mean()
    assert others < before.mean() - 0.3


def test_rewards_that_are_learned_from_are_named():
    """On the sparse robot, dense advantages and sparse returns; steps without a hit do nothing."""
    goals = GoalTasks(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    env = TensorVectorEnv(SparsePointRobot(horizon=4), 2, copies=3, tasks=goals, generator=0)
    policy = LatentPolicy(nets.mlp(4, [8], 2), GaussianHead(2, log_std=-2.0), 2)
    learner = MAESN(env, policy, MAESNConfig(train_reward="dense_reward"), tasks=goals)
    zero = torch.zeros(2, 4)
    dense = learner.episodes(env, zero, learner.generator, inner=False, reward="dense_reward")
    assert dense.steps.returns.abs().max() == 0  # four steps do not get there
    assert dense.learned.max() < -2  # four steps at distances of half and more
    assert dense.steps.advantage.std() > 0.1
    sparse = learner.episodes(env, zero, learner.generator, inner=True)
    assert torch.equal(learner.path(learner.theta, zero, [sparse], create_graph=False), zero)
    assert learner.train(1)[0]["accepted"] == 1


# -- episode by episode -----------------------------------------------------------------------------------------------


class Hits(Quadratic):
    """A reward of 1 within 0.3 of the target."""

    name = "hits"

    def advance(self, tasks, state, actions, noise):
        return state, ((actions.squeeze(-1) - tasks.best).abs() < 0.3).to(actions), None, {}


def hitting(*, rate=1.0, copies=4000, targets=(0.2, -0.9), **options):
    """Actions are the latents themselves, up to 0.001."""
    tasks = Targets(torch.tensor(targets, dtype=torch.float64))
    network = nn.Linear(2, 1).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 1.0]]))
        network.bias.fill_(0.0)
    env = TensorVectorEnv(
        Hits(), len(targets), copies=copies, tasks=tasks, episodes_per_trial=4, generator=0, dtype=torch.float64
    )
    policy = LatentPolicy(network, GaussianHead(1, log_std=math.log(1e-3)), 1)
    options = {"credit": "share", "natural": True, "inner_lr": rate, **options}
    return MAESN(env, policy, MAESNConfig(**options), tasks=tasks), env, tasks.best


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_a_trial_explores_until_it_hits_and_goes_there_again(rate):
    """With a rate of 1 the step goes to the latent that hit, so that episode k brings 1 − (1 − p)^k with p the prior's
    mass near the target, within 4.5 standard errors. A rate of 0.2 (the control) does not get there."""
    learner, env, target = hitting(rate=rate)
    normal = torch.distributions.Normal(0.0, 1.0)
    p = normal.cdf(target + 0.3) - normal.cdf(target - 0.3)
    curve = learner.curve(env, generator=3)
    assert curve.unit == "episode"
    k = torch.arange(1, 5).unsqueeze(-1)
    exact = 1 - (1 - p) ** k
    error = (exact * (1 - exact) / 4000).sqrt()
    distance = ((curve.returns - exact).abs() / error).amax(1)
    assert distance[0] < 4.5
    assert (distance[1:] < 4.5).all() if rate == 1 else distance[1:].max() > 20


def test_the_step_of_a_trial_is_that_of_a_batch():
    """Eight episodes one by one, or as the copies of one task."""
    learner, env, _ = hitting(rate=0.7, copies=8, targets=(0.4,))
    episodes = learner.episodes(env, torch.zeros(1, 2).double(), torch.Generator().manual_seed(1), inner=True)
    assert 0 < (episodes.credit > 0).sum() < 8
    phi = learner.path(learner.theta, torch.zeros(1, 2).double(), [episodes], create_graph=False)
    drawn, credit = (list(x.transpose(0, 1).unsqueeze(0).unbind(1)) for x in (episodes.z, 3 * episodes.credit))
    loc, knows = _adapted(
        learner, [z.view(1, 1, 1) for z in drawn], [c.view(1, 1) for c in credit], drawn[0].view(1, 1, 1)
    )
    torch.testing.assert_close(loc.flatten(), phi[0, :1])
    assert knows.all()
    _, knows = _adapted(learner, [drawn[0].view(1, 1, 1)], [torch.zeros(1, 1).double()], drawn[0].view(1, 1, 1))
    assert not knows.any()


def test_trials_need_steps_that_stand_alone():
    learner, _, _ = hitting(copies=2)
    for episodes in (1, 2):  # a curve of steps, and one of episodes
        moving = TensorVectorEnv(Quadratic(), 2, copies=2, episodes_per_trial=episodes, new_tasks=True)
        with pytest.raises(OptionError, match="new_tasks=True"):
            learner.curve(moving)
    for options in ({"credit": "centred"}, {"gradient": "pathwise"}, {"policy_lr": 0.1}):
        learner, env, _ = hitting(copies=2, **options)
        with pytest.raises(OptionError, match="after each episode"):
            learner.curve(env)
    learner, env, _ = hitting(copies=2)
    for points in (0, 2):
        with pytest.raises(OptionError, match=f"one step from the prior; got {points}"):
            learner.curve(env, points=points)
    assert torch.equal(learner.curve(env, points=1).returns, learner.curve(env).returns)
    several, env, _ = hitting(copies=2, inner_steps=2)
    with pytest.raises(OptionError, match="one step from the prior; got 2"):
        several.curve(env)
    assert several.curve(env, points=1).returns.shape == (4, 2)
    learner, _, _ = hitting(copies=2)
    worse = TensorVectorEnv(Quadratic(), 2, episodes_per_trial=2, dtype=torch.float64)
    with pytest.raises(OptionError, match="0 or more"):
        learner.curve(worse)


@pytest.mark.parametrize("options", [{}, {"adapted": "mean"}])
def test_what_is_watched_are_the_points_of_the_curve(options):
    """Episodes that a step alone reads are no point."""
    env = TensorVectorEnv(Navigation(horizon=4), 2, copies=3, generator=2, dtype=torch.float64)
    learner = small(**options)
    seen = bm.rl.watch(learner, env, points=2)
    assert [len(paths) for paths in seen.paths] == [3, 3]
    assert all(path.shape == (5, 2) for paths in seen.paths for path in paths)
    returns = torch.stack([torch.stack([r.sum() for r in rewards]) for rewards in seen.rewards], 1)
    env = TensorVectorEnv(Navigation(horizon=4), 2, copies=3, tasks=env.tasks, dtype=torch.float64)
    wanted = []
    episodes = learner.episodes
    learner.episodes = lambda *args, **kw: wanted.append(episodes(*args, **kw)) or wanted[-1]
    learner.evaluate(env, inner_steps=2, generator=0)
    shown = wanted if not options else wanted[1::2]
    torch.testing.assert_close(
        returns.double(), torch.stack([w.steps.returns[:, 0] for w in shown]), rtol=1e-5, atol=1e-6
    )


# -- going on ---------------------------------------------------------------------------------------------------------


def made(seed=0, **options):
    family = Navigation(horizon=3)
    env = TensorVectorEnv(family, 3, copies=2, generator=seed)
    torch.manual_seed(seed)
    policy = LatentPolicy(nets.mlp(4, [4], 2, activation="tanh"), GaussianHead(2, log_std=-2.0), 2)
    options = {"kl_ramp": 4, "prior_share": 0.5, "prior_after": 3, "omega_lr": 0.1} | options
    return MAESN(env, policy, MAESNConfig(**options), tasks=family.sample_tasks(7, generator=seed), seed=seed)


def run(learner, iterations, out, resume=False):
    held_out = TensorVectorEnv(Navigation(horizon=3), 5, copies=2, split="validation", generator=9)
    return bm.rl.fit(
        learner, iterations=iterations, out=out, resume=resume, validation=held_out, validate_every=2, points=2,
        checkpoint_every=2, progress=False,
    )  # fmt: skip


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    for name, parts in (("whole", (6,)), ("parts", (1, 4, 6))):
        for number, until in enumerate(parts):
            result = run(made(), until, tmp_path / name, resume=number > 0)
    assert [name for name in result.curves[-1] if not name.endswith("_se")] == [
        "step", "return_0", "return_1", "return_2",
    ]  # fmt: skip
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for content in (whole, parts):  # a part's last iteration is measured too
        content["log"] = [{k: v for k, v in row.items() if not k.startswith("return")} for row in content["log"]]
        content["checkpoint.pt"].pop("curves")
        content.pop("checkpoint.previous.pt")
    assert difference(whole, parts) is None
    run(made(seed=1), 6, tmp_path / "other")  # control: another seed is another run
    assert difference(whole, contents(tmp_path / "other")) is not None
    with pytest.raises(CheckpointError, match="'kl_weight'"):
        run(made(kl_weight=0.5), 8, tmp_path / "whole", resume=True)


def test_what_was_learned_is_loaded_without_the_training_tasks(tmp_path):
    learner = made()
    run(learner, 2, tmp_path)
    family = Navigation(horizon=3)
    env = TensorVectorEnv(family, 4, copies=3)
    policy = LatentPolicy(nets.mlp(4, [4], 2, activation="tanh"), GaussianHead(2), 2)
    elsewhere = MAESN(env, policy, learner.config, tasks=family.sample_tasks(4, generator=8))
    assert bm.rl.load_learner(tmp_path, elsewhere) is elsewhere
    assert torch.equal(elsewhere.theta, learner.theta)
    assert torch.equal(elsewhere.policy.theta, learner.policy.theta)
    assert elsewhere.omega.abs().max() == 0
    with pytest.raises(CheckpointError, match="tasks and the latent of that run"):
        elsewhere.load_state_dict(learner.state_dict())
    other = MAESN(env, LatentPolicy(nets.mlp(4, [5], 2), GaussianHead(2), 2))
    with pytest.raises(CheckpointError, match="meta-parameters"):
        other.load_learned(learner.state_dict())


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    policy = LatentPolicy(nets.mlp(4, [4], 2), GaussianHead(2), 2)
    family = Navigation(horizon=3)
    env = TensorVectorEnv(family, 3, copies=2)
    with pytest.raises(OptionError, match="new_tasks=False"):
        MAESN(TensorVectorEnv(family, 2, new_tasks=True), policy)
    for episodes in (1, 2):  # steps of a batch, and episode by episode
        config = MAESNConfig(credit="share" if episodes == 2 else "standardised")
        learner = MAESN(TensorVectorEnv(family, 2, copies=2), policy, config)
        changing = TensorVectorEnv(family, 2, new_tasks=True, episodes_per_trial=episodes)
        with pytest.raises(OptionError, match="adapt on one task and be played on another"):
            learner.curve(changing)
    with pytest.raises(OptionError, match="2 training tasks were given to environments of 3"):
        MAESN(env, policy, tasks=family.sample_tasks(2))
    single = TensorVectorEnv(family, 3)
    with pytest.raises(OptionError, match="copies=1"):
        MAESN(single, policy)
    MAESN(single, policy, MAESNConfig(credit="raw"))
    env.horizon = None
    with pytest.raises(HorizonError, match="no known horizon"):
        MAESN(env, policy)
    with pytest.raises(OptionError, match="at least one number"):
        LatentPolicy(nets.mlp(2, [4], 2), GaussianHead(2), 0)
    with pytest.raises(ModelError, match="dropout"):
        LatentPolicy(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.1)), CategoricalHead(2), 2)
    with pytest.raises(ShapeError, match="z has shape"):
        policy.distribution(policy.theta, torch.zeros(3, 2, 2), torch.zeros(3, 1, 2))
    for options in (
        {"inner_steps": 0}, {"inner_lr": 0.0}, {"policy_lr": -1.0}, {"gradient": "both"}, {"credit": "rank"},
        {"adapted": "mode"}, {"kl_weight": -0.1}, {"kl_ramp": -1}, {"omega_lr": math.nan}, {"prior_share": 1.5},
        {"later_rates": 0.0}, {"curvature_share": 2.0}, {"curvature_episodes": 0},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            MAESNConfig(**options)


def test_options_name_everything_that_changes_a_run():
    told = made().options()
    assert told["learner"] == "MAESN"
    assert {field.name for field in dataclasses.fields(MAESNConfig)} <= told.keys()


# -- by name ----------------------------------------------------------------------------------------------------------


def test_setups_name_it():
    """On the sparse robot with the settings of its benchmark; on other families as a start."""
    setup = Setup("point-robot", "maesn", tasks=4, copies=3, units=8).filled()
    learner = setup.learner(setup.family())
    assert not setup.remembers
    assert learner.config == POINT_ROBOT
    assert learner.omega.shape == (80, 4)  # all training goals
    assert len(learner.train(1)) == 1
    held_out = setup.held_out(setup.family(), 5, split="validation", seed=0)
    assert learner.curve(held_out, points=2).returns.shape == (3, 5)
    other = Setup("bandit", "maesn", tasks=4, copies=3, units=8, inner_lr=0.5, horizon=5).filled()
    learner = other.learner(other.family())
    assert learner.parts(learner.theta)[1].tolist() == pytest.approx([0.5] * 4)
    assert math.isfinite(learner.train(1)[0]["after"])
    with pytest.raises(OptionError, match="episodes=2 is not an option of maesn"):
        Setup("bandit", "maesn", episodes=2)


def test_the_benchmarks_learner_plays_trials_of_the_sparse_robot():
    """Trained on all goals that it is given; read on trials of several episodes, from the prior."""
    goals = TensorVectorEnv(SparsePointRobot(), 80, generator=0)
    learner = maesn(goals, 2, 0)
    assert torch.equal(learner.tasks.goal, goals.tasks.goal)
    held_out = TensorVectorEnv(SparsePointRobot(), 20, copies=3, split="validation", episodes_per_trial=3, generator=0)
    assert learner.curve(held_out, generator=0).returns.shape == (3, 20)
    other = maesn(goals, 2, 1)
    assert (learner.theta - other.theta).abs().max() > 0.01
