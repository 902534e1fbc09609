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
# This notebook fine-tunes two copies of CLIP ViT-L/14 on ImageNet and merges them at the end of
# every epoch. For this run, the paper reports 87.0 % on ImageNet and an average of 71.6 % on the
# out-of-distribution (OOD) sets. With strong augmentation it reports 87.7 % on ImageNet
# ([Jang et al., 2024](https://arxiv.org/abs/2403.19522), Table 4). **These results have not been
# reproduced with this code yet**. [docs/reproduce.md](../docs/reproduce.md) lists what was checked.
#
# You need ImageNet and its OOD sets on a disk
# ([docs/train_on_imagenet.md](../docs/train_on_imagenet.md)), an accelerator, and time. The next
# cell contains all settings. Nothing is trained until you set `TRAIN` to True.

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

CONFIG = "vitl14"  # or vitb16, vitb32: less memory and time
SETUP = "plain"  # 'strong': 16 epochs with strong augmentation, marked by an asterisk in the paper
PRETRAINED = ""  # a directory that contains the model; "" downloads OpenAI's from the hub
DATA = "/content/imagenet"
WORKDIR = "runs/vitl14"  # on Colab, use a folder of a mounted drive: it outlives the machine
TRAIN = False
# Options of configs/default.py. To reduce memory: gradient accumulation
# {"gradient_accumulation_steps": 4}, rematerialization {"compute.remat": True}, or one replica at
# a time {"compute.replica_mode": "map"}.
OVERRIDES = {}

# %% [markdown]
# ## Available devices

# %%
import jax

for device in jax.devices():
    print(device.platform, device.device_kind)
if jax.default_backend() == "cpu":
    print("no accelerator: choose one under Runtime > Change runtime type")

# %% [markdown]
# ## The experiment
#
# In a terminal, run `python launch.py --config=configs/vitl14.py --config.data.root=DIR`.
# `configs/imagenet.py` states the source of each value: the paper or another source.

# %%
import importlib

config = importlib.import_module(f"configs.{CONFIG}").get_config(SETUP)
config.pretrained = PRETRAINED or config.pretrained
config.data.root = DATA
config.update_from_flattened_dict(OVERRIDES)
print(config.optimizer)

# %% [markdown]
# ## Memory, and missing inputs
#
# The next cell compiles the training step and the merge for the available devices, without
# allocating weights. If *peak of a step* exceeds the memory of a device, see `OVERRIDES` above. The
# list of missing inputs says how to fix each of them.

# %%
from modelstock_jax import UserError, experiment

missing = experiment.dry_run(config, WORKDIR)

# %% [markdown]
# ## Train
#
# If the run is interrupted, by you or by the end of the Colab session, run the same cells again.
# They resume from the last checkpoint; at most `config.checkpoint.save_every_steps` steps are lost.
# During training, `WORKDIR` receives `metrics.jsonl` and TensorBoard files.

# %%
if TRAIN and not missing:
    try:
        experiment.run(config, WORKDIR)
    except UserError as error:  # one line that says what is wrong and how to fix it
        print("error:", error)
else:
    print("not training:", "; ".join(missing) or "TRAIN is False")

# %% [markdown]
# ## Results
#
# The table can also contain rows that merge once, after training. They need the same two replicas
# trained without merging: set `OVERRIDES = {"compare": True}`, which trains two more replicas.

# %%
table = Path(WORKDIR, "results.md")
print(table.read_text() if table.exists() else "no results yet")

# %% [markdown]
# ## The merged model
#
# `WORKDIR/model` is a Hugging Face directory, which also contains the classifier. The next cell
# evaluates the model on all sets again. It works for any other CLIP, too.

# %%
model = Path(WORKDIR, "model")
if model.exists():
    print(sorted(file.name for file in model.iterdir()))
    experiment.evaluate_checkpoint(config, str(model))
