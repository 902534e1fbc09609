"""What a user may ask of a merge; every wrong value is refused before a file is opened."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

from modelstock_jax.errors import UserError
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
CHECKSUMS = ("crc32", "sha256")


_ONE_MODEL = r"base|model:[1-9]\d*"


def method_name(name: str) -> str:
    """A method as `registry.COMMANDS` spells it, from mergekit's or Python's spelling.

    Example:
        >>> method_name("model-stock"), method_name("task_arithmetic"), method_name("Ties")
        ('model_stock', 'task_arithmetic', 'ties')
    """
    spelled = str(name).lower().replace("-", "_")
    if spelled in RENAMED_COMMANDS:
        raise UserError(f"method {name!r} is now {RENAMED_COMMANDS[spelled].replace('_', '-')!r}")
    return SPELLINGS.get(spelled, name)


def dtype_name(name: str | None) -> str | None:
    """A dtype as `DTYPES` spells it.

    Example:
        >>> dtype_name("bf16"), dtype_name("torch.float16"), dtype_name(None)
        ('bfloat16', 'float16', None)
    """
    if name is None:
        return None
    plain = str(name).lower().removeprefix("torch.").removeprefix("jnp.")
    return DTYPE_ALIASES.get(plain, plain)


def model_index(choice: str | None) -> int:
    """The model that `base` or `model:1` names; 0 is the base.

    Example:
        >>> model_index("base"), model_index("model:2"), model_index(None)
        (0, 2, 0)
    """
    return int((choice or "base").partition(":")[2] or 0)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to merge; the models themselves are given beside it.

    Attributes:
        method: One of `registry.COMMANDS`.
        unit: Which numbers share one angle: tensor, layer, filter, head, block or global.
        num_heads: Query heads, for `unit="head"`: a number, or name prefix -> number.
        dtype: Of the merged floating tensors, one of `DTYPES`; None keeps the base's, each.
        include: Shell patterns (``model.layers.*``); only tensors that fit one are merged.
        exclude: Shell patterns; tensors that fit one are not merged.
        excluded: What tensors that are not merged take: ``base``, ``mean`` or ``model:1`` (the
            first fine-tune).
        vocabulary: Where embeddings differ in their number of rows: ``refuse``; ``base`` (rows in
            common merged, the base's number of rows, the rest from the base) or ``longest`` (rows
            in common merged, the rest, and the config, from the model with most rows).
        tied: Where one model ties its head to its embedding and another trained its own: ``keep``
            refuses unless they are equal; ``untie`` merges the head as a tensor of its own.
        missing: Tensors that some models lack: ``refuse``, or ``base`` (the base's, unmerged;
            what only fine-tunes have is left out).
        weights: One number a fine-tune, for linear, task-arithmetic and ties; 1 each by default.
        normalize: Whether weights are divided by their sum; by default the method's custom: yes
            for linear and ties, no for task-arithmetic.
        alpha: Wise-ft's, in [0, 1].
        scale: Lambda of task-arithmetic and ties.
        density: The part of each task vector that ties keeps, in (0, 1]: one, or one a fine-tune.
        t: Slerp's, in [0, 1]: one number, or one for each tensor by its name in the base.
        head: Where the fine-tunes have another classifier than the base, or one that it lacks:
            ``refuse``, or ``finetuned`` (the mean of theirs, for they have no common anchor, and
            the labels of their config; what the base alone has is left out).
        dequantize: Read quantized models as codes x scale; else they are refused.
        config_from: Which model's config.json is written where they disagree: ``base`` or
            ``model:1``; None refuses a disagreement.
        tokenizer_from: Which model's tokenizer files, special tokens, chat template and generation
            settings are written; None for the base's, or those of the model that gives the rows of
            a longer vocabulary.
        anchor_rounding: ``correct`` takes the expected energy of the base's own rounding out of the
            Gram matrix, where the base is stored coarser than the fine-tunes; ``keep`` does not.
        digest: Of inputs and outputs, in report and card: ``crc32``, or the dearer ``sha256``.
            What the hub names by its SHA-256 keeps that.
        max_shard_bytes: Bytes of tensors in a file; a larger tensor has a file of its own.
        threads: Workers; None for one a core.
        window_bytes: A unit of as many bytes a worker is merged by one; what an adapter forms of it
            is kept from the first pass to the second.

    Raises:
        UserError: A value that means nothing, or an option that the method would not read.

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
    weights: tuple[float, ...] | None = None
    normalize: bool | None = None
    alpha: float | None = None
    scale: float | None = None
    density: float | tuple[float, ...] | None = None
    t: float | Mapping[str, float] | None = None
    head: str = "error"
    dequantize: bool = False
    config_from: str | None = None
    tokenizer_from: str | None = None
    anchor_rounding: str = "keep"
    checksum: str = "crc32"
    max_shard_bytes: int = 5 * 10**9
    threads: int | None = None
    window_bytes: int = 256 * 2**20

    def __post_init__(self):
        object.__setattr__(self, "method", method_name(self.method))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name, allowed in (
            ("method", COMMANDS),
            ("unit", UNITS),
            ("vocab_mismatch", VOCAB_MISMATCH),
            ("tied_head", TIED_HEAD),
            ("missing_tensors", MISSING_TENSORS),
            ("dtype", (None, *DTYPES)),
            ("checksum", CHECKSUMS),
            ("head", HEAD),
            ("anchor_rounding", ANCHOR_ROUNDING),
        ):
            if (value := getattr(self, name)) not in allowed:
                known = ", ".join(str(x) for x in allowed if x is not None)
                raise UserError(f"{name} {value!r} is not known; one of {known}.")
        self._check_numbers()

    def _check_numbers(self) -> None:
        read = COMMANDS[self.method].options
        for name in ("weights", "normalize", "alpha", "scale", "density", "t"):
            if getattr(self, name) is not None and name not in read:
                raise UserError(f"method {self.method!r} does not read {name}; leave it out.")
        for name in {"alpha", "t"} & set(read):
            if getattr(self, name) is None:
                raise UserError(f"method {self.method!r} needs {name}, in [0, 1]: --{name} 0.5")
            self._check_each(name, lambda x: 0 <= x <= 1, "lies in [0, 1]")
        self._check_each("density", lambda x: 0 < x <= 1, "lies in (0, 1]")
        for name in ("weights", "scale"):
            self._check_each(name, math.isfinite, "is a number")
        for name in ("max_shard_bytes", "threads", "window_bytes"):
            self._check_each(name, lambda x: x >= 1, "is at least 1")
        if not re.fullmatch(r"base|mean|model:[1-9]\d*", self.unmerged_from):
            raise UserError(f"excluded is base, mean or model:1, ..., not {self.unmerged_from!r}.")
        for name in ("config_from", "tokenizer_from"):
            if not re.fullmatch(_ONE_MODEL, getattr(self, name) or "base"):
                raise UserError(f"{name} is base or model:1, ..., not {getattr(self, name)!r}.")
        if self.anchor_rounding == "correct" and not COMMANDS[self.method].rule:
            measured = " or ".join(name for name, method in COMMANDS.items() if method.rule)
            raise UserError(
                f"anchor_rounding correct is for methods that measure angles: {measured}."
            )
        if isinstance(self.t, Mapping) and self.unit != "tensor":
            raise UserError("t for each tensor needs unit tensor.")

    def _check_each(self, name: str, allowed: Callable[[float], bool], rule: str) -> None:
        value = getattr(self, name)
        values = value.values() if isinstance(value, Mapping) else value
        for one in values if isinstance(values, Iterable) else (values,):
            if one is not None and (isinstance(one, bool) or not allowed(one)):
                raise UserError(f"{name} {rule}, not {one!r}.")

    @property
    def num_threads(self) -> int:
        """Workers: one a core unless said."""
        if self.threads is not None:
            return self.threads
        return usable_cores()
