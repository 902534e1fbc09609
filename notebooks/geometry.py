# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# ruff: noqa: B018, E402

# %% [markdown]
# # The geometry behind Model Stock
#
# This notebook explains the ratio t of the merge. It fine-tunes a few copies of a small CLIP and
# measures three things: the angles between their updates, the thin shell around their center, and
# the point of their span that is closest to the center. Section and equation numbers are those of
# [the paper](https://arxiv.org/abs/2403.19522). [docs/method.md](../docs/method.md) contains the
# derivation. On two CPU cores the notebook takes about a minute.

# %%
# On Colab, this cell clones and installs the repository. On your own machine, it does neither.
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # Colab only: the git URL of this repository
if "google.colab" in sys.modules and not Path("launch.py").exists():
    assert REPOSITORY, "set REPOSITORY to the git URL of this repository"
    tpu = Path("/dev/vfio/0").exists() or Path("/dev/accel0").exists()
    extra = "[cuda12]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else "[cpu]"
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "modelstock_jax"], check=True)
    os.chdir("modelstock_jax")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-e", f".{extra}"], check=True)
os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "launch.py").exists()))
sys.path.insert(0, os.getcwd())

PRETRAINED = "glyph-clip"  # the small CLIP of the package
MODELS = 6  # number of fine-tuned copies; at least 6
STEPS, BATCH, LEARNING_RATE = 32, 32, 2e-3
TRAIN_SIZE = 4096
FIGURES = ""  # a directory to write the figures to

# %% [markdown]
# ## Fine-tune a few models
#
# All models start from the same weights w0. They differ only in the order and the augmentation of
# their images. `anchor` is a pytree, and `models` is the same tree with a leading axis.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.glyphs import CLASS_NAMES, TEMPLATES
from modelstock_jax.data.glyphs.sets import training_set
from modelstock_jax.experiment.setup import open_pretrained
from modelstock_jax.models.model import classifier
from modelstock_jax.models.zero_shot import zero_shot_head

checkpoint = open_pretrained(PRETRAINED)
apply, train = classifier(checkpoint.config), training_set(size=TRAIN_SIZE)
anchor = {
    "image_tower": checkpoint.params["image_tower"],
    "head": zero_shot_head(checkpoint, CLASS_NAMES, TEMPLATES),
}
tx = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=0.1)


def loss(params, images, labels):
    logits = apply(params, checkpoint.preprocessor(images))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def finetune(key, images, labels):
    def step(carry, key):
        params, opt_state = carry
        rows, view = jax.random.split(key)
        chosen = jax.random.choice(rows, len(labels), (BATCH,), replace=False)
        augmented = shift_and_jitter(view, images[chosen])
        grads = jax.grad(loss)(params, augmented, labels[chosen])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    start = jax.tree.map(jnp.asarray, anchor)
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, STEPS))
    return params


keys = jax.random.split(jax.random.key(0), MODELS)
each = [finetune(key, train.images, train.labels) for key in keys]
models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

# %% [markdown]
# ## Observation 1: angles and norms are constants of the layer
#
# d_i = w_i − w0 is the update (task vector) of model i. For each tensor, the next figure shows the
# angle between the updates of two models, over all pairs, and the length of the updates. The black
# lines are standard deviations. The angle differs by tens of degrees between layers, and hardly
# between pairs. This is equation 1: d_i · d_j is l² for i = j and l² cos θ otherwise. The updates
# of kernels have less in common than those of biases and norms. Key biases receive no gradient
# (softmax is shift-invariant); their updates are noise.

# %%
from modelstock_jax.merging import angle, cosines, model_stock, norms, report
from modelstock_jax.reporting import figures


def figure_path(name):
    return Path(FIGURES, f"geometry_{name}.png") if FIGURES else None


_, stats = model_stock(anchor, models)
pairs = np.triu_indices(MODELS, 1)
angles = [np.asarray(angle(c))[pairs].tolist() for c in jax.tree.leaves(cosines(anchor, models))]
lengths = [np.asarray(n) for n in jax.tree.leaves(norms(anchor, models))]
sizes = [leaf.size for leaf in jax.tree.leaves(anchor)]
layers = [
    {"name": row["name"], "angles": a, "rms": n / size**0.5}
    for row, a, n, size in zip(report(stats), angles, lengths, sizes, strict=True)
]
figures.angle_by_layer(layers, figure_path("angles"))

# %% [markdown]
# ## Why they are constants: many dimensions
#
# Let every update consist of a common part μ and noise: d_i = μ + e_i. In many dimensions, two
# noise vectors are nearly orthogonal to each other and to every other vector, and all noise vectors
# have nearly the same length (section 2.3: concentration of measure). The figure shows pairs of
# Gaussian noise vectors in n dimensions.

# %%
from modelstock_jax.reporting.style import BLACK, BLUE, GRAY, GREEN, SKY, VERMILION, draw

rng, dimensions = np.random.default_rng(0), (3, 30, 300, 3_000)
noises = [rng.standard_normal((2, 400, n), np.float32) / n**0.5 for n in dimensions]


def concentration(figure):
    left, right = figure.subplots(1, 2)
    for (a, b), n, shade in zip(noises, dimensions, (GRAY, SKY, BLUE, VERMILION), strict=True):
        length = np.linalg.norm(a, axis=1)
        between = angle((a * b).sum(1) / length / np.linalg.norm(b, axis=1))
        style = dict(bins=60, histtype="step", lw=1.8, color=shade, label=f"n = {n:,}", log=True)
        left.hist(length, range=(0, 2), **style)
        right.hist(between, range=(0, 180), **style)
    left.set_xlabel("length of a noise vector / expected length")
    right.set_xlabel("angle between two noise vectors (degrees)")
    left.legend(loc="upper left")


draw(concentration, (8.6, 3.2), figure_path("concentration"))

# %% [markdown]
# ## The thin shell, and the distance to its center
#
# The center of such models is w0 + μ. The difference between a model and the center is the noise of
# this model. It has three properties:
#
# - (i) All models have the same distance to the center: they are on a thin shell.
# - (ii) The noise is orthogonal to the vector from w0 to the center.
# - (iii) The noise vectors of two models are orthogonal to each other.
#
# The center is estimated from models other than the measured ones, because the mean of a few models
# is closer to these models than the true center is.
#
# Squared lengths of orthogonal noise vectors add up. The mean of N models therefore has the
# distance l √((1 − cos θ) / N) to the center. In the figure, the curve is predicted from the angle
# between two models alone. Each point is a mean of N models. Its distance is measured to the mean
# of all other models. That mean is not exactly at the center, so the measurement is corrected for
# its distance to the center.

# %%
from modelstock_jax.merging import thin_shell, total_distance
from studies.figures import distances

shell = thin_shell(anchor, models)
print(f"distance from w0 to the center: {float(shell.center):.2f}")
for what, values, unit in (
    ("(i)   distance from a model to the center", shell.radius, ""),
    ("(ii)  angle at the center between w0 and a model", angle(shell.anchor_cosine), "°"),
    ("(iii) and between two models", angle(np.asarray(shell.pair_cosine)[pairs]), "°"),
):
    print(f"{what}: {np.mean(values):.2f}{unit} ± {np.std(values):.2f}")


def as_points(trees, count=1):
    """Return each model as one vector."""
    leaves = (np.asarray(leaf, float).reshape(count, -1) for leaf in jax.tree.leaves(trees))
    return np.concatenate(list(leaves), axis=1)


points, one = as_points(models, MODELS), total_distance(stats).replica


def distance_to_center(point, held_out):
    """Estimate the distance to the center from models that are not part of the point."""
    square = np.sum((point - points[held_out].mean(axis=0)) ** 2) - one**2 / len(held_out)
    return max(0.0, square) ** 0.5


measured = {
    n: [
        distance_to_center(points[order[:n]].mean(axis=0), order[n:])
        for order in (np.roll(np.arange(MODELS), k) for k in range(MODELS))
    ]
    for n in range(1, MODELS - 2)
}
distances(measured, one, figure_path("approach"))

# %% [markdown]
# ## The angle of two models gives the ratio of the closest point
#
# Consider the line from w0 to the mean w₁₂ of two models, w0 + t (w₁₂ − w0). For every t, the
# figure shows the distance from the point on this line to the center. The center is estimated by
# the mean of the models that are not on the line. The three tensors have a small, a medium and a
# large angle. A star marks t = 2 cos θ / (1 + cos θ) of equation 2, which uses only the angle of
# the two models: Model Stock. A bar marks the smallest measured distance.

# %%
from modelstock_jax.reporting.style import handle, mark

pair, others = (jax.tree.map(lambda w, k=k: w[k], models) for k in (slice(0, 2), slice(2, None)))
merged, stats = model_stock(anchor, pair)
found = report(stats)
names = [row["name"].removeprefix("image_tower.") for row in found]
kernels = [k for k, row in enumerate(found) if sizes[k] > 1000 and row["cosine"] > 0]
by_angle = sorted(kernels, key=lambda k: found[k]["angle"])
chosen = [by_angle[0], by_angle[len(by_angle) // 2], by_angle[-1]]


def sweep(figure):
    t, lines = np.linspace(0, 1.1, 111), ((BLUE, "-"), (BLACK, "--"), (GREEN, "-."))
    axes = figure.subplots()
    bar = dict(ls="none", marker="|", color=BLACK, ms=12, mew=1.5)
    for k, (shade, dashes) in zip(chosen, lines, strict=True):
        w0, w, center = (np.asarray(jax.tree.leaves(x)[k], float) for x in (anchor, pair, others))
        step, aim = w.mean(0) - w0, center.mean(0) - w0
        square = t**2 * (step**2).sum() - 2 * t * (step * aim).sum() + (aim**2).sum()
        distance = np.sqrt(square / (aim**2).sum())
        star = found[k]["ratio"]
        label = f"{names[k]}, θ = {found[k]['angle']:.0f}°"
        axes.plot(t, distance, dashes, color=shade, lw=2, label=label)
        axes.plot(star, np.interp(star, t, distance), **mark("model_stock"))
        axes.plot(t[distance.argmin()], distance.min(), **bar, zorder=5)
    axes.plot([], [], **bar, label="smallest measured distance")
    axes.set_xlabel("t: from the anchor (0) to the mean of two models (1)")
    axes.set_ylabel("distance to the center,\nas a fraction of the anchor's")
    curves, _ = axes.get_legend_handles_labels()
    stock = handle("model_stock", "Model Stock, from the angle")
    figure.legend(handles=[*curves, stock], loc="outside lower center", ncols=2, fontsize=8)


draw(sweep, (7.2, 4.4), figure_path("sweep"))

# %% [markdown]
# The next figure draws the same merge as a triangle, with true lengths and angles (the paper's
# Figure 6). The upper row shows w₁, w₂, their mean w₁₂, and the merged weights w_H. The lower row
# shows the same merge from the side: w_H is the foot of the perpendicular from the center μ. With a
# small angle, w_H is near the mean. With a large angle, it is near the anchor.

# %%
from studies.catalog.fig6_7 import triangle
from studies.figures import triangles

small_and_large = {names[k]: triangle(found[k]["angle"], found[k]["norms"]) for k in chosen[:2]}
triangles(small_and_large, figure_path("triangles"))

# %% [markdown]
# ## The ratio, for any number of models
#
# Equation 3 is t = N cos θ / (1 + (N − 1) cos θ). t is the fraction of the mean's squared length
# that is common update and not noise. More models therefore need less shrinkage. At 90° the updates
# have nothing in common, and the merge is the anchor for any number of models. The dots are the
# tensors of this notebook, with N = 2.

# %%
from studies.figures import ratios

angle_and_ratio = [(row["angle"], row["ratio"]) for row in found if row["angle"] is not None]
ratios(angle_and_ratio, figure_path("ratio"))

# %% [markdown]
# ## Predicted and measured distances
#
# The last cell prints distances of the complete model to the center. The prediction comes from the
# merge of two models. The measurement is the distance to the mean of the other models, corrected
# for that mean's own distance to the center.

# %%
expected = total_distance(stats)
for name, point, predicted in (
    ("one model", points[0], expected.replica),
    ("their mean", points[:2].mean(axis=0), expected.mean),
    ("Model Stock", as_points(merged)[0], expected.merged),
    ("the anchor", as_points(anchor)[0], float(shell.center)),
):
    measured = distance_to_center(point, np.arange(2, MODELS))
    print(f"{name:12} predicted {predicted:6.3f}   measured {measured:6.3f}")
