"""The paper's section 3 in float64 NumPy, from its equations and independent of the package."""

from __future__ import annotations

import numpy as np


def equation_3(w0, w):
    """Return cosine, ratio and merged weights of one unit: w0 [n], w [N, n], any dtype."""
    w0, w = np.asarray(w0, np.float64), np.asarray(w, np.float64)
    num = len(w)
    deltas = w - w0
    lengths = np.sqrt((deltas**2).sum(axis=1))
    pairs = [
        (deltas[i] * deltas[j]).sum() / (lengths[i] * lengths[j])
        for i in range(num)
        for j in range(i)
    ]
    cosine = np.mean(pairs)
    ratio = np.clip(num * cosine / (1 + (num - 1) * cosine), 0, 1) if cosine > 0 else 0.0
    return cosine, ratio, ratio * w.mean(axis=0) + (1 - ratio) * w0


def pieces(unit, shapes, heads=2):
    """Return the merge units: a list of [(name, index), ...], the slices that share an angle."""
    full = {name: (name, (slice(None),) * len(shape)) for name, shape in shapes.items()}
    if unit == "global":
        return [list(full.values())]
    if unit == "tensor":
        return [[entry] for entry in full.values()]
    if unit == "filter":
        return [
            [(name, (slice(None),) * (len(shape) - 1) + (f,))]
            for name, shape in shapes.items()
            if len(shape) > 1
            for f in range(shape[-1])
        ] + [[full[name]] for name, shape in shapes.items() if len(shape) < 2]
    if unit == "block":
        blocks = sorted({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        rest = [[full[name]] for name in shapes if not name.startswith("blocks.")]
        return rest + [
            [full[name] for name in shapes if name.startswith(f"blocks.{block}.")]
            for block in blocks
        ]
    groups, grouped = [], set()
    for name, shape in shapes.items():
        if not name.endswith("self_attn.q_proj.kernel"):
            continue
        module = name.removesuffix(".q_proj.kernel")
        for kind in ("kernel", "bias"):
            qkv = [f"{module}.{role}_proj.{kind}" for role in "qkv"]
            out = f"{module}.out_proj.{kind}"
            grouped |= set(qkv)
            if unit == "layer":
                groups.append([full[n] for n in qkv])
                continue
            size = shape[1] // heads
            for h in range(heads):
                cut = slice(h * size, (h + 1) * size)
                index = (slice(None), cut) if kind == "kernel" else (cut,)
                group = [(n, index) for n in qkv]
                if kind == "kernel":
                    group.append((out, (cut, slice(None))))
                    grouped.add(out)
                groups.append(group)
    return groups + [[full[name]] for name in shapes if name not in grouped]


def merge_tree(w0, w, unit, heads=2):
    """Merge flat dicts of arrays; return cosines and ratios per element, and merged weights."""
    shapes = {name: value.shape for name, value in w0.items()}
    cosine, ratio, merged = ({n: np.full(s, np.nan) for n, s in shapes.items()} for _ in range(3))
    for group in pieces(unit, shapes, heads):
        slices0 = [np.asarray(w0[name], np.float64)[index] for name, index in group]
        slices = [np.asarray(w[name], np.float64)[(slice(None), *index)] for name, index in group]
        flat0 = np.concatenate([x.ravel() for x in slices0])
        flat = np.concatenate([x.reshape(len(x), -1) for x in slices], axis=1)
        c, t, out = equation_3(flat0, flat)
        start = 0
        for (name, index), x in zip(group, slices0, strict=True):
            cosine[name][index], ratio[name][index] = c, t
            merged[name][index] = out[start : start + x.size].reshape(x.shape)
            start += x.size
    return cosine, ratio, merged


def allowed(w0, w, merged):
    """Return the tolerance of a float32 merge: 1 ulp of max(|anchor|, |result|), + 1e-6 |mean d|.

    The first term is the rounding of the result, the second the effect of 1e-6 of ratio.
    """
    w0 = np.asarray(w0, np.float64)
    larger = np.maximum(np.abs(w0), np.abs(merged)).astype(np.float32)
    return np.spacing(larger) + 1e-6 * np.abs(np.asarray(w, np.float64).mean(axis=0) - w0)


def ties(w0, w, keep, scale=1.0, weights=None, *, normalize=True):
    """Algorithm 1 of TIES in float64: sort, elect the sign of the sum, average what agrees with it.

    w0 is [n], w [N, n]. `keep` has the number of elements to keep of each replica. `weights` are
    those of mergekit: factors of the trimmed task vectors, divided by the sum of those that agree
    in sign if `normalize`.
    """
    w0, w = np.asarray(w0, np.float64), np.asarray(w, np.float64)
    weights = np.ones(len(w)) if weights is None else np.asarray(weights, np.float64)
    trimmed = []
    for delta, number in zip(w - w0, keep, strict=True):
        threshold = np.sort(np.abs(delta))[-number]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0.0))
    trimmed = np.stack(trimmed) * weights[:, None]
    merged = np.zeros(w0.shape)
    for p, column in enumerate(trimmed.T):
        agree = column * (1.0 if column.sum() >= 0 else -1.0) > 0
        divisor = weights[agree].sum() if normalize else 1.0
        merged[p] = column[agree].sum() / divisor if agree.any() else 0.0
    return w0 + scale * merged
