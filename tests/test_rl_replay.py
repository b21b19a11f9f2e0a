"""The replay buffer: a task's steps are never seen in another's batch, and draws are uniform over what is held."""

from collections import deque

import pytest
import torch
from scipy.stats import chi2

from bayesmeta import errors
from bayesmeta.rl.envs import SparsePointRobot, TensorVectorEnv
from bayesmeta.rl.off_policy.replay import Replay, Transitions
from bayesmeta.rl.rollout import Acted, collect
from tests.faults.driver import difference
from tests.rl_small import Constant


def marked(numbers, **more):
    """Steps whose reward and observation are the numbers ``[tasks, n]``."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32)
    false = torch.zeros_like(numbers, dtype=torch.bool)
    steps = {"action": numbers[..., None], "terminated": false, "truncated": false.clone()}
    steps |= {"observation": numbers[..., None].repeat(1, 1, 3), "successor": -numbers[..., None].repeat(1, 1, 3)}
    return Transitions(reward=numbers, **(steps | more))


def strangers(batch, tasks):
    """How many steps of a batch bear another task's mark."""
    marks = torch.stack([batch.reward, batch.observation[..., 1], -batch.successor[..., 2], batch.action[..., 0]])
    return int((marks.div(1000, rounding_mode="floor") != torch.as_tensor(tasks)[:, None]).sum())


def filled(tasks=6, capacity=11, generator=None):
    """A buffer into which steps came in pieces, to some tasks more often: each bears 1000 × task + a running number."""
    replay, counts = Replay(tasks, capacity), torch.zeros(tasks)
    for piece in range(9):
        chosen = torch.randperm(tasks, generator=generator)[: 2 + piece % 4] if piece else torch.arange(tasks)
        n = 1 + piece % 5
        replay.add(marked(1000 * chosen[:, None] + counts[chosen, None] + torch.arange(n)), chosen)
        counts[chosen] += n
    return replay, counts


def test_a_poisoned_task_is_seen_in_no_other():
    generator = torch.Generator().manual_seed(0)
    replay, _ = filled(generator=generator)
    for tasks in (None, torch.tensor([4, 1, 1, 5])):
        batch = replay.sample(2000, generator, tasks=tasks)
        assert strangers(batch, range(6) if tasks is None else tasks) == 0
    # NaN in one task, which would spread by any mixing, even a weighted one
    poison = marked(torch.full((1, 11), float("nan")))
    replay.add(poison, torch.tensor([3]))
    batch = replay.sample(2000, generator)
    assert batch.reward[3].isnan().all()
    assert not batch.reward[[0, 1, 2, 4, 5]].isnan().any()
    # control: the count finds what stands in a wrong row
    moved = batch.map(lambda x: x.roll(1, 0))
    assert strangers(moved.map(lambda x: x.nan_to_num(3000.0)), range(6)) == 6 * 2000 * 4


def test_a_ring_holds_the_last_steps_of_each_task():
    generator = torch.Generator().manual_seed(1)
    replay, counts = filled(generator=generator)
    assert int(counts.max()) > 11 > int(counts.min())  # some wrapped around, some did not
    batch = replay.sample(3000, generator)
    for task in range(6):
        kept = deque((1000 * task + i for i in range(int(counts[task]))), maxlen=11)
        assert sorted(batch.reward[task].unique().tolist()) == [float(x) for x in kept]
        assert int(replay.sizes[task]) == len(kept)
    assert len(replay) == int(replay.sizes.sum())
    newest = replay.sample(3000, generator, recent=4).reward
    for task in range(6):
        last = int(counts[task])
        assert newest[task].unique().tolist() == [1000.0 * task + i for i in range(last - 4, last)]


def test_more_steps_than_there_is_room_for_leave_the_last():
    replay = Replay(1, 4)
    replay.add(marked([[1.0, 2.0]]))
    replay.add(marked([torch.arange(10.0).tolist()]))
    assert replay.sample(500, torch.Generator().manual_seed(0)).reward.unique().tolist() == [6.0, 7.0, 8.0, 9.0]


def _uneven(counts):
    """Pearson's statistic against equal probabilities, and its 0.999 quantile."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum()), chi2.ppf(0.999, len(counts) - 1)


def test_draws_are_uniform_over_what_is_held():
    replay = Replay(2, 13)
    replay.add(marked([list(range(20)), list(range(20))]))
    replay.add(marked([list(range(20, 25))]), torch.tensor([1]))
    generator = torch.Generator().manual_seed(2)
    rewards = replay.sample(26_000, generator).reward
    for task, first in ((0, 7), (1, 12)):
        counts = torch.bincount(rewards[task].long() - first, minlength=13).double()
        statistic, limit = _uneven(counts)
        assert len(counts) == 13
        assert statistic < limit
    # control: a preference for the newer half is found
    newer = replay.sample(13_000, generator, recent=6).reward
    counts = torch.bincount(torch.cat([rewards[0, :13_000], newer[0]]).long() - 7, minlength=13).double()
    statistic, limit = _uneven(counts)
    assert statistic > limit


def test_one_task_does_not_follow_another_in_its_draws():
    replay = Replay(2, 50)
    replay.add(marked(torch.arange(50.0).expand(2, 50)))
    rewards = replay.sample(20_000, torch.Generator().manual_seed(3)).reward
    correlation = float(torch.corrcoef(rewards)[0, 1])
    assert abs(correlation) < 4 / 20_000**0.5  # four standard errors of independent draws


def test_a_rollout_goes_in_task_by_task():
    family = SparsePointRobot(horizon=3)
    env = TensorVectorEnv(family, 3, copies=2, generator=0)

    def act(moment, state, generator):
        action = 0.1 * torch.rand(6, 2, generator=generator)
        return Acted(action, torch.zeros(6))

    rollout = collect(env, act, 6, generator=torch.Generator().manual_seed(0), keep=("dense_reward",))
    steps = Transitions.of_rollout(rollout, ("dense_reward",))
    assert steps.reward.shape == (3, 12)
    for task in range(3):
        for copy in range(2):
            mine = slice(6 * copy, 6 * copy + 6)
            env_index = 2 * task + copy
            assert torch.equal(steps.observation[task, mine], rollout.moments.observation[:, env_index])
            assert torch.equal(steps.successor[task, mine], rollout.successor[:, env_index])
            assert torch.equal(steps.extra["dense_reward"][task, mine], rollout.extra["dense_reward"][:, env_index])
            assert steps.truncated[task, mine].tolist() == [False, False, True] * 2
            assert not steps.terminated[task, mine].any()
    replay = Replay(3, 100)
    replay.add(rollout, extra=("dense_reward",))
    batch = replay.sample(64, torch.Generator().manual_seed(0))
    # each step is whole: s′ is s and the clipped action, and the dense reward is of its own task's goal
    assert torch.allclose(batch.successor, batch.observation + batch.action)
    goal = env.tasks.goal[:, None]
    assert torch.allclose(batch.extra["dense_reward"], -(batch.successor - goal).norm(dim=-1))
    assert torch.equal(batch.with_reward("dense_reward").reward, batch.extra["dense_reward"])
    assert batch.with_reward(None) is batch


def test_a_state_goes_on_bit_for_bit():
    generator = torch.Generator().manual_seed(4)
    replay, _ = filled(generator=generator)
    replay.clear(torch.tensor([2]))
    replay.add(marked([[2000.0, 2001.0]]), torch.tensor([2]))
    state, noise = replay.state_dict(), generator.get_state()
    replay.add(marked(torch.zeros(6, 5)))  # what comes later does not change what was saved

    def following(buffer):
        generator.set_state(noise)
        first = buffer.sample(40, generator)
        buffer.add(marked(1000 * torch.arange(6)[:, None] + torch.arange(500, 507)))
        return [first.reward, buffer.sample(40, generator).successor, buffer.sizes]

    runs = []
    for _ in range(2):
        again = Replay(6, 11)
        again.load_state_dict(state)
        runs.append(following(again))
    for mine, theirs in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(following(replay)[0], runs[0][0])  # control: with what came later


@pytest.mark.parametrize("held", [0, 2, 5])
def test_a_state_is_remembered_while_more_is_added(held):
    replay = Replay(2, 5)
    for step in range(held):
        replay.add(marked([[float(step)], [100.0 + step]]))
    before, earlier = replay.state_dict(), replay.remember()
    for step in range(7):  # around the ring, and not the same for both tasks
        replay.add(marked([[1000.0 + step]]), torch.tensor([1]))
        if step % 3 == 0:
            replay.add(marked([[2000.0], [3000.0]]))
    assert difference(before, replay.state_dict()) is not None  # control
    assert difference(before, earlier()) is None
    asked = earlier()
    replay.add(marked([[1.0], [2.0]]))
    replay.load_state_dict(Replay(2, 5).state_dict())
    replay.add(marked([[1.0], [2.0]]))
    replay.clear()
    assert difference(before, earlier()) is None
    assert difference(before, asked) is None


def test_nothing_is_kept_for_nobody():
    replay = Replay(1, 5)
    replay.add(marked([[1.0]]))
    earlier = replay.remember()
    assert len(replay._remembered) == 1
    del earlier
    assert len(replay._remembered) == 0


def test_an_empty_buffer_says_which_task():
    replay, generator = Replay(3, 5), torch.Generator()
    with pytest.raises(errors.ReplayError, match="no steps of task 0"):
        replay.sample(2, generator)
    replay.add(marked([[1.0], [2.0]]), torch.tensor([0, 2]))
    with pytest.raises(errors.ReplayError, match="no steps of task 1"):
        replay.sample(2, generator)
    assert replay.sample(2, generator, tasks=torch.tensor([2])).reward.tolist() == [[2.0, 2.0]]
    replay.clear()
    with pytest.raises(errors.ReplayError, match="no steps of task 2"):
        replay.sample(2, generator, tasks=torch.tensor([2]))


def test_bad_input_is_refused():
    replay, generator = Replay(2, 5), torch.Generator()
    replay.add(marked([[1.0], [2.0]]))
    for bad in ((0, 5), (2, 0), (2.5, 5), (True, 5)):
        with pytest.raises(errors.OptionError, match="at least 1"):
            Replay(*bad)
    with pytest.raises(errors.ShapeError, match=r"expected \[2, n"):
        replay.add(marked([[1.0]]))
    with pytest.raises(errors.ShapeError, match=r"torch\.float64"):
        replay.add(marked([[1.0], [2.0]]).map(lambda x: x.double() if x.is_floating_point() else x))
    with pytest.raises(errors.ReplayError, match="named twice"):
        replay.add(marked([[1.0], [2.0]]), torch.tensor([1, 1]))
    with pytest.raises(errors.ReplayError, match="this buffer has 2"):
        replay.sample(1, generator, tasks=torch.tensor([2]))
    with pytest.raises(errors.ReplayError, match=r"extra\.dense"):
        replay.add(marked([[1.0], [2.0]], extra={"dense": torch.zeros(2, 1)}))
    for options in (
        {"batch": 0},
        {"batch": 2.5},
        {"batch": True},
        {"batch": 1, "recent": 0},
        {"batch": 1, "recent": 1.5},
    ):
        with pytest.raises(errors.OptionError, match="at least 1"):
            replay.sample(generator=generator, **options)
    with pytest.raises(errors.ShapeError, match="whole numbers"):
        replay.sample(1, generator, tasks=torch.tensor([True, False]))
    with pytest.raises(errors.CheckpointError, match="2 tasks × 5 steps"):
        Replay(3, 5).load_state_dict(replay.state_dict())
    env = TensorVectorEnv(Constant(), 2)
    rollout = collect(env, lambda m, s, g: Acted(torch.zeros(2, 1), torch.zeros(2)), 2, generator=generator)
    with pytest.raises(errors.OptionError, match="dense_reward"):
        Replay(2, 5).add(rollout, extra=("dense_reward",))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_buffer_on_the_device():
    generator = torch.Generator("cuda").manual_seed(0)
    replay = Replay(2, 5, "cuda")
    replay.add(marked([[1.0, 2.0], [1001.0, 1002.0]]))
    batch = replay.sample(50, generator, tasks=torch.tensor([1, 0]))
    assert batch.reward.device.type == "cuda"
    assert strangers(batch.map(lambda x: x.cpu()), [1, 0]) == 0
