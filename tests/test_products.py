"""The pass over a compiler's graph changes how products are made, never what they are."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.train.compilation.products import Products

F64 = torch.float64
aten = torch.ops.aten


def randn(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def rewritten(function, *args):
    """What the pass makes of a function, and the operations before and after."""
    graph = make_fx(function, tracing_mode="fake")(*args)

    def targets():
        return [node.target for node in graph.graph.nodes if node.op == "call_function"]

    before = targets()
    Products()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph, before, targets()


SHAPES = {
    "outer": (randn(3, 4, 1), randn(3, 1, 5), aten.mul.Tensor),
    "to_one_column": (randn(3, 4, 6), randn(3, 6, 1), aten.sum.dim_IntList),
    "to_one_row": (randn(3, 1, 6), randn(3, 6, 5), aten.sum.dim_IntList),
    "of_one_matrix": (randn(3, 4, 6), randn(1, 6, 5).expand(3, 6, 5), aten.mm.default),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_small_products(kind):
    a, b, instead = SHAPES[kind]
    graph, before, after = rewritten(torch.bmm, a, b)
    assert before == [aten.bmm.default]
    assert instead in after
    assert aten.bmm.default not in after
    assert torch.allclose(graph(a, b), torch.bmm(a, b), rtol=1e-13)
    assert graph(a, b).shape == torch.bmm(a, b).shape


def test_sums_with_products():
    bias, a, b = randn(3, 1, 5), randn(3, 4, 6), randn(3, 6, 5)
    for options in ({}, {"alpha": 2.0}, {"beta": 0.5, "alpha": -1.0}):
        graph, _, after = rewritten(lambda *t, o=options: torch.baddbmm(*t, **o), bias, a, b)
        assert after[0] == aten.bmm.default
        assert aten.baddbmm.default not in after
        assert torch.allclose(graph(bias, a, b), torch.baddbmm(bias, a, b, **options), rtol=1e-13)


def test_a_product_whose_transpose_is_used():
    a, b = randn(3, 4, 6), randn(3, 6, 5)
    for transposed in (lambda x, y: torch.bmm(x, y).transpose(1, 2), lambda x, y: torch.bmm(x, y).permute(0, -1, -2)):
        graph, before, after = rewritten(transposed, a, b)
        assert before[0] == aten.bmm.default
        assert after[-1] == aten.bmm.default  # nothing is transposed after it
        assert torch.allclose(graph(a, b), transposed(a, b), rtol=1e-13)

    def used_twice(x, y):
        product = torch.bmm(x, y)
        return product.transpose(1, 2).exp(), product.sin()

    graph, before, after = rewritten(used_twice, a, b)
    assert before == after


def test_what_stays():
    a, b = randn(3, 4, 6), randn(3, 6, 5)
    assert rewritten(torch.bmm, a, b)[2] == [aten.bmm.default]
    assert rewritten(torch.bmm, a.half(), b.half()[..., :1])[2] == [
        aten.bmm.default
    ]  # sums of halves are the library's
    assert Products().uuid() == Products().uuid()
