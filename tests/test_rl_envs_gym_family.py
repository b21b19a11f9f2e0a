"""Families of ordinary gymnasium environments: where tasks come from, new ones at each trial, and going on later."""

import io
from collections import Counter as Counts

import gymnasium
import numpy as np
import pytest
import torch
from test_rl_envs_gym import Counter

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl.envs.gym import GymVectorEnv
from bayesmeta.rl.envs.gym_family import GymFamily, env_horizon


class Walk(gymnasium.Env):
    """A random walk from a random start that drifts as its task says; an episode ends early where it strays far."""

    observation_space = gymnasium.spaces.Box(-1e6, 1e6, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    horizon = 5

    def __init__(self, drift, render_mode=None, *, honest=True):
        self.drift, self.render_mode, self.honest = float(drift), render_mode, honest

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock, self.place = 0, self.np_random.normal()
        return self.seen(), {}

    def seen(self):
        return np.array([self.place, self.drift])

    def step(self, action):
        self.clock += 1
        noise = self.np_random.normal() if self.honest else np.random.default_rng().normal()
        self.place += self.drift + 0.1 * float(action[0]) + noise
        return self.seen(), -abs(self.place), abs(self.place) > 2.5, self.clock == 5, {}

    def render(self):
        return np.full((8, 8, 3), int(self.drift * 10), np.uint8)


def walk(drift, render_mode=None):
    return Walk(drift, render_mode)


def played(env, steps, generator):
    """Everything that some steps return, under random actions."""
    rows = []
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(torch.randn(env.num_envs, 1, generator=generator))
        columns = (observation, info["final_obs"], reward, terminated, truncated, info["trial_ended"], env.clock)
        rows.append(torch.cat([x.double().reshape(env.num_envs, -1) for x in (*columns, env.episode)], 1))
    return torch.stack(rows) if rows else None


def saved(state):
    """A state after a way through a file, as checkpoints are."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- where tasks come from ------------------------------------------------------------------------------


def test_tasks_of_a_sequence_are_drawn_equally_often_and_in_another_order_each_time():
    family = GymFamily(walk, torch.tensor([0.0, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    draws = [family.sample_tasks(6, generator=generator) for _ in range(20)]
    assert all(sorted(draw) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0] for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 10
    singles = Counts(family.sample_tasks(1, generator=generator)[0] for _ in range(600))
    assert min(singles.values()) > 200 - 4 * (600 * 2 / 9) ** 0.5  # four standard deviations


def test_numbers_between_two_ends_are_uniform_and_other_in_each_split():
    family = GymFamily.uniform(walk, 1.0, 3.0)
    draws = torch.tensor(family.sample_tasks(20_000, generator=0))
    assert 1 <= float(draws.min()) < 1.01 < 2.99 < float(draws.max()) < 3
    assert float(draws.mean()) == pytest.approx(2, abs=4 * (4 / 12 / 20_000) ** 0.5)
    splits = [family.sample_tasks(3, generator=0, split=split) for split in ("train", "validation", "test")]
    assert len({tuple(split) for split in splits}) == 3
    assert family.sample_tasks(3, generator=0) == splits[0]
    assert (family.name, family.horizon, family.action_space) == ("walk", 5, Walk.action_space)


def test_a_familys_bad_input_is_refused():
    with pytest.raises(errors.OptionError, match="no tasks"):
        GymFamily(walk, [])
    with pytest.raises(errors.OptionError, match="lower end first"):
        GymFamily.uniform(walk, 2, 1)
    with pytest.raises(errors.OptionError, match=r"3 tasks were asked for.*gave 1"):
        GymFamily(walk, lambda number, generator, split: [0.0] * min(number, 1)).sample_tasks(3)
    with pytest.raises(errors.OptionError, match="split 'exam'"):
        GymFamily(walk, [1.0]).sample_tasks(3, split="exam")
    with pytest.raises(errors.HorizonError, match="say no horizon"):
        GymFamily(lambda task: Counter(task), [{}]).horizon  # noqa: B018
    with pytest.raises(errors.OptionError, match="takes no render_mode"):
        GymFamily(lambda task: Walk(task), [0.0]).vector(1, render_mode="rgb_array")
    for make, kind, message in (
        (lambda task: 1 // task, errors.EnvCrashError, "task 1, 0, cannot be made: ZeroDivisionError"),
        (lambda task: task and walk(task), errors.EnvError, "of task 1, 0, an int was made; expected a gymnasium.Env"),
    ):
        with pytest.raises(kind, match=message):
            GymVectorEnv(lambda task, make=make: walk(task) if task == 1 else make(task), [1, 0])
        with pytest.raises(kind, match=message.replace("task 1", "task 0")):
            GymFamily(make, [0])
    for options, message in (({"new_tasks": True}, "with no family"), ({"episodes_per_trial": 0}, "at least 1")):
        with pytest.raises(errors.OptionError, match=message):
            GymVectorEnv(walk, [0.0], **options)
    with pytest.raises(errors.OptionError, match="copies=2"):
        GymFamily(walk, [0.0]).vector(1, new_tasks=True, copies=2)
    with pytest.raises(errors.SpaceError, match="expected actions from 0"):
        GymVectorEnv(lambda task: Counter({"space": gymnasium.spaces.Discrete(2, start=1)}), [0])


def test_the_horizon_is_the_least_that_is_said():
    limit = gymnasium.wrappers.TimeLimit
    assert env_horizon(Counter({})) is None
    assert env_horizon(limit(Counter({}), 7)) == 7  # without a specification
    assert env_horizon(gymnasium.wrappers.ClipAction(limit(limit(Walk(0.0), 9), 8))) == 5  # Walk's own
    assert env_horizon(limit(Walk(0.0), 3)) == 3
    assert env_horizon(gymnasium.make("CartPole-v1", max_episode_steps=30)) == 30


# -- tasks at each trial --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [False, True])
def test_tasks_change_between_trials_and_never_within(workers):
    family = GymFamily.uniform(walk, 0.0, 1.0)
    env = family.vector(4, new_tasks=True, episodes_per_trial=2, workers=workers, generator=1)
    observation, _ = env.reset()
    task, generator, changes, ends = observation[:, 1].clone(), torch.Generator().manual_seed(0), 0, 0
    assert task.tolist() == pytest.approx(env.tasks)
    for _ in range(40):
        observation, _, terminated, truncated, info = env.step(torch.randn(4, 1, generator=generator))
        assert torch.equal(info["final_obs"][:, 1], task)  # what the action led to is of the old task
        over = terminated | truncated
        assert torch.equal(observation[:, 1] != task, info["trial_ended"])
        assert torch.equal((observation != info["final_obs"]).any(1), over)
        task = observation[:, 1].clone()
        assert task.tolist() == pytest.approx(env.tasks)
        changes, ends = changes + int(info["trial_ended"].sum()), ends + int(over.sum())
    assert 0 < changes < ends  # trials have two episodes
    env.close()


@pytest.mark.parametrize("how", ["made", "set"])
def test_tasks_can_be_set(how):
    made = []

    def make(drift):
        made.append(drift)
        return Walk(drift)

    def give(env, task):
        env.unwrapped.drift = float(task)

    family = GymFamily(make, [0.0], set_task=give if how == "set" else None)
    env = family.vector(2, copies=2)
    assert env.reset()[0][:, 1].tolist() == [0.0] * 4
    before = len(made)
    assert env.reset(options={"tasks": torch.tensor([0.5, 1.5])})[0][:, 1].tolist() == [0.5, 0.5, 1.5, 1.5]
    assert env.reset()[0][:, 1].tolist() == [0.5, 0.5, 1.5, 1.5]  # for later trials too
    assert len(made) - before == (0 if how == "set" else 4)
    with pytest.raises(errors.ShapeError, match=r"3 tasks were given to environments of 2"):
        env.reset(options={"tasks": [1.0, 2.0, 3.0]})
    with pytest.raises(errors.EnvCrashError, match=r"task 1 failed in taking another task.*could not convert"):
        env.reset(options={"tasks": [1.0, "far"]})


def test_a_task_of_other_spaces_is_refused():
    discrete = {"space": gymnasium.spaces.Discrete(3)}
    env = GymVectorEnv(lambda task: Counter(task), [{}, {}])
    with pytest.raises(errors.EnvCrashError, match=r"task 1 failed in taking another task.*Discrete\(3\)"):
        env.reset(options={"tasks": [{}, discrete]})


def test_actions_beyond_a_box_are_clipped_to_it():
    env = GymVectorEnv(lambda task: Counter(task), [{}], horizon=4)
    env.reset()
    assert env.step(torch.tensor([[5.0, -0.25]]))[1].tolist() == [0.75]  # the reward is the sum of the action


def test_an_episode_that_goes_on_behind_its_horizon_is_refused():
    env = GymVectorEnv(walk, [0.0, 0.0], horizon=3, generator=3)
    env.reset()
    played(env, 2, torch.Generator().manual_seed(0))
    with pytest.raises(errors.HorizonError, match="task 0 goes on behind the horizon of 3 steps"):
        env.step(torch.zeros(2, 1))


def test_pictures_are_of_the_first_environment_of_each_task():
    env = GymFamily(walk, [0.5, 2.0]).vector(2, copies=2, render_mode="rgb_array")
    env.reset(options={"tasks": [0.5, 2.0]})
    assert [int(picture[0, 0, 0]) for picture in env.pictures()] == [5, 20]
    with pytest.raises(errors.EnvError, match="no picture"):
        GymVectorEnv(lambda task: Counter(task), [{}]).pictures()


# -- going on later -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("steps", [0, 4, 17])
def test_a_state_is_gone_back_to_bit_for_bit_in_the_middle_of_trials(steps, workers):
    family = GymFamily.uniform(walk, 0.0, 1.0)

    def make(seed):
        return family.vector(3, new_tasks=True, episodes_per_trial=3, workers=workers, generator=seed)

    env, actions = make(1), torch.Generator().manual_seed(0)
    env.reset()
    played(env, steps, actions)
    if steps:
        assert env.clock.any()
        assert len(set(zip(env.episode.tolist(), env.clock.tolist()))) > 1  # not all at one place
    state, at = saved(env.state_dict()), actions.get_state()
    rest = played(env, 30, actions)
    again = make(5)
    again.reset()
    played(again, 3, actions)
    again.load_state_dict(state)
    actions.set_state(at)
    assert torch.equal(again._observation(again._seen), state["seen"])
    assert torch.equal(played(again, 30, actions), rest)
    other = make(5)  # control: without the state it is another run
    other.reset()
    actions.set_state(at)
    assert not torch.equal(played(other, 30, actions), rest)
    env.close(), again.close(), other.close()


def test_what_does_not_come_back_is_refused_and_new_trials_can_be_asked_for():
    def make(replays, honest=False):
        return GymVectorEnv(lambda task: Walk(task, honest=honest), [0.0, 0.5], generator=3, replays=replays)

    env = make(True)
    env.reset()
    env.step(torch.zeros(2, 1))
    assert env.restores_state
    with pytest.raises(errors.CheckpointError, match="did not come back to the state"):
        make(True).load_state_dict(env.state_dict())
    again = make(False)
    assert not again.restores_state
    again.load_state_dict(env.state_dict())
    with pytest.raises(errors.EnvError, match="call reset"):
        again.step(torch.zeros(2, 1))
    assert torch.equal(again.reset()[0], env.reset()[0])  # the seeds that follow are those of the run
    with pytest.raises(errors.CheckpointError, match=r"'num_tasks': 2.*these are .*'num_tasks': 1"):
        GymVectorEnv(walk, [0.0]).load_state_dict(env.state_dict())


def test_tasks_that_were_drawn_come_back_without_replay():
    family = GymFamily.uniform(walk, 0.0, 1.0)
    env = family.vector(2, generator=3, replays=False)
    env.reset(options={"tasks": [0.25, 0.75]})
    again = family.vector(2, generator=4, replays=False)
    again.load_state_dict(saved(env.state_dict()))
    assert again.reset()[0][:, 1].tolist() == [0.25, 0.75]


def test_tasks_of_all_plain_kinds_can_be_saved_and_others_are_refused():
    tasks = [{"place": np.array([1.5, 2.0]), "of": ("a", 1, None, [True])}, {"place": np.float64(2.5), "of": ()}]
    env = GymVectorEnv(lambda task: Counter({}), [{}, {}])
    env.reset(options={"tasks": tasks})
    again = GymVectorEnv(lambda task: Counter({}), [{}, {}])
    again.load_state_dict(saved(env.state_dict()))
    assert again.tasks[0]["of"] == tasks[0]["of"]
    assert np.array_equal(again.tasks[0]["place"], tasks[0]["place"])
    assert float(again.tasks[1]["place"]) == 2.5
    env.reset(options={"tasks": [{}, object()]})
    with pytest.raises(errors.OptionError, match="is an object, which a checkpoint cannot hold"):
        env.state_dict()


# -- learners -------------------------------------------------------------------------------------------


def memory_learner(seed=0):
    env = GymFamily.uniform(walk, 0.0, 1.0).vector(4, new_tasks=True, episodes_per_trial=2, generator=seed)
    config = bm.rl.PPOConfig(epochs=1, minibatches=1)
    return bm.rl.RL2(env, iterations=4, units=4, steps=7, seed=seed, config=config)  # ends in the middle of trials


def stepping_learner(seed=0):
    env = GymFamily.uniform(walk, 0.0, 1.0).vector(3, copies=2, generator=seed)
    torch.manual_seed(seed)
    policy = bm.rl.TaskPolicy(bm.nets.mlp(2, [4], 1, activation="tanh"), bm.rl.GaussianHead(1))
    return bm.rl.MAMLRL(env, policy, bm.rl.MAMLRLConfig(cg_steps=3), seed=seed)


@pytest.mark.parametrize("make", [memory_learner, stepping_learner])
def test_a_learners_run_goes_on_bit_for_bit(make, tmp_path):
    from tests.faults.driver import difference

    whole, first, second, other = make(), make(), make(), make(1)
    for learner, until, resume in ((first, 2, False), (second, 4, True)):
        bm.rl.fit(learner, iterations=until, out=tmp_path, resume=resume, progress=False)
    bm.rl.fit(whole, iterations=4, progress=False)
    bm.rl.fit(other, iterations=4, progress=False)
    assert difference(whole.state_dict(), second.state_dict()) is None
    assert difference(whole.state_dict(), other.state_dict()) is not None


def test_a_curve_is_measured_on_the_same_held_out_tasks_and_noise(tmp_path):
    family = GymFamily.uniform(walk, 0.0, 1.0)
    held_out = family.vector(5, episodes_per_trial=2, split="validation", generator=9)
    learner = memory_learner()
    result = bm.rl.fit(learner, iterations=2, validation=held_out, validate_every=1, progress=False)
    fresh = family.vector(5, episodes_per_trial=2, split="validation", generator=9)
    assert torch.equal(result.last.returns, learner.curve(fresh, generator=0).returns)
    assert fresh.tasks == held_out.tasks
