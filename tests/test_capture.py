"""Functions as graphs: the numbers are those of the function itself, and what cannot be a graph says so."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from bayesmeta.errors import CaptureError
from bayesmeta.ops.random import as_generator, forked_rng, normal_like
from bayesmeta.train.compilation.capture import capture

F64 = torch.float64


def same_again(function, generators=(), arguments=(), others=()):
    """Capture a function; then graph and function on new draws, and whether all generators end in the same state."""
    captured = capture(lambda: function(*arguments), generators, arguments)
    every = [*generators, torch.default_generator]
    states = [g.get_state() for g in every]
    given = captured.graph(*captured.inputs(captured.draw(), others or arguments))
    ends = [g.get_state() for g in every]
    for generator, state in zip(every, states, strict=True):
        generator.set_state(state)
    expected = function(*(others or arguments))
    moved = [torch.equal(g.get_state(), end) for g, end in zip(every, ends, strict=True)]
    return captured, given, expected, all(moved)


def draw_all_kinds(generator):
    like = torch.zeros(3, dtype=F64)
    mean, scale = torch.arange(3.0, dtype=F64), torch.full((2, 3), 2.0, dtype=F64)
    with forked_rng(generator):
        forked = [dist.Normal(mean, 1.0).rsample((2,)), dist.Normal(mean, scale).sample(), torch.rand(2)]
    with forked_rng(generator):
        again = dist.Exponential(torch.ones(2)).rsample()
    private = torch.Generator().manual_seed(int(torch.randint(2**40, (), generator=generator)))
    return [
        torch.rand(4, 2, generator=generator),
        normal_like(like, (2, 3), generator),
        torch.randint(7, (3,), generator=generator),
        torch.randperm(5, generator=generator),
        torch.empty(3).uniform_(-1.0, 2.0, generator=generator),
        torch.empty(3).exponential_(generator=generator),
        torch.normal(mean, scale, generator=generator),
        torch.normal(0.0, scale, generator=generator),
        torch.randn(2, generator=private),
        torch.rand(2),  # torch's global generator
        torch.nn.functional.dropout(torch.ones(50), 0.4),
        torch.randn(3, generator=as_generator(3, stream="fixed")),
        *forked,
        again,
    ]  # fmt: skip


def test_draws_are_those_of_the_function():
    generator = torch.Generator().manual_seed(4)
    captured, given, expected, moved = same_again(lambda: draw_all_kinds(generator), [generator])
    assert moved
    for a, b in zip(given[:-1], expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-14, atol=0)
    frozen = captured.graph(*captured.inputs(captured.example))
    fixed = 11  # the generator that each call makes anew from one seed
    same = [torch.equal(a, b) for a, b in zip(frozen[:-1], expected, strict=True)]
    assert [i for i, equal in enumerate(same) if equal] == [fixed]  # the others were new, or this would show nothing
    assert given[-1].all()


def test_gradients_inside_and_tensors_changed_in_place():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    generator = torch.Generator().manual_seed(0)

    def function():
        x = normal_like(w, (5, 2), generator)
        inner = torch.autograd.grad(((x @ w) ** 4).sum(), w, create_graph=True)[0]
        u = w - 0.01 * inner
        loss = ((x @ u) ** 2).sum()
        return [loss, *torch.autograd.grad(loss, w)]

    captured = capture(function, [generator])
    with torch.no_grad():
        w.copy_(torch.tensor([0.3, 0.7]))
    state = generator.get_state()
    given = captured.graph(*captured.inputs(captured.draw()))
    generator.set_state(state)
    for a, b in zip(given[:-1], function(), strict=True):
        assert torch.allclose(a, b, rtol=1e-13)
    assert not any(t.requires_grad for t in given)


def test_arguments_take_the_place_of_those_captured():
    x, y = torch.arange(3.0), torch.ones(3)
    _, given, expected, _ = same_again(lambda a, b: [a * b, a.sum()], [], [x, y], [x + 1, y * 2])
    assert all(torch.equal(a, b) for a, b in zip(given[:-1], expected, strict=True))


def test_a_value_that_was_read_back_is_a_condition():
    def function(x):
        return [x * 2 if bool((x > 0).all()) else -x]

    x = torch.ones(3)
    captured, given, expected, _ = same_again(function, [], [x], [x * 5])
    assert given[-1].tolist() == [True]
    assert torch.equal(given[0], expected[0])
    *_, held = captured.graph(*captured.inputs([], [-x]))
    assert held.tolist() == [False]
    assert "test_capture.py" in captured.conditions[0]
    assert "bool((x > 0).all())" in captured.conditions[0]


def test_a_drawn_number_that_leaves_the_graph_is_no_constant():
    """A seed for another library looks like a seed of torch's, but no generator here begins with it."""
    generator = torch.Generator().manual_seed(0)

    def function():
        seed = int(torch.randint(2**40, (), generator=generator))
        return [torch.ones(2) * (seed % 1000)]

    captured, given, expected, moved = same_again(function, [generator])
    assert moved
    assert given[-1].tolist() == [False]
    assert not torch.equal(given[0], expected[0])
    assert "was read back" in captured.conditions[0]


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.numpy, np.asarray])
def test_numbers_read_as_a_whole_are_a_condition(read):
    """They pass torch's dispatch by; of what stays the same they may be part of the graph."""
    generator = torch.Generator().manual_seed(0)
    captured, given, expected, moved = same_again(
        lambda: [torch.ones(2) * read(torch.rand(2, generator=generator))[1]], [generator]
    )
    assert moved
    assert given[-1].tolist() == [False]
    assert not torch.equal(given[0], expected[0])
    assert "test_capture.py, line" in captured.conditions[0]
    constant = torch.arange(3.0)
    _, given, expected, _ = same_again(lambda: [torch.rand(2, generator=generator) * read(constant)[2]], [generator])
    assert given[-1].tolist() == [True]
    assert torch.equal(given[0], expected[0])


def lasting():
    generator = torch.Generator().manual_seed(0)
    torch.rand(1, generator=generator)
    return generator


LASTING = lasting()
REFUSED = {
    "nonzero": (lambda: [torch.tensor([0.0, 1.0]).nonzero()], "nonzero"),
    "mask": (lambda: [torch.arange(3.0)[torch.arange(3) > 1]], "depends on values"),
    "bernoulli": (lambda: [torch.bernoulli(torch.full((3,), 0.5))], "bernoulli"),
    "gamma": (lambda: [dist.Gamma(torch.ones(2), 1.0).rsample()], "gamma"),
    "generator": (lambda: [torch.rand(2, generator=LASTING)], "torch.Generator of its own"),
    "numpy": (lambda: [torch.ones(2) * torch.rand(2).numpy().missing], "missing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_graph_names_the_line(kind):
    function, words = REFUSED[kind]
    with pytest.raises(CaptureError, match=words) as caught:
        capture(function)
    assert f'"{kind}": (' in str(caught.value)
    assert "test_capture.py, line" in str(caught.value)


def test_indices_by_number_are_no_masks():
    rows = torch.tensor([2, 0])
    captured = capture(lambda: [torch.arange(3.0)[rows]])
    assert captured.graph(*captured.inputs([]))[0].tolist() == [2.0, 0.0]
