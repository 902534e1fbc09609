"""Synthetic but plausible results for the tests of reporting."""

import numpy as np

from modelstock_jax.reporting.tables import make_row

SHIFTS = ["v2", "r", "sketch", "objectnet", "a", "digits"]
HEADINGS = ["IN-V2", "IN-R", "IN-Sketch", "ObjectNet", "IN-A", "digits"]
OFFSETS = np.array([12.0, 4.0, -6.0, -3.0, -14.0, 7.0])


def rows(seeds=(0,), num_replicas=2):
    """Return rows of one run per seed, with accuracies near those of a small CLIP."""
    result = []

    def add(method, seed, id, avg, noise=0.3, **more):
        rng = np.random.default_rng([seed or 0, len(result)])
        shifts = dict(zip(SHIFTS, avg + OFFSETS + noise * rng.normal(size=6), strict=True))
        result.append(
            make_row(method, id=id + noise * rng.normal(), shifts=shifts, seed=seed, **more)
        )

    add("zero_shot", None, 58.8, 46.5, 0, cost=0, distance_to_anchor=0.0, predicted_distance=5.75)
    for seed in seeds:
        for replica in range(num_replicas):
            add(
                "single_model",
                seed,
                67.6,
                36.3,
                0.6,
                cost=1,
                distance_to_anchor=6.7,
                predicted_distance=3.54,
                replica=replica,
            )
        add(
            "uniform_mean",
            seed,
            68.7,
            37.5,
            cost=2,
            distance_to_anchor=6.2,
            predicted_distance=2.5,
            num_replicas=2,
        )
        add("constant_ratio", seed, 71.0, 41.2, cost=2, distance_to_anchor=4.9)
        add(
            "model_stock", seed, 71.4, 41.7, cost=2, distance_to_anchor=4.9, predicted_distance=2.25
        )
        add("periodic_model_stock", seed, 68.9, 41.2, cost=2, distance_to_anchor=5.1)
        for of, id, avg in [("single_model", 67.6, 36.3), ("uniform_mean", 68.7, 37.5)]:
            for alpha in np.arange(1, 10) / 10:
                x = 58.8 + (id - 58.8) * alpha + 22 * alpha * (1 - alpha) * (0.35 + alpha / 3)
                y = 46.5 + (avg - 46.5) * alpha + 14 * alpha * (1 - alpha)
                add(
                    "wise_ft",
                    seed,
                    x,
                    y,
                    0.05,
                    cost=1 if of == "single_model" else 2,
                    alpha=float(alpha),
                    of=of,
                )
    return result


def report(seed=0, num_blocks=4, num_replicas=2, width=96):
    """Return rows like those of `merging.report`."""
    rng = np.random.default_rng(seed)
    names = {
        "image_tower.class_embedding": width,
        "image_tower.patch_embedding.kernel": 108 * width,
        "image_tower.position_embedding": 17 * width,
    }
    for norm in [
        "pre_layernorm",
        *[f"blocks.block_{b:02}" for b in range(num_blocks)],
        "post_layernorm",
    ]:
        if norm.startswith("blocks"):
            for part in ["layer_norm1", "layer_norm2"]:
                names |= {f"image_tower.{norm}.{part}.{leaf}": width for leaf in ("bias", "scale")}
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"]:
                names[f"image_tower.{norm}.self_attn.{part}.kernel"] = width * width
                names[f"image_tower.{norm}.self_attn.{part}.bias"] = width
            for part in ["fc1", "fc2"]:
                names[f"image_tower.{norm}.mlp.{part}.kernel"] = 4 * width * width
                names[f"image_tower.{norm}.mlp.{part}.bias"] = width
        else:
            names |= {f"image_tower.{norm}.{leaf}": width for leaf in ("bias", "scale")}
    names |= {"image_tower.projection.kernel": 64 * width, "head.kernel": 64 * 62, "head.bias": 62}
    result = []
    for number, (name, size) in enumerate(names.items()):
        base = 44 if name.endswith("kernel") or "embedding" in name else 36
        base = 21 if name.endswith("scale") else 90 if "k_proj.bias" in name else base
        base = 12 if name.startswith("head") else base
        angle = base + 3 * np.sin(number) + rng.normal() * (0.4 if size > 999 else 1.6)
        cosine = float(np.cos(np.radians(angle)))
        norms = (
            0.012
            * np.sqrt(size)
            * (1 + 0.3 * np.sin(number))
            * (1 + 0.02 * rng.normal(size=num_replicas))
        )
        ratio = float(np.clip(2 * cosine / (1 + cosine), 0, 1))
        result.append(
            {
                "name": name,
                "unit": name,
                "cosine": cosine,
                "angle": float(angle),
                "ratio": ratio,
                "norms": norms.tolist(),
                "outcome": "merged",
                "size": size,
            }
        )
    return result


def history(num_merges=8, level=None):
    """Return one entry per merge: ratios rise to 1, or stay at `level`."""
    entries = []
    for merge, t in enumerate([0.72, 0.82, 0.89, 0.94, 0.97, 0.985, 0.995, 1.0][:num_merges]):
        t = t if level is None else level + 0.02 * np.sin(merge)
        offsets = {"kernels": 0.0, "biases": 0.04, "norms": 0.07, "head": 0.15}
        ratios = {}
        for kind, offset in offsets.items():
            median = min(1.0, t + offset * (1 - t) * 4)
            ratios[kind] = {
                "median": median,
                "low": median - 0.2 * (1 - median) - 0.01,
                "high": min(1.0, median + 0.15 * (1 - median)),
                "count": 24,
            }
        entries.append({"epoch": merge + 1, "ratios": ratios})
    return entries
