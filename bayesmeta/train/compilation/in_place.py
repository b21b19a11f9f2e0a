"""The end of a captured step: what it makes of parameters and states, written into them, inside the graph.

The last thing that a graph does is to put the new values in the place of the old ones, where the loss and the norm of
its gradient are finite and the conditions of :mod:`~bayesmeta.train.compilation.capture` hold; else everything stays as
it was. Nothing is then left to do around the call, and several steps may follow each other in one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from bayesmeta.train.compilation.capture import Captured, Draw, Source

aten = torch.ops.aten
#: marks the node that says whether the steps before were made
_GO = "go"


def write_in_place(captured: Captured, outputs: int, targets: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
    """Let a graph make its step.

    Args:
        captured: its graph gives loss, norm, then other outputs, then a new value for each target, then conditions.
            Afterwards: loss, norm, whether the step was made, conditions.
        outputs: the number of those other outputs.
        targets: what is written to.
        moved: buffers that the graph changes on its way, and that a step which is not made must leave alone.
    """
    graph = captured.graph.graph
    output = graph.output_node()
    loss, norm, *rest, held = cast(tuple[fx.Node, ...], output.args[0])
    places = [_placeholder(captured, tensor) for tensor in (*targets, *moved)]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        before = [graph.call_function(aten.clone.default, (place,)) for place in places[len(targets) :]]

    device = targets[0].device

    def write(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with graph.inserting_before(output):
            return graph.call_function(op, args, kwargs)

    finite = write(aten.logical_and.default, write(aten.isfinite.default, loss), write(aten.isfinite.default, norm))
    sound = write(aten.logical_and.default, finite, write(aten.all.default, held)) if captured.conditions else finite
    go = write(aten.ones.default, [], dtype=torch.bool, device=device)
    go.meta[_GO] = True
    made = write(aten.logical_and.default, sound, go)
    for place, new in zip(places, rest[outputs:], strict=False):
        write(aten.copy_.default, place, write(aten.where.self, made, new, place))
    for place, old in zip(places[len(targets) :], before, strict=True):
        write(aten.copy_.default, place, write(aten.where.self, made, place, old))
    output.args = ((loss, norm, made, held),)
    graph.eliminate_dead_code()
    captured.graph.recompile()


def repeat(captured: Captured, steps: int) -> Captured:
    """Several steps after each other in one graph; none after one that was not made.

    Args:
        captured: one step, after :func:`write_in_place`.
        steps: how many.

    Returns:
        A graph of the kept inputs, the arguments, which all steps share, and the draws of each step. It gives, one
        value a step: loss, norm, whether it was made, and, one row a step, its conditions.
    """
    step, count = captured.graph.graph, len(captured.draws)
    graph, sources, shared = fx.Graph(), [], {}
    pairs = list(zip(step.find_nodes(op="placeholder"), captured.sources, strict=True))
    for node, source in pairs:
        if source.kind != "draw":
            shared[node] = graph.placeholder(node.name)
            sources.append(source)
    drawn: list[dict[fx.Node, fx.Node]] = []
    for i in range(steps):
        own = [(node, source.number + i * count) for node, source in pairs if source.kind == "draw"]
        drawn.append({node: graph.placeholder(f"{node.name}_{i}") for node, _ in own})
        sources += [Source("draw", number, None) for _, number in own]
    go = next(node for node in step.nodes if _GO in node.meta)
    results: list[Any] = []
    for i in range(steps):
        values = shared | drawn[i] | ({go: results[-1][2]} if results else {})
        results.append(graph.graph_copy(step, values))
    graph.output(tuple(graph.call_function(aten.stack.default, (list(each),)) for each in zip(*results, strict=True)))
    draws = [_again(draw, i * count) for i in range(steps) for draw in captured.draws]
    module = fx.GraphModule(captured.graph, graph)
    return Captured(module, sources, draws, captured.conditions, captured.example * steps)


def _again(draw: Draw, offset: int) -> Draw:
    """The same draw in a later step, in memory of its own."""
    args = tuple(torch.empty_like(a) if isinstance(a, Tensor) else a for a in draw.args)
    return replace(draw, args=args, seed=None if draw.seed is None else draw.seed + offset)


def _placeholder(captured: Captured, tensor: Tensor) -> fx.Node:
    """The input that is a tensor, which is made where the graph has none."""
    graph = captured.graph.graph
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    for node, source in zip(nodes, captured.sources, strict=True):
        if source.kept is not None and _is_same(source.kept, tensor):
            return node
    with graph.inserting_after(nodes[-1]) if nodes else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(f"input_{len(nodes)}")
    captured.sources.append(Source("kept", 0, tensor.detach()))
    return node


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
