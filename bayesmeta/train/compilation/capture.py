"""A function as one graph: what it draws becomes an input, what it reads back becomes a condition.

PyTorch's ``make_fx`` records every tensor operation that a function runs, whatever the Python around it is: Pyro
handlers, gradients inside the function, a hand-written backward. Three things are not tensor operations on inputs, and
:func:`capture` takes them out of the graph:

- **Random numbers.** Each draw is taken out and becomes an input. :meth:`Captured.draw` makes the numbers of a step
  outside of the graph, by the same operations, in the same order, from the same generators. So they are the numbers
  that the function itself would draw, and the generators end in the same state: a captured run and an eager one
  differ by rounding alone. A generator that is seeded by a number drawn in the step (``forked_rng``) is seeded anew.
- **Values read back** (``bool(tensor)``, ``.item()``): the function goes on with the value that it had while it was
  captured, and the graph says as its last output which of these values were the same again. A check of the data
  thus stays a check. Where it does not hold, nothing that the graph gave may be used.
- **Tensors from outside** (parameters, buffers, states of an optimizer) become inputs that are looked up at each call,
  so that changes in place are seen.

What cannot be one graph raises :class:`~bayesmeta.errors.CaptureError`, naming the line: shapes that depend on values
(``nonzero``, boolean masks as indices), draws whose distribution depends on values (other than Normal), generators that
live on from step to step without being told of.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bayesmeta.errors import CaptureError
from bayesmeta.ops.capturing import capturing

aten = torch.ops.aten

#: draws of which the tensor argument, if there is one, gives shape, dtype and device alone
_FREE = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal_", "uniform_",
    "exponential_", "log_normal_", "cauchy_", "geometric_",
}  # fmt: skip
_FREE_OVERLOADS = {aten.bernoulli_.float, aten.normal.float_float}
_READS = {aten._local_scalar_dense.default, aten.equal.default}


@dataclass
class Draw:
    """One random operation of a step.

    Attributes:
        op, args, kwargs: the operation; of a tensor argument, a tensor like it that may be written to.
        generator: where its numbers come from; None is torch's global generator.
        seed: the draw whose value seeds its generator anew in each step; then ``generator`` is not used.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator: torch.Generator | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.make = self.bind(self.generator)

    def bind(self, generator: torch.Generator | None) -> Callable[[], Tensor]:
        """What draws it from a generator."""
        if generator is None:
            return partial(self.op, *self.args, **self.kwargs)
        takes_generator = any(argument.name == "generator" for argument in self.op._schema.arguments)
        op = self.op if takes_generator else self.op.overloadpacket  # which finds the overload that takes one
        return partial(op, *self.args, **self.kwargs, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where its numbers are drawn."""
        return _device(self.args, self.kwargs)


class Source(NamedTuple):
    """Where an input of a graph comes from: a tensor that is looked at in each call, or one that each call has anew.

    Attributes:
        kind: ``"kept"``, ``"draw"`` or ``"argument"``.
        number: among the draws or arguments.
        kept: the tensor.
    """

    kind: str
    number: int
    kept: Tensor | None


@dataclass
class Captured:
    """A function as a graph.

    Attributes:
        graph: takes the inputs, gives the function's outputs and, last, which conditions held, bool ``[conditions]``.
        sources: where each input comes from.
        draws: what :meth:`draw` draws.
        conditions: for people: the values that were read back while capturing, each with its line.
        example: what was drawn while capturing.
    """

    graph: fx.GraphModule
    sources: list[Source]
    draws: list[Draw]
    conditions: list[str]
    example: list[Tensor]
    _kept: list[Tensor | None] = field(default_factory=list, init=False, repr=False)  # inputs, with gaps
    _open: list[tuple[int, bool, int]] = field(default_factory=list, init=False, repr=False)  # and what fills these

    def draw(self) -> list[Tensor]:
        """The random numbers of one step, in the order of the function; generators move on as it would move them.

        They may lie in the same memory as those of the call before.
        """
        values: list[Tensor] = []
        seeded: dict[int, torch.Generator] = {}
        with torch.no_grad():
            for draw in self.draws:
                if draw.seed is None:
                    values.append(draw.make())
                    continue
                if draw.seed not in seeded:
                    value = values[draw.seed]
                    seeded[draw.seed] = torch.Generator(value.device).manual_seed(int(value))
                values.append(draw.bind(seeded[draw.seed])())
        return values

    def inputs(self, drawn: Sequence[Tensor], arguments: Sequence[Tensor] = ()) -> list[Tensor]:
        """The graph's inputs, given the numbers of :meth:`draw` and this call's arguments."""
        if len(self._kept) != len(self.sources):
            self._kept = [source.kept for source in self.sources]
            self._open = [(i, kind == "draw", n) for i, (kind, n, kept) in enumerate(self.sources) if kept is None]
        inputs = self._kept.copy()
        for i, is_drawn, number in self._open:
            inputs[i] = (drawn if is_drawn else arguments)[number]
        return inputs  # type: ignore[return-value]

    def generators(self) -> list[torch.Generator]:
        """The generators that :meth:`draw` moves on."""
        used = [d.generator or _global_generator(d.device) for d in self.draws if d.seed is None]
        return list({_identity(g): g for g in used}.values())

    @property
    def num_nodes(self) -> int:
        """Size of the graph."""
        return len(self.graph.graph.nodes)


def capture(
    function: Callable[[], Iterable[Tensor]],
    generators: Sequence[torch.Generator] = (),
    arguments: Sequence[Tensor] = (),
) -> Captured:
    """Record a function as one graph.

    The function runs once, for real: give it no lasting effects. Generators move on by its draws.

    Args:
        function: takes nothing, gives tensors. It may take gradients with ``torch.autograd.grad``.
        generators: those that it draws from and that live on from call to call.
        arguments: tensors that it uses and that each call replaces by others of the same shapes.

    Raises:
        CaptureError: when it cannot be one graph, naming the line.
    """
    recorder = _Recorder(generators)

    def traced() -> tuple[Tensor, ...]:
        with recorder, capturing(), _WholeReads():
            outputs = tuple(function())
            with torch.no_grad():
                return (*(t.detach() for t in outputs), recorder.held())

    try:
        module = make_fx(traced)()
    except CaptureError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        raise CaptureError(f"{type(error).__name__}: {_first_line(error)} ({_place(frames)})") from error
    sources = _lift(module, recorder.number, {id(t): i for i, t in enumerate(arguments)})
    # without the tensors that are inputs now, which the compiler would take for further ones
    module = fx.GraphModule(
        {n.target: _attribute(module, n) for n in module.graph.find_nodes(op="get_attr")}, module.graph
    )
    drawn = [v for v in recorder.values if id(v) in recorder.number]
    return Captured(module, sources, recorder.draws, [text for _, _, text in recorder.reads], drawn)


class _WholeReads(TorchFunctionMode):
    """Sees tensors that are read as a whole, past torch's dispatch: then equality with what was read is a condition."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            tensor = args[0].detach()
            with _disable_current_modes():
                now = tensor.clone()
            torch.equal(tensor, now)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Sees each operation before it is recorded."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.lasting = {_identity(g): g for g in generators}
        self.draws: list[Draw] = []
        self.values: list[Tensor] = []  # of the draws
        self.number: dict[int, int] = {}  # of a draw, by the identity of its value
        self.single: dict[int, int] = {}  # likewise of draws of one number, by its address, which reading keeps
        self.reads: list[tuple[Tensor, Any, str]] = []
        self.seeds: dict[int, int] = {}  # the draw that a value was read from
        self.fixed: dict[int, torch.Generator] = {}  # generators that each step makes anew from one seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(func, args, kwargs):
            return self._draw(func, args, kwargs)
        if func in _READS:
            return self._read(func, args)
        if torch.Tag.dynamic_output_shape in func.tags and not _fixed_shape(func, args, kwargs):
            raise CaptureError(f"{func} gives a tensor whose shape depends on values ({_place()})")
        return func(*args, **kwargs)

    # -- draws --------------------------------------------------------------------------------------------------

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        name = func.overloadpacket.__name__
        if name == "normal" and any(isinstance(a, Tensor) for a in args[:2]):
            return self._normal(*args, **kwargs)
        if name not in _FREE and func not in _FREE_OVERLOADS:
            raise CaptureError(
                f"draws by {func} are not supported in a graph, such as those of Gamma, Beta, Dirichlet and Poisson "
                f"({_place()})"
            )
        free = tuple(_template(a) if isinstance(a, Tensor) else a for a in args)
        value = self._hoist(func, free, dict(kwargs))
        if name.endswith("_"):
            return args[0].copy_(value)  # the caller goes on with the tensor that it gave
        return value

    def _normal(self, mean: Any, std: Any = 1.0, *, generator: Any = None) -> Tensor:
        """A Normal of tensors is its mean plus its scale times standard numbers, also inside torch."""
        shape = torch.broadcast_shapes(*(t.shape for t in (mean, std) if isinstance(t, Tensor)))
        like = mean if isinstance(mean, Tensor) else std
        with _disable_current_modes():
            standard = torch.empty(shape, dtype=like.dtype, device=like.device)
        noise = self._hoist(aten.normal_.default, (standard,), {"generator": generator})
        return noise * std + mean

    def _hoist(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        generator = kwargs.pop("generator", None)
        named = {} if generator is None else {"generator": generator}
        shared = _global_generator(_device(args, kwargs))
        generator = None if generator is not None and _identity(generator) == _identity(shared) else generator
        draw = Draw(
            func, args, kwargs, None if generator is None else self.lasting.get(_identity(generator), generator)
        )
        constant = False
        if generator is None or _identity(generator) not in self.lasting:
            draw.seed = self.seeds.get((generator or shared).initial_seed())
            if draw.seed is None and generator is not None:
                self._must_be_fixed(generator)
                constant = True
        with _disable_current_modes():
            value = func(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs, **named)
        if not constant:
            self.number[id(value)] = len(self.draws)
            if value.numel() == 1:
                self.single[value.data_ptr()] = len(self.draws)
            self.draws.append(draw)
        self.values.append(value)
        return value

    def _must_be_fixed(self, generator: torch.Generator) -> None:
        """A generator that nobody told of is made in the step, from one seed, or it lives on and cannot be followed."""
        if _identity(generator) in self.fixed:
            return
        with _disable_current_modes():
            fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
            if not torch.equal(fresh.get_state(), generator.get_state()):
                raise CaptureError(f"it draws from a torch.Generator of its own ({_place()})")
        self.fixed[_identity(generator)] = generator

    # -- values read back -----------------------------------------------------------------------------------------

    def _read(self, func: Any, args: tuple[Any, ...]) -> Any:
        with _disable_current_modes():
            value = func(*args)
        if func is aten.equal.default:
            if args[0].shape != args[1].shape:
                return value  # shapes are the same at each call
            tensor = (args[0] == args[1]).all()
        else:
            tensor = args[0]
            if tensor.data_ptr() in self.single:
                self.seeds[value] = self.single[tensor.data_ptr()]
        self.reads.append((tensor, value, f"{value!r} was read back ({_place()})"))
        return value

    def held(self) -> Tensor:
        """Which of the values that were read back are the same again; a seed that was used as one may be another."""
        seeds = {draw.seed for draw in self.draws}
        self.reads = [read for read in self.reads if self.single.get(read[0].data_ptr(), -1) not in seeds]
        if not self.reads:
            return torch.ones(0, dtype=torch.bool)
        device = next((t.device for t, _, _ in self.reads if t.device.type != "cpu"), self.reads[0][0].device)
        return torch.stack([(t.detach() == value).reshape(()).to(device) for t, value, _ in self.reads])


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Of a random operation."""
    return torch.device(kwargs.get("device") or next((a.device for a in args if isinstance(a, Tensor)), "cpu"))


def _identity(generator: torch.Generator) -> int:
    """Of the generator behind the Python object: a message to a handler brings another object for the same one."""
    return int(generator._cdata)  # type: ignore[attr-defined]


def _global_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator of a device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


# -- the graph ----------------------------------------------------------------------------------------------------


def _lift(module: fx.GraphModule, draws: dict[int, int], arguments: dict[int, int]) -> list[Source]:
    """Turn tensors from outside into inputs; returns where these come from."""
    graph = module.graph
    found: dict[int, tuple[fx.Node, Source]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if all(user.target is aten.lift_fresh_copy.default for user in node.users):
            continue  # torch.tensor(1.0)
        tensor = getattr(module, node.target)
        if id(tensor) not in found:
            if id(tensor) in draws:
                source = Source("draw", draws[id(tensor)], None)
            elif id(tensor) in arguments:
                source = Source("argument", arguments[id(tensor)], None)
            else:
                source = Source("kept", 0, tensor.detach())
            with graph.inserting_before(next(iter(graph.nodes))):
                found[id(tensor)] = (graph.placeholder(f"input_{len(found)}"), source)
        node.replace_all_uses_with(found[id(tensor)][0])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    # each was put before those that came earlier
    return [source for _, source in reversed(found.values())]


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(module, str(node.target))


def _template(tensor: Tensor) -> Tensor:
    """A tensor of the same shape whose values are of no use."""
    with _disable_current_modes():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation, such as attention, is random in its dropout alone and has none."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    return (args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)) == 0.0


def _fixed_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these arguments give a shape that does not depend on values."""
    if func is aten.index.Tensor:
        return not any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is not None
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no detail"])[0][:300].rstrip(". ")


_OURS = Path(__file__).resolve().parent.parent
_LIBRARIES = tuple(Path(str(module.__file__)).resolve().parent for module in (torch, pyro))


def _place(frames: traceback.StackSummary | None = None) -> str:
    """The line of the captured function where we are: the innermost of the user's own, or else of bayesmeta's."""
    frames = traceback.extract_stack() if frames is None else frames
    begin = max(
        (i for i, f in enumerate(frames) if f.name == "traced" and Path(f.filename) == Path(__file__)), default=0
    )
    inner = [(Path(f.filename).resolve(), f) for f in frames[begin + 1 :]]
    inner = [(path, f) for path, f in inner if path != Path(__file__).resolve()]
    own = [f for path, f in inner if not any(path.is_relative_to(home) for home in (*_LIBRARIES, _OURS))]
    ours = [f for path, f in inner if path.is_relative_to(_OURS)]
    frame = next((part[-1] for part in (own, ours, [f for _, f in inner]) if part), None)
    return "no line known" if frame is None else f"{frame.filename}, line {frame.lineno}: {frame.line}"
