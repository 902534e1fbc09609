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
# # The paper's main run: CLIP ViT-L/14 on ImageNet, on a TPU or a GPU
#
# Two copies of CLIP ViT-L/14 are fine-tuned on ImageNet and merged at every epoch's end; the paper
# reports 87.0 % on ImageNet and 71.6 % on the shifts for it, and 87.7 % with strong augmentation
# ([Jang et al., 2024](https://arxiv.org/abs/2403.19522), Table 4). **It has not been reproduced
# with this code yet**: [docs/reproduce.md](../docs/reproduce.md) says what was checked.
#
# You need ImageNet and its shifts on a disk
# ([docs/train_on_imagenet.md](../docs/train_on_imagenet.md)), an accelerator, and time. Everything
# that has to be chosen stands in the next cell; until `TRAIN` is True nothing is trained.

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

CONFIG = "vitl14"  # or vitb16, vitb32: less memory, and less time
SETUP = "plain"  # 'strong': 16 epochs with strong augmentation, the paper's asterisk
PRETRAINED = ""  # a directory that holds the model; "" fetches OpenAI's from the hub
DATA = "/content/imagenet"
WORKDIR = "runs/vitl14"  # on Colab a folder of a mounted drive: what is there outlives the machine
TRAIN = False
# Options of configs/default.py. Where memory is short: smaller parts of a batch, one after the
# other, {"accumulate_steps": 4}; activations computed again, {"compute.remat": True}; one replica
# at a time, {"compute.execution": "map"}.
OVERRIDES = {}

# %% [markdown]
# ## What there is to train on

# %%
import jax

for device in jax.devices():
    print(device.platform, device.device_kind)
if jax.default_backend() == "cpu":
    print("no accelerator: choose one under Runtime > Change runtime type")

# %% [markdown]
# ## The experiment
#
# In a terminal: `python launch.py --config=configs/vitl14.py --config.data.root=DIR`. Where each
# value comes from, the paper or elsewhere, is said in `configs/imagenet.py`.

# %%
import importlib

config = importlib.import_module(f"configs.{CONFIG}").get_config(SETUP)
config.pretrained = PRETRAINED or config.pretrained
config.data.root = DATA
config.update_from_flattened_dict(OVERRIDES)
print(config.optimizer)

# %% [markdown]
# ## What it takes, and what is missing
#
# The step and the merge are compiled for the devices at hand, and no weight is allocated. If
# *peak of a step* is more than a device has, see `OVERRIDES` above. Each line of what is missing
# says the way out.

# %%
from modelstock_jax import UserError, experiment

missing = experiment.dry_run(config, WORKDIR)

# %% [markdown]
# ## Train
#
# Interrupted, by you or by the end of the session, the same cells go on from the last checkpoint:
# `config.checkpoint.every` steps are lost at most. `metrics.jsonl` and TensorBoard files in
# `WORKDIR` are written as it goes.

# %%
if TRAIN and not missing:
    try:
        experiment.run(config, WORKDIR)
    except UserError as error:  # One line that names the thing and the way out.
        print("error:", error)
else:
    print("not training:", "; ".join(missing) or "TRAIN is False")

# %% [markdown]
# ## Results
#
# The rows that merge once after training are made of the same two replicas trained apart; set
# `OVERRIDES = {"compare": True}` for them. That trains two more replicas.

# %%
table = Path(WORKDIR, "results.md")
print(table.read_text() if table.exists() else "no results yet")

# %% [markdown]
# ## The merged model
#
# `WORKDIR/model` is a Hugging Face directory with the classifier beside it. To measure it, or any
# other CLIP, on all sets again:

# %%
model = Path(WORKDIR, "model")
if model.exists():
    print(sorted(file.name for file in model.iterdir()))
    experiment.evaluate_checkpoint(config, str(model))
