"""Ratios that are tried besides equation 3 of each merge unit, and what each part of a model does.

A rule computes one ratio per tensor from the Gram matrices of all tensors. No rule uses data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from modelstock_jax import merging
from modelstock_jax.merging.tensor_roles import block_position, role
from modelstock_jax.merging.trees import PyTree, named_leaves
from studies.expressions import Model, ModelSource, stacked

# Name of a tensor -> its Gram matrix, [N, N].
Grams = Mapping[str, np.ndarray]
Ratios = dict[str, float]


@dataclass(frozen=True)
class RatioMerge(Model):
    """The uniform mean, pulled toward the anchor by one ratio per tensor from a rule."""

    key_name: ClassVar[str] = "RatioMerge"

    models: tuple[Model, ...]
    rule: str

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        w0, replicas = source.anchor(), stacked(source, self.models)
        chosen = ratios(self.rule, gram_matrices(w0, replicas))
        mean, _ = merging.uniform_mean(w0, replicas)
        leaves, structure = jax.tree.flatten(w0)
        means = jax.tree.leaves(jax.device_get(mean))
        return structure.unflatten(
            [
                np.asarray(a + np.float64(t) * (np.float64(b) - a), np.float32)
                for a, b, t in zip(jax.device_get(leaves), means, chosen.values(), strict=True)
            ]
        )


def gram_matrices(w0: PyTree, replicas: PyTree) -> dict[str, np.ndarray]:
    """Return the Gram matrix of the task vectors of each tensor, from its cosines and norms."""
    cosines = named_leaves(jax.device_get(merging.cosines(w0, replicas)))
    norms = named_leaves(jax.device_get(merging.norms(w0, replicas)))
    grams = {}
    for name, cosine in cosines.items():
        norm = np.asarray(norms[name], np.float64)
        # Undefined cosines belong to task vectors of length 0.
        defined = np.where(np.abs(cosine) <= 1 + 1e-6, cosine, 0.0).astype(np.float64)
        np.fill_diagonal(defined, 1.0)
        grams[name] = defined * np.outer(norm, norm)
    return grams


def stored_gram_matrices(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the Gram matrix of each tensor from an `Angles` measurement of two models."""
    grams = {}
    for name, row in rows.items():
        first, second = row["norms"]
        # An undefined angle belongs to a task vector of length 0.
        cosine = np.cos(np.deg2rad(row["angles"][0])) if row["angles"] else 0.0
        product = first * second * cosine
        grams[name] = np.array([[first**2, product], [product, second**2]])
    return grams


def equation_3(gram: np.ndarray) -> float:
    """Return the ratio of equation 3 for one Gram matrix, [N, N]; 0 if it is undefined."""
    cosine = merging.cosine(gram)
    if cosine == merging.COSINE_UNDEFINED:
        return 0.0
    return float(merging.ratio(cosine, len(gram)))


def pooled(grams: Grams, key: Callable[[str], object]) -> Ratios:
    """Return equation 3 of the summed Gram matrices of all tensors with the same key."""
    sums: dict[object, np.ndarray] = {}
    for name, gram in grams.items():
        sums[key(name)] = sums.get(key(name), 0) + gram
    return {name: equation_3(sums[key(name)]) for name in grams}


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def depths(grams: Grams) -> dict[str, int | None]:
    """Return the block of each tensor; None outside of the blocks."""
    names = [name for name in grams if not _is_head(name)]
    positions = zip(names, block_position(names), strict=True)
    found = {name: int(p.depth) if 0 <= p.depth < np.inf else None for name, p in positions}
    return {name: found.get(name) for name in grams}


def part(name: str, depth: int | None, num_blocks: int) -> str:
    """Return the part of a model that a tensor belongs to: a kind, and a half of the blocks.

    >>> part("encoder.layer.0.attention.self.query.kernel", 0, 6)
    'query and key, first half'
    """
    kind = role(name)
    if _is_head(name):
        return "head"
    if depth is None:
        return "embeddings and projection"
    half = "first half" if depth < num_blocks / 2 else "second half"
    if kind == "attention":
        modules = name.split(".")
        is_query_or_key = {"query", "key", "q_proj", "k_proj"} & set(modules)
        kind = "query and key" if is_query_or_key else "value and output"
    return f"{kind}, {half}"


def parts(grams: Grams) -> dict[str, str]:
    """Return the part of each tensor; see `part`."""
    by_depth = depths(grams)
    count = 1 + max(depth for depth in by_depth.values() if depth is not None)
    return {name: part(name, depth, count) for name, depth in by_depth.items()}


def _tower(grams: Grams) -> Ratios:
    """Return one ratio for the tower, and one for the head."""
    return pooled(grams, _is_head)


def _by_kind(grams: Grams) -> Ratios:
    """Return one ratio for each kind of tensor, at all depths."""
    return pooled(grams, lambda name: "head" if _is_head(name) else role(name))


def _by_block(grams: Grams) -> Ratios:
    """Return one ratio for each block, and one for the tensors outside of the blocks."""
    by_depth = depths(grams)
    return pooled(grams, lambda name: "head" if _is_head(name) else by_depth[name])


def _halfway(grams: Grams) -> Ratios:
    """Return equation 3 of each tensor, pulled halfway toward the ratio of the tower."""
    return {
        name: t if _is_head(name) else (t + equation_3(grams[name])) / 2
        for name, t in _tower(grams).items()
    }


def _along_depth(slope: float, grams: Grams) -> Ratios:
    """Return t + slope (t_b - t), with t the ratio of the tower and t_b those of its blocks."""
    tower, blocks, by_depth = _tower(grams), _by_block(grams), depths(grams)
    return {
        name: t if by_depth[name] is None else _clipped(t + slope * (blocks[name] - t))
        for name, t in tower.items()
    }


def _interior(grams: Grams) -> Ratios:
    """Return one ratio for all blocks, one for the head, and 1 elsewhere: the uniform mean."""
    by_depth = depths(grams)
    by_place = pooled(grams, lambda name: "head" if _is_head(name) else by_depth[name] is None)
    return {
        name: 1.0 if by_depth[name] is None and not _is_head(name) else t
        for name, t in by_place.items()
    }


def _coherent(grams: Grams) -> Ratios:
    """Return the best ratios if the signals of all tensors add up in one direction.

    Let tensor l change the output by t_l s_l along a common direction, s_l = |mu_l|, plus
    independent noise of energy t_l^2 n_l, n_l = |e_l|^2 / N. The expected squared distance to the
    sum S of the s_l, (S - sum_l t_l s_l)^2 + sum_l t_l^2 n_l, is minimal at
    t_l = S (s_l / n_l) / (1 + sum_k s_k^2 / n_k). These are clipped to [0, 1].
    """
    signal, noise = {}, {}
    for name, gram in grams.items():
        count = len(gram)
        product = gram[np.triu_indices(count, 1)].mean()
        signal[name] = float(np.sqrt(max(product, 0.0)))
        noise[name] = max(float(np.diag(gram).mean() - product) / count, 1e-30)
    total = 1 + sum(signal[name] ** 2 / noise[name] for name in grams)
    size = sum(signal.values())
    return {name: _clipped(size * signal[name] / noise[name] / total) for name in grams}


def _clipped(ratio: float) -> float:
    return float(np.clip(ratio, 0.0, 1.0))


RULES: dict[str, Callable[[Grams], Ratios]] = {
    "tower": _tower,
    "kind": _by_kind,
    "block": _by_block,
    "halfway": _halfway,
    "steeper": functools.partial(_along_depth, 2.0),
    "reflected": functools.partial(_along_depth, -1.0),
    "interior": _interior,
    "coherent": _coherent,
}
_STEP = 0.3


def ratios(rule: str, grams: Grams) -> Ratios:
    """Return the ratio of each tensor, in the order of `grams`.

    Args:
      rule: a key of `RULES`; `lower PART`, the rule `tower` with the ratios of one part lowered by
        0.3; or `one`, the ratio of the tower for all tensors.
      grams: Gram matrix of each tensor.
    """
    if rule in RULES:
        return RULES[rule](grams)
    tower, by_part = _tower(grams), parts(grams)
    if rule == "one":
        of_tower = next(t for name, t in tower.items() if not _is_head(name))
        return dict.fromkeys(grams, of_tower)
    lowered = rule.removeprefix("lower ")
    if lowered not in by_part.values():
        raise KeyError(f"no rule {rule!r}")
    return {
        name: _clipped(t - _STEP) if by_part[name] == lowered else t for name, t in tower.items()
    }
