"""Time of image operations on the host and as XLA programs on the same CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.data.device_resize import make_resize
from modelstock_jax.data.randaugment import ENCODED
from modelstock_jax.data.transforms import TrainTransform
from modelstock_jax.data.views import GEOMETRY
from modelstock_jax.models.preprocessor import CLIP_MEAN, CLIP_STD

MEAN, STD = (np.array(values, np.float32) for values in (CLIP_MEAN, CLIP_STD))


def operations(pixels: np.ndarray, size: int, batch_size: int) -> None:
    """Print the time per image of operations on stored pixels [H, W, 3].

    Args:
      pixels: an image of a cache
      size: side of the result
      batch_size: images per call of an XLA program
    """
    print("\n| operation | host, µs per image | XLA on the CPU, µs per image |\n|---|---:|---:|")
    resized = np.zeros((batch_size, size, size, 3), np.uint8)
    normalize = jax.jit(lambda images: (images.astype(jnp.float32) / 255 - MEAN) / STD)
    on_host = microseconds(lambda: (resized[0].astype(np.float32) / 255 - MEAN) / STD, 50)
    print_row("normalize", on_host, lambda: normalize(resized), batch_size)
    for name, count in (("crop, resize, flip", 0), ("the same and RandAugment, N = 2", 2)):
        transform = TrainTransform(size, flip=True, randaugment_ops=count, randaugment_magnitude=10)
        on_host = microseconds(partial(transform, pixels, np.random.default_rng(0)), 200)
        print_row(name, on_host, on_device(transform, pixels, batch_size), batch_size)


def print_row(name: str, on_host: float, device: Callable[[], jax.Array], batch_size: int) -> None:
    per_image = microseconds(lambda: jax.block_until_ready(device()), 5) / batch_size
    print(f"| {name} | {on_host:.0f} | {per_image:.0f} |", flush=True)


def on_device(
    transform: TrainTransform, pixels: np.ndarray, batch_size: int
) -> Callable[[], jax.Array]:
    """Return a function that resizes and augments a batch of views of one image."""
    side = transform.canvas_side(tuple(np.array([length]) for length in pixels.shape[:2]))
    arrays = {
        "image": np.zeros((batch_size, side, side, 3), np.uint8),
        "geometry": np.zeros((batch_size, GEOMETRY), np.float32),
    }
    if transform.randaugment_ops:
        arrays["operations"] = np.zeros((batch_size, transform.randaugment_ops, ENCODED), np.int32)
    for number in range(batch_size):
        view = transform.view(pixels, np.random.default_rng(number), side)
        view.store({name: array[number] for name, array in arrays.items()}, transform.size)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    resize = make_resize(sharding, transform.size, transform.resample)
    return lambda: resize(jax.device_put(arrays, sharding))


def microseconds(function: Callable[[], object], count: int) -> float:
    """Return the mean CPU time of a call, after one call that may compile."""
    function()
    start = time.process_time()
    for _ in range(count):
        function()
    return 1e6 * (time.process_time() - start) / count
