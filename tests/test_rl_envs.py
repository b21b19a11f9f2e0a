"""Environments of meta-RL: the tensor environments equal plain ones, keep time, and go on from a state bit for bit."""

import io
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from bayesmeta import errors
from bayesmeta.rl import envs
from bayesmeta.rl.envs import registered
from bayesmeta.rl.protocols import features, num_features

FAMILIES = {
    "bernoulli": envs.BernoulliBandit(arms=4, horizon=6),
    "gaussian": envs.GaussianBandit(arms=3, horizon=5, mean=1.0, spread=2.0, noise=0.5),
    "mdp": envs.TabularMDP(states=4, actions=3, horizon=7),
    "navigation": envs.Navigation(horizon=12),
    "sparse_navigation": envs.Navigation(horizon=12, sparse=True, extent=0.2),
    "robot": envs.SparsePointRobot(),
    "grid": envs.Grid(),
}
# Episodes of these end at different times.
UNEQUAL = {"beam": envs.BeamSteering(envs.Machines.built_in(20), horizon=12), "maze": envs.Maze(horizon=40)}
ALL = FAMILIES | UNEQUAL
PICTURES = ["navigation", "sparse_navigation", "robot", "grid", "beam", "maze"]
family_of = pytest.mark.parametrize("name", FAMILIES)
any_family_of = pytest.mark.parametrize("name", ALL)


def random_actions(family, num, generator, dtype=torch.float32):
    space = family.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.randint(int(space.n), (num,), generator=generator)
    # Twice the limits, so that clipping counts.
    high = torch.as_tensor(space.high, dtype=dtype)
    return 4 * high * (torch.rand(num, *space.shape, generator=generator, dtype=dtype) - 0.5)


def drive(env, actions):
    """All that came out of a few steps, as one list of tensors."""
    out = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        out += [observation, reward, terminated, truncated, *(value for value in info.values())]
    return out


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


# -- truth: the same rules, written twice ---------------------------------------------------------------------------


def run_both(family, *, tasks=3, copies=2, seed=0, plain_task=lambda task: task):
    """Largest difference between the tensor environments and plain ones, on the same random numbers, in float64."""
    generator = torch.Generator().manual_seed(seed)
    vector = family.vector(tasks, copies=copies, generator=seed, dtype=torch.float64)
    noise = family.reset_noise(vector.num_envs, generator, torch.float64)
    observation, _ = vector.reset(noise=noise)
    singles, worst = [], 0.0
    for i in range(vector.num_envs):
        task = {name: value[i // copies].numpy() for name, value in vector.tasks.as_dict().items()}
        singles.append(family.plain(task=plain_task(task)))
        seen, _ = singles[i].reset(seed=0, options={"noise": tuple(n[i].numpy() for n in noise)})
        worst = max(worst, float(np.abs(np.asarray(seen, dtype=float) - observation[i].numpy()).max()))
    running = [True] * vector.num_envs
    for _ in range(family.horizon):
        actions = random_actions(family, vector.num_envs, generator, torch.float64)
        noise = family.step_noise(vector.num_envs, generator, torch.float64)
        observation, reward, terminated, truncated, info = vector.step(actions, noise)
        for i, single in enumerate(singles):
            if not running[i]:
                continue
            numbers = tuple(n[i].numpy() for n in noise)
            seen, value, ended, cut, more = single.step_with(actions[i].numpy(), numbers)
            pairs = [(seen, info["final_obs"][i]), (value, reward[i]), (ended, terminated[i]), (cut, truncated[i])]
            pairs += [(more[key], info[key][i]) for key in more]
            assert set(more) == set(info) - {"final_obs", "trial_ended"}
            worst = max(
                worst, *(float(np.abs(np.asarray(a, dtype=float) - b.double().numpy()).max()) for a, b in pairs)
            )
            running[i] = not (ended or cut)
        if not any(running):
            break
    assert not any(running)
    return worst


@any_family_of
def test_tensor_environments_equal_plain_ones(name):
    # Plain observations are float32, of size 1 or so; all else is float64.
    assert run_both(ALL[name]) < 3e-7


@any_family_of
def test_another_task_would_be_seen(name):
    """The control: plain environments of another task differ."""
    other = lambda task: {key: 0.37 * value + 0.11 for key, value in task.items()}  # noqa: E731
    assert run_both(ALL[name], plain_task=other) > 1e-3


@pytest.mark.parametrize("name", registered.ENVIRONMENTS)
def test_gymnasium_accepts_plain_environments(name):
    env = gymnasium.make("bayesmeta.rl.envs.registered:" + name).unwrapped
    picture = type(env).__name__ in ("BeamSteeringEnv", "GridEnv", "MazeEnv", "NavigationEnv", "SparsePointRobotEnv")
    if picture:
        env = type(env)(render_mode="rgb_array")
    with warnings.catch_warnings():
        # ±0.1 is the action space of the papers; the other two are about being made without gymnasium.make, as here.
        warnings.filterwarnings("ignore", message=r".*(symmetric and normalized space|spec|render).*")
        check_env(env, skip_render_check=not picture)


def test_splits_do_not_share_their_tasks():
    train, test = (envs.Navigation().vector(50, split=split, generator=0).tasks.goal for split in ("train", "test"))
    assert len(torch.unique(torch.cat([train, test]), dim=0)) == 100
    again = envs.Navigation().vector(50, split="train", generator=0).tasks.goal
    assert torch.equal(train, again)


def test_registration_is_not_repeated():
    before = dict(gymnasium.registry)
    assert registered.register() == list(registered.ENVIRONMENTS)
    assert dict(gymnasium.registry) == before


# -- time -----------------------------------------------------------------------------------------------------------


@family_of
def test_episodes_trials_and_what_ends_them(name):
    family = FAMILIES[name]
    env = family.vector(2, copies=3, episodes_per_trial=2, new_tasks=True, generator=1)
    generator = torch.Generator().manual_seed(0)
    start, _ = env.reset()
    first = env.tasks
    for episode in range(4):
        for step in range(family.horizon):
            assert env.clock.tolist() == [step] * 6
            assert env.episode.tolist() == [episode % 2] * 6
            observation, reward, terminated, truncated, info = env.step(random_actions(family, 6, generator))
            over = step == family.horizon - 1
            assert terminated.tolist() == [over and family.horizon_terminates] * 6
            assert truncated.tolist() == [over and not family.horizon_terminates] * 6
            assert info["trial_ended"].tolist() == [over and episode % 2 == 1] * 6
            assert reward.dtype == torch.float32
            assert reward.shape == (6,)
            assert torch.equal(observation, start if over else info["final_obs"])
        assert (env.tasks is first) == (episode == 0)


def test_copies_share_their_task():
    env = envs.Grid().vector(3, copies=2, generator=0)
    env.reset()
    rewards = torch.stack([env.step(torch.tensor([1, 1, 2, 2, 2, 2]))[1] for _ in range(4)])
    assert torch.equal(rewards[:, 0::2], rewards[:, 1::2])
    env.reset(options={"tasks": envs.grid.CellTasks(torch.tensor([[0.0, 2.0], [2.0, 0.0], [3.0, 0.0]]))})
    rewards = torch.stack([env.step(torch.tensor([1, 1, 2, 2, 2, 2]))[1] for _ in range(3)])
    assert (rewards > 0).nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 4], [2, 5]]


def test_without_autoreset_one_has_to_reset():
    env = envs.TabularMDP(horizon=2).vector(2, generator=0, autoreset_mode=AutoresetMode.DISABLED)
    env.reset()
    env.step(torch.zeros(2, dtype=torch.int64))
    *_, terminated, truncated, _ = env.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(errors.EnvError, match="2 episodes have ended and autoreset is disabled"):
        env.step(torch.zeros(2, dtype=torch.int64))
    observation, _ = env.reset(options={"reset_mask": terminated | truncated})
    assert observation.tolist() == [0, 0]
    env.step(torch.zeros(2, dtype=torch.int64))


# -- randomness -----------------------------------------------------------------------------------------------------


@any_family_of
def test_a_run_goes_on_bit_for_bit(name):
    family = ALL[name]
    copies = 2 if family.fixed_length else 1
    make = lambda: family.vector(4 // copies, copies=copies, episodes_per_trial=2, new_tasks=True, generator=3)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    actions = [random_actions(family, 4, generator) for _ in range(3 * family.horizon)]
    env = make()
    env.reset()
    drive(env, actions[:3])
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    rest = drive(env, actions[3:])
    file.seek(0)
    again = make()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert same(drive(again, actions[3:]), rest)
    # The control: without the state of the generator or the clock it is another run.
    other = make()
    other.reset()
    assert not same(drive(other, actions[3:]), rest)


def test_the_state_of_other_environments_is_refused():
    state = envs.Grid().vector(2, generator=0).state_dict()
    with pytest.raises(errors.CheckpointError, match="belongs to environments"):
        envs.Grid(horizon=9).vector(2, generator=0).load_state_dict(state)


@any_family_of
def test_seeds_decide_and_nothing_global_moves(name):
    family = ALL[name]
    generator = torch.Generator().manual_seed(0)
    actions = [random_actions(family, 3, generator) for _ in range(family.horizon + 1)]
    before = torch.get_rng_state()
    runs = []
    for seed in (5, 5, 6):
        env = family.vector(3, new_tasks=True)
        env.reset(seed=seed)
        runs.append([*env.tasks.as_dict().values(), *drive(env, actions)])
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert {value.dtype for value in runs[0] if value.is_floating_point()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), before)


def test_rewards_and_transitions_have_their_distribution():
    """Five standard errors, from the distributions themselves."""
    num = 40_000
    bandit = envs.BernoulliBandit(arms=2).vector(
        1, copies=num, tasks=envs.bandits.BanditTasks(torch.tensor([[0.2, 0.7]]))
    )
    bandit.reset()
    rewards = bandit.step(torch.ones(num, dtype=torch.int64))[1]
    assert abs(float(rewards.mean()) - 0.7) < 5 * (0.21 / num) ** 0.5
    gaussian = envs.GaussianBandit(arms=2, noise=2.0).vector(
        1, copies=num, tasks=envs.bandits.BanditTasks(torch.tensor([[0.2, 0.7]]))
    )
    gaussian.reset()
    rewards = gaussian.step(torch.zeros(num, dtype=torch.int64))[1]
    assert abs(float(rewards.mean()) - 0.2) < 5 * 2.0 / num**0.5
    assert abs(float(rewards.std()) - 2.0) < 5 * 2.0 / (2 * num) ** 0.5
    mdp = envs.TabularMDP(states=3, actions=2).vector(1, copies=num, generator=4)
    mdp.reset()
    observation, rewards, *_ = mdp.step(torch.ones(num, dtype=torch.int64))
    chances = mdp.tasks.transition[0, 0, 1]
    assert bool(
        ((observation.bincount(minlength=3) / num - chances).abs() < 5 * (chances * (1 - chances) / num).sqrt()).all()
    )
    assert abs(float(rewards.mean() - mdp.tasks.reward[0, 0, 1])) < 5 / num**0.5


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_tasks_have_their_distribution():
    mean = envs.BernoulliBandit().sample_tasks(4000, generator=0).mean
    assert bool((mean.sort(0).values - torch.linspace(0, 1, 4000)[:, None]).abs().max() < 1.95 / 4000**0.5)
    tasks = envs.TabularMDP().sample_tasks(500, generator=0)
    assert abs(float(tasks.reward.mean()) - 1) < 5 / tasks.reward.numel() ** 0.5
    assert torch.allclose(tasks.transition.sum(-1), torch.ones(500, 10, 5))
    # A coordinate of a flat Dirichlet of 10 is Beta(1, 9): variance 9 / (100 · 11).
    assert float(tasks.transition.var()) == pytest.approx(9 / 1100, rel=0.02)
    goals = envs.Grid().goals()
    assert len(goals) == 21
    assert not {(0, 0), (0, 1), (1, 0), (1, 1)} & {tuple(goal) for goal in goals.tolist()}
    drawn = envs.Grid().sample_tasks(4200, generator=0).goal
    counts = torch.unique(drawn, dim=0, return_counts=True)[1]
    assert len(counts) == 21
    assert float(((counts - 200.0) ** 2 / 200).sum()) < 45.3  # chi-squared, 20 degrees, p = 0.001


def test_goals_of_the_sparse_robot_are_held_out():
    robot = envs.SparsePointRobot()
    train, validation, test = (robot.goals(split) for split in ("train", "validation", "test"))
    assert [len(goals) for goals in (train, validation, test)] == [80, 20, 20]
    assert len(torch.unique(torch.cat([train, validation, test]), dim=0)) == 120
    assert torch.allclose(train.norm(dim=-1), torch.ones(80))
    assert bool((train[:, 1] >= 0).all())
    drawn = robot.sample_tasks(20, generator=1, split="test").goal
    assert torch.equal(drawn.sort(0).values, test.sort(0).values)
    assert len(robot.sample_tasks(1000, generator=1).goal) == 1000


def test_standing_still_and_the_oracle_of_navigation():
    """Means over goals by hand: standing still −100·2·E[g²] = −16.67; straight there −2·Σₜ E[(|g| − t/10)²₊] =
    −0.133.
    """
    env = envs.Navigation().vector(20_000, generator=0)
    for policy, expected in ((lambda at: torch.zeros_like(at), -100 / 6), (lambda at: env.tasks.goal - at, -0.4 / 3)):
        at, _ = env.reset()
        total = torch.zeros(20_000)
        for _ in range(100):
            _, reward, *_, info = env.step(policy(at))
            at, total = info["final_obs"], total + reward
        assert abs(float(total.mean()) - expected) < 5 * float(total.std()) / 20_000**0.5


def test_the_oracle_of_the_sparse_robot():
    """Straight to a known goal: 13.38 on average over the half circle."""
    angle = (torch.arange(2000) + 0.5) / 2000 * torch.pi
    goals = envs.points.GoalTasks(torch.stack([angle.cos(), angle.sin()], -1))
    env = envs.SparsePointRobot().vector(2000, tasks=goals)
    at, _ = env.reset()
    total, dense = torch.zeros(2000), torch.zeros(2000)
    for _ in range(20):
        _, reward, *_, info = env.step(env.tasks.goal - at)
        at, total, dense = info["final_obs"], total + reward, dense + info["dense_reward"]
        distance = (at - env.tasks.goal).norm(dim=-1)
        assert torch.allclose(info["dense_reward"], -distance, atol=1e-6)
    assert float(total.mean()) == pytest.approx(13.38, abs=0.05)


# -- pictures and spaces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_where_things_are(name):
    family = ALL[name]
    env = family.vector(8, generator=0)
    env.reset()
    before = env.render()
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in before)
    discrete = isinstance(family.action_space, gymnasium.spaces.Discrete)
    action = torch.ones(8, dtype=torch.int64) if discrete else torch.full((8, *family.action_space.shape), 0.1)
    env.step(action)
    assert (before[0] != env.render()[0]).any()
    assert any((before[0] != frame).any() for frame in before)  # other goals


def test_features_are_what_networks_take():
    discrete, box = gymnasium.spaces.Discrete(3), gymnasium.spaces.Box(-1, 1, (2, 2))
    assert features(discrete, torch.tensor([[2], [0]])).tolist() == [[[0, 0, 1]], [[1, 0, 0]]]
    assert features(box, torch.arange(8.0).view(2, 2, 2)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert features(gymnasium.spaces.Box(0, 1, ()), torch.tensor([0.5, 1.0])).tolist() == [[0.5], [1.0]]
    assert [num_features(space) for space in (discrete, box)] == [3, 4]
    for call in (num_features, lambda space: features(space, torch.zeros(1))):
        with pytest.raises(errors.SpaceError, match="Discrete and Box spaces are known"):
            call(gymnasium.spaces.MultiBinary(3))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: envs.BernoulliBandit(arms=0), "arms=0; expected at least 1"),
    (lambda: envs.TabularMDP(horizon=0), "horizon=0"),
    (lambda: envs.Navigation(max_step=0.0), "expected a positive step"),
    (lambda: envs.Navigation(radius=2.0), r"radius in \(0, 1\]"),
    (lambda: envs.Navigation(extent=float("nan")), "extent=nan"),
    (lambda: envs.GaussianBandit(noise=-1.0), "noise=-1"),
    (lambda: envs.Grid(cells=2), "cells=2; expected at least 3"),
    (lambda: envs.Grid().sample_tasks(2, split="dev"), "split 'dev'; expected one of train, validation, test"),
    (lambda: envs.Grid().vector(0), "num_tasks=0"),
    (lambda: envs.Grid().vector(2, autoreset_mode="NextStep"), "expected SameStep or Disabled"),
    (lambda: envs.Grid().vector(2, new_tasks=True, tasks=envs.Grid().sample_tasks(2)), "new_tasks=True and tasks"),
    (lambda: envs.Grid().vector(2).reset(options={"goal": 3}), "unknown options of reset: goal"),
    (lambda: envs.Grid().plain(render_mode="human"), "render_mode='human'"),
    (lambda: envs.Grid().plain(task={"where": 1}), "a task with where was given; expected goal"),
    (lambda: envs.Grid().plain().reset(options={"goal": 3}), "unknown options of reset: goal"),
])  # fmt: skip
def test_bad_options_are_refused(make, message):
    with pytest.raises(errors.OptionError, match=message):
        make()


def test_bad_actions_and_calls_are_refused():
    grid = envs.Grid().vector(2)
    with pytest.raises(errors.EnvError, match="call reset"):
        grid.step(torch.zeros(2, dtype=torch.int64))
    grid.reset()
    with pytest.raises(errors.EnvError, match="actions from -1 to 7 were given; expected 0 … 4"):
        grid.step(torch.tensor([-1, 7]))
    for wrong in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), [0, 1]):
        with pytest.raises(errors.ShapeError, match=r"expected a tensor \[2\] of integers"):
            grid.step(wrong)
    point = envs.Navigation().vector(2)
    point.reset()
    with pytest.raises(errors.ShapeError, match=r"expected a tensor \[2, 2\] of floating numbers"):
        point.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(errors.ShapeError, match="3 tasks were given to environments of 2"):
        grid.reset(options={"tasks": envs.Grid().sample_tasks(3)})
    with pytest.raises(errors.ShapeError, match="reset_mask"):
        grid.reset(options={"reset_mask": torch.ones(2)})
    bandit = envs.BernoulliBandit().vector(1)
    bandit.reset()
    with pytest.raises(errors.EnvError, match="no picture"):
        bandit.render()
    with pytest.raises(errors.EnvError, match="the tasks are drawn by reset"):
        envs.Grid().vector(2, new_tasks=True).tasks  # noqa: B018
    single = envs.Grid().plain()
    with pytest.raises(errors.EnvError, match="no episode is running"):
        single.step(0)
    single.reset(seed=0)
    with pytest.raises(errors.EnvError, match="action 5 was given"):
        single.step(5)
    one = envs.Navigation().plain()
    one.reset(seed=0)
    with pytest.raises(errors.EnvError, match="an action of shape"):
        one.step(np.zeros(3))
