"""Model soups that are searched for on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.averaging import rounded, widest
from modelstock_jax.merging.gram import PyTree, check_alike, in_float64, is_float, named_leaves
from modelstock_jax.merging.rules import NonFiniteError


class Trial(NamedTuple):
    """One candidate's turn, in the order of the search."""

    candidate: int  # its index among the candidates
    own_score: float  # its own score
    soup_score: float  # score of the soup with it
    accepted: bool


class GreedySoup(NamedTuple):
    """The soup, its score, the candidates in it (in the order they joined), and every trial."""

    params: PyTree
    score: float
    ingredients: tuple[int, ...]
    trials: tuple[Trial, ...]


def greedy_soup(
    pretrained: PyTree,
    candidates: Iterable[Any | Callable[[], Any]],
    score: Callable[[Any], float],
    *,
    scores: Sequence[float] | None = None,
    strict: bool = True,
) -> GreedySoup:
    """Greedy soup (Wortsman et al. 2022, arXiv 2203.05482, Recipe 1): keep what helps.

    Candidates are sorted by their own held-out score, best first, and tried one after the other:

        soup <- mean of the ingredients and theta_i, where that scores higher than the soup

    Recipe 1 says `ValAcc(with theta_i) >= ValAcc(without)`; the authors' released code, which
    made the published numbers, asks for a strict gain. Equal scores are common on a small held-out
    set, so the two differ. The default is the code; `strict=False` is the recipe as printed.

    The soup is a running mean in float32 (float64 for float64 weights), scored as rounded to the
    candidates' dtypes. Where candidates are loaders, two models lie in memory: soup and trial.
    All floating tensors are averaged, the head among them.

    Args:
      pretrained: a tree of the models' structure that gives the soup's dtypes and what is not
        floating; None to take both from the best candidate. It is an ingredient only if it is
        among the candidates too.
      candidates: models as trees, or functions of no argument that load one; each is loaded once
        for its own score and once for its trial. Equal scores keep their order.
      score: a tree's score on held-out data, higher is better; never on the test set.
      scores: the candidates' own scores, where they are known: they are then not measured again.
      strict: whether a candidate must raise the score to stay, or only not lower it.

    Returns:
      `GreedySoup`.

    Raises:
      UserError: no candidate, trees that differ, or a score that is NaN.
      NonFiniteError: NaN or infinity in a candidate, naming it and the tensor.

    Example:
      >>> models = [{"w": jnp.array([x])} for x in (0.0, 3.0, 10.0)]
      >>> soup = greedy_soup(None, models, lambda m: -abs(float(m["w"][0]) - 2.0))
      >>> soup.ingredients, soup.params["w"].tolist(), soup.score
      ((1, 0), [1.5], -0.5)
    """
    if isinstance(candidates, Mapping):
        raise UserError(
            "candidates is one tree; give a list of trees, or of functions that load one"
        )
    candidates = list(candidates)
    if not candidates:
        raise UserError("a greedy soup needs at least one candidate")
    if scores is None:
        scores = [
            _scored(score, _load(candidates, i, pretrained), i) for i in range(len(candidates))
        ]
    elif len(scores) != len(candidates) or any(math.isnan(s) for s in scores):
        raise UserError(f"scores: {len(candidates)} numbers are needed, one a candidate")
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    best = order[0]
    first = _load(candidates, best, pretrained)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), first)
    soup, treedef = jax.tree.flatten(widest(first))
    del first
    ingredients, reached = [best], float(scores[best])
    trials = [Trial(best, reached, reached, True)]
    for i in order[1:]:
        trial = jax.tree.leaves(_load(candidates, i, like))
        for k, mean in enumerate(soup):  # tensor by tensor: a candidate turns into its trial
            trial[k] = _stir(mean, trial[k], len(ingredients)) if is_float(mean) else mean
        reach = _scored(score, rounded(treedef.unflatten(trial), like), i)
        kept = reach > reached or (reach == reached and not strict)
        trials.append(Trial(i, float(scores[i]), reach, kept))
        if kept:
            soup, reached = trial, reach
            ingredients.append(i)
    params = rounded(treedef.unflatten(soup), like if pretrained is None else pretrained)
    if pretrained is not None:
        params = jax.tree.map(lambda w0, w: w if is_float(w) else w0, pretrained, params)
    return GreedySoup(params, reached, tuple(ingredients), tuple(trials))


def _load(candidates: list, index: int, like: Any) -> Any:
    """A candidate as a tree of finite arrays, of the structure of `like`."""
    tree = candidates[index]
    tree = jax.tree.map(jnp.asarray, tree() if callable(tree) else tree)
    who = f"candidate {index} (counted from 0)"
    if like is not None:
        check_alike(like, tree, "the anchor or the best candidate", who)
    for name, array in named_leaves(tree).items():
        if is_float(array) and not bool(jnp.isfinite(array).all()):
            raise NonFiniteError(
                f"{who}: tensor {name!r} holds NaN or infinity; leave it out", index, name
            )
    return tree


def _scored(score: Callable[[Any], float], tree: PyTree, index: int) -> float:
    value = float(score(tree))
    if math.isnan(value):
        raise UserError(
            f"the score of candidate {index} (counted from 0), or of a soup with it, "
            "is NaN; a score must be a number, higher for a better model"
        )
    return value


@jax.jit
def _stir(mean, new, count):
    """Mean of count + 1 models, from that of count and one more."""
    share = 1.0 / (jnp.asarray(count, mean.dtype) + 1.0)
    return in_float64(lambda mean, new, share: mean + share * (new - mean))(
        mean, new.astype(mean.dtype), share
    )
