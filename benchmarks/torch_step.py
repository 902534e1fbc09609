"""A PyTorch fine-tuning step of the same classifier, for comparison in `step.py`.

    python benchmarks/torch_step.py --sizes '{"vision": {...}, "features": 512, "classes": 1000}'

step.py runs it; it prints one line of JSON. It computes what step.py's own step computes: CLIP's
image tower from transformers with a linear head, torch.compile, SDPA attention, autocast to
bfloat16 with float32 weights, fused AdamW, gradients clipped to a norm of 1. Needs torch and
transformers, but no jax.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.turns import take_turns  # noqa: E402

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Classifier(nn.Module):
    """Logits f / |f| W + b of the image features f of transformers; input are bytes."""

    def __init__(self, vision: dict, features: int, classes: int) -> None:
        super().__init__()
        config = transformers.CLIPVisionConfig(**vision, projection_dim=features)
        config._attn_implementation = "sdpa"
        self.tower = transformers.CLIPVisionModelWithProjection(config)
        self.head = nn.Linear(features, classes)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features = self.tower(pixel_values=pixels).image_embeds
        return self.head(nn.functional.normalize(features, dim=-1))


def make_step(sizes: dict, batch_size: int, dtype: str, device: str, eager: bool):
    """Return a fine-tuning step for `take_turns`, compiled unless `eager`."""
    classifier = Classifier(**sizes).to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-5, weight_decay=0.1, fused=True)
    side = sizes["vision"]["image_size"]
    images = torch.randint(256, (batch_size, side, side, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(sizes["classes"], (batch_size,), device=device)

    def loss_of(images, labels):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return nn.functional.cross_entropy(classifier(images).float(), labels)

    loss_fn = loss_of if eager else torch.compile(loss_of)

    def run(count: int) -> None:
        for _ in range(count):
            loss_fn(images, labels).backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _finish(device)

    return run


def make_product(dtype: str, side: int, device: str):
    """Return the large product of step.py for `take_turns`."""
    left, right = (
        torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2)
    )

    def run(count: int) -> None:
        for _ in range(count):
            torch.matmul(left, right)
        _finish(device)

    return run


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--side", type=int, default=0, help="size of the product's matrices")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--eager", action="store_true", help="run without torch.compile")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    side = args.side or (2048 if device == "cpu" else 8192)
    variants = {
        "product": make_product(args.dtype, side, device),
        "step": make_step(args.sizes, args.batch, args.dtype, device, args.eager),
    }
    seconds = take_turns(variants, args.rounds, args.seconds)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    print(json.dumps({
        "seconds": seconds, "product_flops": 2.0 * side**3, "memory_bytes": memory,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
