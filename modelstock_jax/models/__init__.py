"""Models as `apply(params, images)`: CLIP with its checkpoints and heads; ResNet and ConvNeXt."""

from modelstock_jax.extras import require

require("train", ["jax", "flax"])
