"""Model soups selected on held-out data."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging.averaging import rounded, widest
from modelstock_jax.merging.gram import in_float64
from modelstock_jax.merging.rules import NonFiniteError
from modelstock_jax.merging.summaries import tree_size
from modelstock_jax.merging.trees import (
    PyTree,
    check_alike,
    check_leaves,
    is_float,
    is_sequence,
    named_leaves,
    shortened,
    to_array,
    to_arrays,
)


class Trial(NamedTuple):
    """The trial of one candidate.

    Attributes:
      candidate: index of the candidate
      own_score: score of the candidate
      soup_score: score of the soup with the candidate
      accepted: whether the candidate became an ingredient
    """

    candidate: int
    own_score: float
    soup_score: float
    accepted: bool


class GreedySoup(NamedTuple):
    """Result of `greedy_soup`.

    Attributes:
      params: weights of the soup
      score: its score
      ingredients: indices of the candidates in it, in the order they were added
      trials: all trials, in the order of the search
    """

    params: PyTree
    score: float
    ingredients: tuple[int, ...]
    trials: tuple[Trial, ...]

    def __repr__(self) -> str:
        return (
            f"GreedySoup(score={self.score:g}, ingredients={list(self.ingredients)}, "
            f"{len(self.trials)} trials,\n  params=<{tree_size(self.params)}>)"
        )


def greedy_soup(
    pretrained: PyTree,
    candidates: Iterable[Any | Callable[[], Any]],
    score: Callable[[Any], float],
    *,
    scores: Sequence[float] | None = None,
    strict: bool = True,
) -> GreedySoup:
    """Select a greedy soup (Wortsman et al. 2022, arXiv 2203.05482, Recipe 1).

    Candidates are sorted by their own held-out score, best first, and tried in this order:

        soup <- mean of the ingredients and theta_i, if its score is above that of the soup

    Recipe 1 states `ValAcc(with theta_i) >= ValAcc(without)`. The authors' released code, which
    produced the published numbers, requires a strict gain. The two differ because equal scores are
    common on a small held-out set. The default follows the code; `strict=False` follows the recipe
    as printed.

    The soup is a running mean in float32 (float64 for float64 weights). It is scored after rounding
    to the candidates' dtypes. If the candidates are loaders, at most two models are in memory: the
    soup and the trial. All floating tensors are averaged, including the head.

    Args:
      pretrained: a tree with the structure of the models. It supplies the dtypes of the soup and
        all arrays that are not floating; None to take both from the best candidate. It is an
        ingredient only if it is also a candidate.
      candidates: models as trees, or functions without arguments that load a model. A candidate
        that is a pytree is a tree, even if it is callable (modules of equinox or flax.nnx), except
        `jax.tree_util.Partial`. Each model is loaded once for its own score and once for its trial.
        Candidates of equal score keep their order.
      score: returns the score of a tree on held-out data, higher is better; never on the test set
      scores: the candidates' own scores, if known; they are then not computed again
      strict: whether a candidate must raise the score to be accepted; False accepts an equal score

    Returns:
      `GreedySoup`

    Raises:
      UserError: no candidate, trees that differ, or a score that is NaN
      NonFiniteError: NaN or infinity in a candidate; the message names candidate and tensor

    Example:
      >>> models = [{"w": jnp.array([x])} for x in (0.0, 3.0, 10.0)]
      >>> soup = greedy_soup(None, models, lambda m: -abs(float(m["w"][0]) - 2.0))
      >>> soup.ingredients, soup.params["w"].tolist(), soup.score
      ((1, 0), [1.5], -0.5)
    """
    if not is_sequence(candidates):
        raise UserError(
            "candidates is a single tree; pass a list of trees, not the result of stack_replicas, "
            "or a list of functions that load a tree"
        )
    candidates = list(candidates)
    if not candidates:
        raise UserError("a greedy soup needs at least one candidate")
    side = "the best candidate" if pretrained is None else "pretrained"
    check_leaves(pretrained, side)
    if scores is None:
        scores = [
            _checked_score(score, _load(candidates, i, pretrained, side), i)
            for i in range(len(candidates))
        ]
    scores = _own_scores(scores, len(candidates))
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    best = order[0]
    first = _load(candidates, best, pretrained, side)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
    soup, treedef = jax.tree.flatten(widest(first))
    del first
    ingredients, soup_score = [best], scores[best]
    trials = [Trial(best, soup_score, soup_score, True)]
    for i in order[1:]:
        trial = jax.tree.leaves(_load(candidates, i, like, side))
        for k, mean in enumerate(soup):  # replace the candidate by the trial, tensor by tensor
            trial[k] = _update_mean(mean, trial[k], len(ingredients)) if is_float(mean) else mean
        trial_score = _checked_score(score, rounded(treedef.unflatten(trial), like), i)
        accepted = trial_score > soup_score or (trial_score == soup_score and not strict)
        trials.append(Trial(i, scores[i], trial_score, accepted))
        if accepted:
            soup, soup_score = trial, trial_score
            ingredients.append(i)
    params = rounded(treedef.unflatten(soup), like if pretrained is None else pretrained)
    if pretrained is not None:
        params = jax.tree.map(lambda w0, w: w if is_float(w) else to_array(w0), pretrained, params)
    return GreedySoup(params, soup_score, tuple(ingredients), tuple(trials))


def _load(candidates: list, index: int, like: Any, side: str) -> PyTree:
    """Return a candidate as a tree of finite arrays with the structure of `like`."""
    who = f"candidate {index} (counted from 0)"
    tree = candidates[index]
    if _is_loader(tree):
        _check_signature(tree, who)
        tree = tree()
    tree = to_arrays(tree, who)
    if not jax.tree.leaves(tree):
        raise UserError(f"{who} contains no tensor; pass a tree with at least one array")
    if like is not None:
        check_alike(like, tree, side, who)
    for name, array in named_leaves(tree).items():
        if is_float(array) and not bool(jax.device_get(_is_finite(array))):
            raise NonFiniteError(
                f"{who}: tensor {shortened(name)!r} contains NaN or infinity; leave the candidate "
                "out",
                index,
                name,
            )
    return tree


def _is_loader(candidate: Any) -> bool:
    """Return whether a candidate is a function that loads a tree: callable, and not a pytree.

    Modules of equinox and flax.nnx are callable pytrees: they are trees. `jax.tree_util.Partial` is
    a pytree too, but a function by its purpose, as `functools.partial` is.
    """
    if isinstance(candidate, functools.partial):
        return True
    return callable(candidate) and jax.tree_util.all_leaves([candidate])


def _check_signature(loader: Callable, who: str) -> None:
    try:
        inspect.signature(loader).bind()
    except TypeError:
        raise UserError(
            f"{who} is of type {type(loader).__name__} and needs arguments; pass a tree of arrays "
            "(of a flax.linen module, its variables), or a function without arguments that loads it"
        ) from None
    except ValueError:
        pass  # a built-in function without a signature


def _own_scores(scores: Iterable[Any], count: int) -> list[float]:
    """Return the candidates' own scores as floats, or raise a UserError."""
    try:
        values = [float(value) for value in scores]
    except TypeError:
        values = []
    if len(values) != count or any(math.isnan(value) for value in values):
        raise UserError(f"scores must be {count} numbers, one per candidate and none of them NaN")
    return values


def _checked_score(score: Callable[[Any], float], tree: PyTree, index: int) -> float:
    value = float(score(tree))
    if math.isnan(value):
        raise UserError(
            f"the score of candidate {index} (counted from 0), or of a soup with it, is NaN; "
            "`score` must return a number, higher for a better model"
        )
    return value


@jax.jit
def _is_finite(array) -> jax.Array:
    return jnp.isfinite(array).all()


def _update_mean(mean: jax.Array, new: jax.Array, count: int) -> jax.Array:
    """Return the mean of count + 1 models from the mean of count models and a new model."""
    weight = jax.device_put(np.asarray(1.0 / (count + 1.0), mean.dtype))
    return _interpolate(mean, new, weight)


@jax.jit
def _interpolate(mean, new, weight):
    return in_float64(lambda mean, new, weight: mean + weight * (new - mean))(
        mean, new.astype(mean.dtype), weight
    )
