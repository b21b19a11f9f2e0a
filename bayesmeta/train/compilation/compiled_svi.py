"""``compile=`` of :class:`~bayesmeta.MetaSVI`: a step of SVI on any Pyro program as one graph.

Pyro's ELBO classes read their value back while they add it up, which a graph cannot hold. The sums are written out here
on the traces that the ELBO object itself makes (its particles, plates and scales are Pyro's own): for ``Trace_ELBO``,
D. Wingate, T. Weber, "Automated Variational Inference in Probabilistic Programming", 2013,
https://arxiv.org/abs/1301.1299, with reparameterised sites (D. Kingma, M. Welling, "Auto-Encoding Variational Bayes",
2013, https://arxiv.org/abs/1312.6114, section 2.3), and for ``TraceMeanField_ELBO`` with the Kullback-Leibler
divergence of a site where it is known. Gradients by the score function are not compiled.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pyro
import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import JitTrace_ELBO, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import constraints, kl_divergence
from torch.utils import _pytree as pytree

from bayesmeta.errors import CaptureError, CompileWarning
from bayesmeta.train.arguments import as_observations
from bayesmeta.train.compilation.compiled import CompiledStep
from bayesmeta.train.compilation.compiling import MOST_BROKEN, MOST_GRAPHS, SECONDS, SPEED_UP, TIMED, Compile, counts
from bayesmeta.train.compilation.recorded import check_cuda
from bayesmeta.train.compilation.several import SeveralSteps
from bayesmeta.train.compilation.watching import MOST_REBUILT, MOST_TRIES, ChanceError, OutdatedError
from bayesmeta.train.svi_state import owners

#: Steps in one graph in :meth:`~bayesmeta.MetaSVI.run`. Compiling takes as many times as long as for one step.
BLOCK = 5
#: Fewer steps than these are made one by one, unless the graph of several is there: it saves some 0.1 ms a step and
#: takes half a minute and more to compile.
LEAST = 5_000


class SVICompiler:
    """Makes the steps of a :class:`~bayesmeta.MetaSVI` by compiled graphs where it can.

    Args:
        svi: the object; its first step is eager, which creates parameters and the optimizer's state.
        mode: ``"inductor"``, or ``"auto"``: compile once eager steps have taken as long as compiling would, which takes
            at most about twice the time of the better choice; in ``run``, which knows the number of steps, compile if
            these win it back.
    """

    def __init__(self, svi: Any, mode: Compile) -> None:
        self.svi, self.mode = svi, mode
        self._text = "not compiled: too few steps so far"
        self.graphs: dict[Any, CompiledStep] = {}
        self._off = False
        self._spent, self._last = 0.0, cast(float | None, None)
        self._made, self._broken, self._without = 0, 0, 0
        self._rebuilt, self._tries = 0, 0
        self._timed, self._left = 0, cast(int | None, None)  # eager steps in that time; steps that run has yet to make
        self._full = False  # whether it was said that there are no more graphs
        self._blocks: dict[Any, SeveralSteps | None] = {}  # by the graph of one step
        self._optimizer: Any = None  # that the graphs are for
        self._same: tuple[list[tuple[Any, int]], CompiledStep, list[Tensor]] | None = None

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The loss of a step, which has been made; None where it is to be made eagerly."""
        left, self._left = self._left, None
        if self._off or self.svi.optimizer is None or self.svi.steps < 1:
            return None
        try:
            step, arguments = self._step(args, kwargs, left)
            found = None if step is None else step(arguments)
        except CaptureError as error:
            self._fail(error)
            return None
        if step is None:
            self._without += len(self.graphs) > 0
            return None
        value = math.nan if found is None else float(found[0] + 0 * found[1])
        if not math.isfinite(value):
            step.undo()
            self._count_broken(found, step)
            return None
        step.commit()
        self._made += 1
        return value

    def run(self, steps: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
        """Make up to so many steps in one graph; the losses of those made, none where the next is to be made alone."""
        self._left = None
        if self._off or steps < BLOCK or not self.graphs or self.svi.optimizer is not self._optimizer:
            self._left = steps
            return []
        try:
            step, arguments = self._step(args, kwargs)
            block = None if step is None else self._block(step, steps)
            losses = [] if block is None else block(arguments)
        except CaptureError as error:
            self._fail(error)
            return []
        self._made += len(losses)
        return losses

    def _block(self, step: CompiledStep, left: int) -> SeveralSteps | None:
        """Several of a step, compiled once as many are left as win it back; None leaves them single."""
        if id(step) not in self._blocks:
            if not self._pays(step, left):
                return None
            try:
                block = SeveralSteps(step, BLOCK)
            except ChanceError as error:
                self._tries += 1
                if self._tries < MOST_TRIES:
                    return None
                self._blocks[id(step)] = None
                self._text += f"; steps are made one by one: {error}"
            except CaptureError as error:
                self._blocks[id(step)] = None
                self._text += f"; steps are made one by one: {error}"
            else:
                self._blocks[id(step)] = block
                self._text += (
                    f"; {BLOCK} steps in one graph of {block.captured.num_nodes} operations in {block.seconds:.1f} s"
                )
        return self._blocks[id(step)]

    def _pays(self, step: CompiledStep, left: int) -> bool:
        """Whether enough steps are left for several in one graph, which at best halve what a step takes.

        Compiling it takes up to :data:`BLOCK` times as long as for one step; ``"auto"`` reckons with that.
        """
        if left < LEAST or self.mode != "auto":
            return left >= LEAST
        each = self._spent / max(self._timed, 1) / SPEED_UP
        return left * each / 2 > 2 * BLOCK * step.seconds["compile"]

    def _count_broken(self, found: Any, step: CompiledStep) -> None:
        if found is None:
            self._broken += 1
            if self._broken > 5 and self._broken > MOST_BROKEN * (self._made + self._broken):
                self._give_up(f"{self._broken} steps had to be made again eagerly, the last since {step.broken[0]}")

    def _fail(self, error: CaptureError) -> None:
        """This step is eager; the next is tried again where that may help."""
        if isinstance(error, OutdatedError) and self._rebuilt < MOST_REBUILT:
            self._rebuilt += 1
            self._forget()
        elif isinstance(error, ChanceError) and self._tries + 1 < MOST_TRIES:
            self._tries += 1
        else:
            self._give_up(str(error))

    def _forget(self) -> None:
        self.graphs, self._blocks, self._same = {}, {}, None

    def _give_up(self, reason: str) -> None:
        self._off = True
        self._text = f"not compiled: {reason}"
        warnings.warn(
            f"{'All' if self._made == 0 else f'From step {self.svi.steps + 1} on the'} steps of MetaSVI are eager, as "
            f"with compile='off': {reason}.",
            CompileWarning,
            stacklevel=4,
        )

    @property
    def report(self) -> str:
        """What became of it, in words, with the number of graphs and of the steps that were made without one."""
        return self._text + counts(self._without, self._broken)

    # -- the graphs ---------------------------------------------------------------------------------------------

    def _step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], left: int | None = None
    ) -> tuple[CompiledStep | None, list[Tensor]]:
        """The compiled step for these arguments, and their tensors; ``left``: steps on them to come, if known."""
        if self.svi.optimizer is not self._optimizer:  # a state was loaded
            self._forget()
            self._optimizer = self.svi.optimizer
        given = (*args, *kwargs, *kwargs.values())
        if self._same is not None and _are_same(given, self._same[0]):
            return self._same[1:]
        args, kwargs, _ = self.svi._arguments(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = self.svi._tasks.known
        if known is not None and len(tensors[0]) != known.size:
            return None, []  # some of a guide's tasks: whose parameters these are differs from step to step
        key = (str(spec), *((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else _plain(v) for v in leaves))
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                self._say_full(leaves)
                return None, []
            if not self._is_time(left):
                return None, []
            self._build(key, self._objective(leaves, spec), tensors)
        self._same = None
        if _are_plain(given, tensors):
            self._same = ([(leaf, getattr(leaf, "_version", 0)) for leaf in given], self.graphs[key], tensors)
        return self.graphs[key], tensors

    def _say_full(self, leaves: Sequence[Any]) -> None:
        """Once, that this step's shapes come too late for a graph."""
        if self._full:
            return
        self._full = True
        shapes = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else repr(v) for v in leaves)
        warnings.warn(
            f"Step {self.svi.steps + 1} of MetaSVI has arguments of shapes {shapes}, and {len(self.graphs)} graphs "
            "have been made for others: it is eager, and so are later ones of shapes without a graph. Pad the shots to "
            "a few lengths (bayesmeta.data.pad_shots), where model and guide take a mask; and let plain values, as "
            "numbers that change from step to step, be tensors.",
            CompileWarning,
            stacklevel=5,
        )

    def _objective(self, leaves: Sequence[Any], spec: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        svi = self.svi
        particle = _PARTICLES.get(type(svi.elbo))
        if particle is None:
            raise CaptureError(
                f"{type(svi.elbo).__name__} is not compiled; Trace_ELBO and TraceMeanField_ELBO are, on sites that are "
                "reparameterised"
            )

        validated = torch.distributions.Distribution._validate_args

        def objective(*given: Tensor) -> tuple[Tensor, Tensor]:
            rest = iter(given)
            args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(v, Tensor) else v for v in leaves], spec)
            within: AbstractContextManager[None] = nullcontext()
            if svi._tasks.known is not None:
                rows = torch.arange(svi._tasks.known.size)
                within = svi._tasks.within(as_observations(args, kwargs), rows)
            # of what validation reads back, what concerns the data becomes conditions; the first step was
            with within, pyro.get_param_store().scope(svi._store), pyro.validation_enabled(False):
                traces = list(svi.elbo._get_traces(svi.model, svi.guide, args, kwargs))
                if validated:
                    for model_trace, _ in traces:
                        _read_supports(model_trace)
                elbo = torch.stack([torch.as_tensor(particle(*pair)) for pair in traces]).sum()
            loss = -elbo / svi.elbo.num_particles
            return loss, loss

        return objective

    def _build(self, key: Any, objective: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Tensor]) -> None:
        svi = self.svi
        parameters = [p for group in svi._groups for p in group]
        if self.mode == "cudagraphs":
            check_cuda(parameters[0].device)
        step = CompiledStep(
            objective,
            parameters,
            svi.optimizer,
            [],
            modules=list(owners(svi.model, svi.guide).values()),
            arguments=tensors,
            mode="cudagraphs" if self.mode == "cudagraphs" else "inductor",
        )
        known = set(svi._store["params"])
        try:
            step.capture()
        finally:  # the eager step makes what is new, by the draws that it makes it by
            new = set(svi._store["params"]) - known
            for name in new:
                del svi._store["params"][name], svi._store["constraints"][name]
            if new:
                raise ChanceError(f"the parameters {sorted(new)} are made in this step")
        self.graphs[key] = step.compile()
        self._tries = 0
        seconds = sum(sum(s.seconds.values()) for s in self.graphs.values())
        nodes = ", ".join(str(s.captured.num_nodes) for s in self.graphs.values())
        self._text = (
            f"compiled at step {svi.steps + 1}: {len(self.graphs)} graph(s) of {nodes} operations in {seconds:.1f} s"
        )

    def _is_time(self, left: int | None) -> bool:
        """For ``"auto"``: whether the steps left win back compiling, or else eager ones have taken as long as it."""
        if self.mode != "auto" or self.graphs:
            return True
        now = time.perf_counter()
        if self._last is not None:
            self._spent += now - self._last
            self._timed += 1
        self._last = now
        if left is None:
            return self._spent > 2 * SECONDS
        if self._timed < TIMED:
            return False
        return left * self._spent / self._timed * (1 - 1 / SPEED_UP) >= 2 * 2 * SECONDS


def _are_same(given: Sequence[Any], before: Sequence[tuple[Any, int]]) -> bool:
    """Whether these are the very objects of the step before, unchanged since, as far as torch's versions tell."""
    return len(given) == len(before) and all(
        a is b and getattr(a, "_version", 0) == version for a, (b, version) in zip(given, before, strict=True)
    )


def _are_plain(given: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain values and the very tensors that a graph reads, of which nothing was copied."""
    mine = [v for v in given if isinstance(v, Tensor)]
    others = [v for v in given if not isinstance(v, Tensor)]
    return (
        len(mine) == len(tensors)
        and all(a is b for a, b in zip(mine, tensors, strict=True))
        and all(v is None or isinstance(v, bool | int | float | str) for v in others)
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CaptureError(
        f"an argument is a {type(value).__name__}; a graph takes tensors and plain values; the model and guide of "
        "a method are trained by fit"
    )


def _read_supports(model_trace: Any) -> None:
    """Read back whether data lie in the support of their distribution: each becomes a condition of the graph.

    Where it fails the step is made eagerly, which raises as ever. Of a real number nothing is asked: NaN gives a loss
    that is not finite.
    """
    for site in model_trace.nodes.values():
        if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("is_auxiliary"):
            continue
        try:
            support = site["fn"].support
        except (NotImplementedError, AttributeError):
            continue
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real and not constraints.is_dependent(support):
            bool(support.check(site["value"]).all())


# -- what a particle adds to the ELBO -----------------------------------------------------------------------------


def _trace(model_trace: Any, guide_trace: Any) -> Any:
    """log p(y, z) − log q(z)."""
    total: Any = 0.0
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            _check_reparameterised(name, site)
            total = total - site["log_prob_sum"]
    return total + sum(site["log_prob_sum"] for site in model_trace.nodes.values() if site["type"] == "sample")


def _mean_field(model_trace: Any, guide_trace: Any) -> Any:
    """log p(y | z) − KL(q ‖ p), site by site, with a draw where the divergence is not known."""
    total: Any = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            total = total + site["log_prob_sum"]
            continue
        guide_site = guide_trace.nodes[name]
        _check_reparameterised(name, guide_site)
        try:
            divergence = kl_divergence(guide_site["fn"], site["fn"])
        except NotImplementedError:
            total = total + site["log_prob_sum"] - guide_site["score_parts"].entropy_term.sum()
            continue
        divergence = scale_and_mask(divergence, scale=guide_site["scale"], mask=guide_site["mask"])
        total = total - divergence.sum()
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and name not in model_trace.nodes:
            _check_reparameterised(name, site)
            total = total - site["score_parts"].entropy_term.sum()
    return total


def _check_reparameterised(name: str, site: Any) -> None:
    if not is_identically_zero(site["score_parts"].score_function):
        raise CaptureError(f"the guide's site {name!r} is not reparameterised, and its gradient is not compiled")


_PARTICLES: dict[type, Callable[[Any, Any], Any]] = {
    Trace_ELBO: _trace,
    JitTrace_ELBO: _trace,
    TraceMeanField_ELBO: _mean_field,
    JitTraceMeanField_ELBO: _mean_field,
}
