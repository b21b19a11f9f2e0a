"""A training step as one compiled graph: objective, gradient, and the optimizer's update where it can be part of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.errors import CaptureError
from bayesmeta.train.compilation.capture import Captured, capture
from bayesmeta.train.compilation.in_place import write_in_place
from bayesmeta.train.compilation.quiet import without_shim_messages
from bayesmeta.train.compilation.recorded import record_step
from bayesmeta.train.compilation.trial import can_try, try_in_child
from bayesmeta.train.compilation.updates import Update
from bayesmeta.train.compilation.watching import ChanceError, OutdatedError, Watch, next_check, no_factor, rounding

#: what a step minimises: its value, and what its gradient is taken of
Objective = Callable[..., tuple[Tensor, Tensor]]


class CompiledStep:
    """One step, compiled.

    Args:
        objective: takes the arguments, gives the loss and what is to be differentiated (the same, or a surrogate).
        parameters: those that are trained.
        optimizer: a torch optimizer that has taken a step.
        generators: what the objective draws from, beside torch's global generators.
        clip: largest norm of the gradient.
        modules: what the objective calls; their buffers may be changed in place, such as running statistics.
        arguments: tensors that each step brings anew, contiguous and of the same shapes, which the objective uses.
        only_gradient: leave the optimizer's update out of the graph.
        mode: ``"inductor"``, or ``"cudagraphs"``.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator],
        *,
        clip: float | None = None,
        modules: Sequence[nn.Module] = (),
        arguments: Sequence[Tensor] = (),
        only_gradient: bool = False,
        mode: str = "inductor",
    ) -> None:
        self.mode = mode
        self.only_gradient = only_gradient
        self.objective, self.optimizer, self.clip = objective, optimizer, clip
        self.generators, self.arguments = list(generators), list(arguments)
        self.buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
        self.watch = Watch(modules, parameters)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.update: Update | None = None
        self.trained: list[Tensor] = []  # the parameters that the objective reaches
        self.seconds = {"capture": 0.0, "compile": 0.0}
        self._gradients: list[Tensor] = []  # of the step last computed, where the optimizer steps outside
        self._moved: list[Tensor] = []  # buffers that a step changes
        self._targets: list[Tensor] = []  # what the update writes to, once it is part of the graph
        self.broken: list[str] = []  # conditions that did not hold when it was last called
        self._before: tuple[Any, Any] = ((), ())  # generators and moved buffers before the step last computed
        self._made, self._next_check = 0, next_check(0)  # steps asked for, and when to compare again
        self._rounding = 0.0  # by how much the graph may differ from the step itself then

    # -- making it ----------------------------------------------------------------------------------------------

    def capture(self, others: Sequence[Tensor] = ()) -> CompiledStep:
        """Record the step, and compare what the graph gives with the step itself on other draws.

        Generators and buffers are left as they were.

        Args:
            others: other arguments to compare on.

        Raises:
            CaptureError: when the step cannot be one graph, or the graph does not give what the step gives.
            ChanceError: when this may be due to what was drawn.
        """
        begin = time.perf_counter()
        with no_factor(), self._undone(self._all_generators()):
            self._prepare_update()
            self.captured = capture(lambda: self._outputs(self.arguments), self.generators, self.arguments)
            others = others or self.arguments
            before = [(b, b.clone(), b._version) for b in self.buffers]
            with self._undone(self._all_generators()):
                expected = [t.detach().clone() for t in self._outputs(others)]
                # a version tells of what was written though the number stayed the same
                self._moved = [b for b, old, version in before if b._version != version or not torch.equal(b, old)]
            with self._undone(self._all_generators()):
                again = [t.detach().clone() for t in self._outputs(others)]
            given = self.captured.graph(*self.captured.inputs(self.captured.draw(), others))
        self.drawn_from = self.captured.generators()
        self._compare(given, expected, again)
        self.seconds["capture"] = time.perf_counter() - begin
        return self

    def compile(self) -> CompiledStep:
        """Compile what was captured, and compare once more.

        Raises:
            CaptureError: when it cannot be compiled, or gives other numbers.
        """
        begin = time.perf_counter()
        if self.update is not None:
            self._targets = self.update.targets(self.trained)
            write_in_place(self.captured, len(self.trained), self._targets, self._moved)
        self._call = self.build(self.captured)
        self.seconds["compile"] = time.perf_counter() - begin
        return self

    def build(self, captured: Captured) -> Callable[..., Any]:
        """A graph of this step, or of several, compiled and compared with itself.

        Raises:
            CaptureError: when it cannot be compiled, or gives other numbers.
        """
        inputs = captured.inputs(captured.example, self.arguments)
        if self.mode == "cudagraphs":
            fresh = [i for i, source in enumerate(captured.sources) if source.kept is None]
            call = record_step(captured.graph, inputs, fresh, [*self.buffers, *self._targets])
        else:
            call = _inductor(captured.graph, inputs)
        made = []
        for graph in (captured.graph, call):
            with no_factor(), self._undone([]):
                result = [t.clone() for t in graph(*inputs)[:2]]
                made.append([*result, *self._first_moments()])
        # compiled code keeps bfloat16 wider between two operations than torch does
        rounds = any(node.kwargs.get("dtype") is torch.bfloat16 for node in captured.graph.graph.nodes)
        self._compare_numbers(made[1], made[0], 2e-2 if rounds else 1e-3)
        return call

    @property
    def written(self) -> list[Tensor]:
        """What a step writes to, where the update is part of the graph."""
        return [*self._targets, *self._moved]

    def _first_moments(self) -> list[Tensor]:
        """What the update made of the gradient, as far as it is linear in it."""
        if self.update is None:
            return []
        return [torch.cat([t.flatten().double() for t in self.update.linear(self.trained)])]

    def _prepare_update(self) -> None:
        with self._undone([]):
            _, differentiated = self.objective(*self.arguments)
            gradients = (
                torch.autograd.grad(differentiated, self.parameters, allow_unused=True) if self.parameters else ()
            )
        self.trained = [p for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        if not self.trained:
            raise CaptureError("the loss depends on no parameter that is trained")
        if Update.serves(self.optimizer) and not self.only_gradient:
            update = Update(self.optimizer)
            self.update = update if update.is_ready(self.trained) else None

    def _outputs(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Loss, norm of the gradient, gradients, and what the update makes of parameters and state."""
        loss, differentiated = self.objective(*arguments)
        gradients = list(torch.autograd.grad(differentiated, self.trained))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        new: list[Tensor] = []
        if self.update is not None:
            clipped = gradients
            if self.clip is not None:
                share = (self.clip / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
                clipped = [g * share for g in gradients]
            new = self.update.values(self.trained, clipped)
        return [loss, norm, *gradients, *new]

    def _compare(self, given: Sequence[Tensor], expected: Sequence[Tensor], again: Sequence[Tensor]) -> None:
        """The graph, the step itself, and the step itself once more, on the same draws."""
        held = given[-1]
        if not bool(held.all()):
            broken = [text for text, ok in zip(self.captured.conditions, held.tolist(), strict=True) if not ok]
            raise ChanceError(f"a value that differs from step to step is used outside of the graph: {broken[0]}")
        # one gradient: that of a parameter may be rounding alone, as a bias's before a softmax
        end = 2 + len(self.trained)
        numbers = [[*v[:2], torch.cat([t.flatten() for t in v[2:end]])] for v in (given, expected, again)]
        # operations on the same numbers give the same bits, except where a GPU adds up in any order; more is a counter
        self._compare_numbers(numbers[2], numbers[1], rounding(expected[0], 64 if expected[0].is_cpu else 512))
        found = self._compare_numbers(numbers[0], numbers[1], min(1e-4, rounding(expected[0], 1e6)))
        self._rounding = min(1e-4, max(rounding(expected[0], 64 if expected[0].is_cpu else 512), 8 * found))

    def _compare_numbers(self, given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
        """By how much the first differ from the second, as a share of the largest."""
        most = 0.0
        for a, b in zip(given, expected, strict=True):
            scale, off = (float(t.detach().abs().max()) if t.numel() else 0.0 for t in (b, a - b))
            if math.isfinite(scale) and not off <= tolerance * scale + 1e-30:
                raise CaptureError(
                    f"the graph differs from the step itself by {off / max(scale, 1e-30):.2g} of the largest number: "
                    "something changes from step to step that is neither drawn from its generator nor a parameter"
                )
            most = max(most, off / max(scale, 1e-30) if math.isfinite(scale) else 0.0)
        return most

    # -- running it ---------------------------------------------------------------------------------------------

    def __call__(self, arguments: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor] | None:
        """Make a step on fresh draws; where the optimizer steps outside, :meth:`commit` makes it.

        A step whose loss or gradient is not finite changes nothing but the generators.

        Returns:
            Loss and norm of the gradient; None where a condition did not hold: then nothing has happened, and the step
            is to be made eagerly.
        """
        self.ready(1, arguments)
        states = [(g, g.get_state()) for g in self.drawn_from]
        buffers = [] if self.update is not None else [(b, b.clone()) for b in self._moved]
        self._before = states, buffers
        try:
            result = self._call(*self.captured.inputs(self.captured.draw(), arguments))
        except RuntimeError as error:  # as a matrix that has no factor; the eager step says it better, or knows help
            self.broken = [str(error)]
        else:
            if not self.captured.conditions or bool(result[-1].all()):
                self._gradients = [] if self.update is not None else list(result[2:-1])
                if buffers and not bool((result[0] + 0 * result[1]).isfinite()):
                    _restore([], buffers)
                return result[0], result[1]
            self.broken = [t for t, ok in zip(self.captured.conditions, result[-1].tolist(), strict=True) if not ok]
        self.undo()
        return None

    def undo(self) -> None:
        """Put generators and buffers back to what they were before the last call, which has not been committed."""
        _restore(*self._before)

    def ready(self, count: int, arguments: Sequence[Tensor]) -> None:
        """Look whether the graph may be used for so many further steps; to be called before it is.

        Raises:
            OutdatedError: when modules, parameters or the optimizer are not what they were.
            CaptureError: when an eager step, made now and then, gives other numbers.
        """
        if not self.watch.is_same():
            raise OutdatedError("train() or eval(), requires_grad, or a parameter's memory has changed")
        if self.update is not None and not self.update.refresh():
            raise OutdatedError("an option of the optimizer has changed that is part of the graph")
        self._made += count
        if self._made >= self._next_check:
            self._next_check = next_check(self._made)
            self._check(arguments)

    def _check(self, arguments: Sequence[Tensor]) -> None:
        """The captured graph and an eager step on the same draws, twice: one may differ by an unlucky cancellation."""
        with self._undone(self._all_generators()):
            for tries_left in (1, 0):
                try:
                    with self._undone(self._all_generators()):
                        expected = [t.detach().clone() for t in self._outputs(arguments)[:2]]
                    with self._undone([]), torch.no_grad():
                        given = self.captured.graph(*self.captured.inputs(self.captured.draw(), arguments))
                        given = [t.clone() for t in (*given[:2], given[-1])]
                except RuntimeError:  # as a matrix that has no factor: the step itself will see
                    return
                if not bool(given[2].all()):
                    return
                try:
                    self._compare_numbers(given[:2], expected, self._rounding)
                except CaptureError as error:
                    if not tries_left:
                        raise CaptureError(
                            f"compared after {self._made} steps, {error}; it has kept the value that this had when it "
                            "was captured"
                        ) from error
                else:
                    return

    def commit(self) -> None:
        """Let the optimizer make the step that was last computed, if the graph has not made it."""
        if self.update is not None:
            return
        self.hand_over()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()

    def hand_over(self) -> None:
        """Put the gradient that was last computed into the parameters, where the update is not part of the graph."""
        for p in self.parameters:
            p.grad = None
        for p, gradient in zip(self.trained, self._gradients, strict=True):
            p.grad = gradient

    # -- leaving no trace ---------------------------------------------------------------------------------------

    @contextmanager
    def _undone(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Put generators and tensors back afterwards."""
        states = [(g, g.get_state()) for g in generators]
        buffers = [(b, b.clone()) for b in (*self.buffers, *self._targets)]
        changed: list[str] = []
        try:
            yield
        finally:
            changed = self.watch.put_back()
            _restore(states, buffers)
        if changed:
            raise CaptureError(
                f"the buffer {changed[0]!r} is assigned anew in a step; change it in place, as by .copy_() or .mul_()"
            )

    def _all_generators(self) -> list[torch.Generator]:
        return [*self.generators, torch.default_generator]


def _restore(states: Sequence[tuple[torch.Generator, Tensor]], buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


#: One piece of memory for what a graph makes on its way. Planning it recurses, too deep for graphs of more nodes.
_ONE_PIECE, _MOST_PLANNED = {"memory_planning": True, "memory_pool": "intermediates"}, 5400


def _inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The compiled graph."""
    on_cpu = all(t.device.type == "cpu" for t in inputs)
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # torch's own, of parts of it that inductor uses
            warnings.simplefilter("ignore", kind)
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile as inductor
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from bayesmeta.train.compilation.products import Products

        # options are patched while it compiles, and are then as they were; shapes are those that it is made for
        options: dict[str, Any] = {
            "cpp_wrapper": on_cpu,
            "post_grad_custom_pre_pass": Products(),
            "size_asserts": False,
        }
        if on_cpu and len(graph.graph.nodes) <= _MOST_PLANNED:
            options |= _ONE_PIECE
        # without shapes of its own, though all are fixed, the compiler does not keep what it made for the next process
        fake = FakeTensorMode(shape_env=ShapeEnv())
        context = TracingContext(fake)
        given: list[Any] = [fake.from_tensor(t, static_shapes=True) for t in inputs]
        try:
            # a second cache, which cannot hold a captured graph and says so at length
            with without_shim_messages(), tracing(context), torch._functorch.config.patch(enable_autograd_cache=False):
                call = inductor(graph, given, options=options)
        except Exception as error:
            line = (str(error).splitlines() or ["no detail"])[0][:300].rstrip(". ")
            raise CaptureError(f"the compiler failed: {type(error).__name__}: {line}") from error
    if can_try(inputs):
        try_in_child(call, inputs)
    return call
