"""Fine-tuned weights held within given or learned radii of the pretrained ones, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.training.state import leaf_names

NORMS = ("l2", "mars")
MIN_RADIUS = 1e-8


def layer_norms(delta: PyTree, norm: str = "mars") -> PyTree:
    """The norms that a radius is compared with, a tree of arrays that broadcast with their leaf.

        l2    |delta|_2                               one a leaf
        mars  |delta_r|_1 for every row r             one an output; the matrix norm is their max

    A row is what feeds one output: of a kernel [in, out] the last axis counts them, of an
    embedding [T, D] the first. A vector is one row.

    Args:
      delta: w - w0.
      norm: "l2" or "mars" (maximum absolute row sum, Gouk et al. 2021).

    Raises:
      UserError: if there is no such norm.

    >>> kernel = {"kernel": jnp.array([[3.0, 0.0], [-4.0, 1.0]])}
    >>> layer_norms(kernel, "l2")["kernel"].round(2).tolist()
    [[5.099999904632568]]
    >>> layer_norms(kernel, "mars")["kernel"].tolist()
    [[7.0, 1.0]]
    """
    check_choice("projection.norm", norm, NORMS)

    def one(leaf, name):
        axes = tuple(range(leaf.ndim))
        if norm == "l2":
            return jnp.sqrt(jnp.square(leaf).sum(axes, keepdims=True))
        if leaf.ndim > 1:
            axes = axes[:-1] if name.endswith("kernel") else axes[1:]
        return jnp.abs(leaf).sum(axes, keepdims=True)

    return jax.tree.map(one, delta, leaf_names(delta))


def project(params: PyTree, pretrained: PyTree, radii: PyTree, norm: str = "mars") -> PyTree:
    """The nearest weights along their task vector within each leaf's radius.

        w <- w0 + min(1, radius / |w - w0|) (w - w0)

    Weights within the radius keep their bits. It can be differentiated by the radius, also where
    that equals the norm.

    Args:
      params: w, of one replica.
      pretrained: w0.
      radii: a scalar a leaf, >= 0.
      norm: see `layer_norms`.

    >>> w, w0 = {"w": jnp.array([5.0, 1.0])}, {"w": jnp.ones(2)}
    >>> project(w, w0, {"w": jnp.float32(2)}, "l2")["w"].tolist()
    [3.0, 1.0]
    """
    delta = jax.tree.map(jnp.subtract, params, pretrained)
    shrink = _shrink(radii, layer_norms(delta, norm))
    return jax.tree.map(lambda w, d, s: w + s * d, params, delta, shrink)


def _shrink(radii: PyTree, norms: PyTree) -> PyTree:
    """min(1, radius / norm) - 1: what is added of the task vector, 0 within the radius."""
    return jax.tree.map(
        lambda r, n: jnp.where(n < r, 0.0, r / jnp.maximum(n, MIN_RADIUS) - 1.0), radii, norms
    )


def clip_radii(radii: PyTree, norms: PyTree) -> PyTree:
    """Radii within [1e-8, the leaf's largest norm]: beyond it nothing would change."""
    return jax.tree.map(lambda r, n: jnp.clip(r, MIN_RADIUS, n.max()), radii, norms)


class FTPState(NamedTuple):
    """What Fast Trainable Projection carries.

    Attributes:
      inner: the state of the direction that it projects.
      count: int32 [], steps taken.
      radius: a scalar a leaf.
      mean, square: Adam's moments of the radii's gradients, a scalar a leaf each.
      direction: the last unprojected task vector over its norms: what the radius scales. One more
        copy of the weights: after the first step the weights themselves do not hold it.
    """

    inner: Any
    count: jax.Array
    radius: PyTree
    mean: PyTree
    square: PyTree
    direction: PyTree


def fast_trainable_projection(
    inner: optax.GradientTransformation,
    *,
    learning_rate: float = 1e-2,
    k: float = 1.0,
    norm: str = "mars",
) -> optax.GradientTransformationExtraArgs:
    """FTP (Tian et al. 2023): a step, then a projection whose radii learn from the gradients.

        c_t  = w_t - lr u_t - w0                             the unprojected task vector
        h_t  = sum_rows g_t . c_{t-1} / |c_{t-1}|            algorithm 1: dL/dradius of step t - 1
        r_t  = clip(Adam(r_{t-1}, h_t or, where h_t > 0, k h_t), 1e-8, |c_t|)
        w_{t+1} = w0 + min(1, r_t / |c_t|) c_t

    with r_1 = 1e-8 and Adam's bias corrected for t steps, as in the authors' code. The gradient
    that the next step has anyway stands for TPGM's held-out one: no second pass, no extra data.

    Args:
      inner: the direction u (AdamW's, SGD's).
      learning_rate: Adam's, of the radii.
      k: in [0, 1], how much of a gradient that would tighten a radius is kept.
      norm: see `layer_norms`.

    Returns:
      A direction whose `update` needs the keywords `pretrained` (w0) and `learning_rate` (lr, of
      the weights): w - lr u is then the projected weight. Where lr is 0 nothing moves.

    Raises:
      UserError: if a number is out of its range.
    """
    if not 0 <= k <= 1:
        raise UserError(f"projection.k is {k}; it must be in [0, 1]")
    if learning_rate < 0:
        raise UserError(f"projection.learning_rate is {learning_rate}; it must be >= 0")
    layer_norms({}, norm)
    inner, rate_of_radii = optax.with_extra_args_support(inner), learning_rate
    b1, b2, eps = 0.9, 0.999, 1e-8

    def init(params):
        scalars = jax.tree.map(lambda w: jnp.zeros((), w.dtype), params)
        least = jax.tree.map(lambda z: z + MIN_RADIUS, scalars)
        count, nothing = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        return FTPState(inner.init(params), count, least, scalars, scalars, nothing)

    def update(updates, state, params=None, *, pretrained=None, learning_rate=None, **more):
        if pretrained is None or learning_rate is None:
            raise ValueError("update needs the keywords pretrained and learning_rate")
        grads, rate, count = updates, learning_rate, state.count + 1
        updates, inner_state = inner.update(
            grads, state.inner, params, pretrained=pretrained, learning_rate=rate, **more
        )
        delta = jax.tree.map(lambda w, u, w0: w - rate * u - w0, params, updates, pretrained)
        norms = layer_norms(delta, norm)
        slope = jax.tree.map(lambda g, d: (g * d).sum(), grads, state.direction)
        slope = jax.tree.map(lambda h: jnp.where(h > 0, k * h, h), slope)
        mean = jax.tree.map(lambda m, h: b1 * m + (1 - b1) * h, state.mean, slope)
        square = jax.tree.map(lambda v, h: b2 * v + (1 - b2) * h**2, state.square, slope)

        def moved(radius, m, v):
            m, v = m / (1 - b1**count), v / (1 - b2**count)
            return radius - rate_of_radii * m / (jnp.sqrt(v) + eps)

        learned = clip_radii(jax.tree.map(moved, state.radius, mean, square), norms)
        # The first step has no gradient of a radius yet.
        radius = jax.tree.map(lambda new, r: jnp.where(count > 1, new, r), learned, state.radius)
        factor = jax.tree.map(lambda s: _over(s, rate), _shrink(radius, norms))
        updates = jax.tree.map(lambda u, s, d: u - s * d, updates, factor, delta)
        direction = jax.tree.map(lambda d, n: d / jnp.maximum(n, MIN_RADIUS), delta, norms)
        return updates, FTPState(inner_state, count, radius, mean, square, direction)

    return optax.GradientTransformationExtraArgs(init, update)


def _over(shrink: jax.Array, rate: jax.Array) -> jax.Array:
    return jnp.where(rate > 0, shrink / jnp.where(rate > 0, rate, 1.0), 0.0)


# Trainable projected gradient: radii around the pretrained weights, learned on held-out data.


def trainable_projection(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    pretrained: PyTree,
    batches: Iterable[Any],
    *,
    learning_rate: float = 1e-2,
    norm: str = "l2",
) -> tuple[PyTree, PyTree]:
    """TPGM (Tian et al. 2023, CVPR): how far each layer may be from its pretrained weights.

        min over radii of  loss(project(w, w0, radii), held-out batch)

    by Adam, a step a batch; the weights stay: the outer level of the paper's bi-level problem, its
    projection update (section 3.3). A radius starts at half its layer's smallest norm and stays
    within [1e-8, its largest], as in the authors' code. Once at the end of a training, this is what
    they do on ImageNet; with smaller models they call it at every step of the inner level.

    Args:
      loss: (params, batch) -> scalar.
      params: w, fine-tuned, of one replica.
      pretrained: w0.
      batches: held out from what w was trained on; as many as there are to be steps.
      learning_rate: Adam's, of the radii.
      norm: "l2" or "mars", see `layer_norms`.

    Returns:
      (the projected weights, the radii: a scalar a leaf).

    >>> import jax.numpy as jnp
    >>> w, w0 = {"w": jnp.array([4.0, 0.0])}, {"w": jnp.zeros(2)}
    >>> held_out = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> best = jnp.array([1.0, 0.0])
    >>> got, radii = trainable_projection(held_out, w, w0, [best] * 300, learning_rate=0.05)
    >>> round(float(radii["w"]), 2)
    1.0
    """
    norms = jax.jit(_norms, static_argnums=2)(params, pretrained, norm)
    radii = jax.tree.map(lambda n: n.min() / 2, norms)
    tx = optax.adam(learning_rate)

    @jax.jit
    def step(radii, opt_state, params, pretrained, norms, batch):
        def outer(radii):
            return loss(project(params, pretrained, radii, norm), batch)

        slope = jax.grad(outer)(radii)
        updates, opt_state = tx.update(slope, opt_state)
        return clip_radii(optax.apply_updates(radii, updates), norms), opt_state

    opt_state = tx.init(radii)
    for batch in batches:
        radii, opt_state = step(radii, opt_state, params, pretrained, norms, batch)
    return jax.jit(project, static_argnums=3)(params, pretrained, radii, norm), radii


def _norms(params: PyTree, pretrained: PyTree, norm: str) -> PyTree:
    return layer_norms(jax.tree.map(lambda w, w0: w - w0, params, pretrained), norm)
