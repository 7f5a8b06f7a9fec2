"""Which attacks an evaluation consists of: from the words of a configuration and its flags to threats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fasttht.alarm_rows import widest
from fasttht.attacks.threat import Loss, Threat
from fasttht.config import TrainConfig
from fasttht.errors import UsageError

Goal = Literal["untargeted", "targeted", "least-likely"]

# What `--goal` means; None leaves it to the run.
GOALS: dict[str, tuple[Goal, ...] | None] = {
    "run": None, "untargeted": ("untargeted",), "targeted": ("targeted",), "least-likely": ("least-likely",),
    "both": ("untargeted", "targeted"), "all": ("untargeted", "targeted", "least-likely"),
}  # fmt: skip


def step_size(eps: float, steps: int, rule: str, norm: str = "linf") -> float:
    """Return the evaluation's alpha: 2.5 eps/K (`ratio`), or max(1/255, eps/K) (`paper`; in l2 without the floor)."""
    if rule == "paper":
        return max(1 / 255 if norm == "linf" else 0.0, eps / max(steps, 1))
    return 2.5 * eps / max(steps, 1)


def threats(
    config: TrainConfig,
    goals: Sequence[Goal] | None = None,
    *,
    losses: Sequence[Loss] = ("ce",),
    eps_sweep: Sequence[float] = (),
) -> list[Threat]:
    """Return the attacks that a configuration asks to evaluate: every goal with every loss and number of steps.

    goals: by default untargeted, and targeted too if the run trained against that. eps_sweep: other radii that all of
    them are done at as well, with a step size that follows.
    """
    evaluation, eps, norm = config.evaluation, config.attack.eps, config.attack.norm
    assert eps is not None, "the config was not resolved"
    own: tuple[Goal, ...] = ("untargeted", "targeted") if config.attack.targeted else ("untargeted",)
    radii = [(eps, False), *((other, True) for other in eps_sweep)]
    return [
        Threat(
            eps=radius,
            alpha=step_size(radius, steps, evaluation.eval_rule, norm),
            steps=steps,
            targeted=goal != "untargeted",
            target="least-likely" if goal == "least-likely" else "random",
            norm=norm,
            loss=loss,
            named_eps=named,
        )
        for radius, named in radii
        for goal in (own if goals is None else goals)
        for loss in losses
        for steps in evaluation.eval_steps
    ]


def knn_threats(config: TrainConfig, goals: Sequence[Goal] | None, eps_sweep: Sequence[float]) -> list[Threat]:
    """Return what the nearest neighbours are attacked with: all that is asked for, on the cross entropy, with steps."""
    return [threat for threat in threats(config, goals, eps_sweep=eps_sweep) if threat.steps]


def alarm_threats(config: TrainConfig, num_classes: int) -> list[Threat]:
    """Return the attacks that masked gradients show themselves under, beside the ordinary ones.

    Noise alone; one step; the shortest PGD untargeted with every loss that there are classes for, targeted, at half and
    twice the radius, and, where the norm has one, in a ball that holds every image (`alarm_rows.widest`, in l2 the next
    whole number, which its name holds exactly); and five times the longest's steps.
    """
    eps, norm = config.attack.eps, config.attack.norm
    assert eps is not None, "the config was not resolved"
    lengths = [steps for steps in config.evaluation.eval_steps if steps] or [10]
    short = replace(config, evaluation=replace(config.evaluation, eval_steps=(min(lengths),)))
    other = replace(config, evaluation=replace(config.evaluation, eval_steps=(0, 1, 5 * max(lengths))))
    every = widest(norm, config.data.img_size)
    wide = [] if every is None else [float(math.ceil(every))]
    radii = {min([radius, *wide]) for radius in (eps / 2, eps * 2)}.union(wide)
    losses: tuple[Loss, ...] = ("ce", "margin", "dlr") if num_classes >= 3 else ("ce", "margin")
    return [
        *threats(other, ("untargeted",)),
        *threats(short, ("untargeted",), losses=losses),
        *threats(short, ("targeted",)),
        *(threat for threat in threats(short, ("untargeted",), eps_sweep=sorted(radii)) if threat.named_eps),
    ]


def image_steps(attacks: Sequence[Threat], restarts: int) -> int:
    """Return how many passes one image takes: a forward of each version of it, and a gradient at every step.

    A radius of a sweep that is the evaluation's own is not attacked twice.
    """
    return 1 + sum(restarts * (threat.steps + 1) for threat in {replace(a, named_eps=False) for a in attacks})


def check_losses(attacks: Sequence[Threat], num_classes: int) -> None:
    """Refuse DLR where there are too few classes for it. Raises: UsageError."""
    for threat in attacks:
        least, goal = (4, " with a target") if threat.targeted else (3, "")
        if threat.loss == "dlr" and num_classes < least:
            raise UsageError(
                f"--losses: expected at least {least} classes for dlr{goal}, got {num_classes}; its denominator needs "
                "them: take margin"
            )
