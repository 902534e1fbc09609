"""Names and shapes of tiny image models, as transformers and this project store them.

The names of transformers are literal; `tests/parity` compares them with the files that it writes. A
line is a pattern of names and the shapes of its expansions: `{a,b}.weight  8 8` is `a.weight` and
`b.weight`, both [8, 8].
"""

from __future__ import annotations

import itertools
import re

from modelstock_jax.merging.trees import named_leaves
from modelstock_jax.models.model import abstract_params, config_from_dict

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


_VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
)
_TEXT = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=24,
    max_position_embeddings=8,
)
_DINOV2 = {k: v for k, v in _VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
_CONVNEXT = dict(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], image_size=16)
_RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2])
_SETTINGS = {
    "siglip": dict(text_config=_TEXT, vision_config=_VISION),
    "vit": _VISION,
    "deit": _VISION,
    "dinov2": _DINOV2,
    "dinov2 swiglu": _DINOV2 | {"use_swiglu_ffn": True},
    "dinov2_with_registers": _DINOV2,
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "resnet basic": _RESNET | {"layer_type": "basic"},
    "resnet bottleneck": _RESNET | {"layer_type": "bottleneck"},
}


# The same models in this project: their configs, and the names and shapes of their trees.
CONFIGS = {
    model: config_from_dict(settings | {"model_type": model.split()[0]})
    for model, settings in _SETTINGS.items()
}
OURS = {
    model: {name: leaf.shape for name, leaf in named_leaves(abstract_params(config)).items()}
    for model, config in CONFIGS.items()
}
