"""LoRA adapters as PEFT saves them: which tensors they change, and by how much."""

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
WAY_OUT = "merge it once with PEFT's merge_and_unload() and give the saved model instead"

# Options that make the adapter more than W + s B A, and their values that change nothing.
_BEYOND = (
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
# Initializations that also change the base's weights, so that B A alone is not the movement.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq")
_TYPES = {"base_model_name_or_path": str, "rank_pattern": dict, "alpha_pattern": dict}
_LARGEST = float(np.finfo(np.float64).max)
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_embedding_|lora_)(?P<side>[AB])(?:\.weight)?")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.|$)")
_UNTRAINED = re.compile(r"\.original_module(?=\.|$)")


class Factors(NamedTuple):
    """Where the two factors of one tensor's movement lie, and how they make it."""

    a: str  # [r, in]
    b: str  # [out, r]
    scale: float
    transposed: bool  # the tensor is stored [in, out]


class Adapter:
    """A directory with `adapter_config.json` and `adapter_model.safetensors`.

    A changed tensor is W + s B A with s = alpha / r (alpha / sqrt(r) for rslora); tensors that
    the adapter holds whole (`modules_to_save`, biases, a resized embedding) take the base's place.

    Args:
      directory: as PEFT's `save_pretrained` writes it.

    Raises:
      UserError: an adapter that is not plain LoRA on matrices, pickled or broken files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        config = read_json(directory / CONFIG)
        if not isinstance(config, dict):
            raise UserError(f"{directory / CONFIG}: not a JSON object")
        _check(config, directory)
        if not (directory / WEIGHTS).is_file():
            raise UserError(
                f"{directory}: no {WEIGHTS} (a pickled adapter_model.bin is not read); save the "
                "adapter again with safe_serialization=True"
            )
        self.base: str = config.get("base_model_name_or_path") or ""
        self.files = TensorFiles(directory / WEIGHTS)
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, str] = {}
        self._sort_tensors(config)
        # Two tensors may be in work at once; each is asked for chunk by chunk.
        self._load = functools.lru_cache(maxsize=2)(self._load_factors)

    def rename(self, names: Mapping[str, str]) -> None:
        """Calls tensors by other names from here on, as the base does.

        Args:
          names: the adapter's name -> the base's.
        """
        self.factors = {names.get(name, name): found for name, found in self.factors.items()}
        self.whole = {names.get(name, name): found for name, found in self.whole.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that the adapter moves."""
        factors = self.factors[name]
        shape = (self.files.shape(factors.b)[0], self.files.shape(factors.a)[1])
        return shape[::-1] if factors.transposed else shape

    def delta(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of s B A, flattened as the tensor is stored.

        Only the rows asked for are formed, in float64.

        Returns:
          [stop - start], float64.
        """
        left, right = self._load(name)
        columns = right.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = left[first:last].astype(np.float64) * self.factors[name].scale
        if last - first == 1:  # A piece of one row: its columns alone.
            begin = start - first * columns
            return (rows @ right[:, begin : begin + stop - start].astype(np.float64))[0]
        product = rows @ right.astype(np.float64)
        return product.reshape(-1)[start - first * columns : stop - first * columns]

    def _load_factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The factors [rows, r] and [r, columns] of the tensor as it is stored."""
        factors = self.factors[name]
        a, b = self.files[factors.a], self.files[factors.b]
        return (a.T, b.T) if factors.transposed else (b, a)

    def _sort_tensors(self, config: Mapping[str, Any]) -> None:
        sides: dict[str, dict[str, str]] = {}
        kinds: dict[str, str] = {}
        for full in self.files:
            if _UNTRAINED.search(full):
                continue  # The base's own, next to what was trained in its place.
            name = _WRAPPER.sub("", full.removeprefix(PREFIX))
            found = _FACTOR.fullmatch(name)
            if found:
                sides.setdefault(found["module"], {})[found["side"]] = full
                kinds[found["module"]] = found["kind"]
            elif "lora_" in name or not full.startswith(PREFIX):
                raise UserError(
                    f"{self.directory}: {full!r} is not a tensor of plain LoRA; {WAY_OUT}"
                )
            else:
                self.whole[name] = full
        for module, pair in sides.items():
            if len(pair) != 2:
                raise UserError(f"{self.directory}: {module!r} has lora_{min(pair)} alone")
            embedding = kinds[module] == "lora_embedding_"
            shapes = [self.files.shape(pair[side]) for side in "AB"]
            self._check_shapes(module, *shapes)
            self.factors[f"{module}.weight"] = Factors(
                pair["A"],
                pair["B"],
                self._scale(module, shapes[0][0], config),
                embedding or bool(config.get("fan_in_fan_out")),
            )
        if not self.factors and not self.whole:
            raise UserError(f"{self.directory / WEIGHTS}: holds no tensors")

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        if len(a) != 2 or len(b) != 2:
            raise UserError(
                f"{self.directory}: {module!r} is LoRA on a convolution (A is {list(a)}), which is "
                f"not formed here; {WAY_OUT}"
            )
        if not a[0]:
            raise UserError(f"{self.directory}: {module!r} has rank 0")
        if a[0] != b[1]:
            raise UserError(f"{self.directory}: {module!r}: A {list(a)} and B {list(b)} disagree")

    def _scale(self, module: str, rank: int, config: Mapping[str, Any]) -> float:
        try:
            said = _patterned(config.get("rank_pattern"), module, config.get("r"))
            alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        except re.error as error:
            raise UserError(
                f"{self.directory / CONFIG}: {error.pattern!r} is not a regular expression"
            ) from None
        if said != rank:
            raise UserError(
                f"{self.directory}: {module!r} has rank {rank}, {CONFIG} says {said!r}; the two "
                "files are not of one adapter"
            )
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not abs(alpha) <= _LARGEST:  # JSON may say NaN, and whole numbers beyond.
            raise UserError(f"{self.directory / CONFIG}: lora_alpha is {alpha!r}, not a number")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no whole model.

    Example:
      >>> is_adapter(Path("/nowhere"))
      False
    """
    return (directory / CONFIG).is_file() and not any(directory.glob("model*.safetensors"))


def _check(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{directory}: peft_type is {kind!r}; only LORA is formed here; {WAY_OUT}")
    if used := [key for key in _BEYOND if config.get(key)]:
        raise UserError(f"{directory}: {used[0]} is not formed here; {WAY_OUT}")
    for key, kind in _TYPES.items():
        if config.get(key) and not isinstance(config[key], kind):
            what = "a name" if kind is str else "names and values"
            raise UserError(f"{directory / CONFIG}: {key} is {config[key]!r}, not {what}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise UserError(
            f"{directory}: init_lora_weights {start!r} changed the base's weights too, and the "
            "adapter does not hold that; save it with path_initial_model_for_weight_conversion, "
            f"or {WAY_OUT}"
        )


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name (PEFT's rule)."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
