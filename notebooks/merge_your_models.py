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
# Model Stock for checkpoints that exist already: a base model and two or more fine-tunes of it, in
# safetensors, of any architecture. First on files, which needs neither a GPU nor memory for the
# models; then as a function on arrays. [docs/merging.md](../docs/merging.md) has every option.

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

BASE = ""  # a directory, a .safetensors file or a hub id; "" makes small models to look at
FINETUNED = []  # the same of its fine-tunes, two or more; LoRA adapters of BASE too
OUT = "runs/merge_your_models/merged"
OVERWRITE = True  # replace OUT where it exists

# %% [markdown]
# ## Models to look at
#
# Where no models are named above, this writes three small ones in the shape of a language model:
# each fine-tune moved along a way that both share, and along one of its own. The embedding was
# frozen, and norms moved almost alike.

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
# ## Look first
#
# `modelstock compare` measures angles and ratios and writes no model. In a terminal:
# `modelstock compare BASE FT1 FT2`. An angle of 0° between the movements of two fine-tunes means
# that they agree wholly, 90° that they share nothing.

# %%
from modelstock_jax.checkpoint_merge.cli import main as modelstock

modelstock(["compare", BASE, *FINETUNED])

# %% [markdown]
# What would be done, and what stands in the way (other vocabularies, missing tensors, quantised
# weights), all at once and before anything is written:

# %%
modelstock(["merge", BASE, *FINETUNED, "--out", OUT, "--dry-run"])

# %% [markdown]
# ## Merge
#
# In a terminal: `modelstock merge BASE FT1 FT2 --out merged`. `OUT` takes its name when it is
# complete; stopped, the same command goes on. The result is a whole checkpoint with the base's
# config and tokenizer, where it has them, and a report.

# %%
options = ["--overwrite"] if OVERWRITE else []
modelstock(["merge", BASE, *FINETUNED, "--out", OUT, *options])
print(sorted(file.name for file in Path(OUT).iterdir()))

# %% [markdown]
# ## Read the report
#
# The *policy* says which rule a tensor met: `interpolated` is the usual, `undefined` a tensor that
# no fine-tune moved (it stays the base's, bit for bit), `clipped` one on which they disagree. The
# *ratio* is how far the merge goes from the base (0) to the mean (1).

# %%
import json

report = json.loads(Path(OUT, "merge_report.json").read_text())
for row in report["units"][:10]:
    angle = "     -" if row["angle"] is None else f"{row['angle']:5.1f}°"
    print(f"{angle}  t = {row['ratio']:.3f}  {row['outcome']:13} {row['name']}")

# %% [markdown]
# ## What goes wrong is said
#
# A mistake is one line and exit status 1, and nothing is written. Here one number of a fine-tune
# is not finite:

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
# The same on arrays in memory, of any pytree: one rule, defined once, so both give the same
# weights. PyTorch's kernels have their outputs on the first axis, `filter_axis=0`; it matters for
# `unit="filter"` alone.

# %%
from modelstock_jax import model_stock, stack_replicas

w0, w = read(BASE), stack_replicas([read(model) for model in FINETUNED])
merged, stats = model_stock(w0, w, filter_axis=0)
written = read(OUT)
print("largest difference:", max(np.abs(merged[name] - written[name]).max() for name in w0))

# %% [markdown]
# ## Where the other methods lie
#
# `stats` predicts how far each candidate is from the centre of all such fine-tunes, which nobody
# knows: one fine-tune, their mean, and Model Stock. It holds for fine-tunes that differ in their
# noise alone (seed, order of data), not for models of different tasks.

# %%
from modelstock_jax import total_distance, uniform_mean, wise_ft

predicted = total_distance(stats)
print(
    f"one fine-tune {predicted.replica:.3f}, their mean {predicted.mean:.3f}, "
    f"Model Stock {predicted.merged:.3f}"
)
mean, _ = uniform_mean(w0, w)
halfway, given = wise_ft(w0, w, 0.5)
print(f"WiSE-FT of the mean, alpha = 0.5: {total_distance(given).merged:.3f}")
