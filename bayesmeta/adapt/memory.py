"""A limit on the matrices of a posterior: an error that says what to do, before an allocator's."""

from __future__ import annotations

from bayesmeta.errors import UnsupportedError

#: Matrices of a posterior of more than this many GiB are refused.
MAX_GIB = 4.0


def need_memory(numbers: int, num_tasks: int, groups: int, *, what: str, formula: str, advice: str) -> None:
    """Refuse matrices of more than ``MAX_GIB``, at 8 bytes a number.

    Args:
        numbers: of one task under one draw of the global sites.
        num_tasks: how many tasks.
        groups: draws of the global sites.
        what: takes the memory, for the message.
        formula: of ``numbers``, for the message.
        advice: what to use instead.

    Raises:
        UnsupportedError: naming the memory, what takes it and ways out.
    """
    gib = num_tasks * groups * numbers * 8 / 2**30
    if gib <= MAX_GIB:
        return
    tasks = "1 task" if num_tasks == 1 else f"{num_tasks} tasks"
    draws = f" × {groups} draws of the global sites" if groups > 1 else ""
    fewer = "adapt to fewer tasks at a time, " if num_tasks > 1 else ""
    raise UnsupportedError(
        f"{what} takes {gib:.3g} GiB for {tasks}{draws} (tasks · {formula} · 8 bytes); the limit is {MAX_GIB:g} GiB. "
        f"Use {advice}, {fewer}or let fewer parameters be task-specific (task_modules='head')."
    )
