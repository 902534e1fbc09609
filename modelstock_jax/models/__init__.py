"""Models as `apply(params, images)`: CLIP with its checkpoints and heads; ResNet and ConvNeXt."""
