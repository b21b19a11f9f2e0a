"""Latents of training tasks and an encoder distilled onto them: what learns from what, and that runs go on."""

import copy

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl.envs import BeamSteering, BernoulliBandit, Navigation, SparsePointRobot, TensorVectorEnv
from bayesmeta.rl.envs.points import GoalTasks
from bayesmeta.rl.latent.contexts import ContextSpec, prefix
from bayesmeta.rl.off_policy import distilled
from bayesmeta.rl.off_policy.distilled import DistilledLatents
from bayesmeta.rl.off_policy.distilled_config import DistilledConfig
from bayesmeta.rl.off_policy.sac import SACConfig
from bayesmeta.rl.runs import fit
from tests.faults.driver import contents, difference

ROBOT = SparsePointRobot(horizon=4)
SAC = SACConfig(hidden=(8,), lr=1e-2)
SMALL = {"sac": SAC, "batch": 4, "updates": 2, "distill_steps": 2, "distill_batch": 3, "chains": 2}


def make(*, seed=0, tasks=5, episodes=3, iterations=8, family=ROBOT, spec=None, encoder=None, **options):
    env = TensorVectorEnv(family, tasks, episodes_per_trial=episodes, generator=seed)
    config = DistilledConfig(**({"train_reward": "dense_reward", "chain_every": 2} | SMALL | options))
    return DistilledLatents(env, config, iterations=iterations, spec=spec, seed=seed, **(encoder or {}))


def held_out(tasks=6, episodes=3, **options):
    return TensorVectorEnv(ROBOT, tasks, split="validation", episodes_per_trial=episodes, generator=9, **options)


# -- what learns from what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["mixture", "gaussian"])
def test_the_encoder_leaves_policy_and_latents_alone_and_they_leave_it(posterior):
    learner = make(posterior=posterior)
    learner.train(2)

    def values():
        found = {name: value.clone() for name, value in learner.policy.state_dict().items()}
        parts = ("networks", "latents", "belief")
        return {part: {n: v for n, v in found.items() if n.startswith(part)} for part in parts}

    before = values()
    learner.policy.zero_grad()
    learner.distill()
    assert all(p.grad is None for part in ("networks", "latents") for p in getattr(learner.policy, part).parameters())
    after = values()
    assert difference(before["networks"], after["networks"]) is None
    assert difference(before["latents"], after["latents"]) is None
    assert difference(before["belief"], after["belief"]) is not None
    learner.update()
    last = values()
    assert difference(after["belief"], last["belief"]) is None
    assert difference(after["networks"], last["networks"]) is not None
    assert difference(after["latents"], last["latents"]) is not None


def test_latents_learn_from_their_own_task_alone():
    """Only the KL moves the latents of a task whose steps are of no consequence to its critics."""
    learner = make(kl_weight=0.0)
    learner.train(1)
    batch = learner.replay.sample(4, learner.generator).with_reward("dense_reward")
    z = learner.policy.latents.rsample(learner.generator)
    inputs = learner.policy.networks.inputs(batch.observation[:2], z[:2])
    learner.policy.latents.zero_grad()
    learner.policy.networks.critics(torch.cat([inputs, batch.action[:2]], -1)).sum().backward()
    grad = learner.policy.latents.loc.grad
    assert (grad[:2] != 0).all()
    assert (grad[2:] == 0).all()


def test_a_higher_kl_weight_keeps_latents_at_the_prior():
    options = {"latent_lr": 0.1, "last_lr": 1.0, "updates": 4}
    free, held = make(kl_weight=0.0, **options), make(kl_weight=100.0, **options)
    for learner in (free, held):
        learner.train(8)
    with torch.no_grad():
        assert float(held.policy.latents.kl().mean()) < 0.5 * float(free.policy.latents.kl().mean())


def test_critics_learn_from_the_training_reward_and_contexts_hold_the_sparse_one():
    learner = make()
    learner.train(1)
    steps = learner.replay.sample(50, torch.Generator().manual_seed(0))
    assert (steps.reward == 0).all()  # nobody finds a goal in 4 steps
    assert (steps.extra["dense_reward"] < -0.2).all()
    seen, _ = learner.chains.sample(9, torch.Generator().manual_seed(0))
    assert (seen.y == 0).all()
    with pytest.raises(errors.OptionError, match="nothing named 'dense'"):
        make(train_reward="dense").train(1)


def test_chains_are_trials_of_their_task_in_order():
    """A family whose reward tells the task: each row of a chain is of its own task, and time runs on."""
    family = Navigation(horizon=4)
    spec = ContextSpec(family.observation_space, family.action_space, inputs=("successor",))
    learner = make(family=family, spec=spec, train_reward=None, tasks=4)
    learner.train(1)
    seen, which = learner.chains.sample(20, torch.Generator().manual_seed(0))
    goal = learner.env.tasks.goal[which].unsqueeze(1)
    assert torch.allclose(seen.y, -(seen.x - goal).square().sum(-1), atol=1e-6)
    others = learner.env.tasks.goal[(which + 1) % 4].unsqueeze(1)
    assert not torch.allclose(seen.y, -(seen.x - others).square().sum(-1), atol=1e-3)
    assert seen.x.shape == (20, 12, 2)
    starts = seen.x[:, [0, 4, 8]].norm(dim=-1)  # one step away from the begin of an episode
    assert (starts <= 0.1 * 2**0.5 + 1e-6).all()


@pytest.mark.parametrize("posterior", ["mixture", "gaussian"])
def test_each_context_goes_with_a_draw_of_its_own_task_at_every_prefix(posterior, monkeypatch):
    """With copies, and latents so far apart that a draw tells whose it is, as a reward tells where the goal is."""
    family = Navigation(horizon=4)
    env = TensorVectorEnv(family, 4, copies=2, episodes_per_trial=3, generator=0)
    spec = ContextSpec(family.observation_space, family.action_space, inputs=("successor",))
    config = DistilledConfig(**SMALL | {"posterior": posterior, "distill_batch": 40})
    learner = DistilledLatents(env, config, iterations=2, spec=spec)
    with torch.no_grad():
        learner.policy.latents.loc.copy_(10.0 * torch.arange(4).unsqueeze(-1).expand_as(learner.policy.latents.loc))
        learner.policy.latents.log_scale.fill_(-5.0)

    def raises(*args):
        raise AssertionError("a chain that knows its task")

    learner._own_latents = raises
    learner.collect_chain()
    goals, told = env.tasks.goal, []
    loss = distilled.distillation_loss

    def spy(belief, context, z, steps):
        value = loss(belief, context, z, steps)
        told.append((context, z, steps, value.detach()))
        return value

    monkeypatch.setattr(distilled, "distillation_loss", spy)
    before = copy.deepcopy(learner.policy.belief)
    learner.distill()
    ((context, z, steps, value),) = told
    assert steps.tolist() == [4, 8, 12]
    assert context.x.shape == (40, 12, 2)
    distance = (context.x.unsqueeze(1) - goals.view(1, 4, 1, 2)).square().sum(-1)
    task = (context.y.unsqueeze(1) + distance).abs().amax(-1).argmin(-1)  # whose goal explains the rewards
    assert task.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal((z / 10.0).round(), task.unsqueeze(-1).expand_as(z).to(z))
    each = [-before.posterior(prefix(context, n)).log_prob(z).mean().detach() for n in (4, 8, 12)]
    torch.testing.assert_close(value, torch.stack(each).mean(), rtol=1e-4, atol=1e-4)


def test_no_chain_before_the_end_of_the_warmup():
    learner = make(warmup=2)
    rows = learner.train(4)
    assert ["distillation" in row for row in rows] == [False, False, True, True]
    assert len(learner.chains) == 1


def test_rates_fall_linearly():
    learner = make(iterations=5, last_lr=0.2)
    learner.train()
    rates = [g["lr"] for o in (*learner.updates.optimizers.values(), learner.distiller) for g in o.param_groups]
    start = [1e-2, 3e-3, 1e-2, 1e-2, 3e-3]
    assert rates == pytest.approx([0.2 * rate for rate in start])


# -- what was learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["mixture", "gaussian"])
def test_a_new_tasks_first_episode_knows_nothing_of_it(posterior):
    """Which row a task stands in, and its goal, change nothing until it is told a reward."""
    learner = make(posterior=posterior)
    learner.train(3)
    near = torch.tensor([[0.05, 0.05]]).expand(6, 2)  # met by everyone at once, and so told by the first rewards
    far = torch.tensor([[5.0, 5.0]]).expand(6, 2)
    paths = {}
    for name, goal in (("near", near), ("far", far), ("other", torch.tensor([[-5.0, 5.0]]).expand(6, 2))):
        env = TensorVectorEnv(ROBOT, 6, tasks=GoalTasks(goal.clone()), episodes_per_trial=3)
        paths[name] = learner.evaluate(env, generator=3).successor
    assert torch.equal(paths["near"][:4], paths["far"][:4])
    assert torch.equal(paths["far"], paths["other"])
    assert not torch.equal(paths["near"][4:], paths["far"][4:])


def test_the_curve_has_a_point_for_each_episode():
    learner = make()
    learner.train(2)
    curve = learner.curve(held_out(copies=2), generator=0)
    assert curve.unit == "episode"
    assert curve.returns.shape == (3, 6)
    assert learner.curve(held_out(copies=2), generator=0).returns.equal(curve.returns)
    greedy = [learner.evaluate(held_out(), exploration="mean", generator=g).successor for g in (0, 1)]
    assert torch.equal(*greedy)  # nothing is drawn
    drawn = [learner.evaluate(held_out(), generator=g).successor for g in (0, 1)]
    assert not torch.equal(*drawn)


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["mixture", "gaussian"])
def test_a_resumed_run_is_the_same_bit_for_bit(posterior, tmp_path):
    for name, parts in (("whole", (6,)), ("parts", (1, 4, 6))):
        for number, until in enumerate(parts):
            learner = make(posterior=posterior, warmup=1, capacity=10)
            fit(
                learner, iterations=until, out=tmp_path / name, resume=number > 0, validation=held_out(),
                validate_every=3, checkpoint_every=2, progress=False,
            )  # fmt: skip
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for content in (whole, parts):
        content["log"] = [{k: v for k, v in row.items() if not k.startswith("return")} for row in content["log"]]
        content["checkpoint.pt"].pop("curves")
        content.pop("checkpoint.previous.pt")
    assert difference(whole, parts) is None
    fit(make(posterior=posterior, warmup=1, capacity=10, seed=1), iterations=6, out=tmp_path / "other", progress=False)
    assert difference(whole, contents(tmp_path / "other")) is not None  # control: another seed is another run
    again = bm.rl.load_learner(tmp_path / "whole", make(posterior=posterior, warmup=1, capacity=10))
    drawn = [x.evaluate(held_out(), generator=0).successor for x in (again, learner)]
    assert torch.equal(*drawn)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"posterior": "flow"}, "expected 'mixture' or 'gaussian'"),
        ({"latent": 0}, "a latent of size 0 says nothing"),
        ({"updates": 0}, "updates must be a whole number"),
        ({"distill_steps": 0}, "distill_steps must be a whole number"),
        ({"warmup": -1}, "warmup must be a whole number"),
        ({"latent_lr": 0.0}, "latent_lr must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more"),
        ({"last_lr": 0.0}, r"last_lr is a share in \(0, 1\]"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(errors.OptionError, match=says):
        DistilledConfig(**options)


@pytest.mark.parametrize("posterior", ["mixture", "gaussian"])
def test_numbers_of_another_precision(posterior):
    def robots(**options):
        return TensorVectorEnv(ROBOT, 4, episodes_per_trial=2, dtype=torch.float64, generator=0, **options)

    learner = DistilledLatents(robots(), DistilledConfig(**SMALL, posterior=posterior), iterations=2)
    told = learner.train()[-1]
    assert all(torch.tensor(value).isfinite() for value in told.values())
    assert {p.dtype for p in learner.policy.parameters()} == {torch.float64}
    assert learner.curve(robots(split="validation")).returns.dtype == torch.float64


def test_an_update_that_is_not_finite_leaves_the_learner_as_it_was():
    learner = make(chain_every=1)
    learner.train(1)
    before = learner.state_dict()
    reward = learner.replay._fields["extra.dense_reward"]
    learner.replay._fields["extra.dense_reward"] = reward.clone().fill_(torch.nan)
    with pytest.raises(errors.NonFiniteLossError, match="iteration 2"):
        learner.train(1)
    after = learner.state_dict()
    assert difference(before["policy"], after["policy"]) is None
    for name, moments in before["updates"].items():  # rates fall from iteration to iteration
        assert difference(moments["state"], after["updates"][name]["state"]) is None
    learner.replay._fields["extra.dense_reward"] = reward
    learner.train(1)
    assert difference(before["policy"], learner.state_dict()["policy"]) is not None  # control


def test_bad_environments():
    with pytest.raises(errors.OptionError, match="new_tasks=True"):
        DistilledLatents(TensorVectorEnv(ROBOT, 4, new_tasks=True))
    beam = TensorVectorEnv(BeamSteering(horizon=4), 4)
    with pytest.raises(errors.HorizonError, match="must be of one length"):
        DistilledLatents(beam)
    with pytest.raises(errors.ContextError, match="another task family"):
        make(spec=ContextSpec.of(beam))
    with pytest.raises(errors.OptionError, match="iterations must be"):
        make(iterations=0)
    with pytest.raises(errors.ContextError, match="another task family"):
        make().curve(TensorVectorEnv(BernoulliBandit(arms=2, horizon=4), 4))


@pytest.mark.parametrize("where", ["loss", "step"])
def test_an_encoder_that_diverged_says_so(where, monkeypatch):
    learner = make()
    learner.train(1)
    learner.env.reset()
    if where == "loss":
        monkeypatch.setattr(learner, "distill", lambda: torch.tensor(torch.nan))
    else:  # a step on the last finite loss
        learner._rates[-1] = [torch.inf]
    with pytest.raises(errors.NonFiniteLossError, match="The encoder is not finite after iteration 2"):
        learner.train(1)
