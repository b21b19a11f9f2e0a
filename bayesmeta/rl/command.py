"""What ``bayesmeta rl train`` and ``bayesmeta rl evaluate`` do, as plain functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bayesmeta.rl.drawings import plot_learning_curve, point_name
from bayesmeta.rl.learner import AdaptationCurve, standard_error
from bayesmeta.rl.plan import plan_of
from bayesmeta.rl.plan import read_setup as read_setup
from bayesmeta.rl.runs import FitResult, fit
from bayesmeta.rl.setups import Setup
from bayesmeta.train.folder import CONFIG, has_checkpoint

#: Gradient steps that curves go to.
POINTS = 3


def train_setup(
    setup: Setup,
    out: str | Path,
    *,
    validation_tasks: int | None = None,
    validate_every: int | None = None,
    checkpoint_every: int = 10,
    tensorboard: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train a method on an environment, both by name, and say what became of it.

    Args:
        setup: the settings; what is None takes its default or, on resume, what the run has that is gone on with.
        out: folder of the run.
        validation_tasks: tasks that the learning curve is measured on; None: 100, on resume as many as before.
        validate_every: iterations between two measurements; None: twenty in all, on resume as before.
        checkpoint_every, tensorboard, overwrite, resume, progress: see :func:`bayesmeta.rl.fit`.
        device: ``"auto"``, or a torch device.

    Returns:
        The result of :func:`bayesmeta.rl.fit`; the folder also has ``learning_curve.png``.

    Raises:
        OptionError: for settings that cannot be used, and on resume for others than those of the run.
    """
    out = Path(out)
    plan = plan_of(
        setup, out, validation_tasks=validation_tasks, validate_every=validate_every, device=device, resume=resume
    )
    setup, learner = plan.setup, plan.learner()
    if progress:
        print(plan.line(), flush=True)
    result = fit(
        learner,
        iterations=setup.iterations,
        validation=plan.held_out(),
        validate_every=plan.validate_every,
        points=None if setup.remembers else max(POINTS, setup.inner_steps or 0),
        out=out,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        tensorboard=True if tensorboard else None,
        progress=progress,
        config={
            "setup": dataclasses.asdict(setup),
            "validation_tasks": plan.validation_tasks,
            "validate_every": plan.validate_every,
        },
    )
    _say(setup, result, out)
    return result


def dry_run(
    setup: Setup,
    out: Path | None,
    *,
    validation_tasks: int | None = None,
    validate_every: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
) -> str:
    """What :func:`train_setup` would train, with what each setting means; nothing is trained or written.

    The learner is made, so that what cannot be trained is refused here too.

    Args:
        setup, out, validation_tasks, validate_every, device, overwrite, resume: as there; ``out`` may be None.

    Raises:
        OptionError: for settings that cannot be used.
    """
    plan = plan_of(
        setup, out, validation_tasks=validation_tasks, validate_every=validate_every, device=device, resume=resume
    )
    lines = [
        plan.table(),
        length(plan.setup, plan.learner()),
        "Nothing was trained or written: leave --dry-run out to begin.",
    ]
    held = out is not None and ((out / CONFIG).exists() or has_checkpoint(out))
    if held and not (overwrite or resume):
        lines.append(f"{out} holds a run already: give --resume, --overwrite, or another --out.")
    return "\n".join(lines)


def length(setup: Setup, learner: Any) -> str:
    """How long a training is, as far as that is known before it begins: iterations, and environment steps."""
    iterations, env = setup.iterations or 0, learner.env
    steps, horizon = getattr(learner, "steps", None), getattr(env, "horizon", None)
    if steps is None and horizon is not None:
        steps = horizon * _episodes(setup, learner)
    if steps is None:
        return f"{iterations:,} iterations; how long they take is said when some are done."
    each = round(steps * env.num_envs)
    return (
        f"{iterations:,} iterations of about {each:,} environment steps (in {env.num_envs:,} environments), "
        f"{iterations * each:,} in all; how long they take is said when some are done."
    )


def _episodes(setup: Setup, learner: Any) -> float:
    """Of an iteration in each environment, for learners that play whole ones."""
    if not setup.remembers:
        return 1 + float(learner.config.inner_steps)  # 0 of joint training
    if setup.method == "distilled":  # an episode, and a trial every so often
        return 1 + (setup.episodes or 1) / float(learner.config.chain_every)
    return float(setup.episodes or 1)


def _say(setup: Setup, result: FitResult, out: Path) -> None:
    from bayesmeta.diagnostics.plots import save_figure

    unit = "episode" if setup.remembers else "step"
    figure = plot_learning_curve(result.curves, unit=unit, title=f"{setup.method} on {setup.env}")
    save_figure(figure, out / "learning_curve.png")
    first, last = result.curves[0], result.curves[-1]
    print(f"return on validation tasks, before training and after {result.iterations} iterations:")
    for name in (n for n in last if n.startswith("return_") and not n.endswith("_se")):
        point = int(name.removeprefix("return_"))
        error = last.get(f"{name}_se", float("nan"))
        print(f"  {point_name(unit, point):18} {first[name]:10.3f}  {last[name]:10.3f} ± {error:.3f}")
    if result.last is not None and result.last.unit == "step":
        told = harm(result.last, setup.inner_steps or 1)
        print(told, end="\n" if told else "")
    print(f"{out}/learning_curve.png, log.jsonl, checkpoint.pt; next: bayesmeta rl evaluate {out}")


def harm(curve: AdaptationCurve, steps: int) -> str:
    """A line of warning where gradient steps make it worse, beyond three standard errors over tasks; else nothing.

    Args:
        curve: the return after 0, 1, … steps.
        steps: as many as the learner was trained for.
    """
    change = (curve.returns[steps] - curve.returns[0]).unsqueeze(0)
    mean, error = float(change.mean()), standard_error(change)[0]
    if not mean < -3 * error:
        return ""
    return (
        f"Adaptation makes it worse: {mean:.3f} ± {error:.3f} after {steps} step{'' if steps == 1 else 's'}. Train "
        "longer (--iterations), or take a smaller --inner-lr."
    )
