"""Merge methods: names, options, labels and colors, one entry per method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PAPER = (
    "[Model Stock: All we need is just a few fine-tuned models](https://arxiv.org/abs/2403.19522)"
)


class Style(NamedTuple):
    """Label and plot style of a row of results, or of another point of figures.

    Attributes:
      label: row label in tables; may contain {n}, {of} and {alpha}
      short: label next to the marker in a figure; may contain {n}
      color: key of `reporting.style.COLORS`
      marker: Matplotlib marker; `reporting.style.mark` draws it
    """

    label: str
    short: str
    color: str
    marker: str


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """One merge method.

    Attributes:
      name: the name in the library, in `merge.method`, in results and in studies; the command line
        uses `-` for `_`
      style: style of its row in results
      periodic: style of the row of a run that merges by it during training; None if unsupported
      module: module of `merging` that defines the function; empty if only the command line
        supports the method
      on_command_line: whether `modelstock merge --method` supports it
      aliases: spellings of other tools that the command line also accepts
      rule: function of `merging.rules` that computes the coefficients from only the Gram matrix
        and `is_scalar`; empty if `checkpoint_merge.methods` defines it
      min_models: minimum number of fine-tuned models
      max_models: maximum number on the command line; None for any number
      needs_base: whether a file merge needs a base; without one, weights are merged directly
      options: command-line options that it reads, of weights, normalize, alpha, scale, density,
        t and seed
      required: those of them that have no default
      normalize: default of the option `normalize`
      parameters: further parameters of a file merge -> default; None if it depends on others
      elementwise: whether a file merge treats each element by itself, so that the merged weights
        are no sum of complete task vectors
      by_row: whether that needs complete rows of a tensor
      of_matrices: whether it needs the complete matrix of each tensor
      of_weights: whether a file merge measures angles between weights, which are small, instead of
        angles between task vectors
      has_ratio: whether the merged weights are w0 + t mean(d), with one t for a merge unit
      convex: whether every merged value is within the range of the inputs, so that nothing
        overflows and variances stay positive
      mergekit: name in recipes of mergekit; empty if mergekit does not support it
      mergekit_keys: parameters of such a recipe that are read
      description: name in the model card of a merged checkpoint
    """

    name: str
    style: Style
    periodic: Style | None = None
    module: str = "baselines"
    on_command_line: bool = True
    aliases: tuple[str, ...] = ()
    rule: str = ""
    min_models: int = 1
    max_models: int | None = None
    needs_base: bool = True
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    normalize: bool = False
    parameters: Mapping[str, float | bool | None] = field(default_factory=dict)
    elementwise: bool = False
    by_row: bool = False
    of_matrices: bool = False
    of_weights: bool = False
    has_ratio: bool = False
    convex: bool = False
    mergekit: str = ""
    mergekit_keys: tuple[str, ...] = ()
    description: str = ""

    @property
    def command(self) -> str:
        """Name on the command line."""
        return self.name.replace("_", "-")

    @property
    def periodic_row(self) -> str:
        """Row of a run that merges by this method during training."""
        return f"periodic_{self.name}"


_SPARSE_OPTIONS = ("weights", "scale", "density", "normalize")
_SPARSE_KEYS = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask")
_DARE = "[DARE](https://arxiv.org/abs/2311.03099)"
_BREADCRUMBS = "[Model Breadcrumbs](https://arxiv.org/abs/2312.06795)"
_DELLA = "[DELLA](https://arxiv.org/abs/2406.11617)"
_RAM = "https://arxiv.org/abs/2601.13572"
_ELECTED = ", with the elected signs of [TIES](https://arxiv.org/abs/2306.01708)"

_ALL = (
    MergeMethod(
        name="model_stock", module="stock", rule="equation_3", min_models=2, convex=True,
        has_ratio=True, mergekit="model_stock", mergekit_keys=("filter_wise",),
        style=Style("Model Stock, after training", "Model Stock,\nafter training",
                    "vermilion", "*"),
        periodic=Style("Model Stock, periodic", "Model Stock,\nperiodic", "blue", "^"),
        description=f"Model Stock ({PAPER})",
    ),
    MergeMethod(
        name="weighted_model_stock", module="stock", rule="noise_weights", min_models=2,
        convex=True, has_ratio=True,
        style=Style("Model Stock, weighted (extension)", "weighted\n(extension)", "purple", "X"),
        description=f"Model Stock ({PAPER}), each fine-tuned model weighted by its own noise",
    ),
    MergeMethod(
        name="model_stock_carried", module="stock", on_command_line=False, min_models=2,
        style=Style("Model Stock, periodic, noise carried (extension)",
                    "Model Stock,\nnoise carried\n(extension)", "green", "v"),
    ),
    MergeMethod(
        name="constant_ratio", on_command_line=False, min_models=2,
        style=Style("Mean with one global ratio", "mean, one\nglobal ratio", "orange", "P"),
    ),
    MergeMethod(
        name="uniform_mean", aliases=("mean", "average"), convex=True, needs_base=False,
        has_ratio=True,
        style=Style("Uniform mean of {n} replicas", "mean of {n}", "sky", "D"),
        periodic=Style("Uniform mean, periodic (t = 1)", "mean, periodic", "sky", "<"),
        description="the uniform mean of the fine-tuned models",
    ),
    MergeMethod(
        name="linear", module="", options=("weights", "normalize"), normalize=True,
        needs_base=False, has_ratio=True,
        mergekit="linear", mergekit_keys=("weight", "normalize"),
        style=Style("Weighted mean of {n} replicas", "weighted mean of {n}", "sky", "s"),
        description="a weighted mean of the fine-tuned models",
    ),
    MergeMethod(
        name="wise_ft", aliases=("wiseft",), options=("alpha",), required=("alpha",), convex=True,
        has_ratio=True,
        style=Style("WiSE-FT of {of}, α = {alpha:g}", "WiSE-FT", "gray", "."),
        description="[WiSE-FT](https://arxiv.org/abs/2109.01903)",
    ),
    MergeMethod(
        name="task_arithmetic", options=("weights", "scale", "normalize"),
        mergekit="task_arithmetic", mergekit_keys=("weight", "lambda", "normalize", "int8_mask"),
        style=Style("Task arithmetic", "task arithmetic", "blue", "s"),
        description="[task arithmetic](https://arxiv.org/abs/2212.04089)",
    ),
    MergeMethod(
        name="ties", aliases=("ties-merging",), options=_SPARSE_OPTIONS, normalize=True,
        parameters={"rescale": False}, elementwise=True,
        mergekit="ties", mergekit_keys=_SPARSE_KEYS,
        style=Style("TIES", "TIES", "green", "s"),
        description="[TIES](https://arxiv.org/abs/2306.01708)",
    ),
    MergeMethod(
        name="dare_linear", module="dare", options=(*_SPARSE_OPTIONS, "seed"),
        parameters={"rescale": True}, elementwise=True,
        mergekit="dare_linear", mergekit_keys=_SPARSE_KEYS,
        style=Style("DARE", "DARE", "purple", "s"), description=_DARE,
    ),
    MergeMethod(
        name="dare_ties", module="dare", options=(*_SPARSE_OPTIONS, "seed"),
        parameters={"rescale": True}, elementwise=True,
        mergekit="dare_ties", mergekit_keys=_SPARSE_KEYS,
        style=Style("DARE, TIES", "DARE, TIES", "purple", "d"), description=f"{_DARE}{_ELECTED}",
    ),
    MergeMethod(
        name="breadcrumbs", module="", options=_SPARSE_OPTIONS,
        parameters={"gamma": 0.01, "rescale": False}, elementwise=True,
        mergekit="breadcrumbs", mergekit_keys=(*_SPARSE_KEYS, "gamma"),
        style=Style("Breadcrumbs", "breadcrumbs", "vermilion", "s"), description=_BREADCRUMBS,
    ),
    MergeMethod(
        name="breadcrumbs_ties", module="", options=_SPARSE_OPTIONS,
        parameters={"gamma": 0.01, "rescale": False}, elementwise=True,
        mergekit="breadcrumbs_ties", mergekit_keys=(*_SPARSE_KEYS, "gamma"),
        style=Style("Breadcrumbs, TIES", "breadcrumbs,\nTIES", "vermilion", "d"),
        description=f"{_BREADCRUMBS}{_ELECTED}",
    ),
    MergeMethod(
        name="della", module="", options=(*_SPARSE_OPTIONS, "seed"), normalize=True,
        parameters={"epsilon": 0.15, "rescale": True}, elementwise=True, by_row=True,
        mergekit="della", mergekit_keys=(*_SPARSE_KEYS, "epsilon"),
        style=Style("DELLA, TIES", "DELLA, TIES", "black", "H"), description=f"{_DELLA}{_ELECTED}",
    ),
    MergeMethod(
        name="della_linear", module="", options=(*_SPARSE_OPTIONS, "seed"),
        parameters={"epsilon": 0.15, "rescale": True}, elementwise=True, by_row=True,
        mergekit="della_linear", mergekit_keys=(*_SPARSE_KEYS, "epsilon"),
        style=Style("DELLA", "DELLA", "black", "h"), description=_DELLA,
    ),
    MergeMethod(
        name="sce", module="", parameters={"select_topk": 1.0}, elementwise=True,
        mergekit="sce", mergekit_keys=("select_topk", "int8_mask"),
        style=Style("SCE", "SCE", "green", "h"),
        description="[SCE](https://arxiv.org/abs/2408.07990)",
    ),
    MergeMethod(
        name="ram", module="", parameters={"epsilon": 1e-5}, elementwise=True,
        mergekit="ram", mergekit_keys=("epsilon",),
        style=Style("RAM", "RAM", "sky", "h"), description=f"[RAM]({_RAM})",
    ),
    MergeMethod(
        name="ramplus_tl", module="", options=("alpha",), elementwise=True,
        parameters={"r": 0.1, "epsilon": 1e-5},
        mergekit="ramplus_tl", mergekit_keys=("r", "alpha", "epsilon"),
        style=Style("RAM+ per tensor", "RAM+", "sky", "p"),
        description=f"[RAM+]({_RAM}) per tensor",
    ),
    MergeMethod(
        name="nearswap", module="", max_models=1, options=("t",), required=("t",),
        elementwise=True, mergekit="nearswap", mergekit_keys=("t",),
        style=Style("NearSwap", "NearSwap", "orange", "d"),
        description="[NearSwap](https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)",
    ),
    MergeMethod(
        name="arcee_fusion", module="", max_models=1, elementwise=True, by_row=True,
        mergekit="arcee_fusion",
        style=Style("Arcee Fusion", "Arcee Fusion", "gray", "d"), description="Arcee Fusion",
    ),
    MergeMethod(
        name="slerp", max_models=2, needs_base=False, options=("t",), required=("t",),
        of_weights=True, mergekit="slerp", mergekit_keys=("t",),
        style=Style("SLERP", "SLERP", "orange", "s"),
        description="spherical interpolation",
    ),
    MergeMethod(
        name="nuslerp", module="", min_models=2, max_models=2, needs_base=False,
        options=("weights",), of_weights=True, mergekit="nuslerp",
        mergekit_keys=("weight", "nuslerp_flatten", "nuslerp_row_wise"),
        style=Style("NuSLERP", "NuSLERP", "orange", "p"),
        description="spherical interpolation (NuSLERP)",
    ),
    MergeMethod(
        name="multislerp", module="", min_models=2, needs_base=False,
        options=("weights", "normalize"), normalize=True, of_weights=True,
        mergekit="multislerp", mergekit_keys=("weight", "normalize_weights", "eps"),
        style=Style("Multi-SLERP", "Multi-SLERP", "orange", "X"),
        description="the mean on a sphere (Multi-SLERP)",
    ),
    MergeMethod(
        name="karcher", module="", min_models=2, needs_base=False, of_weights=True,
        parameters={"max_iter": 10, "tol": 1e-5},
        mergekit="karcher", mergekit_keys=("max_iter", "tol"),
        style=Style("Karcher mean", "Karcher mean", "orange", "v"),
        description="the Karcher mean on a sphere",
    ),
    MergeMethod(
        name="monosoup", module="single_model", elementwise=True, of_matrices=True,
        style=Style("MonoSoup", "MonoSoup", "black", "X"),
        description="[MonoSoup](https://arxiv.org/abs/2602.09689)",
    ),
    MergeMethod(
        name="lines", module="single_model", options=("alpha",), required=("alpha",),
        has_ratio=True, parameters={"beta": None},
        style=Style("LiNeS", "LiNeS", "black", "p"),
        description="[LiNeS](https://arxiv.org/abs/2410.17146)",
    ),
    MergeMethod(
        name="passthrough", module="", max_models=1, needs_base=False, options=("scale",),
        mergekit="passthrough", mergekit_keys=("scale",),
        style=Style("Passthrough", "passthrough", "gray", "X"),
        description="copying its tensors (passthrough)",
    ),
)  # fmt: skip

METHODS = {method.name: method for method in _ALL}
FUNCTIONS = {method.name: method for method in _ALL if method.module}
COMMANDS = {method.name: method for method in _ALL if method.on_command_line}
RECIPES = {method.mergekit: method for method in _ALL if method.mergekit}
# {spelling that the command line accepts: name}
SPELLINGS = {
    spelling.replace("-", "_"): name
    for name, method in COMMANDS.items()
    for spelling in (name, method.mergekit, *method.aliases)
    if spelling
}
# {name in files of earlier versions: current name}
RENAMED_METHODS = {
    "stock": "model_stock",
    "weighted": "weighted_model_stock",
    "carried": "model_stock_carried",
    "mean": "uniform_mean",
}
RENAMED_ROWS = RENAMED_METHODS | {
    "replica": "single_model",
    "periodic": "periodic_model_stock",
    "periodic_mean": "periodic_uniform_mean",
}
# {name on the command line of earlier versions: current name}
RENAMED_COMMANDS = {
    "stock": "model_stock",
    "weighted_stock": "weighted_model_stock",
    "weighted": "linear",
    "uniform": "uniform_mean",
}
# Rows of the model as it was opened: the anchor, unless a linear probe follows.
OPENED_ROWS = ("zero_shot", "pretrained", "random_head")
# All rows of a results table, and other points of figures: each has one color and one marker in all
# figures. Rows that are not merges after training are first.
ROWS = {
    "zero_shot": Style("Zero-shot (the anchor)", "zero-shot", "black", "s"),
    "pretrained": Style("Pretrained classifier (the anchor)", "pretrained", "black", "s"),
    "random_head": Style("Random head (the anchor)", "random head", "black", "s"),
    "probed": Style("Linear probe (the anchor)", "probed", "black", "d"),
    "single_model": Style("Single fine-tuned model", "single\nfine-tuned", "gray", "o"),
    # Single models of runs with another objective or projection (docs/methods.md).
    "linear_probe": Style("Linear probe", "linear probe", "black", "d"),
    "lp_ft": Style("LP-FT", "LP-FT", "orange", "h"),
    "car_ft": Style("CAR-FT", "CAR-FT", "green", "p"),
    "flyp": Style("FLYP", "FLYP", "purple", "H"),
    "l2_sp": Style("L2-SP", "L2-SP", "sky", ">"),
    "bitfit": Style("BitFit", "BitFit", "blue", "8"),
    "ftp": Style("FTP", "FTP", "vermilion", "P"),
    "tpgm": Style("TPGM", "TPGM", "orange", "<"),
    "decay_to_pretrained": Style(
        "Decoupled decay to the anchor", "decay\nto the anchor", "gray", "v"
    ),
    **{method.periodic_row: method.periodic for method in _ALL if method.periodic},
    **{method.name: method.style for method in _ALL},
    # Drawn by the studies only.
    "model_stock_carried_last": Style(
        "Model Stock, noise carried, shrunk at the last merge (extension)",
        "noise carried,\nlast merge",
        "green",
        ">",
    ),
    "uniform_soup": Style("Uniform Model Soup", "uniform soup", "green", "P"),
    "greedy_soup": Style("Greedy Model Soup", "greedy soup", "purple", "p"),
    "center": Style("Center μ", "μ", "black", "P"),
    "noise": Style("Center + Gaussian noise", "center + noise", "purple", "."),
}
