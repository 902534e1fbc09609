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
# # Model Stock in ten minutes
#
# This notebook fine-tunes two copies of a pretrained model with different seeds and averages them.
# Model Stock ([Jang et al., 2024](https://arxiv.org/abs/2403.19522)) then pulls the average back
# toward the pretrained weights, layer by layer, by a ratio computed from the angle between the two
# updates. The result is a table and a figure. They show what fine-tuning gains, what it loses on
# images that look different, and how much of this loss the merge recovers.
#
# The notebook needs no download and no GPU. The model is a small CLIP that ships with the package,
# and the images are rendered characters. On two CPU cores the run takes about four minutes.

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
WORKDIR = "runs/quickstart"
OVERRIDES = {}  # options of configs/default.py, e.g. {"epochs": 2} for a shorter run

# %% [markdown]
# ## The synthetic benchmark
#
# The training images come from one narrow domain: a few fonts, gray, noisy. The out-of-distribution
# (OOD) test sets show the same 62 characters in other ways. They differ from the training images as
# ImageNet-V2, -R, -Sketch, ObjectNet and ImageNet-A differ from ImageNet. `digits` contains scans
# of handwriting.

# %%
import matplotlib.pyplot as plt

from modelstock_jax.data import glyphs

benchmark = glyphs.make_sets(train_size=62, validation_size=1, test_size=62, shift_size=62)
sets = {"training": benchmark.train} | benchmark.shifts
figure, axes = plt.subplots(len(sets), 10, figsize=(7, 0.8 * len(sets)))
for row, (name, images) in zip(axes, sets.items(), strict=True):
    for axis, image in zip(row, images.images[::6], strict=False):
        axis.imshow(image)
    row[0].set_title(name, loc="left", fontsize=8)
    for axis in row:
        axis.set_axis_off()

# %% [markdown]
# ## Train, merge, measure
#
# Each experiment has one config file. `configs/default.py` explains every option
# ([docs/configuration.md](../docs/configuration.md)). The next cell does the same as
# `python launch.py --config=configs/glyphs.py --workdir=runs/quickstart` in a terminal. If it is
# interrupted, run the cell again to resume.

# %%
from configs import glyphs as demo
from modelstock_jax.experiment import run

config = demo.get_config()
config.pretrained = PRETRAINED
config.update_from_flattened_dict(OVERRIDES)
run(config, WORKDIR)

# %% [markdown]
# ## The table
#
# - `ID` is the accuracy on new images of the training domain.
# - `avg. shifts` is the mean accuracy over the OOD sets. `IN-V2`, `IN-R`, `IN-A`, `IN-Sketch` and
#   `ObjectNet` are the synthetic counterparts of the ImageNet sets.
# - "(exported)" marks the model in `model/`.
# - `L2 distance to anchor` is the distance to the pretrained weights.
# - `predicted distance to center` is the distance to the center, the mean of infinitely many models
#   trained in this way. It is predicted from the angle between the two updates.

# %%
print(Path(WORKDIR, "results.md").read_text())

# %% [markdown]
# ## The figure
#
# The horizontal axis is ID accuracy, the vertical axis is OOD accuracy. A single fine-tuned model
# is to the right of the anchor and below it. The mean of two is further up and to the right. Model
# Stock moves from the mean toward the anchor, with a separate ratio for each tensor. The gray curve
# is WiSE-FT, which needs data to choose its alpha.

# %%
import json

from modelstock_jax.reporting import figures

rows = json.loads(Path(WORKDIR, "results.json").read_text())["rows"]
figures.id_against_shifts(rows)

# %% [markdown]
# ## Why each tensor has a separate ratio
#
# The figure shows the angle between the updates of the two replicas, per tensor. The updates of
# kernels are more than 45° apart. Much of them is noise, so the merge pulls kernels far back toward
# the anchor. The updates of biases and norms agree, so the merge keeps most of them. The notebook
# `geometry` explains the ratio.

# %%
from modelstock_jax.reporting.figures import layer_rows

seed = json.loads(Path(WORKDIR, f"runs/seed_{config.seed}/results.json").read_text())
figures.angle_by_layer(layer_rows([seed["geometry"]]))

# %% [markdown]
# ## Use the merged model
#
# `model/` is a Hugging Face directory. It stores the classifier in `head.safetensors`.

# %%
import numpy as np

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.model import classifier

merged = checkpoint_io.load(f"{WORKDIR}/model")
images = benchmark.shifts["sketch"].images[:10]
logits = classifier(merged.config)(merged.replica(), merged.preprocessor(images))
print("seen: ", [merged.labels[k] for k in np.argmax(logits, axis=1)])
print("truth:", [merged.labels[k] for k in benchmark.shifts["sketch"].labels[:10]])

# %% [markdown]
# ## Next steps
#
# - Train on your own images: `configs/folder.py`.
# - Train on ImageNet: `configs/vitb32.py` and the notebook `tpu_vitl14`.
# - Merge existing checkpoints of any model: the notebook `merge_your_models`.
# - Use your own training loop: [docs/library.md](../docs/library.md).
# - Read the mathematics: the notebook `geometry` and [docs/method.md](../docs/method.md).
