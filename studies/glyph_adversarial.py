"""Select shift A: images that a convolutional network trained on ID misclassifies.

    python -m studies.glyph_adversarial

This trains the network (about a minute on two cores), classifies the pool and writes
`adversarial.json`. The file is committed, so the command does not need to run again, and the
rounding of other machines cannot change the set.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from modelstock_jax.data.glyphs import sets
from modelstock_jax.data.glyphs.render import CHARACTERS
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError

SIZE = 2000
LOOKALIKES = ("0Oo", "1Il", "Cc", "Kk", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Zz")
"""Characters that differ only in size or position; confusing them does not count as an error."""

_EPOCHS = 24
_BATCH = 128
_WIDTHS = (32, 64, 96)


def init(key: jax.Array) -> dict:
    """Initialize a network of three 3 x 3 convolutions and one linear layer."""
    keys = jax.random.split(key, len(_WIDTHS) + 1)
    he = jax.nn.initializers.he_normal()
    params, channels = {}, 3
    for i, width in enumerate(_WIDTHS):
        kernel = he(keys[i], (3, 3, channels, width), jnp.float32)
        params[f"conv{i}"] = {"kernel": kernel, "bias": jnp.zeros(width)}
        channels = width
    shape = (3 * 3 * channels, len(CHARACTERS))
    params["head"] = {"kernel": he(keys[-1], shape, jnp.float32), "bias": jnp.zeros(shape[1])}
    return params


def apply(params: dict, images: jax.Array) -> jax.Array:
    """Return logits [B, 62] of uint8 images [B, 24, 24, 3]."""
    x = images.astype(jnp.float32) / 127.5 - 1.0
    x = x - x.mean(axis=(1, 2), keepdims=True)
    for i in range(len(_WIDTHS)):
        layer = params[f"conv{i}"]
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"][None, None, None, :])
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    return x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"][None, :]


def train(train_set: ImageSet, seed: int = 0, epochs: int = _EPOCHS) -> dict:
    """Train with AdamW and translations of up to 2 pixels; return the weights."""
    rng = np.random.default_rng(seed)
    steps = epochs * (len(train_set) // _BATCH)
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.05)
    params = init(jax.random.key(seed))
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        def loss(params):
            logits = apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(epochs):
        order = rng.permutation(len(train_set))
        for start in range(0, len(order) - _BATCH + 1, _BATCH):
            chosen = order[start : start + _BATCH]
            down, right = rng.integers(-2, 3, size=2)
            images = np.pad(train_set.pixels[chosen], ((0, 0), (2, 2), (2, 2), (0, 0)), "edge")
            images = images[:, 2 + down : 26 + down, 2 + right : 26 + right]
            params, opt_state = step(params, opt_state, images, train_set.labels[chosen])
    return params


def predict(params: dict, images: np.ndarray) -> np.ndarray:
    """Return int32 classes [M] of uint8 images [M, 24, 24, 3]."""
    classify = jax.jit(lambda params, batch: apply(params, batch).argmax(axis=-1))
    parts = [
        classify(params, images[start : start + 1024]) for start in range(0, len(images), 1024)
    ]
    return np.concatenate(jax.device_get(parts)).astype(np.int32)


def is_error(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return [M] whether each prediction is neither the label nor a lookalike of it."""
    group = np.arange(len(CHARACTERS))
    for lookalikes in LOOKALIKES:
        members = [CHARACTERS.index(character) for character in lookalikes]
        group[members] = members[0]
    return group[labels] != group[predictions]


def choose(seed: int = 0) -> dict:
    """Return shift A as JSON: indices into the pool, and the mean of each image as a checksum."""
    params = train(sets.training_set(seed), seed)
    images, labels = sets.pool(np.arange(sets.POOL_SIZE))
    wrong = np.flatnonzero(is_error(labels, predict(params, images)))
    if len(wrong) < SIZE:
        raise UserError(
            f"the network misclassifies {len(wrong)} images of the pool; shift A needs {SIZE}"
        )
    indices = wrong[:SIZE]
    means = images[indices].astype(np.float64).mean(axis=(1, 2, 3))
    return {
        "pool_size": sets.POOL_SIZE,
        "errors_in_pool": len(wrong),
        "indices": indices.tolist(),
        "means": np.round(means, 2).tolist(),
    }


def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Select the images of shift A.")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=sets.ADVERSARIAL_FILE,
        help="output file (default: %(default)s)",
    )
    out = parser.parse_args(argv).out
    chosen = choose()
    out.write_text(json.dumps(chosen) + "\n")
    print(f"{out}: {SIZE} of {chosen['errors_in_pool']} misclassified of {sets.POOL_SIZE} images")


if __name__ == "__main__":
    main()
