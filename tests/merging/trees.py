"""Random anchors and replicas for the tests."""

from __future__ import annotations

import numpy as np

# Few shapes, because each is compiled for each number of replicas. Other tests use odd shapes.
BLOCK = {
    "layer_norm1.scale": (8,),
    "layer_norm1.bias": (8,),
    **{
        f"self_attn.{role}_proj.{kind}": (8, 8) if kind == "kernel" else (8,)
        for role in ("q", "k", "v", "out")
        for kind in ("kernel", "bias")
    },
    "mlp.fc1.kernel": (8, 8),
    "mlp.fc1.bias": (8,),
}
TRANSFORMER = {
    "position_embedding": (8, 8),
    **{f"blocks.block_0{b}.{name}": shape for b in (0, 1) for name, shape in BLOCK.items()},
    "head.kernel": (8, 3),
    "head.bias": (3,),
}


def replicas(shapes, num, seed=0, cosine=0.6, size=0.1, dtype=np.float32):
    """Return an anchor and `num` replicas with about this cosine between task vectors, as dicts."""
    rng = np.random.default_rng(seed)
    w0, w = {}, {}
    for name, shape in shapes.items():
        anchor = rng.standard_normal(shape)
        shared = rng.standard_normal(shape)
        noise = rng.standard_normal((num, *shape))
        deltas = size * (cosine**0.5 * shared + (1 - cosine) ** 0.5 * noise)
        w0[name] = anchor.astype(dtype)
        w[name] = (w0[name].astype(np.float64) + deltas).astype(dtype)
    return w0, w


def nested(flat):
    """Return nested dicts from dotted names."""
    tree: dict = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flat(tree, prefix=""):
    """Return a dict with dotted names from nested dicts; inverts `nested`."""
    out = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return out
