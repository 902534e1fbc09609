"""Arithmetic of a model: dtype, attention implementation, rematerialization."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from modelstock_jax.errors import UserError, check_choice

_DTYPES = tuple(jnp.dtype(x) for x in ("float32", "bfloat16", "float16", "float64"))
ATTENTIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class Compute:
    """Dtype, attention implementation and rematerialization; parameters do not depend on it.

    Attributes:
      dtype: dtype, or its name, of activations and of weights in matrix products. Layer-norm
        statistics, softmax and output features are float32 or wider in any case.
      attention_impl: "xla", or "cudnn" (GPU only, dtype bfloat16 or float16)
      remat: recompute each block in the backward pass instead of storing its activations
    """

    dtype: Any = jnp.float32
    attention_impl: str = "xla"
    remat: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        except TypeError:
            pass
        name = getattr(self.dtype, "name", self.dtype)
        check_choice("compute.dtype", name, [dtype.name for dtype in _DTYPES])
        check_choice("compute.attention_impl", self.attention_impl, ATTENTIONS)
        if self.attention_impl == "cudnn" and self.dtype not in (jnp.bfloat16, jnp.float16):
            raise UserError(
                f"compute.attention_impl='cudnn' requires compute.dtype bfloat16 or float16, not "
                f"{self.dtype.name}"
            )

    @classmethod
    def of(cls, options: Any) -> Compute:
        """Create from options that have at least these fields, such as `config.compute`."""
        return cls(**{field.name: options[field.name] for field in dataclasses.fields(cls)})


DEFAULT_COMPUTE = Compute()
