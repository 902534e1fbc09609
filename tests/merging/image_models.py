"""Names and shapes of tiny image models, as transformers and this project store them.

A line is a pattern of names and the shapes of its expansions: `{a,b}.weight  8 8` is `a.weight` and
`b.weight`, both [8, 8].
"""

from __future__ import annotations

import itertools
import re

_ENCODER_LAYER = """
    {0,1}.attention.attention.{query,key,value}.weight  16 16
    {0,1}.attention.attention.{query,key,value}.bias  16
    {0,1}.attention.output.dense.weight  16 16
    {0,1}.attention.output.dense.bias  16
"""
_VIT_LAYER = (
    _ENCODER_LAYER
    + """
    {0,1}.{layernorm_before,layernorm_after}.{weight,bias}  16
    {0,1}.intermediate.dense.weight  24 16
    {0,1}.intermediate.dense.bias  24
    {0,1}.output.dense.weight  16 24
    {0,1}.output.dense.bias  16
"""
)
_DINOV2_LAYER = (
    _ENCODER_LAYER
    + """
    {0,1}.{norm1,norm2}.{weight,bias}  16
    {0,1}.{layer_scale1,layer_scale2}.lambda1  16
"""
)
_FC = """
    {0,1}.mlp.fc1.weight  32 16
    {0,1}.mlp.fc1.bias  32
    {0,1}.mlp.fc2.weight  16 32
    {0,1}.mlp.fc2.bias  16
"""
_SWIGLU = """
    {0,1}.mlp.weights_in.weight  48 16
    {0,1}.mlp.weights_in.bias  48
    {0,1}.mlp.weights_out.weight  16 24
    {0,1}.mlp.weights_out.bias  16
"""
_CLIP_LAYER = """
    {0,1}.{layer_norm1,layer_norm2}.{weight,bias}  16
    {0,1}.mlp.fc1.weight  24 16
    {0,1}.mlp.fc1.bias  24
    {0,1}.mlp.fc2.weight  16 24
    {0,1}.mlp.fc2.bias  16
    {0,1}.self_attn.{q_proj,k_proj,v_proj,out_proj}.weight  16 16
    {0,1}.self_attn.{q_proj,k_proj,v_proj,out_proj}.bias  16
"""
_PATCHES = """
    cls_token  1 1 16
    patch_embeddings.projection.weight  16 3 4 4
    patch_embeddings.projection.bias  16
    position_embeddings  1 5 16
"""
_SIGLIP = """
    logit_{scale,bias}  1
    text_model.embeddings.position_embedding.weight  8 16
    text_model.embeddings.token_embedding.weight  24 16
    text_model.final_layer_norm.{weight,bias}  16
    text_model.head.weight  16 16
    text_model.head.bias  16
    vision_model.embeddings.patch_embedding.weight  16 3 4 4
    vision_model.embeddings.patch_embedding.bias  16
    vision_model.embeddings.position_embedding.weight  4 16
    vision_model.head.attention.in_proj_weight  48 16
    vision_model.head.attention.in_proj_bias  48
    vision_model.head.attention.out_proj.weight  16 16
    vision_model.head.attention.out_proj.bias  16
    vision_model.head.layernorm.{weight,bias}  16
    vision_model.head.mlp.fc1.weight  24 16
    vision_model.head.mlp.fc1.bias  24
    vision_model.head.mlp.fc2.weight  16 24
    vision_model.head.mlp.fc2.bias  16
    vision_model.head.probe  1 1 16
    vision_model.post_layernorm.{weight,bias}  16
"""
_CONVNEXT_STEM = """
    embeddings.layernorm.{weight,bias}  8
    embeddings.patch_embeddings.weight  8 3 4 4
    embeddings.patch_embeddings.bias  8
    encoder.stages.1.downsampling_layer.0.{weight,bias}  8
    encoder.stages.1.downsampling_layer.1.weight  16 8 2 2
    encoder.stages.1.downsampling_layer.1.bias  16
    layernorm.{weight,bias}  16
"""
_CONVNEXT_STAGES = """
    encoder.stages.0.layers.{0,1}.dwconv.weight  8 1 7 7
    encoder.stages.0.layers.{0,1}.{dwconv,layernorm,pwconv2}.bias  8
    encoder.stages.0.layers.{0,1}.layernorm.weight  8
    encoder.stages.0.layers.{0,1}.pwconv1.weight  32 8
    encoder.stages.0.layers.{0,1}.pwconv1.bias  32
    encoder.stages.0.layers.{0,1}.pwconv2.weight  8 32
    encoder.stages.1.layers.{0,1}.dwconv.weight  16 1 7 7
    encoder.stages.1.layers.{0,1}.{dwconv,layernorm,pwconv2}.bias  16
    encoder.stages.1.layers.{0,1}.layernorm.weight  16
    encoder.stages.1.layers.{0,1}.pwconv1.weight  64 16
    encoder.stages.1.layers.{0,1}.pwconv1.bias  64
    encoder.stages.1.layers.{0,1}.pwconv2.weight  16 64
"""
_LAYER_SCALE = """
    encoder.stages.0.layers.{0,1}.layer_scale_parameter  8
    encoder.stages.1.layers.{0,1}.layer_scale_parameter  16
"""
_GRN = """
    encoder.stages.0.layers.{0,1}.grn.{weight,bias}  1 1 1 32
    encoder.stages.1.layers.{0,1}.grn.{weight,bias}  1 1 1 64
"""
_STATISTICS = "{weight,bias,running_mean,running_var}"
_RESNET_STEM = f"""
    embedder.embedder.convolution.weight  8 3 7 7
    embedder.embedder.normalization.{_STATISTICS}  8
    embedder.embedder.normalization.num_batches_tracked
"""
_RESNET_BASIC = f"""
    encoder.stages.0.layers.{{0,1}}.layer.{{0,1}}.convolution.weight  8 8 3 3
    encoder.stages.0.layers.{{0,1}}.layer.{{0,1}}.normalization.{_STATISTICS}  8
    encoder.stages.0.layers.{{0,1}}.layer.{{0,1}}.normalization.num_batches_tracked
    encoder.stages.1.layers.0.layer.0.convolution.weight  16 8 3 3
    encoder.stages.1.layers.0.layer.1.convolution.weight  16 16 3 3
    encoder.stages.1.layers.1.layer.{{0,1}}.convolution.weight  16 16 3 3
    encoder.stages.1.layers.{{0,1}}.layer.{{0,1}}.normalization.{_STATISTICS}  16
    encoder.stages.1.layers.{{0,1}}.layer.{{0,1}}.normalization.num_batches_tracked
    encoder.stages.1.layers.0.shortcut.convolution.weight  16 8 1 1
    encoder.stages.1.layers.0.shortcut.normalization.{_STATISTICS}  16
    encoder.stages.1.layers.0.shortcut.normalization.num_batches_tracked
"""
_RESNET_BOTTLENECK = f"""
    encoder.stages.{{0,1}}.layers.{{0,1}}.layer.0.convolution.weight  2 8 1 1
    encoder.stages.{{0,1}}.layers.{{0,1}}.layer.1.convolution.weight  2 2 3 3
    encoder.stages.{{0,1}}.layers.{{0,1}}.layer.2.convolution.weight  8 2 1 1
    encoder.stages.{{0,1}}.layers.{{0,1}}.layer.{{0,1}}.normalization.{_STATISTICS}  2
    encoder.stages.{{0,1}}.layers.{{0,1}}.layer.2.normalization.{_STATISTICS}  8
    encoder.stages.{{0,1}}.layers.{{0,1}}.layer.{{0,1,2}}.normalization.num_batches_tracked
    encoder.stages.{{0,1}}.layers.0.shortcut.convolution.weight  8 8 1 1
    encoder.stages.{{0,1}}.layers.0.shortcut.normalization.{_STATISTICS}  8
    encoder.stages.{{0,1}}.layers.0.shortcut.normalization.num_batches_tracked
"""


def expand(lines: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a list of patterns."""
    found = {}
    for line in filter(str.strip, lines.splitlines()):
        pattern, *numbers = line.split()
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        for name in map("".join, itertools.product(*parts)):
            found[prefix + name] = tuple(map(int, numbers))
    return found


def _transformer(layer: str, *others: str) -> dict[str, tuple[int, ...]]:
    return {
        **expand("".join(others), "embeddings."),
        **expand(layer, "encoder.layer."),
        **expand("layernorm.{weight,bias}  16"),
    }


_POOLER = expand("pooler.dense.weight  16 16\npooler.dense.bias  16")
_DISTILLED = "distillation_token  1 1 16\n"
_MASKED = "mask_token  1 16\n"
# Models without a classifier.
BODIES = {
    "siglip": {
        **expand(_SIGLIP),
        **expand(_CLIP_LAYER, "text_model.encoder.layers."),
        **expand(_CLIP_LAYER, "vision_model.encoder.layers."),
    },
    "vit": _transformer(_VIT_LAYER, _PATCHES) | _POOLER,
    "deit": _transformer(_VIT_LAYER, _PATCHES.replace(" 5 ", " 6 "), _DISTILLED) | _POOLER,
    "dinov2": _transformer(_DINOV2_LAYER + _FC, _PATCHES, _MASKED),
    "dinov2 swiglu": _transformer(_DINOV2_LAYER + _SWIGLU, _PATCHES, _MASKED),
    "dinov2_with_registers": _transformer(
        _DINOV2_LAYER + _FC, _PATCHES, _MASKED, "register_tokens  1 4 16\n"
    ),
    "convnext": expand(_CONVNEXT_STEM + _CONVNEXT_STAGES + _LAYER_SCALE),
    "convnextv2": expand(_CONVNEXT_STEM + _CONVNEXT_STAGES + _GRN),
    "resnet basic": expand(_RESNET_STEM + _RESNET_BASIC),
    "resnet bottleneck": expand(_RESNET_STEM + _RESNET_BOTTLENECK),
}


def classified(model: str, classes: int = 3) -> dict[str, tuple[int, ...]]:
    """Return the names of a model for image classification, which adds a prefix to its body."""
    kind = model.split()[0]
    width = 32 if kind.startswith("dinov2") else 16  # The class token and the mean of the patches.
    head = expand(f"classifier.weight  {classes} {width}\nclassifier.bias  {classes}")
    if kind == "siglip":
        return {n: s for n, s in BODIES[model].items() if n.startswith("vision_model.")} | head
    if kind == "resnet":
        head = {name.replace(".", ".1."): shape for name, shape in head.items()}
    body = {f"{kind}.{n}": s for n, s in BODIES[model].items() if not n.startswith("pooler.")}
    return body | head


_OUR_BLOCK = """
    {layer_norm1,layer_norm2}.{scale,bias}  16
    self_attn.{q_proj,k_proj,v_proj,out_proj}.kernel  16 16
    self_attn.{q_proj,k_proj,v_proj,out_proj}.bias  16
"""
_OUR_MLP = "mlp.fc1.kernel  16 24\nmlp.fc1.bias  24\nmlp.fc2.kernel  24 16\nmlp.fc2.bias  16\n"
_OUR_POOL = """
    probe  16
    in_proj.kernel  16 48
    in_proj.bias  48
    out_proj.kernel  16 16
    out_proj.bias  16
    layernorm.{scale,bias}  16
"""


def _blocks(lines: str, first: int = 0) -> dict[str, tuple[int, ...]]:
    return expand(lines, f"blocks.block_{first:02d}.") | expand(
        lines, f"blocks.block_{first + 1:02d}."
    )


def _ours(*parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return an image tower of these tensors, with a head."""
    tower = {f"image_tower.{name}": s for part in parts for name, s in part.items()}
    return tower | {"head.kernel": (16, 3), "head.bias": (3,)}


_OUR_EMBEDDING = "patch_embedding.kernel  48 16\nposition_embedding  5 16\n"
_OUR_CONVNEXT = """
    depthwise.kernel  49 {width}
    depthwise.bias  {width}
    norm.SCALE  {width}
    mlp.fc1.kernel  {width} 32
    mlp.fc1.bias  32
    mlp.fc2.kernel  32 {width}
    mlp.fc2.bias  {width}
    grn.GAMMA  32
"""
_OUR_RESNET = """
    conv1.kernel  72 8
    conv2.kernel  72 8
    {norm1,norm2,shortcut_norm}.{scale,bias,mean,var}  8
    shortcut.kernel  8 8
"""


def _our_convnext(width: int) -> str:
    lines = _OUR_CONVNEXT.replace("{width}", str(width))
    return lines.replace("SCALE", "{scale,bias}").replace("GAMMA", "{gamma,beta}")


# Image towers as trees of this project.
OURS = {
    "siglip": _ours(
        expand(_OUR_EMBEDDING),
        _blocks(_OUR_BLOCK + _OUR_MLP),
        expand("post_layernorm.{scale,bias}  16"),
        expand(_OUR_POOL + _OUR_MLP, "pool."),
    ),
    "dinov2": _ours(
        expand(_OUR_EMBEDDING + "class_embedding  16\nregister_tokens  4 16\nmask_token  16"),
        _blocks(_OUR_BLOCK + "layer_scale1  16\nlayer_scale2  16\n"),
        _blocks("mlp.weights_in.{kernel}  16 48\nmlp.weights_out.kernel  24 16\n"),
        expand("post_layernorm.{scale,bias}  16"),
    ),
    "convnextv2": _ours(
        expand("stem.kernel  48 8\nstem.bias  8\nstem_norm.{scale,bias}  8"),
        _blocks(_our_convnext(8)),
        expand("downsample_02.norm.{scale,bias}  8\ndownsample_02.conv.kernel  32 16"),
        _blocks(_our_convnext(16), first=2),
        expand("post_layernorm.{scale,bias}  16"),
    ),
    "resnet": _ours(
        expand("stem.kernel  147 8\nstem_norm.{scale,bias,mean,var}  8"),
        _blocks(_OUR_RESNET),
        _blocks(_OUR_RESNET, first=2),
    ),
}
