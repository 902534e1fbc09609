"""Noise carried over merges, an extension of ours, beside what else pulls toward the anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies import figures
from studies.catalog.model_pool import MERGING, PAIR, mean
from studies.catalog.tables5_6 import period_options
from studies.curves import (
    ALPHAS,
    Curve,
    both,
    curve,
    curve_above,
    curve_scores,
    id_and_shifts,
    jackknife,
    known,
    mean_curve,
    own_above,
    shown,
    with_error,
)
from studies.expressions import Merge, Merged, Model, Replica
from studies.measurements import Measurement, Score
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

_MEAN = MERGING | {"merge.method": "uniform_mean"}
# Fixed before any of them was run. A run of 8 epochs at 2e-3 takes exp(-0.27 d) off a task vector
# that nothing renews: these reach from little to nearly all. A penalty acts through Adam, which
# divides it by a gradient of about 1e-3 an element: a thousandth of the decay pulls about as hard.
_DECAYS = (1.0, 3.0, 10.0)
_PENALTIES = (0.001, 0.003, 0.01)
# What is carried to the last merge ends where curves are steep: a tenth of a point ID is worth a
# quarter on the shifts there.
_ALPHAS = (*ALPHAS, 0.875)
_OURS = {
    "every": "noise carried, shrunk at every merge",
    "last": "noise carried, shrunk at the last merge",
}
# What carried noise is held against: a name -> the models whose curves are its.
_RIVALS: Mapping[str, Sequence[Any]] = {
    "one fine-tuned model": ("replica",),
    "the mean after training": ("mean",),
    "Model Stock after training": ("post",),
    "periodic mean": ("periodic_mean",),
    "periodic Model Stock": ("off",),
    "decay to the anchor, at its best strength": tuple(("decay", d) for d in _DECAYS),
    "L2-SP, at its best strength": tuple(("l2_sp", a) for a in _PENALTIES),
}
_NAMES = {
    "replica": "one fine-tuned model",
    "mean": "mean of two after training",
    "post": "Model Stock after training",
    "periodic_mean": "periodic mean (t = 1)",
    "off": "periodic, equation 3",
    **_OURS,
    **{("decay", d): f"periodic mean, decay {d:g} to the anchor" for d in _DECAYS},
    **{("l2_sp", a): f"periodic mean, L2-SP {a:g}" for a in _PENALTIES},
}
# Rows beside the verdict, over fewer seeds and from the first anchor alone.
_SIDE_SEEDS = 3
_HOW = {"off": "equation 3", "every": "noise carried"}


def _models(seed: int) -> dict[Any, Model]:
    team = tuple(Replica(Run.of(seed, PAIR), r) for r in (0, 1))
    carried = {
        how: Merged(Run.of(seed, MERGING | {"merge.carry_noise": how}))
        for how in ("off", "last", "every")
    }
    decays = {
        ("decay", d): Merged(Run.of(seed, _MEAN | {"optimizer.decay_to_pretrained": d}))
        for d in _DECAYS
    }
    penalties = {("l2_sp", a): Merged(Run.of(seed, _MEAN | _l2_sp(a))) for a in _PENALTIES}
    return {
        "replica": team[0],
        "mean": mean(team),
        "post": Merge(team),
        "periodic_mean": Merged(Run.of(seed, _MEAN)),
        **carried,
        **decays,
        **penalties,
    }


def _l2_sp(alpha: float) -> dict[str, Any]:
    """The penalty in the place of weight decay; the head, zero-shot here, is not pulled to zero."""
    return {
        "objective.name": "l2_sp",
        "objective.l2_sp_alpha": alpha,
        "objective.l2_sp_beta": 0.0,
        "optimizer.weight_decay": 0.0,
    }


def _side_settings(setup: Setup) -> dict[str, dict[str, Any]]:
    return {
        "merged every 2 epochs": period_options(setup, 2.0),
        "N = 3": {"merge.every": "epoch", "num_replicas": 3},
        "N = 4": {"merge.every": "epoch", "num_replicas": 4},
        f"{2 * setup.epochs} epochs": MERGING | {"epochs": 2 * setup.epochs},
        "rate falls to a tenth, not to 0": MERGING | {"optimizer.final_lr_fraction": 0.1},
    }


def _side_seeds(setup: Setup) -> Sequence[int]:
    return () if setup.further else setup.seeds[:_SIDE_SEEDS]


def _wanted(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    for seed in setup.seeds:
        wanted |= curve_scores(_models(seed), seed, _ALPHAS)
    for seed in _side_seeds(setup):
        for name, options in _side_settings(setup).items():
            for how in _HOW:
                more = {"merge.carry_noise": how} if how != "off" else {}
                wanted["side", name, how, seed] = Score(Merged(Run.of(seed, options | more)))
    return wanted


def _say(setup: Setup, values: Values) -> StudyReport:
    curves = {
        (name, seed): curve(values, name, seed, _ALPHAS) for name in _NAMES for seed in setup.seeds
    }
    rows, claims, notes = _against_rivals(setup, curves)
    tables = [
        _accuracies(setup, values),
        Table(
            ["on the shifts, at equal ID", "as it is", "seeds", "of mean curves", "at its best α"],
            rows,
        ),
    ]
    if _side_seeds(setup):
        tables.append(_side(setup, values, curves))
    lines = {label: [curves[name, seed] for seed in setup.seeds] for name, label in _NAMES.items()}
    return StudyReport(
        tables,
        claims,
        {"carried": lambda path: figures.wise_ft_curves(lines, path, strong=_OURS.values())},
        [
            "As it is: the model with nothing tuned, against the best that a rival's WiSE-FT curve "
            "(its alphas joined by a spline) has at the same accuracy in distribution; of a rival "
            "with a strength, the best of all strengths, chosen on the test sets in its favor.",
            "Of mean curves: as it is, of accuracies averaged over the seeds before they are "
            "compared, with a jackknife's error. No seed drops out for having too much ID, and "
            "noise in a seed's ID, which a bent curve does not average out, matters less.",
            "At its best α: curve against curve, the mean difference over the upper half of the "
            "accuracies that both have.",
            *notes,
        ],
    )


def _against_rivals(
    setup: Setup, curves: Mapping[Any, Curve]
) -> tuple[list[list[str]], list[Claim], list[str]]:
    """Rows and claims, and a note where there is no point of equal ID at some seeds."""
    claims, rows, notes = [], [], []
    for how, text in _OURS.items():
        for rival, members in _RIVALS.items():
            pairs = [
                (curves[how, seed], [curves[member, seed] for member in members])
                for seed in setup.seeds
            ]
            own = known(own_above(mine.own, theirs) for mine, theirs in pairs)
            along = known(curve_above([mine], theirs) for mine, theirs in pairs)
            together = with_error(jackknife(_of_means, pairs))
            rows.append([f"{text} − {rival}", shown(own), str(len(own)), together, shown(along)])
            if len(own) < len(pairs):
                notes.append(_outside(text, rival, pairs, len(own)))
            said = {f"{text}, as it is,": own, f"{text}, at its best α,": along}
            claims += [
                Claim(f"{what} beats {rival}, at equal ID", "ours", found)
                for what, found in said.items()
                if len(found) > 1
            ]
    return rows, claims, notes


def _of_means(pairs: Sequence[tuple[Curve, list[Curve]]]) -> float | None:
    mine, theirs = zip(*pairs, strict=True)
    rivals = [mean_curve(one) for one in zip(*theirs, strict=True)]
    return own_above(mean_curve(mine).own, rivals)


def _outside(text: str, rival: str, pairs: Sequence[tuple[Curve, list[Curve]]], inside: int) -> str:
    better = sum(mine.own[0] > max(one.dense[0].max() for one in theirs) for mine, theirs in pairs)
    return (
        f"{text}, {rival}: at {len(pairs) - inside} of {len(pairs)} seeds there is no point of "
        f"equal ID ({better} times it has more ID than any point of the curve)."
    )


def _accuracies(setup: Setup, values: Values) -> Table:
    def pair(name: Any, alpha: float) -> str:
        scores = [values[name, seed, alpha] for seed in setup.seeds]
        means = [sum(found) / len(found) for found in zip(*map(id_and_shifts, scores), strict=True)]
        return " / ".join(f"{value:.2f}" for value in means)

    rows = [["zero-shot", *both([values["zero_shot", setup.seeds[0]]]), *["–"] * len(_ALPHAS)]]
    for name, label in _NAMES.items():
        own = both([values[name, seed] for seed in setup.seeds])
        rows.append([label, *own, *(pair(name, alpha) for alpha in reversed(_ALPHAS))])
    columns = ["two replicas", "ID", "avg shifts"]
    return Table([*columns, *(f"α = {alpha:g}" for alpha in reversed(_ALPHAS))], rows)


def _side(setup: Setup, values: Values, curves: Mapping[Any, Curve]) -> Table:
    rows, seeds = [], _side_seeds(setup)
    for name in _side_settings(setup):
        for how, text in _HOW.items():
            scores = [values["side", name, how, seed] for seed in seeds]
            above = known(
                own_above(id_and_shifts(score), [curves["mean", seed]])
                for score, seed in zip(scores, seeds, strict=True)
            )
            rows.append([f"{name}, {text}", *both(scores), f"{shown(above)} ({len(above)})"])
    # Of two replicas of the usual length, whatever the variant costs.
    return Table(["variants", "ID", "avg shifts", "above the curve of two's mean (seeds)"], rows)


CARRIED = Study(
    "carried",
    "Noise carried over merges",
    "An extension of ours: periodic merging that remembers the noise of earlier periods. It is "
    "held against every method that pulls toward the anchor and against every WiSE-FT curve, at "
    "equal accuracy in distribution; the claims are ours, not the paper's.",
    _wanted,
    _say,
    num_seeds=8,
)
