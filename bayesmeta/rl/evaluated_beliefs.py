"""What ``bayesmeta rl evaluate`` says, writes and draws of a learner's beliefs about test tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bayesmeta.errors import ContextError, RunFolderError, UnsupportedError
from bayesmeta.ops.files import reason
from bayesmeta.rl.drawings import point_name
from bayesmeta.rl.envs.grid import Grid
from bayesmeta.rl.latent.beliefs import BeliefPath, told_apart
from bayesmeta.rl.latent.checks import Figure, GoalsCheck, admissible_cells, compare_goals, seen_cells
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.drawn import plot_latents
from bayesmeta.rl.latent.pictures import belief_maps, plot_beliefs, walked
from bayesmeta.rl.latent.undecoded import Undecoded
from bayesmeta.rl.learner import HasBeliefs, standard_error
from bayesmeta.rl.rollout import Rollout
from bayesmeta.rl.weighed_tasks import evaluate_weights, goals_of

#: Files in the run's folder.
TREE, PICTURE = "beliefs.nc", "beliefs.png"
#: Tasks and draws of z in the DataTree, whose size is their product with the steps.
WRITTEN = 20
DRAWS = 100
#: Panels of the picture at most.
PANELS = 8


def evaluate_beliefs(learner: HasBeliefs, env: Any, *, seed: int, folder: Path, title: str = "") -> dict[str, Any]:
    """The beliefs of one trial in each environment: print what they are, write ``beliefs.nc``, draw ``beliefs.png``.

    Args:
        learner: trained.
        env: of test tasks. It is reset.
        seed: of actions and draws.
        folder: for the files.
        title: above the picture.

    Returns:
        ``kl``, ``contraction`` and ``told_apart`` before anything and after each episode, means over tasks, each with
        ``_standard_error``; of a grid ``on_seen_empty`` and ``distance`` from the exact belief too; ``files``; ``note``
        where there was something that could not be done.

    Raises:
        RunFolderError: when a file cannot be written.
    """
    try:
        path, rollout = learner.belief_path(env, generator=seed)
    except UnsupportedError as error:
        tqdm.write(f"beliefs: {error}")
        return {"files": [], "note": str(error), **_of_weights(learner, env, seed, folder / PICTURE, title)}
    result: dict[str, Any] = {**by_episode(path, rollout, env.episodes_per_trial), "files": [TREE]}
    tqdm.write(_table(result))
    _write(path, folder / TREE, seed)
    try:
        check = goals_check(path, learner.belief_spec, rollout, env, seed)
        if check is not None:
            result |= _goals(check)
            share, distance = check.seen_share, check.distance
            tqdm.write(f"belief on cells seen empty: {share}; total variation from the exact belief: {distance}")
        why = draw(path, learner.belief_spec, rollout, env, seed=seed, file=folder / PICTURE, title=title)
        result["files"].append(PICTURE)
        if why:
            result["note"] = f"{PICTURE} shows z itself. {why}"
            tqdm.write(result["note"])
    except (UnsupportedError, ContextError) as error:
        tqdm.write(f"no {PICTURE}: {error}")
        result["note"] = str(error)
    return result


def _of_weights(learner: HasBeliefs, env: Any, seed: int, file: Path, title: str) -> dict[str, Any]:
    """Of a belief that is a mixture of known tasks; nothing of others."""
    if not hasattr(learner, "belief_weights"):
        return {}
    found = evaluate_weights(learner, env, ends=ends_of, shown=shown_steps, seed=seed, file=file, title=title)
    pairs = zip(found["spread_over_tasks"], found["spread_over_tasks_standard_error"], strict=True)
    told = ", ".join(f"{mean:.3g} ± {error:.2g}" for mean, error in pairs)
    tqdm.write(f"training tasks that it is spread over, before any and after each episode: {told}")
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def episode_ends(path: BeliefPath, rollout: Rollout, episodes: int) -> Tensor:
    """How many steps each environment had done when an episode of its first trial was over, ``[episodes + 1, envs]``.

    Args:
        path: beliefs, whose context counts the steps of the first trial.
        rollout: what they are about.
        episodes: of a trial.
    """
    return ends_of(path.context.full_mask().T, rollout, episodes)


def ends_of(happened: Tensor, rollout: Rollout, episodes: int) -> Tensor:
    """As :func:`episode_ends`, of the steps that count, ``[steps, envs]``."""
    number = torch.arange(1, len(happened) + 1, device=happened.device).unsqueeze(1)
    episode = rollout.moments.episode.to(happened.device)
    ends = [torch.where(happened & (episode < n), number, 0).amax(0) for n in range(episodes + 1)]
    return torch.stack(ends)


def by_episode(path: BeliefPath, rollout: Rollout, episodes: int) -> dict[str, list[float]]:
    """KL from the prior, contraction, and how far tasks are told apart, before anything and after each episode.

    Means over tasks with their standard errors; of ``told_apart``, which is one number of all tasks, by the jackknife.
    """
    ends, found = episode_ends(path, rollout, episodes), dict[str, list[float]]()
    for name, values in (("kl", path.kl()), ("contraction", path.contraction())):
        each = rollout.by_task(values.gather(0, ends)).mean(2)
        found[name] = [float(x) for x in each.mean(1)]
        found[f"{name}_standard_error"] = standard_error(each)
    if env_tasks(rollout) > 1:
        index = ends.unsqueeze(-1).expand(-1, -1, path.loc.shape[-1])
        loc, scale = (
            torch.stack([rollout.by_task(x).mean(-1) for x in values.gather(0, index).unbind(-1)], -1)
            for values in (path.loc, path.scale)
        )
        found["told_apart"] = told_apart(loc, scale).tolist()
        found["told_apart_standard_error"] = _jackknife(loc, scale).tolist()
    return found


def env_tasks(rollout: Rollout) -> int:
    """How many tasks a rollout is of."""
    return rollout.by_task(rollout.reward[:1]).shape[1]


def _jackknife(loc: Tensor, scale: Tensor) -> Tensor:
    """Standard error over tasks of :func:`told_apart`, of ``[points, tasks, D]``; NaN of two tasks."""
    tasks = loc.shape[1]
    if tasks < 3:
        return loc.new_full((len(loc),), torch.nan)
    kept = [[n for n in range(tasks) if n != left] for left in range(tasks)]
    without = torch.stack([told_apart(loc[:, rows], scale[:, rows]) for rows in kept])
    return ((tasks - 1) * without.var(0, correction=0)).sqrt()


def goals_check(path: BeliefPath, spec: ContextSpec, rollout: Rollout, env: Any, seed: int) -> GoalsCheck | None:
    """Beliefs about the goal of a grid against the exact ones, at all steps; None without a grid or a decoder.

    Args:
        path: beliefs.
        spec: of their context.
        rollout: what they are about.
        env: the environments.
        seed: of the draws.
    """
    family = env.family
    if not isinstance(family, Grid) or isinstance(path.program, Undecoded):
        return None
    maps = belief_maps(
        path, spec, torch.zeros(0, 2), range(path.steps + 1), family=family, num_samples=DRAWS, generator=seed
    )
    goals = env.tasks.goal.repeat_interleave(env.copies, 0)
    goal = (goals[:, 0] * family.cells + goals[:, 1]).long()
    seen = seen_cells(rollout.successor, family, path.context.full_mask().T)
    return compare_goals(maps.cpu(), seen.cpu(), goal.cpu(), admissible_cells(family))


def _goals(check: GoalsCheck) -> dict[str, Any]:
    def plain(figure: Figure) -> dict[str, float]:
        return {"mean": figure.mean, "standard_error": figure.error}

    return {"on_seen_empty": plain(check.seen_share), "distance": plain(check.distance)}


def _table(result: dict[str, Any]) -> str:
    """KL, contraction and how far tasks are told apart, a column an episode."""
    points = len(result["kl"])
    heads = ["before any", *(f"after {point_name('episode', n)}" for n in range(points - 1))]
    names = {"kl": "KL from the prior, nats", "contraction": "contraction", "told_apart": "tasks told apart"}
    rows = {"belief": heads}
    for name, text in names.items():
        if name not in result:
            continue
        pairs = zip(result[name], result[f"{name}_standard_error"], strict=True)
        rows[text] = [f"{mean:.3f} ± {error:.3f}" for mean, error in pairs]
    width, wide = max(map(len, rows)), max(18, *(len(cell) + 2 for cells in rows.values() for cell in cells))
    return "\n".join(text.ljust(width) + "".join(cell.rjust(wide) for cell in cells) for text, cells in rows.items())


# -- files -------------------------------------------------------------------------------------------------------------


def _write(path: BeliefPath, file: Path, seed: int) -> None:
    from bayesmeta.diagnostics.datatree import save_netcdf

    tree = path.tasks(slice(0, WRITTEN)).to_datatree(num_samples=DRAWS, generator=seed)
    try:
        save_netcdf(tree, file)
    except OSError as error:
        raise RunFolderError(f"{file} could not be written: {reason(error)}") from error


def shown_steps(ends: Sequence[int]) -> list[int]:
    """At which steps a belief is drawn: some of the first episode, and the ends of all; at most ``PANELS``."""
    first = ends[1]
    steps = sorted({0, first // 3, 2 * first // 3, *ends})
    if len(steps) <= PANELS:
        return steps
    chosen = torch.linspace(0, len(steps) - 1, PANELS).round().long().tolist()
    return [steps[index] for index in chosen]


def draw(
    path: BeliefPath, spec: ContextSpec, rollout: Rollout, env: Any, *, seed: int, file: Path, title: str = ""
) -> str:
    """Draw the belief about the first task: beside the way that led to it where it says something of places, else as z.

    Args:
        path: beliefs.
        spec: of their context.
        rollout: what they are about.
        env: the environments: of a plane if its tasks have a ``goal`` of two numbers and observations are two.
        seed: of the draws.
        file: to write.
        title: above.

    Returns:
        Why z itself was drawn over the steps; nothing where places were.
    """
    from bayesmeta.diagnostics.plots import save_figure

    goal, why = goals_of(env), _no_places(path, spec, env)
    if why:
        save_figure(plot_latents(path, rollout, goal=None if goal is None else goal[0], title=title), file)
        return why
    assert goal is not None
    ends = episode_ends(path, rollout, env.episodes_per_trial)[:, 0].tolist()
    family = env.family if isinstance(env.family, Grid) else None
    figure = plot_beliefs(
        path, spec, rollout, steps=shown_steps(ends), family=family, goal=goal[0], num_samples=DRAWS, generator=seed,
        extent=None if family is not None else _extent(goal, rollout, int(ends[-1])), title=title,
    )  # fmt: skip
    save_figure(figure, file)
    return ""


def _no_places(path: BeliefPath, spec: ContextSpec, env: Any) -> str:
    """Why a belief says nothing of places; nothing where it does."""
    if isinstance(path.program, Undecoded):
        return f"This belief has no decoder: {path.program.why}"
    if goals_of(env) is None:
        return "These environments are no plane with goals."
    if not {"state", "successor"} & set(spec.inputs):
        return f"The decoder is told {spec.inputs} and no place, so that it expects the same everywhere."
    if "reward" not in spec.targets:
        return f"The decoder foretells {spec.targets} and no reward."
    return ""


def _extent(goal: Tensor, rollout: Rollout, steps: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of what has all goals and the first environment's way, with a margin."""
    way = walked(rollout, 0)[0][:steps].flatten(0, 1)
    places = torch.cat([goal.cpu().double(), way.cpu().double()])
    low, high = places.min(0).values, places.max(0).values
    margin = 0.1 * float((high - low).max().clamp_min(1e-3))
    left, bottom = (float(x) - margin for x in low)
    right, top = (float(x) + margin for x in high)
    return left, right, bottom, top
