"""Every merge method once: its names, what it reads, and how it is written and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PAPER = "[Model Stock: All we need is just a few fine-tuned models](https://arxiv.org/abs/2403.19522)"


class Style(NamedTuple):
    """How a row of a results table is written and drawn.

    Attributes:
        label: In tables; it may hold {n}, {of} and {alpha}.
        short: Beside its marker in a figure; it may hold {n}.
        colour: A key of `reporting.style.COLOURS`.
        marker: Matplotlib's.
    """

    label: str
    short: str
    colour: str
    marker: str


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """One merge method.

    Attributes:
        name: What `merge.method` of a training run and the keys of the studies call it.
        row: What a row of a results table calls it.
        style: Of that row.
        periodic: The row of a run that merges by it while it trains; empty where none can.
        function: The public function; empty for a method of the command line alone.
        module: The module of `merging` that defines the function.
        command: What `modelstock merge --method` calls it; empty for a method of the library
            alone.
        aliases: Other spellings that the command line takes, besides those of `function` and
            `mergekit`.
        rule: The function of `merging.rules` that gives the coefficients, of the Gram matrix and
            `single` alone; empty where `checkpoint_merge.methods` says how.
        least: Fine-tunes that it needs.
        most: Fine-tunes that the command line takes; None for any number.
        options: Those of the command line that it reads, of weights, normalize, alpha, scale,
            density and t.
        convex: Whether the result never lies outside of the range of the inputs: nothing
            overflows, and a variance stays positive.
        mergekit: What mergekit's recipes call it; empty where they lack it.
        mergekit_keys: Parameters of such a recipe that are read.
        card: What the model card of a merged checkpoint calls it.
    """

    name: str
    row: str
    style: Style
    periodic: str = ""
    function: str = ""
    module: str = "baselines"
    command: str = ""
    aliases: tuple[str, ...] = ()
    rule: str = ""
    min_models: int = 1
    max_models: int | None = None
    options: tuple[str, ...] = ()
    convex: bool = False
    mergekit: str = ""
    mergekit_keys: tuple[str, ...] = ()
    description: str = ""


_ALL = (
    MergeMethod(
        name="stock", function="model_stock", module="stock", command="stock",
        rule="equation_3", min_models=2, convex=True,
        mergekit="model_stock", mergekit_keys=("filter_wise",),
        row="model_stock", periodic="periodic",
        style=Style("Model Stock, after training", "Model Stock,\nafter training",
                    "vermilion", "*"),
        description=f"Model Stock ({PAPER})",
    ),
    MergeMethod(
        name="weighted", function="weighted_model_stock", module="stock", command="weighted-stock",
        rule="noise_weights", min_models=2, convex=True,
        row="weighted",
        style=Style("Model Stock, weighted (ours)", "weighted (ours)", "purple", "X"),
        description=f"Model Stock ({PAPER}), each fine-tune weighted by its own noise",
    ),
    MergeMethod(
        name="carried", function="model_stock_carried", module="stock", min_models=2,
        row="carried",
        style=Style("Model Stock, periodic, noise carried (ours)",
                    "Model Stock,\nnoise carried\n(ours)", "green", "v"),
    ),
    MergeMethod(
        name="constant_ratio", function="constant_ratio", min_models=2,
        row="constant_ratio",
        style=Style("Mean shrunk by one t", "mean, one t", "orange", "P"),
    ),
    MergeMethod(
        name="mean", function="uniform_mean", command="uniform", aliases=("mean", "average"),
        convex=True,
        row="mean", periodic="periodic_mean",
        style=Style("Mean of {n} replicas", "mean of {n}", "sky", "D"),
        description="the plain mean of the fine-tunes",
    ),
    MergeMethod(
        name="linear", command="linear", aliases=("weighted",), options=("weights", "normalize"),
        mergekit="linear", mergekit_keys=("weight", "normalize"),
        row="linear",
        style=Style("Weighted mean of {n} replicas", "weighted mean of {n}", "sky", "s"),
        description="a weighted mean of the fine-tunes",
    ),
    MergeMethod(
        name="wise_ft", function="wise_ft", command="wise-ft", aliases=("wiseft",),
        options=("alpha",), convex=True,
        row="wise_ft",
        style=Style("WiSE-FT of {of}, α = {alpha:g}", "WiSE-FT", "grey", "."),
        description="[WiSE-FT](https://arxiv.org/abs/2109.01903)",
    ),
    MergeMethod(
        name="task_arithmetic", function="task_arithmetic", command="task-arithmetic",
        options=("weights", "scale", "normalize"),
        mergekit="task_arithmetic", mergekit_keys=("weight", "lambda", "normalize", "int8_mask"),
        row="task_arithmetic",
        style=Style("Task arithmetic", "task arithmetic", "blue", "s"),
        description="[task arithmetic](https://arxiv.org/abs/2212.04089)",
    ),
    MergeMethod(
        name="ties", function="ties", command="ties", aliases=("ties-merging",),
        options=("weights", "scale", "density", "normalize"),
        mergekit="ties", mergekit_keys=("weight", "density", "lambda", "normalize", "int8_mask"),
        row="ties",
        style=Style("TIES", "TIES", "green", "s"),
        description="[TIES](https://arxiv.org/abs/2306.01708)",
    ),
    MergeMethod(
        name="slerp", function="slerp", command="slerp", max_models=2, options=("t",),
        mergekit="slerp", mergekit_keys=("t",),
        row="slerp",
        style=Style("SLERP", "SLERP", "orange", "s"),
        description="spherical interpolation",
    ),
)  # fmt: skip

METHODS = {method.name: method for method in _ALL}
FUNCTIONS = {method.function: method for method in _ALL if method.function}
COMMANDS = {method.command: method for method in _ALL if method.command}
RECIPES = {method.mergekit: method for method in _ALL if method.mergekit}
# Every spelling that the command line takes -> its own.
SPELLINGS = {
    spelling.replace("_", "-"): command
    for command, method in COMMANDS.items()
    for spelling in (command, method.function, method.mergekit, *method.aliases)
    if spelling
}
# Every row that a results table names; those that are no merge after training come first.
ROWS = {
    "zero_shot": Style("Zero-shot (the anchor)", "zero-shot", "black", "s"),
    "random_head": Style("Random head (the anchor)", "random head", "black", "x"),
    "probed": Style("Linear probe (the anchor)", "probed", "black", "d"),
    "replica": Style("One replica", "one replica", "grey", "o"),
    # One replica of a run whose objective or projection is another (docs/methods.md).
    "linear_probe": Style("Linear probe", "linear probe", "black", "d"),
    "lp_ft": Style("LP-FT", "LP-FT", "orange", "h"),
    "car_ft": Style("CAR-FT", "CAR-FT", "green", "p"),
    "flyp": Style("FLYP", "FLYP", "purple", "H"),
    "l2_sp": Style("L2-SP", "L2-SP", "sky", ">"),
    "bitfit": Style("BitFit", "BitFit", "blue", "8"),
    "ftp": Style("FTP", "FTP", "vermilion", "P"),
    "tpgm": Style("TPGM", "TPGM", "orange", "<"),
    "decay_to_pretrained": Style(
        "Decoupled decay to the anchor", "decay\nto the anchor", "grey", "v"
    ),
    "periodic": Style("Model Stock, periodic", "Model Stock,\nperiodic", "blue", "^"),
    "periodic_mean": Style("Mean, periodic (t = 1)", "mean, periodic", "sky", "<"),
    **{method.row: method.style for method in _ALL},
}
