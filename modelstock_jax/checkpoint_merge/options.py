"""Options of a merge. Invalid values raise an error before any file is opened."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from modelstock_jax.errors import UserError, suggest
from modelstock_jax.machine import usable_cores
from modelstock_jax.merging.units import UNITS
from modelstock_jax.registry import COMMANDS, RENAMED_COMMANDS, SPELLINGS

DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "f16": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
}
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
VOCAB_MISMATCH = ("error", "base", "longest")
TIED_HEAD = ("keep", "untie")
MISSING_TENSORS = ("error", "base")
HEAD = ("error", "finetuned")
ANCHOR_ROUNDING = ("keep", "correct")
DENSITY_ROUNDING = ("nearest", "down")
CHECKSUMS = ("crc32", "sha256")
# Values that earlier versions of the command had -> values now.
RENAMED_VALUES = {"refuse": "error"}

PerTensor = float | Mapping[str, float]
PerModel = tuple[float, ...] | Mapping[str, tuple[float, ...]]

# Methods whose result is the base plus a sum of complete task vectors.
_OF_ADAPTERS = (
    "model_stock",
    "weighted_model_stock",
    "uniform_mean",
    "linear",
    "wise_ft",
    "task_arithmetic",
)
# Options that have no effect on an adapter -> why, and what to do.
_NOT_OF_ADAPTERS = {
    "unmerged_from": "tensors that are not merged are left out, so they are those of the base; "
    "remove it",
    "vocab_mismatch": "embeddings must have equal shapes; remove it, or remove --as-adapter to "
    "write a complete model",
    "missing_tensors": "an adapter without a tensor does not change it; remove it",
    "tied_head": "an adapter has no config.json; remove it, or remove --as-adapter to write a "
    "complete model",
    "anchor_rounding": "updates of adapters do not contain the base's rounding; remove it",
    "max_shard_bytes": "an adapter is one file; remove it",
    "chat_template": "the tokenizer files of an adapter are copied as they are; remove it",
}
# Options whose values belong to the method.
METHOD_OPTIONS = ("weights", "normalize", "alpha", "scale", "density", "t", "seed")
_UNIT_INTERVAL = (lambda x: 0 <= x <= 1, "in [0, 1]")
_POSITIVE = (lambda x: 0 < x < math.inf, "above 0")
_NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or above")
_FINITE = (math.isfinite, "a finite number")
_VALID: dict[str, tuple[Callable[[float], bool], str]] = {
    "alpha": _UNIT_INTERVAL,
    "beta": _FINITE,
    "density": _UNIT_INTERVAL,
    "gamma": _UNIT_INTERVAL,
    "select_topk": _UNIT_INTERVAL,
    "t": _NOT_NEGATIVE,
    "epsilon": _NOT_NEGATIVE,
    "r": _NOT_NEGATIVE,
    "tol": _POSITIVE,
    "max_iter": (lambda x: 1 <= x < math.inf and x == int(x), "an integer, 1 or above"),
    "weights": _FINITE,
    "scale": _FINITE,
}
_MODEL = r"base|model:[1-9]\d*"


def method_name(name: str) -> str:
    """Return a method's name in `registry.COMMANDS`, from any spelling of it.

    Raises:
      UserError: the name is unknown, or an earlier version's

    Example:
      >>> method_name("model-stock"), method_name("task_arithmetic"), method_name("Ties")
      ('model_stock', 'task_arithmetic', 'ties')
    """
    spelling = str(name).lower().replace("-", "_")
    if spelling in RENAMED_COMMANDS:
        raise UserError(f"{name!r} is now {COMMANDS[RENAMED_COMMANDS[spelling]].command!r}")
    if spelling not in SPELLINGS:
        raise UserError(invalid_choice(name, [method.command for method in COMMANDS.values()]))
    return SPELLINGS[spelling]


def dtype_name(name: str | None) -> str | None:
    """Return a dtype's name in `DTYPES`, from any spelling of it.

    Example:
      >>> dtype_name("bf16"), dtype_name("torch.float16"), dtype_name(None)
      ('bfloat16', 'float16', None)
    """
    if name is None:
        return None
    spelling = str(name).lower().removeprefix("torch.").removeprefix("jnp.")
    return DTYPE_ALIASES.get(spelling, spelling)


def model_index(choice: str | None) -> int:
    """Return the index of the model that `base` or `model:1` names; 0 is the base.

    Example:
      >>> model_index("base"), model_index("model:2"), model_index(None)
      (0, 2, 0)
    """
    return int((choice or "base").partition(":")[2] or 0)


def invalid_choice(value: object, choices: Iterable[str]) -> str:
    """Return the error for a value that is not one of the choices.

    Example:
      >>> invalid_choice("tensors", ["tensor", "layer"])
      "'tensors' is not valid; choose one of tensor, layer (did you mean 'tensor'?)"
    """
    choices = list(choices)
    if (renamed := RENAMED_VALUES.get(str(value))) in choices:
        return f"{value!r} is now {renamed!r}"
    return f"{value!r} is not valid; choose one of {', '.join(choices)}{suggest(value, choices)}"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a merge, without the models.

    Attributes:
      method: one of `registry.COMMANDS`
      unit: elements that share one angle: tensor, layer, filter, head, block or global
      num_heads: query heads, for `unit="head"` only: a number, or name prefix -> number
      dtype: dtype of the merged floating-point tensors, one of `DTYPES`; with None each tensor
        has the base's
      include: shell patterns (`model.layers.*`); only tensors that match one are merged
      exclude: shell patterns; tensors that match one are not merged
      unmerged_from: values of tensors that are not merged: `base`, `mean` or `model:1` (the first
        fine-tune)
      vocab_mismatch: if embeddings have different numbers of rows: `error`; `base` (merge the rows
        in common, with the base's number of rows and the remaining rows from the base) or `longest`
        (merge the rows in common; the remaining rows and the config come from the model with the
        most rows)
      tied_head: if one model ties its head to its embedding and another trained a separate head:
        `keep` is an error unless the two are equal; `untie` merges the head as a separate tensor
      missing_tensors: tensors that some models lack: `error`, or `base` (the base's tensor,
        unmerged; tensors that only fine-tunes have are dropped)
      weights: one per fine-tune, for methods that weight models; 1 each by default
      normalize: whether weights are divided by their sum; None for the method's default
      alpha: ratio of wise_ft; of the first layer of lines; limit of ramplus_tl; in [0, 1]
      scale: lambda of the methods that add task vectors; factor of passthrough
      density: fraction of each task vector that remains, in [0, 1]: one value, or one per fine-tune
      density_rounding: how ties rounds density x number of elements to the number that it keeps:
        `nearest`, or `down` as mergekit does (set by its recipes)
      t: position of slerp, in [0, 1]; largest change of nearswap
      seed: seed of the methods that choose elements at random
      parameters: further parameters of the method, by the names in the registry
      head: if the classifier of the fine-tunes differs from the base's, or the base has none:
        `error`, or `finetuned` (the mean of the fine-tunes' classifiers, which have no common
        anchor, and the labels of their config; a classifier that only the base has is dropped)
      dequantize: read quantized models as codes x scale; otherwise they are an error
      config_from: model whose config.json is written if the configs disagree: `base` or `model:1`;
        with None a disagreement is an error
      tokenizer_from: model whose tokenizer files, special tokens, chat template and generation
        settings are written; None for the base, or for the model that supplies the rows of a longer
        vocabulary
      chat_template: Jinja template that is written; None for that of the tokenizer
      anchor_rounding: `correct` subtracts the expected energy of the base's own rounding from the
        Gram matrix if the base is stored at lower precision than the fine-tunes; `keep` does not
      as_adapter: the fine-tunes are LoRA adapters and are merged into one adapter
      rank: maximum rank of the update of each tensor of that adapter; None for the sum of the ranks
      checksum: kind of checksum of inputs and outputs in the report and the model card: `crc32`, or
        the slower `sha256`. A file that the hub names by its SHA-256 always gets that
      max_shard_bytes: maximum bytes of tensors in a file; a larger tensor gets a separate file
      threads: number of worker threads; None for one per core
      window_bytes: a unit with at most this many bytes per worker is merged by one worker, which
        caches the values that it computes from an adapter from the first pass to the second

    The numbers of the method (weights to parameters) may differ by tensor: a mapping from a
    tensor's name in the base to its value.

    Raises:
      UserError: a value is not valid, or the method does not use the option

    Example:
      >>> Options(method="wise_ft", alpha=0.5).alpha
      0.5
    """

    method: str = "model_stock"
    unit: str = "tensor"
    num_heads: int | Mapping[str, int] | None = None
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    unmerged_from: str = "base"
    vocab_mismatch: str = "error"
    tied_head: str = "keep"
    missing_tensors: str = "error"
    weights: PerModel | None = None
    normalize: bool | None = None
    alpha: PerTensor | None = None
    scale: PerTensor | None = None
    density: PerTensor | PerModel | None = None
    density_rounding: str = "nearest"
    t: PerTensor | None = None
    seed: int | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str = "error"
    dequantize: bool = False
    config_from: str | None = None
    tokenizer_from: str | None = None
    chat_template: str | None = None
    anchor_rounding: str = "keep"
    as_adapter: bool = False
    rank: int | None = None
    checksum: str = "crc32"
    max_shard_bytes: int = 5 * 10**9
    threads: int | None = None
    window_bytes: int = 256 * 2**20

    def __post_init__(self):
        try:
            object.__setattr__(self, "method", method_name(self.method))
        except UserError as error:
            raise UserError(f"--method: {error}") from None
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name, choices in (
            ("unit", UNITS),
            ("vocab_mismatch", VOCAB_MISMATCH),
            ("tied_head", TIED_HEAD),
            ("missing_tensors", MISSING_TENSORS),
            ("dtype", (None, *DTYPES)),
            ("checksum", CHECKSUMS),
            ("head", HEAD),
            ("anchor_rounding", ANCHOR_ROUNDING),
            ("density_rounding", DENSITY_ROUNDING),
        ):
            if (value := getattr(self, name)) not in choices:
                shown = invalid_choice(value, [x for x in choices if x is not None])
                raise UserError(f"{_flag(name)}: {shown}")
        self._check_values()
        self._check_models()
        self._check_adapter()

    @property
    def num_threads(self) -> int:
        """Number of worker threads."""
        return usable_cores() if self.threads is None else self.threads

    @property
    def differs_by_tensor(self) -> bool:
        """Whether a number of the method differs by tensor."""
        numbers = [getattr(self, name) for name in METHOD_OPTIONS]
        return any(isinstance(x, Mapping) for x in (*numbers, *self.parameters.values()))

    def value(self, name: str, tensor: str) -> Any:
        """Return an option or a parameter of the method for one tensor, or its default.

        Args:
          name: name of the option or of the parameter
          tensor: name of the tensor in the base

        Example:
          >>> Options(method="slerp", t={"a": 0.1, "b": 0.2}).value("t", "b")
          0.2
          >>> Options(method="breadcrumbs").value("gamma", "a")
          0.01
        """
        if name in METHOD_OPTIONS:
            value = getattr(self, name)
        else:
            value = self.parameters.get(name, COMMANDS[self.method].parameters[name])
        return value[tensor] if isinstance(value, Mapping) else value

    def _check_values(self) -> None:
        method = COMMANDS[self.method]
        for name in METHOD_OPTIONS:
            if getattr(self, name) is not None and name not in method.options:
                users = [m.command for m in COMMANDS.values() if name in m.options]
                raise UserError(
                    f"--{name} does not apply to --method {method.command}; remove it (it applies "
                    f"to {', '.join(users)})"
                )
        for name in method.required:
            if getattr(self, name) is None:
                raise UserError(
                    f"--method {method.command} requires --{name}, a number in [0, 1]; for "
                    f"example --{name} 0.5"
                )
        self._check_parameters()
        if method.of_weights:
            self._check_each("t", self.t, *_UNIT_INTERVAL)
        for name in ("weights", "alpha", "scale", "density", "t"):
            self._check_each(name, getattr(self, name), *_VALID[name])
        if self.density is not None and not any(_numbers(self.density)):
            raise UserError("--density: must be in (0, 1], not 0, which would leave the base")
        for name in ("max_shard_bytes", "threads", "window_bytes"):
            self._check_each(name, getattr(self, name), lambda x: x >= 1, "at least 1")
        self._check_unit()

    def _check_parameters(self) -> None:
        """Check the further parameters of the method."""
        defaults = COMMANDS[self.method].parameters
        for name, value in self.parameters.items():
            if name not in defaults:
                known = f"it has {', '.join(defaults)}" if defaults else "it has none"
                raise UserError(
                    f"--parameter {name}: --method {COMMANDS[self.method].command} has no such "
                    f"parameter; {known}{suggest(name, defaults)}"
                )
            is_of_models = name == "gamma" or (name == "epsilon" and "della" in self.method)
            if isinstance(value, tuple) and not is_of_models:
                raise UserError(f"--parameter {name}: must be one value, not {value!r}")
            if isinstance(defaults[name], bool):
                if wrong := [x for x in _numbers(value) if not isinstance(x, bool)]:
                    raise UserError(f"--parameter {name}: must be true or false, not {wrong[0]!r}")
            else:
                self._check_each(name, value, *_VALID[name])

    def _check_unit(self) -> None:
        if self.num_heads is not None and self.unit != "head":
            raise UserError(
                "--num-heads applies to --unit head only; remove it, or pass --unit head"
            )
        if self.differs_by_tensor and self.unit != "tensor":
            raise UserError(
                f"values that differ by layer or filter require --unit tensor, not {self.unit}"
            )
        if COMMANDS[self.method].of_matrices and self.unit != "tensor":
            raise UserError(
                f"--method {COMMANDS[self.method].command} treats each matrix by itself; use "
                f"--unit tensor, not {self.unit}"
            )
        if self.method in ("della", "della_linear"):
            self._check_epsilon()

    def _check_epsilon(self) -> None:
        """Check that each element of DELLA remains with a probability in (0, 1)."""
        given = (self.density, self.parameters.get("epsilon"))
        for tensor in {x for value in given if isinstance(value, Mapping) for x in value} or {""}:
            density = self.value("density", tensor)
            values = ([*_numbers(x)] for x in (density, self.value("epsilon", tensor)))
            for d, epsilon in _pairs(*values):
                if d is not None and 0 < d < 1 and not 0 < d - epsilon <= d + epsilon < 1:
                    raise UserError(
                        f"--parameter epsilon: --density {d:g} minus and plus epsilon {epsilon:g} "
                        "must be in (0, 1); choose a smaller epsilon"
                    )

    def _check_models(self) -> None:
        for name, pattern, choices in (
            ("unmerged_from", rf"mean|{_MODEL}", "base, mean or model:1"),
            ("config_from", _MODEL, "base or model:1"),
            ("tokenizer_from", _MODEL, "base or model:1"),
        ):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                raise UserError(
                    f"{_flag(name)}: must be {choices} (the first fine-tune), model:2, ..., not "
                    f"{value!r}"
                )
        if self.anchor_rounding == "correct" and not COMMANDS[self.method].rule:
            rules = [method.command for method in COMMANDS.values() if method.rule]
            raise UserError(
                "--anchor-rounding correct requires a method that measures angles: --method "
                f"{' or '.join(rules)}"
            )

    def _check_adapter(self) -> None:
        """Check the options of a merge of adapters into an adapter."""
        if not self.as_adapter:
            if self.rank is not None:
                raise UserError("--rank applies to --as-adapter only; remove it")
            return
        if self.method not in _OF_ADAPTERS:
            known = ", ".join(COMMANDS[name].command for name in _OF_ADAPTERS)
            raise UserError(
                f"--as-adapter does not apply to --method {COMMANDS[self.method].command}, whose "
                f"result is no sum of the adapters' updates; choose one of {known}, or remove "
                "--as-adapter to write a complete model"
            )
        self._check_each("rank", self.rank, lambda x: x >= 1, "at least 1")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name, advice in _NOT_OF_ADAPTERS.items():
            if getattr(self, name) != default[name]:
                raise UserError(f"{_flag(name)} does not apply to --as-adapter: {advice}")
        for name in ("config_from", "tokenizer_from"):
            if getattr(self, name) == "base":
                raise UserError(
                    f"{_flag(name)} base does not apply to --as-adapter; choose an adapter: model:1"
                )

    def _check_each(
        self, name: str, value: Any, is_valid: Callable[[float], bool], rule: str
    ) -> None:
        for x in _numbers(value):
            if x is not None and (isinstance(x, bool | str) or not is_valid(x)):
                raise UserError(f"{_flag(name)}: must be {rule}, not {x!r}")


def _numbers(value: Any) -> Iterable[Any]:
    """Yield each number of a value: of each tensor and of each model."""
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, str) or not isinstance(value, Iterable):
        yield value
        return
    for x in value:
        yield from _numbers(x)


def _pairs(first: list, second: list) -> Iterable[tuple]:
    """Return the pairs of each model; a list of one number is for all models."""
    number = max(len(first), len(second))
    return zip(*(x * number if len(x) == 1 else x for x in (first, second)), strict=False)


def _flag(name: str) -> str:
    special = {"max_shard_bytes": "--max-shard-size"}
    special |= {name: name for name in ("window_bytes", "density_rounding")}  # not flags
    special |= {name: f"--parameter {name}" for name in set(_VALID) - set(METHOD_OPTIONS)}
    return special.get(name, f"--{name.replace('_', '-')}")
