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
# Two copies of one pretrained model are fine-tuned on a narrow world, and merged layer by layer
# toward the centre of the shell on which fine-tuned weights lie
# ([Jang et al., 2024](https://arxiv.org/abs/2403.19522)). At the end there is a table and a
# figure: what fine-tuning gains, what it loses where images look different, and how much of
# that the merge brings back.
#
# Nothing is downloaded, no GPU is needed: the model is a small true CLIP that comes with the
# package, and the world is rendered characters. On two CPU cores the run takes about four minutes.

# %%
# On Colab this cell fetches the repository and installs it; on your own machine it does neither.
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # Colab only: the git URL of this repository
if "google.colab" in sys.modules and not Path("launch.py").exists():
    assert REPOSITORY, "set REPOSITORY to the git URL of this repository"
    tpu = Path("/dev/vfio/0").exists() or Path("/dev/accel0").exists()
    extra = "[cuda12]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "modelstock_jax"], check=True)
    os.chdir("modelstock_jax")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-e", f".{extra}"], check=True)
os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "launch.py").exists()))
sys.path.insert(0, os.getcwd())

PRETRAINED = "glyph-clip"  # the small CLIP of the package
WORKDIR = "runs/quickstart"
OVERRIDES = {}  # of configs/default.py, such as {"epochs": 2} for a quick look

# %% [markdown]
# ## The world
#
# Training images come from one narrow domain: a few fonts, grey, noisy. The *shifts* show the same
# 62 characters otherwise, in the way that ImageNet's V2, R, Sketch, ObjectNet and A differ from
# ImageNet; `digits` are scans of handwriting.

# %%
import matplotlib.pyplot as plt

from modelstock_jax.data import glyphs

world = glyphs.make_sets(train_size=62, validation_size=1, test_size=62, shift_size=62)
sets = {"training": world.train} | world.shifts
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
# One config file is one experiment; `configs/default.py` explains every option
# ([docs/configuration.md](../docs/configuration.md)). In a terminal the next cell is
# `python launch.py --config=configs/glyphs.py --workdir=runs/quickstart`. Interrupted, the same
# cell goes on where it stopped.

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
# `ID` is accuracy on new images of the training domain; `avg shifts` is the mean over the shifts.
# `to anchor` is the distance from the pretrained weights, `to centre` the distance from the centre
# of all models that could have been trained so, which is predicted from the angle between the two.

# %%
print(Path(WORKDIR, "results.md").read_text())

# %% [markdown]
# ## The figure
#
# Up is robust, right is accurate. One replica lies to the right of the anchor and below it;
# averaging two moves up and right, and Model Stock moves on from the mean toward the anchor, by a
# ratio of its own for each tensor. The grey curve is WiSE-FT, which needs data to choose its
# alpha by.

# %%
import json

from modelstock_jax.reporting import figures

rows = json.loads(Path(WORKDIR, "results.json").read_text())["rows"]
figures.id_against_shifts(rows)

# %% [markdown]
# ## Why each tensor has a ratio of its own
#
# Below is the angle between the two replicas' movements, tensor by tensor. Kernels have moved
# along directions of their own, more than 45° apart: much of that is noise, and the merge takes
# them far back toward the anchor. Biases and norms agree, and stay where fine-tuning brought them.
# The notebook `geometry` shows where the ratio comes from.

# %%
from modelstock_jax.reporting.figures import layer_rows

seed = json.loads(Path(WORKDIR, f"runs/seed_{config.seed}/results.json").read_text())
figures.angle_by_layer(layer_rows([seed["geometry"]]))

# %% [markdown]
# ## Use the merged model
#
# `model/` is a Hugging Face directory with the classifier in `head.safetensors`.

# %%
import numpy as np

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.clip import classifier

merged = checkpoint_io.load(f"{WORKDIR}/model")
images = world.shifts["sketch"].images[:10]
logits = classifier(merged.config)(merged.replica(), merged.preprocessor(images))
print("seen: ", [merged.labels[k] for k in np.argmax(logits, axis=1)])
print("truth:", [merged.labels[k] for k in world.shifts["sketch"].labels[:10]])

# %% [markdown]
# ## Where to go from here
#
# - your own images: `configs/folder.py`; ImageNet: `configs/vitb32.py` and the notebook
#   `tpu_vitl14`
# - checkpoints that you have already, of any model: the notebook `merge_your_models`
# - a training loop of your own: [docs/library.md](../docs/library.md)
# - the mathematics: the notebook `geometry` and [docs/method.md](../docs/method.md)
