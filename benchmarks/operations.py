"""Time of image operations on the host and as an XLA program on the same CPU."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from modelstock_jax.data.randaugment import OPERATIONS, apply_operations, draw_operations
from modelstock_jax.models.preprocessor import CLIP_MEAN, CLIP_STD

MEAN, STD = (np.array(values, np.float32) for values in (CLIP_MEAN, CLIP_STD))


def operations(pixels: np.ndarray, batch_size: int) -> None:
    """Print the time per image like `pixels` [H, W, 3]; XLA processes `batch_size` at a time."""
    batch = jnp.asarray(np.stack([pixels] * batch_size))
    image = Image.fromarray(pixels)
    rng = np.random.default_rng(0)
    gray = jnp.array([0.299, 0.587, 0.114])

    def blend(x, degenerate):
        return jnp.clip(degenerate + 1.3 * (x - degenerate), 0, 255).astype(jnp.uint8)

    on_device = {
        "flip": lambda x: x[:, :, ::-1],
        "normalize": lambda x: (x.astype(jnp.float32) / 255 - MEAN) / STD,
        "brightness": lambda x: blend(x.astype(jnp.float32), 0.0),
        "color": lambda x: blend(x.astype(jnp.float32), (x @ gray)[..., None]),
        "contrast": lambda x: blend(
            x.astype(jnp.float32), (x @ gray).mean((1, 2), keepdims=True)[..., None]
        ),
        "solarize": lambda x: jnp.where(x < 128, x, 255 - x),
        "posterize": lambda x: x & 0b11100000,
    }

    def on_host(name):
        if name == "flip":
            return lambda: np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        if name == "normalize":
            return lambda: (pixels.astype(np.float32) / 255 - MEAN) / STD
        return lambda: np.asarray(OPERATIONS[name].apply(image, OPERATIONS[name].strongest / 3))

    def microseconds(function, count, repeats):
        function()
        times = []
        for _ in range(repeats):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return 1e6 * min(times) / count

    print("\n| operation | host, µs per image | XLA on the CPU, µs per image |\n|---|---:|---:|")
    measured = {}
    for name, function in on_device.items():
        compiled = jax.jit(function)
        device = microseconds(
            lambda compiled=compiled: compiled(batch).block_until_ready(), len(batch), 5
        )
        measured[name] = microseconds(on_host(name), 1, 50), device
        print(f"| {name} | {measured[name][0]:.0f} | {device:.0f} |")
    color = np.array([measured[name] for name in on_device if name in OPERATIONS])
    # A program for a complete batch computes every operation and selects one, twice.
    host, device = 2 * color[:, 0].mean(), 2 * color[:, 1].sum()
    print(f"| two random ones of the five color operations | {host:.0f} | {device:.0f} |")
    both = np.mean([
        microseconds(
            lambda: np.asarray(apply_operations(image, draw_operations(rng, 2, 10))), 1, 1
        )
        for _ in range(200)
    ])  # fmt: skip
    print(f"| RandAugment, two of all fourteen operations | {both:.0f} | - |", flush=True)
