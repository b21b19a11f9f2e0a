"""Batches of any shape padded to a few: the least padding, the same numbers, few graphs."""

import itertools
import warnings

import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import CompileWarning, UnsupportedError
from bayesmeta.train import buckets as room
from bayesmeta.train.buckets import Buckets, Shape, choose, difference, fitting, pad_tasks
from bayesmeta.train.compiling import MOST_GRAPHS, flatten
from tests.test_compile import off
from tests.test_contract import METHODS, on_network, ragged_batch, sinusoids, stir

F64 = torch.float64


@pytest.fixture
def uncompiled(monkeypatch):
    """The captured graph as it is: all but the compiler, in a hundredth of its time."""
    monkeypatch.setattr("bayesmeta.train.compiled._inductor", lambda graph, inputs: graph)


# -- which buckets ------------------------------------------------------------------------------------------------


def padded_size(sizes, buckets):
    return sum(min(b for b in buckets if b >= size) for size in sizes)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_buckets_pad_less(most, seed):
    """Beside all choices of so many buckets among the sizes; the middle of them is worse."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 40, (14,), generator=generator).tolist()
    found = choose(sizes, most, waste=0.0)
    distinct = sorted(set(sizes))
    least = min(padded_size(sizes, (*some, distinct[-1])) for some in itertools.combinations(distinct[:-1], most - 1))
    assert len(found) == most
    assert padded_size(sizes, found) == least
    if most == 2:
        assert padded_size(sizes, [distinct[0], distinct[-1]]) > least  # a control


def test_few_buckets_where_they_do():
    assert choose([40, 40, 41, 42], 4) == [42]
    assert choose([3, 3, 3, 40], 4) == [3, 40]
    assert choose([7], 4) == [7]
    assert choose([1, 10, 100, 1000], 2) == [100, 1000]


def test_lengths_beyond_those_seen_come_to_few_more():
    assert [fitting(size, [4, 10]) for size in (1, 4, 5, 10)] == [4, 4, 10, 10]
    beyond = sorted({fitting(size, [4, 10]) for size in range(11, 101)})
    assert len(beyond) == 11  # log(100 / 10) / log(1.25), rounded up
    assert all(fitting(size, [4, 10]) >= size for size in range(1, 200))
    assert all(fitting(size, [0]) >= size for size in range(1, 20))


# -- padding ------------------------------------------------------------------------------------------------------


def test_padding_is_masked_copies():
    batch = ragged_batch()
    shapes = [Shape.of(batch), Shape(5, 9, 7, (False, False)), Shape(7, 4, 5, (True, False))]
    found = Buckets(shapes, 1)
    padded = found.pad(batch)
    assert found.most == 1
    assert Shape.of(padded) == Shape(7, 9, 7, (True, True))
    for part, like in ((padded.support, batch.support), (padded.query, batch.query)):
        assert torch.equal(part.counts()[:5], like.counts())
        assert torch.equal(part.x[:5, : like.shots], like.x)
        assert torch.equal(part.x[:5, like.shots :], like.x[:, :1].expand_as(part.x[:5, like.shots :]))
        assert not part.mask[:5, like.shots :].any()
    assert padded.task_id.tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert padded.check() is padded
    assert torch.equal(padded.without_padding().support.y, padded.support.y[:5])


def test_batches_that_are_alike_stay_as_they_are():
    batch = sinusoids()
    found = Buckets([Shape.of(batch)] * 3, 4)
    assert found.pad(batch).query.x is batch.query.x
    assert found.pad(batch).support.mask is None
    assert found.pad(batch).task_id is None


def test_padding_tasks_keep_their_ids():
    batch = bm.tasks.FixedTasks(sinusoids(9)).sample(4, support=3, query=3, generator=0)
    assert pad_tasks(batch, 6).task_id.tolist() == [*batch.task_id.tolist(), -1, -1]


# -- every method -------------------------------------------------------------------------------------------------

#: they draw a number for each observation of a batch: their noise would be another
NOISE_OF_POINTS = ("abml_local", "mr_maml_activations", "mr_neural_process")


def harm(name, batch, padded):
    method = on_network(name, F64)
    method.prepare(batch)
    stir(method, batch)
    generator = torch.Generator().manual_seed(3)

    def lose(one):
        loss = method.loss(one, generator=generator)
        return loss, loss

    parameters = [p for p in method.parameters() if p.requires_grad]
    return difference(lose, batch, padded, parameters, [generator, torch.default_generator])


@pytest.mark.parametrize("name", METHODS)
def test_padded_shots_change_neither_loss_nor_gradient(name):
    """Of a ragged batch; or the method is known to mind."""
    batch = ragged_batch()
    shapes = [Shape.of(batch), Shape(5, 9, 8, (True, True))]
    reason = harm(name, batch, Buckets(shapes, 1).pad(batch))
    if name in NOISE_OF_POINTS:
        assert "noise for each observation" in reason
    else:
        assert reason is None
