"""Projections that keep fine-tuned parameters within a radius of the pretrained ones, per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.state import leaf_names

NORMS = ("l2", "mars")
MIN_RADIUS = 1e-8


def layer_norms(delta: PyTree, norm: str = "mars") -> PyTree:
    """Return the norms that a radius is compared with; each broadcasts with its leaf.

        l2    |delta|_2                      one per leaf
        mars  |delta_r|_1 for every row r    one per output; the matrix norm is their maximum

    A row contains the weights of one output: the last axis of a kernel [in, out] indexes rows, the
    first axis of an embedding [T, D]. A vector is one row.

    Args:
      delta: w - w0
      norm: "l2" or "mars" (maximum absolute row sum, Gouk et al. 2021)

    Raises:
      UserError: if the norm is unknown

    Example:
      >>> kernel = {"kernel": jnp.array([[3.0, 0.0], [-4.0, 1.0]])}
      >>> layer_norms(kernel, "l2")["kernel"].round(2).tolist()
      [[5.099999904632568]]
      >>> layer_norms(kernel, "mars")["kernel"].tolist()
      [[7.0, 1.0]]
    """
    check_choice("optimizer.projection.norm", norm, NORMS)

    def leaf_norm(leaf, name):
        axes = tuple(range(leaf.ndim))
        if norm == "l2":
            return jnp.sqrt(jnp.square(leaf).sum(axes, keepdims=True))
        if leaf.ndim > 1:
            axes = axes[:-1] if name.endswith("kernel") else axes[1:]
        return jnp.abs(leaf).sum(axes, keepdims=True)

    return jax.tree.map(leaf_norm, delta, leaf_names(delta))


def project(params: PyTree, pretrained: PyTree, radii: PyTree, norm: str = "mars") -> PyTree:
    """Shrink each task vector to at most the radius of its leaf.

        w <- w0 + min(1, radius / |w - w0|) (w - w0)

    Parameters within the radius are bitwise unchanged. The result is differentiable in the radius,
    also where the radius equals the norm.

    Args:
      params: w, parameters of one replica
      pretrained: w0
      radii: one scalar >= 0 per leaf
      norm: see `layer_norms`

    Example:
      >>> w, w0 = {"w": jnp.array([5.0, 1.0])}, {"w": jnp.ones(2)}
      >>> project(w, w0, {"w": jnp.float32(2)}, "l2")["w"].tolist()
      [3.0, 1.0]
    """
    delta = jax.tree.map(jnp.subtract, params, pretrained)
    shrink = _shrink(radii, layer_norms(delta, norm))
    return jax.tree.map(lambda w, d, s: w + s * d, params, delta, shrink)


def _shrink(radii: PyTree, norms: PyTree) -> PyTree:
    """Return min(1, radius / norm) - 1, the multiple of the task vector to add; 0 within it."""
    return jax.tree.map(
        lambda r, n: jnp.where(n < r, 0.0, r / jnp.maximum(n, MIN_RADIUS) - 1.0), radii, norms
    )


def clip_radii(radii: PyTree, norms: PyTree) -> PyTree:
    """Clip radii to [1e-8, largest norm of the leaf]; a larger radius has no effect."""
    return jax.tree.map(lambda r, n: jnp.clip(r, MIN_RADIUS, n.max()), radii, norms)


class FTPState(NamedTuple):
    """Optimizer state of Fast Trainable Projection.

    Attributes:
      inner: state of the wrapped optimizer
      count: int32 [], number of steps done
      radius: one scalar per leaf
      mean: Adam's first moment of the radius gradients, one scalar per leaf
      square: Adam's second moment of the radius gradients, one scalar per leaf
      direction: the last unprojected task vector divided by its norms, which the radius scales.
        This is one more copy of the parameters: after the first step it cannot be computed from
        the parameters.
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
    """Wrap an optimizer with FTP (Tian et al. 2023): a step, then a projection with learned radii.

        c_t  = w_t - lr u_t - w0                             the unprojected task vector
        h_t  = sum_rows g_t . c_{t-1} / |c_{t-1}|            algorithm 1: dL/dradius of step t - 1
        r_t  = clip(Adam(r_{t-1}, h_t or, where h_t > 0, k h_t), 1e-8, |c_t|)
        w_{t+1} = w0 + min(1, r_t / |c_t|) c_t

    r_1 = 1e-8, and Adam's bias correction counts t steps, as in the authors' code. The gradient
    that the next step computes anyway replaces TPGM's held-out gradient: FTP needs no second pass
    and no additional data.

    Args:
      inner: computes the update direction u (AdamW, SGD)
      learning_rate: Adam's learning rate for the radii
      k: in [0, 1], factor of gradients that would shrink a radius
      norm: see `layer_norms`

    Returns:
      A transformation whose `update` needs the keywords `pretrained` (w0) and `learning_rate` (lr
      of the parameters): w - lr u is then the projected parameter. If lr is 0, nothing changes.

    Raises:
      UserError: if an argument is out of range
    """
    if not 0 <= k <= 1:
        raise UserError(f"optimizer.projection.k is {k}; it must be in [0, 1]")
    if learning_rate < 0:
        raise UserError(f"optimizer.projection.learning_rate is {learning_rate}; it must be >= 0")
    layer_norms({}, norm)
    inner, radius_lr = optax.with_extra_args_support(inner), learning_rate
    b1, b2, eps = 0.9, 0.999, 1e-8

    def init(params):
        scalars = jax.tree.map(lambda w: jnp.zeros((), w.dtype), params)
        radius = jax.tree.map(lambda z: z + MIN_RADIUS, scalars)
        count, zeros = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        return FTPState(inner.init(params), count, radius, scalars, scalars, zeros)

    def update(updates, state, params=None, *, pretrained=None, learning_rate=None, **extra_args):
        if pretrained is None or learning_rate is None:
            raise ValueError("update needs the keywords pretrained and learning_rate")
        grads, lr, count = updates, learning_rate, state.count + 1
        updates, inner_state = inner.update(
            grads, state.inner, params, pretrained=pretrained, learning_rate=lr, **extra_args
        )
        delta = jax.tree.map(lambda w, u, w0: w - lr * u - w0, params, updates, pretrained)
        norms = layer_norms(delta, norm)
        slope = jax.tree.map(lambda g, d: (g * d).sum(), grads, state.direction)
        slope = jax.tree.map(lambda h: jnp.where(h > 0, k * h, h), slope)
        mean = jax.tree.map(lambda m, h: b1 * m + (1 - b1) * h, state.mean, slope)
        square = jax.tree.map(lambda v, h: b2 * v + (1 - b2) * h**2, state.square, slope)

        def adam(radius, m, v):
            m, v = m / (1 - b1**count), v / (1 - b2**count)
            return radius - radius_lr * m / (jnp.sqrt(v) + eps)

        learned = clip_radii(jax.tree.map(adam, state.radius, mean, square), norms)
        # The first step has no radius gradient yet.
        radius = jax.tree.map(lambda new, r: jnp.where(count > 1, new, r), learned, state.radius)
        factor = jax.tree.map(lambda s: _divide_or_zero(s, lr), _shrink(radius, norms))
        updates = jax.tree.map(lambda u, s, d: u - s * d, updates, factor, delta)
        direction = jax.tree.map(lambda d, n: d / jnp.maximum(n, MIN_RADIUS), delta, norms)
        return updates, FTPState(inner_state, count, radius, mean, square, direction)

    return optax.GradientTransformationExtraArgs(init, update)


def _divide_or_zero(x: jax.Array, lr: jax.Array) -> jax.Array:
    """Return x / lr, or 0 if lr is 0."""
    return jnp.where(lr > 0, x / jnp.where(lr > 0, lr, 1.0), 0.0)


def trainable_projection(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    pretrained: PyTree,
    batches: Iterable[Any],
    *,
    learning_rate: float = 1e-2,
    norm: str = "l2",
) -> tuple[PyTree, PyTree]:
    """Project parameters with TPGM (Tian et al. 2023, CVPR): radii learned on held-out data.

        min over radii of  loss(project(w, w0, radii), held-out batch)

    Adam does one step per batch; the parameters w stay fixed. This is the outer level of the
    paper's bi-level problem, its projection update (section 3.3). A radius starts at half the
    smallest norm of its layer and stays within [1e-8, the largest], as in the authors' code. They
    run it once after training on ImageNet; for smaller models they run it after every step of the
    inner level.

    Args:
      loss: (params, batch) -> scalar
      params: w, fine-tuned parameters of one replica
      pretrained: w0
      batches: batches of data that w was not trained on, one per step
      learning_rate: Adam's learning rate for the radii
      norm: "l2" or "mars", see `layer_norms`

    Returns:
      (projected parameters, radii), the radii one scalar per leaf

    Example:
      >>> import jax.numpy as jnp
      >>> w, w0 = {"w": jnp.array([4.0, 0.0])}, {"w": jnp.zeros(2)}
      >>> held_out_loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
      >>> best = jnp.array([1.0, 0.0])
      >>> _, radii = trainable_projection(held_out_loss, w, w0, [best] * 300, learning_rate=0.05)
      >>> round(float(radii["w"]), 2)
      1.0
    """
    norms = jax.jit(_task_vector_norms, static_argnums=2)(params, pretrained, norm)
    radii = jax.tree.map(lambda n: n.min() / 2, norms)
    tx = optax.adam(learning_rate)

    @jax.jit
    def step(radii, opt_state, params, pretrained, norms, batch):
        def projected_loss(radii):
            return loss(project(params, pretrained, radii, norm), batch)

        grads = jax.grad(projected_loss)(radii)
        updates, opt_state = tx.update(grads, opt_state)
        return clip_radii(optax.apply_updates(radii, updates), norms), opt_state

    opt_state = tx.init(radii)
    for batch in batches:
        radii, opt_state = step(radii, opt_state, params, pretrained, norms, batch)
    return jax.jit(project, static_argnums=3)(params, pretrained, radii, norm), radii


def _task_vector_norms(params: PyTree, pretrained: PyTree, norm: str) -> PyTree:
    return layer_norms(jax.tree.map(lambda w, w0: w - w0, params, pretrained), norm)
