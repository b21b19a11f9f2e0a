"""What to do about a profile: each line of advice is derived from what was measured, and says from what."""

from __future__ import annotations

from collections.abc import Iterator

from bayesmeta.train.bounded import in_words
from bayesmeta.train.profiling.profiled import Profile, duration
from bayesmeta.train.profiling.stages import STAGES

#: Shares of a step from which on a stage, or what a single task costs too, is spoken of.
MUCH = {"draw": 0.3, "update": 0.3, "rest": 0.2}
BOUND = 0.6
#: A single operation is named from this share on.
HEAVY = 0.3
#: How much faster another number of threads must have been; and how much faster compiled steps must be.
FASTER = 1.15
#: Steps of a run by which compiling should have paid.
LONG_RUN = 20_000
#: A step at most this times as long as its kernels is bound by the GPU.
BUSY = 1.15
#: Memory of a step, in times what is held between steps, from which on it is spoken of; and at least so much.
MEMORY_TIMES, MEMORY_LEAST = 10, 2**28


def advise(profile: Profile) -> tuple[str, ...]:
    """Advice, the most to the point first; one line at least."""
    found = [
        line
        for part in (_compiled, _draw, _bound, _threads, _stages, _validation, _memory, _noise)
        for line in part(profile)
    ]
    if not found:
        longest = max(profile.eager.stages, key=lambda s: s.seconds)
        found = [
            f"Nothing stands out; the largest part is “{STAGES[longest.name]}” with "
            f"{profile.eager.share(longest.name):.0%} of a step."
        ]
    return tuple(found)


def _compiled(profile: Profile) -> Iterator[str]:
    eager, compiled = profile.eager, profile.compiled
    if compiled is None:
        if profile.compile_report is not None:
            yield f"compile= wins nothing here: {profile.compile_report}."
        return
    assert profile.compile_seconds is not None
    assert profile.break_even is not None
    ratio = eager.seconds / compiled.seconds
    if ratio < FASTER:
        yield (
            f"Do not compile: a compiled step takes {duration(compiled.seconds)}, an eager one "
            f"{duration(eager.seconds)}."
        )
        return
    steps = profile.break_even
    verdict = "worth it in a run of some length" if steps < LONG_RUN else "worth it in a very long run alone"
    yield (
        f'compile="{compiled.mode}" makes a step {ratio:.1f} times as fast. Compiling took '
        f"{profile.compile_seconds:.0f} s, which {_round(steps)} steps win back: {verdict}."
    )


def _draw(profile: Profile) -> Iterator[str]:
    share = profile.eager.share("draw")
    if share >= MUCH["draw"]:
        yield (
            f"Drawing the tasks takes {share:.0%} of a step ({duration(profile.eager['draw'].seconds)}): draw whole "
            "batches by tensor operations instead of task by task in Python or numpy, keep tables and images where "
            "they are used, or draw batches ahead in another process."
        )
    if profile.compiled is not None and profile.compiled.share("draw") >= MUCH["draw"] > share:
        yield (
            f"Beside the graph, drawing the tasks is {profile.compiled.share('draw'):.0%} of a compiled step: they are "
            "drawn before the graph. Tasks that are drawn by tensor operations become part of it."
        )


def _bound(profile: Profile) -> Iterator[str]:
    """Whether the time goes into calling operations, not into what they do."""
    eager = profile.eager
    each = eager.seconds / max(eager.num_operations, 1.0)
    if eager.kernel_seconds is not None:
        ratio = eager.seconds / eager.kernel_seconds
        if ratio > BUSY:
            more = "" if profile.compiled is not None else "; compile= removes most of the waiting"
            yield (
                f"The GPU is busy for {1 / ratio:.0%} of a step; it waits for {eager.num_operations:.0f} operations to "
                f"be called, one each {duration(each)}. Larger batches cost little then{more}."
            )
            return
    heavy = next((o for o in eager.operations if o.name.startswith("aten::")), None)
    if eager.kernel_seconds is None and profile.fixed_share >= BOUND:
        more = "" if profile.compiled is not None else ', and compile="inductor" removes most of it: measure that too'
        yield (
            f"The step is bound by calling operations, {eager.num_operations:.0f} of {duration(each)} each, not by "
            f"what they compute: a step of a single task takes {profile.fixed_share:.0%} of the time. More tasks in a "
            f"step cost little then{more}."
        )
    elif heavy is not None and heavy.share >= HEAVY:
        rate = ""
        if profile.flops and any(word in heavy.name for word in ("mm", "conv")):
            reached = profile.flops / eager.seconds / profile.peak_flops
            rate = f" The step reaches {reached:.0%} of the rate of a large matrix product on this device."
        yield f"{heavy.name} alone takes {heavy.share:.0%} of a step: what it does is the cost, not calling it.{rate}"


def _threads(profile: Profile) -> Iterator[str]:
    for threads, seconds in profile.other_threads.items():
        if profile.eager.seconds > FASTER * seconds:
            yield (
                f"With {threads} thread(s) instead of {profile.threads} an eager step takes {duration(seconds)} "
                f"instead of {duration(profile.eager.seconds)}: torch.set_num_threads({threads})."
            )


def _stages(profile: Profile) -> Iterator[str]:
    eager = profile.eager
    if eager.share("update") >= MUCH["update"]:
        yield (
            f"Clipping and the optimizer take {eager.share('update'):.0%} of a step. They cost the same for any number "
            "of tasks: more tasks in a step (tasks_per_step=, accumulate=) make them a smaller part."
        )
    if eager.share("rest") >= MUCH["rest"]:
        yield (
            f"{eager.share('rest'):.0%} of a step is none of drawing, loss, gradient and update: waiting for the "
            "device, or for another process on this machine."
        )


def _validation(profile: Profile) -> Iterator[str]:
    if profile.validation_seconds is None or profile.validate_every is None:
        return
    step = (profile.compiled or profile.eager).seconds
    share = profile.validation_seconds / (profile.validation_seconds + profile.validate_every * step)
    if share >= MUCH["rest"]:
        yield (
            f"Validation takes {duration(profile.validation_seconds)}, every {profile.validate_every} steps: "
            f"{share:.0%} of the run. Validate less often, or on fewer tasks."
        )


def _memory(profile: Profile) -> Iterator[str]:
    peak, held = profile.eager.peak_bytes, sum(profile.held_bytes.values())
    if peak >= max(MEMORY_LEAST, MEMORY_TIMES * held):
        where = max(profile.eager.stages, key=lambda s: s.peak_bytes).name
        yield (
            f"A step needs {in_words(peak)} at most, in “{STAGES[where]}”. chunk= bounds it by fewer tasks at a time, "
            "checkpoint_inner=True by computing inner steps again, with the same gradient."
        )


def _noise(profile: Profile) -> Iterator[str]:
    if profile.eager.disturbed or (profile.compiled is not None and profile.compiled.disturbed):
        yield "Other processes took the core in every step that was timed: times are too long. Try on a quiet machine."


def _round(steps: float) -> str:
    """Two digits say all that there is to say."""
    number = float(f"{steps:.2g}")
    return f"{number:,.0f}" if number >= 1 else "1"
