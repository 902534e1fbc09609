"""Noise carried over merges, an extension, compared with other methods that pull to the anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies import figures
from studies.catalog.model_pool import MERGING, PAIR, mean
from studies.catalog.tables5_6 import period_options
from studies.curves import (
    ALPHAS,
    Curve,
    accuracy_cells,
    curve,
    curve_gap,
    curve_scores,
    defined,
    estimate_cell,
    id_and_shifts,
    jackknife,
    mean_cell,
    mean_curve,
    model_gap,
)
from studies.expressions import Merge, Merged, Model, Replica
from studies.measurements import Measurement, Score
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

_MEAN = MERGING | {"merge.method": "uniform_mean"}
# Chosen before any of these runs. In a run of 8 epochs at 2e-3, decay d shrinks a task vector
# without gradient by exp(-0.27 d), so these strengths range from little to nearly all. Adam divides
# a penalty by a gradient of about 1e-3 per element: a thousandth of the decay pulls about as hard.
_DECAYS = (1.0, 3.0, 10.0)
_PENALTIES = (0.001, 0.003, 0.01)
# Models that are shrunk at the last merge end where curves are steep: a tenth of a point of ID
# corresponds to a quarter of a point of avg. shifts there.
_ALPHAS = (*ALPHAS, 0.875)
_EXTENSION = {
    "every": "Noise carried (extension), shrunk at every merge",
    "last": "Noise carried (extension), shrunk at the last merge",
}
# Name of a compared method -> the models of its curves.
_RIVALS: Mapping[str, Sequence[Any]] = {
    "a single fine-tuned model": ("replica",),
    "the uniform mean after training": ("mean",),
    "Model Stock after training": ("post",),
    "the periodic uniform mean": ("periodic_mean",),
    "periodic Model Stock": ("off",),
    "decay to the anchor": tuple(("decay", d) for d in _DECAYS),
    "L2-SP": tuple(("l2_sp", a) for a in _PENALTIES),
}
_NAMES = {
    "replica": "Single fine-tuned model",
    "mean": "Uniform mean of 2 replicas, after training",
    "post": "Model Stock, after training",
    "periodic_mean": "Uniform mean, periodic (t = 1)",
    "off": "Model Stock, periodic",
    **_EXTENSION,
    **{("decay", d): f"Uniform mean, periodic, decay {d:g} to the anchor" for d in _DECAYS},
    **{("l2_sp", a): f"Uniform mean, periodic, L2-SP {a:g}" for a in _PENALTIES},
}
# Row of the registry -> the model of its curve in the figure. More curves are not distinguishable;
# the tables have all methods.
_DRAWN = {
    "single_model": "replica",
    "uniform_mean": "mean",
    "model_stock": "post",
    "periodic_model_stock": "off",
    "model_stock_carried": "every",
    "model_stock_carried_last": "last",
}
# Variants without a verdict use fewer seeds and only the config's anchor.
_VARIANT_SEEDS = 3
_CARRY_NOISE = {"off": "Model Stock", "every": "noise carried (extension)"}


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
    """Return options of L2-SP without weight decay; the zero-shot head is not pulled to zero."""
    return {
        "objective.name": "l2_sp",
        "objective.l2_sp_alpha": alpha,
        "objective.l2_sp_beta": 0.0,
        "optimizer.weight_decay": 0.0,
    }


def _variants(setup: Setup) -> dict[str, dict[str, Any]]:
    return {
        "merged every 2 epochs": period_options(setup, 2.0),
        "N = 3": {"merge.every": "epoch", "num_replicas": 3},
        "N = 4": {"merge.every": "epoch", "num_replicas": 4},
        f"{2 * setup.epochs} epochs": MERGING | {"epochs": 2 * setup.epochs},
        "learning rate decays to a tenth, not to 0": (
            MERGING | {"optimizer.final_lr_fraction": 0.1}
        ),
    }


def _variant_seeds(setup: Setup) -> Sequence[int]:
    return () if setup.additional_anchor else setup.seeds[:_VARIANT_SEEDS]


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for seed in setup.seeds:
        measurements |= curve_scores(_models(seed), seed, _ALPHAS)
    for seed in _variant_seeds(setup):
        for name, options in _variants(setup).items():
            for how in _CARRY_NOISE:
                carry = {"merge.carry_noise": how} if how != "off" else {}
                run = Run.of(seed, options | carry)
                measurements["variant", name, how, seed] = Score(Merged(run))
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    curves = {
        (name, seed): curve(values, name, seed, _ALPHAS) for name in _NAMES for seed in setup.seeds
    }
    rows, claims, notes = _comparisons(setup, curves)
    columns = ["difference of avg. shifts at equal ID", "without tuning", "seeds"]
    columns += ["without tuning, of mean curves", "at the best α"]
    tables = [_accuracy_table(setup, values), Table(columns, rows)]
    if _variant_seeds(setup):
        tables.append(_variant_table(setup, values, curves))
    labeled_curves = {
        row: (_NAMES[name], [curves[name, seed] for seed in setup.seeds])
        for row, name in _DRAWN.items()
    }
    return StudyReport(
        tables,
        claims,
        {
            "carried": lambda path: figures.wise_ft_curves(
                labeled_curves,
                path,
                strong=["model_stock_carried", "model_stock_carried_last"],
                title="WiSE-FT curves with and without carried noise",
            )
        },
        [
            "The figure leaves out the periodic uniform mean, decay to the anchor and L2-SP, which "
            "are in the tables.",
            "Without tuning: the model itself, compared with the best point of the other method's "
            "WiSE-FT curve (a spline through its alphas) at the same ID. Decay to the "
            "anchor and L2-SP are compared at their best strength, selected on the test sets in "
            "their favor.",
            "Of mean curves: the same comparison of accuracies that are averaged over the seeds "
            "first, with a jackknife error. No seed is left out because its ID is too high, and "
            "noise in a seed's ID, which does not average out along a bent curve, has less effect.",
            "At the best α: curve against curve, the mean difference over the upper half of the "
            "ID accuracies that both curves reach.",
            *notes,
        ],
    )


def _comparisons(
    setup: Setup, curves: Mapping[Any, Curve]
) -> tuple[list[list[str]], list[Claim], list[str]]:
    """Return rows, claims, and notes on methods without a point of equal ID at some seeds."""
    claims, rows, notes = [], [], []
    for how in _EXTENSION:
        for rival, members in _RIVALS.items():
            pairs = [
                (curves[how, seed], [curves[member, seed] for member in members])
                for seed in setup.seeds
            ]
            untuned = defined(model_gap(carried.endpoint, others) for carried, others in pairs)
            tuned = defined(curve_gap([carried], others) for carried, others in pairs)
            of_means = estimate_cell(jackknife(_gap_of_mean_curves, pairs))
            rows.append(
                [
                    f"`{how}` − {rival}",
                    mean_cell(untuned),
                    str(len(untuned)),
                    of_means,
                    mean_cell(tuned),
                ]
            )
            if len(untuned) < len(pairs):
                notes.append(_out_of_range_note(how, rival, pairs, len(untuned)))
            gaps = {"without tuning": untuned, "at the best α": tuned}
            claims += [
                Claim(f"`{how}` {tuning} beats {rival}", "this project", differences)
                for tuning, differences in gaps.items()
                if len(differences) > 1
            ]
    return rows, claims, notes


def _gap_of_mean_curves(pairs: Sequence[tuple[Curve, list[Curve]]]) -> float | None:
    carried, others = zip(*pairs, strict=True)
    rivals = [mean_curve(seeds) for seeds in zip(*others, strict=True)]
    return model_gap(mean_curve(carried).endpoint, rivals)


def _out_of_range_note(
    how: str, rival: str, pairs: Sequence[tuple[Curve, list[Curve]]], num_inside: int
) -> str:
    num_above = sum(
        carried.endpoint[0] > max(curve.samples[0].max() for curve in others)
        for carried, others in pairs
    )
    return (
        f"`{how}`, compared with {rival}: at {len(pairs) - num_inside} of {len(pairs)} seeds there "
        f"is no point of equal ID (at {num_above}, its ID is above that of the entire curve)."
    )


def _accuracy_table(setup: Setup, values: Values) -> Table:
    def mean_pair(name: Any, alpha: float) -> str:
        scores = [values[name, seed, alpha] for seed in setup.seeds]
        means = [
            sum(column) / len(column) for column in zip(*map(id_and_shifts, scores), strict=True)
        ]
        return " / ".join(f"{value:.2f}" for value in means)

    zero_shot = accuracy_cells([values["zero_shot", setup.seeds[0]]])
    rows = [["Zero-shot", *zero_shot, *["–"] * len(_ALPHAS)]]
    for name, label in _NAMES.items():
        cells = accuracy_cells([values[name, seed] for seed in setup.seeds])
        rows.append([label, *cells, *(mean_pair(name, alpha) for alpha in reversed(_ALPHAS))])
    columns = ["two replicas", "ID", "avg. shifts"]
    columns += [f"ID / avg. shifts at α = {alpha:g}" for alpha in reversed(_ALPHAS)]
    return Table(columns, rows)


def _variant_table(setup: Setup, values: Values, curves: Mapping[Any, Curve]) -> Table:
    rows, seeds = [], _variant_seeds(setup)
    for name in _variants(setup):
        for how, label in _CARRY_NOISE.items():
            scores = [values["variant", name, how, seed] for seed in seeds]
            gaps = defined(
                model_gap(id_and_shifts(score), [curves["mean", seed]])
                for score, seed in zip(scores, seeds, strict=True)
            )
            rows.append(
                [f"{name}, {label}", *accuracy_cells(scores), f"{mean_cell(gaps)} ({len(gaps)})"]
            )
    # All variants are compared with two replicas of the usual length, whatever they cost.
    columns = ["variant", "ID", "avg. shifts"]
    columns += ["above the WiSE-FT curve of the uniform mean of 2 (seeds)"]
    return Table(columns, rows)


CARRIED = Study(
    "carried",
    "Noise carried over merges",
    "This extension of the paper is periodic merging that keeps the estimated noise of earlier "
    "periods. It is compared with every method that pulls to the anchor and with every WiSE-FT "
    "curve, at equal in-distribution accuracy. `every` and `last` are values of "
    "`merge.carry_noise`: carried noise shrinks the model at every merge, or at the last merge "
    "only. The claims are on avg. shifts at equal ID, and are not in the paper.",
    _measurements,
    _summarize,
    num_seeds=8,
)
