"""Read LoRA adapters in PEFT's format: the tensors that they change, and their updates."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HOW_TO_FIX = "merge it with PEFT's merge_and_unload() and pass the saved model instead"

# Options that, if set, make the adapter more than W + s B A.
_NOT_PLAIN_LORA = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
)
# Initializations that also change the base weights, so B A alone is not the complete update.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_TYPES = {
    "base_model_name_or_path": (str, "a name"),
    "task_type": (str, "a name"),
    "rank_pattern": (dict, "names and values"),
    "alpha_pattern": (dict, "names and values"),
    "modules_to_save": (list, "a list of names"),
}
_BIASES = ("none", "all", "lora_only")
_MAX_FLOAT64 = float(np.finfo(np.float64).max)
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_embedding_|lora_)(?P<side>[AB])(?:\.weight)?")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.|$)")
_UNTRAINED = re.compile(r"\.original_module(?=\.|$)")


class Factors(NamedTuple):
    """The names of the two factors of a tensor's update, and how to combine them."""

    a: str  # of A, [r, in]
    b: str  # of B, [out, r]
    scale: float
    transposed: bool  # the tensor is stored as [in, out]


class Adapter:
    """A directory with `adapter_config.json` and `adapter_model.safetensors`.

    A changed tensor is W + s B A with s = alpha / r (alpha / sqrt(r) for rslora). Tensors that the
    adapter stores in full (`modules_to_save`, biases, a resized embedding) replace those of the
    base.

    Args:
      directory: as PEFT's `save_pretrained` writes it

    Attributes:
      base: the model that the adapter was trained on, as its config names it; may be empty
      config: content of `adapter_config.json`
      files: the stored tensors
      factors: name of a tensor -> the factors of its update
      replacements: name of a tensor -> name of the stored tensor that replaces it

    Raises:
      UserError: the adapter is not plain LoRA on matrices, or its files are pickled or invalid
    """

    def __init__(self, directory: Path):
        self.directory = directory
        config = read_json(directory / CONFIG)
        if not isinstance(config, dict):
            raise UserError(f"{directory / CONFIG}: not a JSON object")
        _check(config, directory)
        if not (directory / WEIGHTS).is_file():
            raise UserError(
                f"{directory}: no {WEIGHTS} (a pickled adapter_model.bin is not supported); save "
                "the adapter again with safe_serialization=True"
            )
        self.base: str = config.get("base_model_name_or_path") or ""
        self.config: dict[str, Any] = config
        self.files = TensorFiles(directory / WEIGHTS)
        self.factors: dict[str, Factors] = {}
        self.replacements: dict[str, str] = {}
        self._sort_tensors(config)
        # Two tensors may be processed at the same time, each chunk by chunk.
        self._load = functools.lru_cache(maxsize=2)(self._load_factors)

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors to the names of the base.

        Args:
          names: name in the adapter -> name in the base
        """
        self.factors = {names.get(name, name): value for name, value in self.factors.items()}
        self.replacements = {
            names.get(name, name): stored for name, stored in self.replacements.items()
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that has an update."""
        factors = self.factors[name]
        shape = (self.files.shape(factors.b)[0], self.files.shape(factors.a)[1])
        return shape[::-1] if factors.transposed else shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that the adapter changes or replaces, by name."""
        replaced = {name: self.files.shape(stored) for name, stored in self.replacements.items()}
        return replaced | {name: self.shape(name) for name in self.factors}

    def delta(self, name: str, start: int, stop: int) -> np.ndarray:
        """Compute elements [start, stop) of the update s B A, flattened as the tensor is stored.

        Only the rows of the range are computed, in float64.

        Returns:
          [stop - start], float64
        """
        left, right = self._load(name)
        columns = right.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = left[first:last].astype(np.float64) * self.factors[name].scale
        if last - first == 1:  # Part of one row: compute only its columns.
            begin = start - first * columns
            return (rows @ right[:, begin : begin + stop - start].astype(np.float64))[0]
        product = rows @ right.astype(np.float64)
        return product.reshape(-1)[start - first * columns : stop - first * columns]

    def _load_factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors [rows, r] and [r, columns] of the tensor as it is stored."""
        factors = self.factors[name]
        a, b = self.files[factors.a], self.files[factors.b]
        return (a.T, b.T) if factors.transposed else (b, a)

    def _sort_tensors(self, config: Mapping[str, Any]) -> None:
        sides: dict[str, dict[str, str]] = {}
        kinds: dict[str, str] = {}
        for stored in self.files:
            if _UNTRAINED.search(stored):
                continue  # The tensor of the base, stored next to its trained replacement.
            name = _WRAPPER.sub("", stored.removeprefix(PREFIX))
            match = _FACTOR.fullmatch(name)
            if match:
                sides.setdefault(match["module"], {})[match["side"]] = stored
                kinds[match["module"]] = match["kind"]
            elif "lora_" in name or not stored.startswith(PREFIX):
                raise UserError(
                    f"{self.directory}: {stored!r} is not a tensor of plain LoRA; {HOW_TO_FIX}"
                )
            else:
                self.replacements[name] = stored
        for module, pair in sides.items():
            if len(pair) != 2:
                raise UserError(f"{self.directory}: {module!r} has only lora_{min(pair)}")
            embedding = kinds[module] == "lora_embedding_"
            shapes = [self.files.shape(pair[side]) for side in "AB"]
            self._check_shapes(module, *shapes)
            self.factors[f"{module}.weight"] = Factors(
                pair["A"],
                pair["B"],
                self._scale(module, shapes[0][0], config),
                embedding or bool(config.get("fan_in_fan_out")),
            )
        if not self.factors and not self.replacements:
            raise UserError(f"{self.directory / WEIGHTS}: contains no tensors")

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        if len(a) != 2 or len(b) != 2:
            raise UserError(
                f"{self.directory}: {module!r} is LoRA on a convolution (A is {list(a)}), which is "
                f"not supported; {HOW_TO_FIX}"
            )
        if not a[0]:
            raise UserError(f"{self.directory}: {module!r} has rank 0")
        if a[0] != b[1]:
            raise UserError(
                f"{self.directory}: {module!r}: the ranks of A {list(a)} and B {list(b)} differ"
            )

    def _scale(self, module: str, rank: int, config: Mapping[str, Any]) -> float:
        try:
            config_rank = _match_pattern(config.get("rank_pattern"), module, config.get("r"))
            alpha = _match_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        except re.error as error:
            raise UserError(
                f"{self.directory / CONFIG}: a key of rank_pattern or alpha_pattern is not a "
                f"regular expression ({error.msg})"
            ) from None
        if config_rank != rank:
            raise UserError(
                f"{self.directory}: {module!r} has rank {rank}, but {config_rank!r} in {CONFIG}; "
                "the two files do not belong to one adapter"
            )
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        # JSON can contain NaN and integers beyond float64.
        if not number or not abs(alpha) <= _MAX_FLOAT64:
            raise UserError(f"{self.directory / CONFIG}: lora_alpha is {alpha!r}, not a number")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def module_of(stored: str) -> str:
    """Return the module of a stored factor, as PEFT names it.

    Example:
      >>> module_of("base_model.model.layers.0.q_proj.lora_A.weight")
      'layers.0.q_proj'
    """
    match = _FACTOR.fullmatch(_WRAPPER.sub("", stored.removeprefix(PREFIX)))
    assert match is not None, f"{stored} is no factor"
    return match["module"]


def is_adapter(directory: Path) -> bool:
    """Return whether a directory contains an adapter and no complete model.

    Example:
      >>> is_adapter(Path("/nowhere"))
      False
    """
    return (directory / CONFIG).is_file() and not any(directory.glob("model*.safetensors"))


def _check(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{directory}: peft_type is {kind!r}; only LORA is supported; {HOW_TO_FIX}")
    if used := [key for key in _NOT_PLAIN_LORA if config.get(key)]:
        raise UserError(f"{directory}: {used[0]} is not supported; {HOW_TO_FIX}")
    for key, (kind, what) in _TYPES.items():
        if config.get(key) and not isinstance(config[key], kind):
            raise UserError(f"{directory / CONFIG}: {key} is {config[key]!r}, not {what}")
    if config.get("bias", "none") not in (None, *_BIASES):
        raise UserError(
            f"{directory / CONFIG}: bias is {config['bias']!r}, not one of {', '.join(_BIASES)}"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"{directory}: init_lora_weights {init!r} also changed the base weights, and the "
            "adapter does not contain that change; save it with "
            f"path_initial_model_for_weight_conversion, or {HOW_TO_FIX}"
        )


def _match_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
