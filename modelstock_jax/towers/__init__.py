"""Image towers that are no CLIP, at the size of the glyphs: ViT, hybrid, ResNet and ConvNeXt."""
