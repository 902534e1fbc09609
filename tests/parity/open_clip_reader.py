"""Read checkpoints with OpenCLIP: `python open_clip_reader.py SITE WORK`.

OpenCLIP wants torchvision, which it needs for neither towers nor weights: an empty one stands in,
in this process alone. In: WORK/inputs.npz and directories. Out: WORK/features.npz and shapes.json.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

SITE, WORK = sys.argv[1:]
sys.path.insert(0, SITE)
PUBLISHED = [
    *("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"),
    *("ViT-L-14-336-quickgelu", "ViT-bigG-14"),
]


class Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
    module = sys.modules[f"torchvision{name}"] = Empty(f"torchvision{name}")
    module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(module.__name__, None)
    parent, _, last = module.__name__.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
for name in ("InterpolationMode",):
    setattr(sys.modules["torchvision.transforms"], name, type(name, (), {"BICUBIC": "bicubic"}))

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
from open_clip.model import CLIP, build_model_from_openai_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def shapes(config: dict) -> dict[str, list[int]]:
    """Names and shapes of a model that is not run."""
    with torch.device("meta"):
        return {name: list(value.shape) for name, value in CLIP(**config).state_dict().items()}


def features(model, inputs) -> list[np.ndarray]:
    """Return features of images and texts."""
    images = torch.from_numpy(np.ascontiguousarray(inputs["images"].transpose(0, 3, 1, 2)))
    with torch.no_grad():
        found = model.encode_image(images), model.encode_text(torch.from_numpy(inputs["ids"]))
    return [x.numpy() for x in found]


def main() -> None:
    work, found = Path(WORK), {}
    inputs = np.load(work / "inputs.npz")
    for directory in sorted(work.glob("open_clip_*")):
        model = open_clip.create_model(f"local-dir:{directory}", precision="fp32").eval()
        save_file(model.state_dict(), work / f"{directory.name}.safetensors")
        found[f"{directory.name}/image"], found[f"{directory.name}/text"] = features(model, inputs)
    # Sizes inferred by OpenAI's code; through half precision and back.
    state = load_file(work / "openai" / "model.safetensors")
    half = build_model_from_openai_state_dict(state, cast_dtype=torch.float16)
    save_file(half.state_dict(), work / "half.safetensors")
    found["half/image"], found["half/text"] = features(half.float().eval(), inputs)
    np.savez(work / "features.npz", **found)
    configs = {name: open_clip.get_model_config(name) for name in PUBLISHED}
    published = {name: {"config": c, "shapes": shapes(c)} for name, c in configs.items()}
    (work / "shapes.json").write_text(json.dumps(published))


if __name__ == "__main__":
    main()
