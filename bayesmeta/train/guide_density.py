"""How dense a guide is at its own draws: by task where its tasks are independent, else for all of them together."""

from __future__ import annotations

from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

_TASK_DIM = -2


def log_density(trace: Any, rows: Tensor | None) -> Tensor | None:
    """log q of what a run of the guide drew, in the sites' own space, without the scale that a plate may have.

    An automatic guide draws some sites from auxiliary ones and states the Jacobian in their Delta's log-density, so
    that the sum over all its sites is the density of the sites themselves.

    Args:
        trace: of the guide.
        rows: of the guide's tasks that are wanted; None for all, in their order.

    Returns:
        ``[tasks]`` where every site stands in the task plate; else one number, ``[]``, of all sites together; None
        for some of the tasks of a guide that has no density of each.
    """
    by_task: Tensor | None = None
    alone: Tensor | None = None
    tasks = 0
    for node in trace.nodes.values():
        if node["type"] != "sample" or node["is_observed"] or site_is_subsample(node):
            continue
        value = scale_and_mask(node["fn"].log_prob(node["value"]), 1.0, node["mask"])
        frames = [frame for frame in node["cond_indep_stack"] if frame.dim == _TASK_DIM]
        if frames:
            tasks = frames[0].size
            each = value.expand(tasks, -1).sum(-1) if value.dim() < 2 else value.reshape(tasks, -1).sum(-1)
            by_task = each if by_task is None else by_task + each
        else:
            alone = value.sum() if alone is None else alone + value.sum()
    if alone is None:
        return by_task if by_task is None or rows is None else by_task[rows.to(by_task.device)]
    if rows is not None and len(rows) < tasks:
        return None
    return alone if by_task is None else alone + by_task.sum()
