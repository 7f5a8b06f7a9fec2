"""What does not add up in an evaluation: signs that its attacks were held off by masked gradients, not by robustness.

Every check compares accuracies of one row, `pgd10_top1` and the like, in percent. Where a difference may be chance, two
standard errors are granted: of two independent proportions where any difference would be a sign, which is generous as
the images are the same; of the share of images that only one of them breaks where it must be large.

The literature: Athalye, Carlini & Wagner 2018, "Obfuscated Gradients Give a False Sense of Security";
Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Croce & Hein 2020, "Reliable Evaluation
of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"; Croce et al. 2021, "RobustBench"; Pang et
al. 2020, "Boosting Adversarial Training with Hypersphere Embedding", and github.com/ShawnXYang/AT_HE, issue 1. Bounds
that none of them gives are ours, and stand below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fasttht.alarm_rows import Alarm, View, parse, series, widest

__all__ = ["Alarm", "look", "missing"]

# A drop of fewer points says nothing of how strong one step is beside many.
_LEAST_DROP = 5.0
# One step that takes this share of what many take is as strong as they are.
_ONE_STEP_SHARE = 0.98
# Noise that takes this share of what the attack takes is as strong as it is.
_NOISE_SHARE = 0.5
# Percent of input-gradient elements that are exactly zero.
_ZERO_GRADIENT = 5.0
# Points that one loss may be weaker than another. The AT_HE report: 1.8 for a linear classifier, 4.3 and 7.1 for
# classifiers of cosines.
_LOSS_GAP = 3.0
# Points, and share of the weaker attack's accuracy, that an ensemble of attacks may be stronger.
_ENSEMBLE_GAP, _ENSEMBLE_SHARE = 5.0, 0.2
# Points that Square may take beyond the white-box attacks: that of AutoAttack's own check.
_SQUARE_GAP = 0.2
# A sweep over radii says something of its fall if the largest is so many times the smallest.
_SWEEP_RATIO = 4.0


def look(row: Mapping[str, Any], *, classifier: str, chance: float) -> list[Alarm]:
    """Return what does not add up in a row of an evaluation. What is not in the row is not judged: see `missing`.

    row: accuracies in percent, each under `<attack>_top1`, their number of `images`, and, for radii, `eps`. chance: the
    accuracy of guessing, in percent. classifier: `cosine` or `linear`, for what an alarm may mean. Norms are judged
    apart; each check raises one alarm for each, at its worst.

    Raises: ValueError for a row without a number of images.
    """
    if not row.get("images"):
        raise ValueError("alarms: expected a row with the number of images, got none")
    pgd = list(parse(row))
    found: list[Alarm] = []
    for norm in ("", "_l2", "_l2_relative"):
        view = View(row, norm, tuple(p for p in pgd if p.norm == norm), classifier == "cosine", chance)
        for check in _CHECKS:
            found += check(view)
    return found


def missing(row: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each check that the row has too little for: what was not checked, and what would do it."""
    pgd = list(parse(row))
    own = [p for p in pgd if p.eps is None and p.goal == ""]
    lengths = {p.steps for p in own if p.steps > 0}
    autoattack = any(key.startswith("autoattack") for key in row)
    radii = {p.eps for p in pgd if p.eps is not None}
    norm = row.get("norm", "linf")
    every = widest(norm, row.get("img_size"))
    there = {
        "more steps against fewer": len(lengths) > 1,
        "one step against many": 1 in lengths and len(lengths) > 1,
        "random noise against the attack": any(p.steps == 0 for p in own) or "noise_top1" in row,
        # Of attacks that leave nothing right there is no share, and nothing that zeros could have saved.
        "the share of zero gradients": any(p.steps for p in pgd),
        "cross entropy against DLR and margin": any(p.loss != "ce" for p in own) or "apgd_dlr_top1" in row,
        "targeted against untargeted": any(p.goal for p in pgd) and bool(lengths),
        "accuracy against the radius": len(radii) > 1,
        "a radius that holds every image": norm == "l2-relative"
        or any(every is not None and eps >= every for eps in radii),
        "AutoAttack against PGD": autoattack and bool(lengths),
        "black-box against white-box": autoattack,
    }
    return [f"not checked: {what}; {_FLAGS[what]} would" for what, is_there in there.items() if not is_there]


# What makes each check possible, in words of `fasttht eval`.
_FLAGS = {
    "more steps against fewer": "--eval-steps 10 50",
    "one step against many": "--eval-steps 1 10",
    "random noise against the attack": "--eval-steps 0 10",
    "the share of zero gradients": "any PGD attack",
    "cross entropy against DLR and margin": "--losses ce margin dlr",
    "targeted against untargeted": "--goal both",
    "accuracy against the radius": "--eps-sweep 1/255 8/255 1",
    "a radius that holds every image": "--alarms full",
    "AutoAttack against PGD": "--suites autoattack",
    "black-box against white-box": "--suites autoattack",
}


def _steps(view: View) -> Iterator[Alarm]:
    """More steps leave significantly more images right."""
    pairs = [
        (few, many)
        for group in series([p for p in view.pgd if p.steps], lambda p: (p.goal, p.loss, p.eps, p.restarts))
        for few in group
        for many in group
        if few.steps < many.steps and many.top1 - few.top1 > view.chance_gap(few.top1, many.top1)
    ]
    if pairs:
        few, many = max(pairs, key=lambda pair: pair[1].top1 - pair[0].top1)
        yield Alarm(
            "more_steps_weaker",
            f"{many.name} leaves {many.top1:.2f} % right and {few.name} {few.top1:.2f} %: {many.top1 - few.top1:.2f} "
            f"points more under more steps, where {view.chance_gap(few.top1, many.top1):.2f} could be chance over "
            f"{view.images} images. More steps must not be weaker: gradients may mislead (Athalye et al. 2018; Carlini "
            "et al. 2019).",
        )


def _one_step(view: View) -> Iterator[Alarm]:
    """A single step takes what many take."""
    if view.clean is None:
        return
    for group in series(view.untargeted(), lambda p: (p.loss, p.restarts)):
        one = next((p for p in group if p.steps == 1), None)
        many = max(group, key=lambda p: p.steps)
        if one is None or many.steps < 5 or many.top1 <= view.broken:
            continue
        drop, single = view.clean - many.top1, view.clean - one.top1
        if drop >= _LEAST_DROP and single >= _ONE_STEP_SHARE * drop:
            yield Alarm(
                "one_step_as_strong",
                f"{one.name} takes {single:.2f} points and {many.name} {drop:.2f}: one step is "
                f"{100 * single / drop:.0f} % as strong as {many.steps}. Iterating must gain where gradients guide "
                "(Athalye et al. 2018; Carlini et al. 2019).",
            )
            return


def _noise(view: View) -> Iterator[Alarm]:
    """Random noise takes about what the attack takes."""
    noise, attack = view.noise(), view.strongest()
    if noise is None or attack is None or view.clean is None or attack.top1 <= view.broken:
        return
    drop = view.clean - attack.top1
    least = max(view.chance_gap(noise, attack.top1), _NOISE_SHARE * drop)
    if noise - attack.top1 < least:
        yield Alarm(
            "noise_as_strong",
            f"random noise leaves {noise:.2f} % right and {attack.name} {attack.top1:.2f} %, of {view.clean:.2f} %: "
            f"the attack takes {noise - attack.top1:.2f} points beyond noise, fewer than the {least:.2f} expected. "
            "Either the radius is too small to matter, or the gradient leads nowhere (Carlini et al. 2019).",
        )


def _zero_gradient(view: View) -> Iterator[Alarm]:
    """Many elements of the input gradient are exactly zero.

    DLR is left out: where the label's logit has fallen to the third place it is 1 whatever the image, by definition.
    """
    keys = {p.name: f"{p.name}_zero_grad_pct" for p in view.pgd if p.steps and p.loss != "dlr"}
    shares = {name: view.row[key] for name, key in keys.items() if key in view.row}
    name = max(shares, key=lambda name: shares[name], default=None)
    if name is not None and shares[name] > _ZERO_GRADIENT:
        yield Alarm(
            "zero_gradient",
            f"{shares[name]:.2f} % of the elements of {name}'s input gradient are exactly zero (at most "
            f"{_ZERO_GRADIENT:g} % expected): the sign of zero is zero, and there the attack stands still (Athalye et "
            "al. 2018; Croce & Hein 2020).",
        )


_COSINES = (
    " The classifier compares directions: with logits confined to a sphere cross entropy is known to be a weak attack "
    "on it, so quote DLR or AutoAttack (Pang et al. 2020; AT_HE, issue 1: 60.0 % under APGD-CE, 52.9 % under APGD-DLR)."
)
_NO_COSINES = " Cross entropy flattens where logits are large: quote the stronger loss, or AutoAttack."


def _losses(view: View) -> Iterator[Alarm]:
    """Attacks on the cross entropy leave much more right than those on DLR or the margin."""
    pairs: list[_Pair] = []
    for group in series(view.untargeted(), lambda p: (p.steps, p.restarts)):
        by_loss = {p.loss: p for p in group}
        ce = by_loss.pop("ce", None)
        if ce is not None:
            pairs += [(ce.name, ce.top1, other.name, other.top1, _LOSS_GAP) for other in by_loss.values()]
    # What nine targets gain is not the gain of the loss alone.
    for weak, strong, bound in (("apgd_ce", "apgd_dlr", _LOSS_GAP), ("aa_apgd_ce", "aa_apgd_t", _ENSEMBLE_GAP)):
        a, b = view.get(weak), view.get(strong)
        if a is not None and b is not None:
            pairs.append((weak, a, strong, b, bound))
    if view.cosine and not _measures_other_losses(view):
        pairs += _autoattack_pair(view)
    found = [pair for pair in pairs if _far(view, pair)]
    if found:
        weak, a, strong, b, _ = max(found, key=lambda pair: pair[1] - pair[3])
        yield Alarm(
            "ce_above_dlr",
            f"{weak}, on cross entropy, leaves {a:.2f} % right and {strong} {b:.2f} %, {a - b:.2f} points fewer (Croce "
            f"& Hein 2020).{_COSINES if view.cosine else _NO_COSINES}",
        )


def _autoattack(view: View) -> Iterator[Alarm]:
    """AutoAttack leaves far less right than the strongest PGD."""
    if view.cosine and not _measures_other_losses(view):
        return  # then the weakness of cross entropy on cosines explains it, and `_losses` has said so
    for pair in _autoattack_pair(view):
        if _far(view, pair):
            weak, a, strong, b, _ = pair
            yield Alarm(
                "autoattack_below_pgd",
                f"{strong} leaves {b:.2f} % right and the strongest PGD, {weak}, {a:.2f} %: {a - b:.2f} points lie "
                "between them. PGD is too weak here (more steps, other losses, another step size), or gradients are "
                "masked (Croce & Hein 2020; Croce et al. 2021).",
            )


# The weaker attack and its accuracy, the stronger and its, and the points that may lie between.
_Pair = tuple[str, float, str, float, float]


def _far(view: View, pair: _Pair) -> bool:
    gap = pair[1] - pair[3]
    return gap > max(pair[4], view.nested_gap(gap))


def _measures_other_losses(view: View) -> bool:
    return any(p.loss != "ce" for p in view.untargeted())


def _autoattack_pair(view: View) -> list[_Pair]:
    """Return the strongest PGD against AutoAttack, if both are there."""
    pgd, auto = view.strongest(), view.get("autoattack")
    if pgd is None or auto is None:
        return []
    return [(pgd.name, pgd.top1, f"autoattack{view.norm}", auto, max(_ENSEMBLE_GAP, _ENSEMBLE_SHARE * pgd.top1))]


def _black_box(view: View) -> Iterator[Alarm]:
    """An attack without gradients takes what those with gradients do not."""
    white, square = view.get("aa_fab_t"), view.get("aa_square")
    if white is not None and square is not None:
        images = round((white - square) * view.images / 100)
        if white - square > _SQUARE_GAP and images > 1:
            yield Alarm(
                "square_beyond_white_box",
                f"Square, which sees no gradient, breaks {images} images ({white - square:.2f} points) that APGD and "
                f"FAB leave right; more than {_SQUARE_GAP:g} points make AutoAttack itself unreliable here (Croce & "
                "Hein 2020; Athalye et al. 2018).",
            )


def _targeted(view: View) -> Iterator[Alarm]:
    """One target class breaks more images than any class would."""
    pairs = [
        (free, bound)
        for group in series([p for p in view.pgd if p.steps], lambda p: (p.steps, p.loss, p.eps, p.restarts))
        for free in group
        for bound in group
        if free.goal == "" and bound.goal and free.top1 - bound.top1 > view.chance_gap(free.top1, bound.top1)
    ]
    if pairs:
        free, bound = max(pairs, key=lambda pair: pair[0].top1 - pair[1].top1)
        yield Alarm(
            "targeted_stronger",
            f"{bound.name}, which wants one class, leaves {bound.top1:.2f} % right and {free.name}, which takes any, "
            f"{free.top1:.2f} %: the untargeted attack fails where a way exists (Carlini et al. 2019).",
        )


def _radius(view: View) -> Iterator[Alarm]:
    """Accuracy rises with the radius, or does not fall."""
    own = view.row.get("eps")
    rises, flats = [], []
    for group in series([p for p in view.pgd if p.steps], lambda p: (p.steps, p.goal, p.loss, p.restarts)):
        known = [(p.eps if p.eps is not None else own, p) for p in group]
        sweep = sorted(((eps, p) for eps, p in known if eps), key=lambda found: found[0])
        rises += [
            (a, b)
            for a in sweep
            for b in sweep
            if a[0] < b[0] and b[1].top1 - a[1].top1 > view.chance_gap(a[1].top1, b[1].top1)
        ]
        if sweep and sweep[-1][0] >= max(_SWEEP_RATIO * sweep[0][0], own or 0):
            low, high = sweep[0][1].top1, sweep[-1][1].top1
            if low - high <= view.chance_gap(low, high) and high > view.broken:
                flats.append((sweep[0], sweep[-1]))
    for name, pairs, what in (
        ("accuracy_rises_with_eps", rises, "A larger ball holds all attacks of a smaller"),
        ("eps_without_effect", flats, "A radius without effect means an attack without direction"),
    ):
        if pairs:
            (small, a), (large, b) = max(pairs, key=lambda pair: pair[1][1].top1 - pair[0][1].top1)
            yield Alarm(
                name,
                f"{b.name} at eps {large:.4g} leaves {b.top1:.2f} % right, {a.name} at eps {small:.4g} {a.top1:.2f} %. "
                f"{what} (Athalye et al. 2018; Carlini et al. 2019).",
            )


def _unbounded(view: View) -> Iterator[Alarm]:
    """In a ball that holds every image, images stay right."""
    every = view.widest
    if every is None:
        return
    whole = [p for p in view.pgd if p.steps and p.goal == "" and p.eps is not None and p.eps >= every]
    best = min(whole, key=lambda p: p.top1, default=None)
    if best is not None and best.top1 > view.broken:
        yield Alarm(
            "unbounded_attack_fails",
            f"{best.name} leaves {best.top1:.2f} % right (at most {view.broken:.2f} % expected) though at eps "
            f"{best.eps:g} every image may become any other: the attack does not find what is certainly there (Athalye "
            "et al. 2018; Carlini et al. 2019).",
        )


_CHECKS: tuple[Callable[[View], Iterator[Alarm]], ...] = (
    _steps, _one_step, _noise, _zero_gradient, _losses, _targeted, _black_box, _radius, _unbounded, _autoattack,
)  # fmt: skip
