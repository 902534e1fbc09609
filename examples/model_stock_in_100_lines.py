"""Model Stock (https://arxiv.org/abs/2403.19522): its training loop and its merge in one file.

    python examples/model_stock_in_100_lines.py

Fine-tunes two replicas of a small CLIP on the synthetic benchmark and merges them after every
epoch, with the settings of `configs/glyphs.py`. Data and model are the package's (extra `cpu`).
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.data import glyphs
from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.loader import train_batches
from modelstock_jax.models.checkpoint_io import load
from modelstock_jax.models.model import classifier
from modelstock_jax.models.zero_shot import zero_shot_head


def load_model():
    """Return the pretrained image tower with its zero-shot head, and apply(w, images) -> logits."""
    clip = load(Path(glyphs.__file__).parent / "clip")
    head = zero_shot_head(clip, glyphs.CLASS_NAMES, glyphs.TEMPLATES)
    w0 = {"image_tower": clip.params["image_tower"], "head": head}
    return w0, lambda w, images: classifier(clip.config)(w, clip.preprocessor(images))


def stack(params):
    """Return two copies of the parameters, stacked along a leading replica axis."""
    return jax.tree.map(lambda w: jnp.stack([w, w]), params)


def make_optimizer(num_steps):
    """Return AdamW with a linear warmup over 10 % of the steps, then a cosine down to 0."""
    warmup = round(0.1 * num_steps)

    def learning_rate(step):
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / (num_steps - warmup)))
        return 2e-3 * jnp.where(step < warmup, (step + 1) / max(warmup, 1), cosine)

    adamw = optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_train_step(apply, augment, optimizer):
    """Return one optimizer step of both replicas; all arguments have a leading replica axis."""

    def loss_fn(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()

    def replica_step(params, opt_state, key, batch):
        images = augment(key, batch["image"])
        loss, grads = jax.value_and_grad(loss_fn)(params, images, batch["label"])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(jax.vmap(replica_step))


def interpolation_ratio(w0, w):
    """Return t = 2 cos / (1 + cos) of one tensor (equation 2), for w [2, ...]; 0 if cos <= 0.

    >>> round(float(interpolation_ratio(jnp.zeros(2), jnp.array([[1, 0], [0.5, 0.75**0.5]]))), 3)
    0.667
    """
    d1, d2 = (w - w0[None]).reshape(2, -1)  # the task vectors
    cos = jnp.vdot(d1, d2, precision="highest") / (jnp.linalg.norm(d1) * jnp.linalg.norm(d2))
    # An unchanged tensor has cos = 0 / 0 = NaN; the comparison with NaN is False.
    return jnp.where(cos > 0, 2 * cos / (1 + cos), 0.0)


@jax.jit
def merge(w0, w):
    """Return w_H = t mean(w) + (1 - t) w0 of every tensor, and t of every tensor."""
    ratio = jax.tree.map(interpolation_ratio, w0, w)
    return jax.tree.map(lambda t, w0, w: t * w.mean(0) + (1 - t) * w0, ratio, w0, w), ratio


def finetune(w0, apply, augment, batches, epochs, steps, seed):
    """Fine-tune two replicas of w0; return them before the last merge, and the merged model."""
    merged, w = w0, stack(w0)
    optimizer = make_optimizer(epochs * steps)
    opt_state = jax.vmap(optimizer.init)(w)
    train_step = make_train_step(apply, augment, optimizer)
    replica_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(2))
    for epoch in range(epochs):
        w, losses = stack(merged), []  # Both replicas start from w_H and keep their Adam moments.
        for step in range(epoch * steps, (epoch + 1) * steps):
            keys = jax.vmap(jax.random.fold_in, (0, None))(replica_keys, step)
            w, opt_state, loss = train_step(w, opt_state, keys, next(batches))
            losses.append(loss)
        merged, ratio = merge(w0, w)
        mean_ratio = jnp.stack(jax.tree.leaves(ratio)).mean()
        print(f"epoch {epoch + 1}: loss {jnp.stack(losses).mean():.4f}, mean t {mean_ratio:.4f}")
    return w, merged


def main():
    """Fine-tune and merge; print top-1 accuracy in distribution (id) and on a shift (r)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("epochs", 8), ("steps", 32), ("batch_size", 128), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    data = glyphs.make_sets(train_size=args.steps * args.batch_size, shifts=("r",))
    batches = train_batches(data.train, batch_size=args.batch_size, seed=args.seed, num_replicas=2)
    w0, apply = load_model()
    w, merged = finetune(w0, apply, shift_and_jitter, batches, args.epochs, args.steps, args.seed)
    w1, w2 = (jax.tree.map(lambda x, r=r: x[r], w) for r in (0, 1))
    for name, params in {"pretrained": w0, "w1": w1, "w2": w2, "merged": merged}.items():
        for test in (data.test, *data.shifts.values()):
            correct = jax.jit(apply)(params, test.pixels).argmax(-1) == test.labels
            print(f"{name:10} {test.name:6} {100 * correct.mean():.2f} %")


if __name__ == "__main__":
    main()
