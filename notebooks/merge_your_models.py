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
# # Merge your own models
#
# This notebook applies Model Stock to existing checkpoints: a base model and two or more fine-tuned
# versions of it, in safetensors, of any architecture. It first merges files, which needs neither a
# GPU nor memory for the complete models. It then merges arrays with a function call.
# [docs/merging.md](../docs/merging.md) describes every option.

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

BASE = ""  # a directory, a .safetensors file or a hub id; "" creates small example models
FINETUNED = []  # two or more fine-tuned models, given in the same way; or LoRA adapters of BASE
OUT = "runs/merge_your_models/merged"
OVERWRITE = True  # replace OUT if it exists

# %% [markdown]
# ## Example models
#
# If `BASE` is empty, this cell writes three small models in the shape of a language model: a base
# and two fine-tuned models. The update of each fine-tuned model has a common part and an individual
# part. The embedding is frozen, and the updates of norms are almost equal.

# %%
import numpy as np

from modelstock_jax.tensor_files.hub import resolve
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors


def read(model):
    return dict(TensorFiles(resolve(model, ("*.safetensors", "*.json"))))


WIDTH, LAYERS = 64, 4


def small_models(folder):
    shapes = {"model.embed_tokens.weight": (256, WIDTH), "model.norm.weight": (WIDTH,)}
    for k in range(LAYERS):
        layer = f"model.layers.{k}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.up_proj.weight": (4 * WIDTH, WIDTH)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, 4 * WIDTH)}
        shapes |= {f"{layer}.input_layernorm.weight": (WIDTH,)}
    base, shared, *own = (np.random.default_rng(seed) for seed in range(4))

    def draw(rng):
        return {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    w0, common = draw(base), draw(shared)
    models = {"base": w0}
    for k, rng in enumerate(own, 1):
        models[f"finetuned_{k}"] = {
            name: w0[name] + 0.02 * (0.0 if "embed" in name else 1.0) * (
                common[name] + (0.2 if "norm" in name else 1.0) * noise)
            for name, noise in draw(rng).items()
        }  # fmt: skip
    for name, tensors in models.items():
        file = Path(folder, f"{name}.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {name: w.astype(np.float32) for name, w in tensors.items()})
    return [str(Path(folder, f"{name}.safetensors")) for name in models]


if not BASE:
    BASE, *FINETUNED = small_models(Path(OUT).parent)
print(BASE, *FINETUNED)

# %% [markdown]
# ## Compare first
#
# `modelstock compare` measures angles and ratios and writes no model. In a terminal, run
# `modelstock compare BASE FT1 FT2`. An angle of 0° between the updates of two fine-tuned models
# means that they agree completely. An angle of 90° means that they have nothing in common.

# %%
from modelstock_jax.checkpoint_merge.cli import main as modelstock

modelstock(["compare", BASE, *FINETUNED])

# %% [markdown]
# `--dry-run` shows the plan and all errors (different vocabularies, missing tensors, quantized
# weights) at once, before anything is written:

# %%
modelstock(["merge", BASE, *FINETUNED, "--out", OUT, "--dry-run"])

# %% [markdown]
# ## Merge
#
# In a terminal, run `modelstock merge BASE FT1 FT2 --out merged`. The output directory is renamed
# to `OUT` when it is complete. If the merge is interrupted, run the same command again to resume.
# The result is a complete checkpoint with a report, and with the base's config and tokenizer if the
# base has them.

# %%
options = ["--overwrite"] if OVERWRITE else []
modelstock(["merge", BASE, *FINETUNED, "--out", OUT, *options])
print(sorted(file.name for file in Path(OUT).iterdir()))

# %% [markdown]
# ## Read the report
#
# The *outcome* of a tensor says which rule applied:
#
# - *interpolated*: the usual case.
# - *unchanged*: no fine-tuned model changed the tensor. It equals the base's, bit for bit.
# - *clamped to 0*: the updates have no common direction (cosine of 0 or less). The result is the
#   base's tensor.
#
# The *ratio* is the position of the result between the base (0) and the mean (1).

# %%
import json

report = json.loads(Path(OUT, "merge_report.json").read_text())
for row in report["units"][:10]:
    angle = "     -" if row["angle"] is None else f"{row['angle']:5.1f}°"
    print(f"{angle}  t = {row['ratio']:.3f}  {row['outcome']:13} {row['name']}")

# %% [markdown]
# ## Errors
#
# An error is one line. The exit status is 1, and nothing is written. In this example, one element
# of a fine-tuned model is not finite:

# %%
spoiled = {name: np.array(tensor) for name, tensor in read(FINETUNED[0]).items()}
spoiled[max(spoiled)].flat[0] = np.nan
broken = str(Path(OUT).parent / "broken.safetensors")
write_tensors(broken, spoiled)
status = modelstock(["merge", BASE, broken, *FINETUNED[1:], "--out", OUT + "_2"])
print("exit status", status)

# %% [markdown]
# ## As a library
#
# The function `model_stock` does the same for arrays in memory, in any pytree. The command and the
# function share one implementation of the rule, so they give the same weights. PyTorch's kernels
# have their output channels on the first axis: `filter_axis=0`. This option affects only
# `unit="filter"`.

# %%
from modelstock_jax import model_stock, stack_replicas

w0, w = read(BASE), stack_replicas([read(model) for model in FINETUNED])
merged, stats = model_stock(w0, w, filter_axis=0)
written = read(OUT)
print("largest difference:", max(np.abs(merged[name] - written[name]).max() for name in w0))

# %% [markdown]
# ## Compare with other methods
#
# `stats` predicts the distance of each candidate to the center, the mean of infinitely many such
# fine-tuned models, although the center is unknown. The candidates are a single fine-tuned model,
# the mean, and Model Stock. The prediction applies to fine-tuned models that differ only in their
# noise (seed, data order), not to models of different tasks.

# %%
from modelstock_jax import total_distance, uniform_mean, wise_ft

predicted = total_distance(stats)
print(
    f"single fine-tuned model {predicted.replica:.3f}, mean {predicted.mean:.3f}, "
    f"Model Stock {predicted.merged:.3f}"
)
mean, _ = uniform_mean(w0, w)
halfway, halfway_stats = wise_ft(w0, w, 0.5)
print(f"WiSE-FT of the mean, alpha = 0.5: {total_distance(halfway_stats).merged:.3f}")
