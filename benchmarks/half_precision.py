"""Error of embeddings in half precision: `python benchmarks/half_precision.py`, a minute on a CPU.

Towers with 12 layers of width 96 and random weights; eight images and eight texts. Prints the
maximum distance between embeddings of norm 1 and those in float32.
"""

from __future__ import annotations

import jax
import numpy as np

from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import TextConfig, VisionConfig
from modelstock_jax.models.model import encode_image, encode_text, init

SIZE = dict(hidden_size=96, intermediate_size=384, num_attention_heads=6, num_hidden_layers=12)


def main() -> None:
    """Print a line for each tower and dtype."""
    config = CLIPConfig(
        VisionConfig(**SIZE, image_size=48, patch_size=8),
        TextConfig(**SIZE, vocab_size=64, max_position_embeddings=16),
        projection_dim=64,
    )
    params = init(config, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (8, 48, 48, 3))
    ids = jax.random.randint(jax.random.key(2), (8, 16), 1, 63)
    for name, encode, x in (
        ("image_tower", encode_image, images),
        ("text_tower", encode_text, ids),
    ):

        def embedded(dtype, encode=encode, name=name, x=x):
            compute = Compute(dtype=dtype)
            embedding = jax.jit(lambda x: encode(config, params[name], x, compute))(x)
            return np.asarray(embedding) / np.linalg.norm(embedding, axis=1, keepdims=True)

        full = embedded("float32")
        for dtype in ("bfloat16", "float16"):
            distance = np.linalg.norm(embedded(dtype) - full, axis=1)
            print(f"{name} {dtype}: {distance.max():.4f}")


if __name__ == "__main__":
    main()
