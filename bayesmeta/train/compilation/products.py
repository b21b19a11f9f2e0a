"""Batched products of small matrices, as the compiler should see them.

The compiler hands every ``bmm`` to the library of matrix products, and fuses nothing into it. For the small matrices of
one network for each task this is often the wrong choice. :class:`Products` is a pass over the compiler's graph that
leaves the numbers what they are, to rounding:

- a product over, or to, a dimension of size 1 (first and last layers of networks on one input or output) becomes a
  multiplication, with a sum where there is one, and is fused with what is around it;
- ``baddbmm`` becomes a product and a sum, since the sum is fused with what follows, and the library would copy first;
- a product of which only the transpose is used is made as the product of the transposes, which saves a copy;
- a product of every task with the same matrix is one product of them all.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten


class Products(CustomGraphPass):
    """The pass. The key of the compiler's cache has the text of this file in it."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        for node in graph.find_nodes(op="call_function", target=aten.baddbmm.default):
            if _is_served(node):
                _replace(node, _sum_after(_Writer(node), *node.args, **node.kwargs))
        for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
            if _is_served(node):
                _rewrite_product(node)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Of this version of the pass."""
        return get_hash_for_files((__file__,))


def _is_served(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)


def _rewrite_product(node: fx.Node) -> None:
    a, b = cast(tuple[fx.Node, fx.Node], node.args)
    left, right, write = a.meta["val"], b.meta["val"], _Writer(node)
    user = next(iter(node.users))
    if left.shape[2] == 1:
        _replace(node, write(aten.mul.Tensor, a, b))
    elif right.shape[2] == 1:
        _replace(node, write(aten.sum.dim_IntList, write(aten.mul.Tensor, a, write.transpose(b)), [2], True))
    elif left.shape[1] == 1:
        _replace(node, write(aten.sum.dim_IntList, write(aten.mul.Tensor, write.transpose(a), b), [1], True))
    elif right.stride(0) == 0 and len(left) > 1 and left.is_contiguous():
        tasks, rows, inner = left.shape
        flat = write(aten.reshape.default, a, [tasks * rows, inner])
        product = write(aten.mm.default, flat, write(aten.select.int, b, 0, 0))
        _replace(node, write(aten.reshape.default, product, [tasks, rows, right.shape[2]]))
    elif len(node.users) == 1 and _is_transpose(user):
        _replace(user, write(aten.bmm.default, write.transpose(b), write.transpose(a)))


def _sum_after(write: _Writer, bias: fx.Node, a: fx.Node, b: fx.Node, *, beta: float = 1, alpha: float = 1) -> fx.Node:
    product = write(aten.bmm.default, a, b)
    product = product if alpha == 1 else write(aten.mul.Tensor, product, alpha)
    return write(aten.add.Tensor, product, bias if beta == 1 else write(aten.mul.Tensor, bias, beta))


def _is_transpose(node: fx.Node) -> bool:
    if node.target is aten.permute.default:
        return [d % 3 for d in cast(list[int], node.args[1])] == [0, 2, 1]
    return node.target is aten.transpose.int and {d % 3 for d in cast(tuple[int, int], node.args[1:])} == {1, 2}


class _Writer:
    """Writes nodes before another, each with the value that the compiler's later passes look at."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before

    def __call__(self, op: Any, *args: Any) -> fx.Node:
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_function(op, args)
        with self.before.meta["val"].fake_mode:
            node.meta["val"] = op(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return node

    def transpose(self, node: fx.Node) -> fx.Node:
        """Of each matrix."""
        return self(aten.permute.default, node, [0, 2, 1])


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
