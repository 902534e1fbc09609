"""Logits of published models on one photograph, compared with those that transformers' tests state.

    make verify-clip                                    # OpenAI's CLIP ViT-B/32
    make verify-clip ARGS="--models all"                # and a SigLIP, ViT, ConvNeXt and ResNet
    make verify-clip ARGS="--image FILE --weights DIR"  # without a network

Needs a network, or the photograph and a directory with the model's files. Every part that a
training run uses takes part: download, conversion, preprocessing, tokenizer, zero-shot head, model.
The tolerance is that of transformers' test. Exit status 1 if a logit differs by more.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from modelstock_jax.data.transforms import Unreadable  # noqa: E402
from modelstock_jax.errors import UserError  # noqa: E402
from modelstock_jax.models import checkpoint_io  # noqa: E402
from modelstock_jax.models.model import classifier  # noqa: E402
from modelstock_jax.models.zero_shot import zero_shot_head  # noqa: E402

PHOTOGRAPH = "http://images.cocodataset.org/val2017/000000039769.jpg"  # Two cats on a sofa.


class Expected(NamedTuple):
    """The first logits of a model, as in tests/models/*/test_modeling_*.py of transformers."""

    weights: str
    logits: tuple[float, ...]
    tolerance: float  # Absolute, and relative to the logit.
    class_names: tuple[str, ...] = ()
    template: str = ""


EXPECTED = {
    "clip": Expected(
        "openai/clip-vit-base-patch32", (24.5701, 19.3049), 1e-3, ("cat", "dog"), "a photo of a {}"
    ),
    "siglip": Expected(
        "google/siglip-base-patch16-224",
        (-0.7567, -10.3354),
        1e-3,
        ("cats", "dogs"),
        "a photo of 2 {}",
    ),
    "vit": Expected("google/vit-base-patch16-224", (-0.2744, 0.8215, -0.0836), 1e-4),
    "convnext": Expected("facebook/convnext-tiny-224", (-0.0260, -0.4739, 0.1911), 1e-4),
    "resnet": Expected("microsoft/resnet-50", (-11.1069, -9.7877, -8.3777), 1e-4),
}


def read_photograph(source: str) -> bytes:
    """Return the bytes of a file or of a web address.

    Raises:
      UserError: it cannot be read
    """
    try:
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=60) as answer:
                return answer.read()
        return Path(source).read_bytes()
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read {source} ({reason}); pass this photograph as --image FILE"
        ) from None


def first_logits(weights: str, expected: Expected, photograph: bytes) -> np.ndarray:
    """Return as many logits of the photograph as `expected` has.

    Raises:
      UserError: the weights cannot be read
    """
    checkpoint = checkpoint_io.load(weights)
    head = checkpoint.head
    if expected.class_names:
        head = zero_shot_head(checkpoint, expected.class_names, [expected.template])
    if head is None:
        raise UserError(f"{weights}: the checkpoint has no classifier")
    pixels = checkpoint.preprocessor.eval_transform()(photograph)
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    # TF32 or bfloat16, the default on an accelerator, has an error of 1e-3.
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(classifier(checkpoint.config))(
            params, checkpoint.preprocessor(pixels[None])
        )
    return np.asarray(logits)[0, : len(expected.logits)]


def verify(name: str, weights: str, photograph: bytes) -> bool:
    """Print the logits of one model next to the expected ones; return whether they agree."""
    expected = EXPECTED[name]
    ours = first_logits(weights, expected, photograph)
    theirs = np.asarray(expected.logits)
    agree = bool(np.all(np.abs(ours - theirs) <= expected.tolerance * (1 + np.abs(theirs))))
    print(
        f"{name}: {weights}\n  ours         {ours.round(4).tolist()}\n"
        f"  transformers {theirs.tolist()}\n"
        f"  {'agrees' if agree else 'DIFFERS'}: largest difference "
        f"{np.abs(ours - theirs).max():.1e}, tolerance {expected.tolerance:g} (1 + |logit|)"
    )
    return agree


def main(argv: list[str] | None = None) -> None:
    """Verify the chosen models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["clip"], choices=[*EXPECTED, "all"])
    parser.add_argument("--image", default=PHOTOGRAPH, help="file or address of the photograph")
    parser.add_argument("--weights", help="directory with the files of the one model")
    args = parser.parse_args(argv)
    names = list(EXPECTED) if "all" in args.models else args.models
    if args.weights and len(names) > 1:
        parser.error("--weights needs one model in --models")
    try:
        photograph = read_photograph(args.image)
        agree = [verify(x, args.weights or EXPECTED[x].weights, photograph) for x in names]
    except Unreadable as error:
        sys.exit(f"error: {args.image}: {error}")
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
