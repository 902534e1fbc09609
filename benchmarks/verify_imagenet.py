"""Accuracy of CLIP ViT-B/32 on ImageNet and five shifts, compared with the published numbers.

    make verify-imagenet DATA=DIR                                       # zero-shot
    make verify-imagenet DATA=DIR ARGS="--fine_tuned ft1.safetensors ft2.safetensors"

Zero-shot accuracy is compared with the paper's Table 2. With the two models that the authors
released (docs/reproduce.md, steps 1 and 2, says how to get their safetensors), they are merged with
the authors' unit and compared with the table in docs/reproduce.md. Needs ImageNet and its shifts in
DIR (docs/train_on_imagenet.md; no training images), and CLIP's weights from the hub or a
directory. An accuracy agrees if it differs by at most 0.1 points, 50 of ImageNet's 50,000 images:
room for rounding, too little for another preprocessing, prompt, class mapping or ratio. Exit
status 1 if one does not agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.turns import table  # noqa: E402
from configs import vitb32  # noqa: E402
from modelstock_jax import model_stock, stack_replicas  # noqa: E402
from modelstock_jax.data.imagenet import CLASS_NAMES, TEMPLATES  # noqa: E402
from modelstock_jax.errors import UserError  # noqa: E402
from modelstock_jax.experiment import evaluate_checkpoint  # noqa: E402
from modelstock_jax.models import checkpoint_io  # noqa: E402
from modelstock_jax.models.zero_shot import zero_shot_head  # noqa: E402

TOLERANCE = 0.1
# Table 2 of the paper, and the table in docs/reproduce.md (mean: over the five shifts).
ZERO_SHOT = {"ImageNet": 63.34, "mean": 48.51}
MERGED = {
    "ImageNet": 79.67,
    "v2": 69.22,
    "sketch": 47.18,
    "r": 67.24,
    "objectnet": 47.28,
    "a": 32.52,
    "mean": 52.69,
}


def merge(
    base: str, fine_tuned: Sequence[str], out: Path, class_names: Sequence[str], templates: Any
) -> None:
    """Write the Model Stock merge of models in the format of Model Soups (paper, Equation 3).

    Args:
      base: directory or hub id of the model that was fine-tuned
      fine_tuned: one file of image tower and head per model
      out: directory to create
      class_names: classes of the zero-shot head, the anchor of the heads
      templates: its prompts
    """
    clip = checkpoint_io.load(base)
    head = zero_shot_head(clip, class_names, templates, allow_repeats=True)
    anchor = {"image_tower": clip.params["image_tower"], "head": head}
    replicas = [checkpoint_io.load(name, base=clip).replica() for name in fine_tuned]
    merged, _ = model_stock(anchor, stack_replicas(replicas), unit="layer")
    checkpoint_io.save(out, clip.with_replica(jax.tree.map(np.asarray, merged), class_names))


def compare(title: str, row: dict[str, Any], published: dict[str, float]) -> bool:
    """Print accuracies next to the published ones; return whether all agree."""
    ours = {"ImageNet": row["id"], "mean": row["avg_shifts"]} | row["shifts"]
    rows = [
        {
            "dataset": name,
            "published": f"{accuracy:.2f}",
            "ours": f"{ours[name]:.2f}",
            "difference": f"{ours[name] - accuracy:+.2f}",
        }
        for name, accuracy in published.items()
    ]
    agree = all(abs(ours[name] - accuracy) <= TOLERANCE for name, accuracy in published.items())
    print(f"\n{title}: {'agrees' if agree else 'DIFFERS'} (tolerance {TOLERANCE} points)\n")
    print(table(rows))
    return agree


def verify(
    config: ConfigDict,
    fine_tuned: Sequence[str] = (),
    class_names: Sequence[str] = CLASS_NAMES,
    templates: Sequence[str] = TEMPLATES,
) -> bool:
    """Evaluate zero-shot and, if there are fine-tuned models, their merge.

    Args:
      config: options with the data and, in `pretrained`, the CLIP
      fine_tuned: the authors' models as safetensors
      class_names: see `merge`
      templates: see `merge`

    Raises:
      UserError: a file is missing; found before the evaluation, which takes long
    """
    for name in fine_tuned:
        if not Path(name).is_file():
            raise UserError(f"--fine_tuned: no file {name}; docs/reproduce.md says how to get it")
    row = evaluate_checkpoint(config, config.pretrained)
    agree = compare("Zero-shot", row, ZERO_SHOT)
    if fine_tuned:
        with tempfile.TemporaryDirectory() as directory:
            merged = Path(directory) / "merged"
            merge(config.pretrained, fine_tuned, merged, class_names, templates)
            row = evaluate_checkpoint(config, str(merged))
        agree &= compare("The authors' models, merged", row, MERGED)
    return agree


def main(argv: list[str] | None = None) -> None:
    """Verify; user errors are one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="as --config.data.root")
    parser.add_argument("--fine_tuned", nargs=2, default=(), metavar="FILE")
    parser.add_argument("--weights", help="directory of CLIP ViT-B/32 (default: from the hub)")
    args = parser.parse_args(argv)
    config = vitb32.get_config()
    config.data.root = args.data
    config.data.real_labels = False
    config.compute.dtype = "float32"
    config.pretrained = args.weights or config.pretrained
    try:
        agree = verify(config, args.fine_tuned)
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
