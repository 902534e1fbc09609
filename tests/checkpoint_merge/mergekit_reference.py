"""Outputs of mergekit 0.1.5 for a tiny base and three fine-tunes, one per recipe.

To generate `mergekit_reference.safetensors`, which contains the inputs and all outputs:

    MERGEKIT_PYTHON=/path/to/env/bin/python python -m tests.checkpoint_merge.mergekit_reference

mergekit runs in its own environment; the tests need neither mergekit nor torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.small import LLAMA, llama_shapes

FILE = Path(__file__).with_suffix(".safetensors")
CONFIG = LLAMA | {"num_hidden_layers": 1}
MODELS = ("base", "ft1", "ft2", "ft3")


def _recipe(method: str, models: dict[str, dict], base: str | None = "base", **parameters) -> dict:
    entries = [{"model": m, **({"parameters": p} if p else {})} for m, p in models.items()]
    recipe = {"merge_method": method, "models": entries, "dtype": "float32"}
    recipe |= {"base_model": base} if base else {}
    return recipe | ({"parameters": parameters} if parameters else {})


RECIPES = {
    "model_stock_2": _recipe("model_stock", {"ft1": {}, "ft2": {}}),
    "model_stock_3": _recipe("model_stock", {"ft1": {}, "ft2": {}, "ft3": {}}),
    "linear": _recipe("linear", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}, base=None),
    "task_arithmetic": _recipe(
        "task_arithmetic", {"ft1": {"weight": 0.7}, "ft2": {"weight": 0.4}}, **{"lambda": 0.9}
    ),
    "ties": _recipe(
        "ties",
        {"ft1": {"weight": 0.7, "density": 0.5}, "ft2": {"weight": 0.4, "density": 0.3}},
        normalize=True,
    ),
    "slerp": _recipe("slerp", {"base": {}, "ft1": {}}, t=0.3),
}


def write_inputs(folder: Path, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    """Write each model to a directory with its name."""
    for model in MODELS:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(CONFIG))
        write_tensors(folder / model / "model.safetensors", tensors[model])


def write_recipe(folder: Path, name: str) -> Path:
    """Write a recipe with absolute paths of the models."""
    recipe = json.loads(json.dumps(RECIPES[name]))
    for model in recipe["models"]:
        model["model"] = str(folder / model["model"])
    if "base_model" in recipe:
        recipe["base_model"] = str(folder / recipe["base_model"])
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML too.
    return path


def load() -> dict[str, dict[str, np.ndarray]]:
    """Return the stored inputs and outputs by name."""
    stored, models = TensorFiles(FILE), {}
    for key in stored:
        model, name = key.split("/", 1)
        models.setdefault(model, {})[name] = stored[key]
    return models


def _random_models() -> dict[str, dict[str, np.ndarray]]:
    """Return float32 models whose updates have cosines near 0.7, so all ratios are in (0, 1)."""
    rng = np.random.default_rng(0)
    models: dict[str, dict[str, np.ndarray]] = {model: {} for model in MODELS}
    for name, shape in llama_shapes().items():
        if ".layers.1." in name:
            continue
        base, common = rng.standard_normal((2, *shape))
        models["base"][name] = (0.5 * base).astype(np.float32)
        for model in MODELS[1:]:
            update = 0.02 * (common + 0.6 * rng.standard_normal(shape))
            models[model][name] = (models["base"][name] + update).astype(np.float32)
    return models


def run_mergekit(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Return the output of a recipe from the mergekit in the environment of MERGEKIT_PYTHON."""
    command = [
        os.path.abspath(os.environ["MERGEKIT_PYTHON"]),
        "-m",
        "mergekit.scripts.run_yaml",
        write_recipe(folder, name),
        folder / f"mergekit_{name}",
        "--no-copy-tokenizer",
    ]
    # Its environment must not import modules of this one.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"mergekit failed:\n{done.stderr}")
    return dict(TensorFiles(folder / f"mergekit_{name}"))


def main() -> None:
    """Generate the file."""
    models = _random_models()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, models)
        for name in RECIPES:
            models[name] = run_mergekit(folder, name)
    write_tensors(
        FILE, {f"{m}/{n}": x for m, tensors in models.items() for n, x in tensors.items()}
    )


if __name__ == "__main__":
    main()
