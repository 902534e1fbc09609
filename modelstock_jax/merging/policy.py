"""What was done with a merge unit, and what is refused; the same words in every door."""

from __future__ import annotations

import enum

from modelstock_jax.errors import UserError


class Policy(enum.IntEnum):
    """What was done with a merge unit; `stats.policy` holds these codes as int8."""

    INTERPOLATED = 0  # w0 + t mean(d), the rule itself
    GIVEN = 1  # the ratio was given, not measured
    CLIPPED = 2  # cos <= 0 (carried: noise above the movement): no common signal, the anchor
    UNDEFINED = 3  # no replica moved: the anchor, bit for bit
    ONE_REPLICA_LEFT = 4  # one replica moved: its weights, bit for bit
    REPLICAS_LEFT_OUT = 5  # some did not move; the rule over the others
    TOO_SMALL = 6  # a unit of fewer than two numbers has no angle: the mean
    WEIGHTED_FALLBACK = 7  # a replica's noise came out negative: equation 3 in its place
    KEPT = 8  # integers, booleans and empty tensors: the anchor's
    NON_FINITE = 9  # NaN or infinity in a replica: the anchor, and `stats.finite` says which


class NonFiniteError(UserError):
    """NaN or infinity in the weights; `tensor` is its name, `replica` its index or 'pretrained'."""

    def __init__(self, message: str, replica: int | str, tensor: str):
        """Keep what a program may want to look at beside the message."""
        super().__init__(message)
        self.replica = replica
        self.tensor = tensor
