"""A study context without training: replicas are random points around a center.

Accuracy decreases with the distance to the center.
"""

from __future__ import annotations

import zlib

import numpy as np

DENSE = {"kernel": (20, 20), "bias": (20,)}
SHAPES = {
    "image_tower": {
        "blocks": {
            "block_00": {
                "layer_norm1": {"scale": (20,), "bias": (20,)},
                "self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), DENSE),
            }
        }
    },
    "head": {"kernel": (50, 30), "bias": (30,)},
}
SPREAD = 0.5


def draw(shapes, rng):
    if isinstance(shapes, dict):
        return {name: draw(inner, rng) for name, inner in shapes.items()}
    return rng.standard_normal(shapes).astype(np.float32)


def combine(function, *trees):
    if isinstance(trees[0], dict):
        return {name: combine(function, *(tree[name] for tree in trees)) for name in trees[0]}
    return function(*trees)


class DrawnContext:
    """Like `studies.image_context.ImageContext`, for measurements and models."""

    num_heads = 2

    def __init__(self):
        self._w0 = draw(SHAPES, np.random.default_rng(0))
        task_vector = draw(SHAPES, np.random.default_rng(1))
        self.center = combine(lambda w0, d: w0 + d, self._w0, task_vector)
        self.size = sum(leaf.size for leaf in _leaves(self._w0))

    def name(self, run):
        return f"run-{run.seed}-{run.options}"

    def anchor(self):
        return self._w0

    def start(self, run):
        return self._w0

    def replica(self, run, index, epoch):
        seed = zlib.crc32(repr((self.name(run), index, epoch)).encode())
        noise = draw(SHAPES, np.random.default_rng(seed))
        return combine(lambda c, z: c + np.float32(SPREAD) * z, self.center, noise)

    def merged(self, run):
        return self.replica(run, 100, None)

    def validation_set(self):
        return ["drawn"]

    def validate(self, params):
        return self.accuracy(params, shifts=False)["id"]

    def held_out(self, model):
        return self.validate(model.build(self))

    def sets(self, shifts):
        return ["drawn", shifts]

    def accuracy(self, params, *, shifts):
        squared_distance = sum(
            float(((a - b) ** 2).sum())
            for a, b in zip(_leaves(params), _leaves(self.center), strict=True)
        )
        accuracy = 90 - np.sqrt(squared_distance)
        return {"id": accuracy, "shifts": {"v2": accuracy - 10} if shifts else {}}


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in _leaves(tree[name])]
    return [np.asarray(tree)]
