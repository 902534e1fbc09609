"""Tiny random checkpoints written by other libraries, and the expected results of their merges.

Every fine-tune is the base plus an update common to all fine-tunes plus an individual update, so
that the angles between the fine-tunes are neither 0 nor 90 degrees.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.numpy import load_file
from safetensors.torch import save_file

from modelstock_jax.checkpoint_merge.cli import main

hf.utils.logging.disable_progress_bar()
VOCABULARY = 24
IDS = torch.tensor([[1, 5, 7, 9, 3, 4]])
# Rounding of float32 (6e-8) and of a ratio computed from float32 dot products.
TOLERANCE = 1e-6


def family(name: str) -> torch.nn.Module:
    """Return a tiny random model of a family in `FAMILIES`, the same for each call."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    with torch.no_grad():
        for tensor in model.parameters():  # Initial zeros and ones would hide errors.
            tensor.add_(0.02 * torch.randn(tensor.shape))
    return model.eval()


def fine_tuned(model: torch.nn.Module, seed: int, size: float = 0.02) -> torch.nn.Module:
    """Return a copy of a model with an update of every parameter."""
    tuned = copy.deepcopy(model)
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tuned.parameters():
            shape = tensor.shape
            tensor.add_(
                size
                * (torch.randn(shape, generator=common) + torch.randn(shape, generator=own)).to(
                    tensor.dtype
                )
            )
    return tuned.eval()


def save_all(
    root: Path, model: torch.nn.Module, save: Callable | None = None, count: int = 2
) -> list[Path]:
    """Write `base`, `ft1`, ... with `save_pretrained`, or with `save(model, directory)`."""
    paths = [root / "base", *(root / f"ft{i + 1}" for i in range(count))]
    models = [model, *(fine_tuned(model, i + 1) for i in range(count))]
    for path, saved in zip(paths, models, strict=True):
        saved.save_pretrained(path) if save is None else save(saved, path)
    return paths


def merge(paths: Sequence[Path | str], out: Path, *options: str) -> int:
    """Return the exit status of `modelstock merge`."""
    return main(["merge", *map(str, paths), "--out", str(out), *options])


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a directory or file, by name."""
    files = [directory] if directory.is_file() else sorted(directory.glob("*.safetensors"))
    assert files, f"no safetensors in {directory}"
    found: dict[str, np.ndarray] = {}
    for file in files:
        found |= load_file(file)
    return found


def merged(base: np.ndarray, tuned: Sequence[np.ndarray]) -> np.ndarray:
    """Return equation 3 in float64: w0 + t mean(d), t = N cos / (1 + (N - 1) cos).

    N is the number of changed fine-tunes; if only one changed, it is the result.
    """
    w0 = base.astype(np.float64)
    moves = [w.astype(np.float64) - w0 for w in tuned]
    if base.size < 2:  # A single element has no angle: the mean.
        return w0 + sum(moves) / len(moves)
    moves = [d for d in moves if d.any()]
    if len(moves) < 2:
        return w0 + sum(moves)
    norms = [np.linalg.norm(d) for d in moves]
    mean, number = sum(moves) / len(moves), len(moves)
    cosines = [
        np.vdot(a, b) / (m * n)
        for i, (a, m) in enumerate(zip(moves, norms, strict=True))
        for b, n in zip(moves[:i], norms[:i], strict=True)
    ]
    cosine = sum(cosines) / len(cosines)
    ratio = number * cosine / (1 + (number - 1) * cosine) if cosine > 0 else 0.0
    return w0 + ratio * mean


def assert_close(value: np.ndarray, expected: np.ndarray, name: str, tolerance: float = TOLERANCE):
    """Compare relative to the maximum absolute value."""
    assert value.shape == expected.shape, name
    expected = np.asarray(expected, np.float64)
    far = np.abs(np.asarray(value, np.float64) - expected).max(initial=0)
    assert far <= tolerance * np.abs(expected).max(initial=0), f"{name}: {far}"


def assert_merged(
    out: Mapping[str, np.ndarray] | Path,
    inputs: Sequence[Mapping | Path],
    tolerance: float = TOLERANCE,
) -> None:
    """Check that every tensor of the result is equation 3 of the inputs, and none is missing."""
    result, base, *tuned = (tensors(x) if isinstance(x, Path) else x for x in (out, *inputs))
    assert result.keys() == base.keys()
    for name, value in result.items():
        assert value.dtype == base[name].dtype, name
        expected = (
            merged(base[name], [model[name] for model in tuned])
            if value.dtype.kind == "f"
            else base[name]
        )
        assert_close(value, expected, name, tolerance)


def opened(kind: type, directory: Path, **how) -> torch.nn.Module:
    """Open a model; no key may be missing, unexpected or of another shape."""
    model, report = kind.from_pretrained(directory, output_loading_info=True, **how)
    assert not any(report.values()), report
    return model.eval()


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return all floating tensors of a model's output for a fixed input."""
    with torch.no_grad():
        output = model(**inputs_of(model))
    return [x for x in _flat(output.to_tuple()) if x.is_floating_point()]


def _flat(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for element in value:
            yield from _flat(element)


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return an input for a tiny model of any family in `FAMILIES`."""
    generator = torch.Generator().manual_seed(3)
    config, ids = model.config, {"input_ids": IDS}
    kind = config.model_type
    if kind == "wav2vec2":
        return {"input_values": torch.randn(1, 400, generator=generator)}
    if kind == "whisper":
        return {
            "input_features": torch.randn(1, 8, 16, generator=generator),
            "decoder_input_ids": IDS,
        }
    if kind == "qwen2_vl":
        vision = config.vision_config
        patch = vision.patch_size**2 * vision.temporal_patch_size * vision.in_channels
        return {
            "input_ids": torch.tensor([[1, 20, 21, 21, 21, 21, 22, 5]]),
            "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
            "pixel_values": torch.randn(16, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "image_size") and kind not in ("resnet", "convnext"):
        return ids | ({"decoder_input_ids": IDS} if config.is_encoder_decoder else {})
    size = getattr(vision, "image_size", 32)
    pixels = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    if vision is config:
        return pixels
    if kind in ("llava", "gemma3"):
        image = torch.full((1, 4), config.image_token_id)
        ids = {"input_ids": torch.cat([IDS[:, :2], image, IDS[:, 2:]], 1)}
        if kind == "gemma3":
            ids["token_type_ids"] = (ids["input_ids"] == config.image_token_id).long()
    return ids | pixels


_ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    pad_token_id=0,
)
_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS = _DECODER | dict(num_experts_per_tok=2)
_VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=16,
    patch_size=8,
)
_TEXT_TOWER = _ENCODER | dict(bos_token_id=1, eos_token_id=3, projection_dim=8)
_BART = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
)
_GEMMA = _DECODER | dict(head_dim=4, sliding_window=4, query_pre_attn_scalar=4)


def _gemma3():
    text = hf.Gemma3TextConfig(**_GEMMA)
    vision = hf.SiglipVisionConfig(**_VISION)  # 4 patches make 4 image tokens.
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=23,
            image_token_id=23,
            boi_token_index=21,
            eoi_token_index=22,
        )
    )


def _llava():
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**_DECODER),
            vision_config=hf.CLIPVisionConfig(**_VISION),
            image_token_index=23,
            image_token_id=23,
            vision_feature_layer=-1,
        )
    )


def _qwen2_vl():
    text = _DECODER | dict(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
    )
    vision = dict(
        depth=2,
        embed_dim=16,
        hidden_size=16,
        num_heads=2,
        mlp_ratio=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
    )
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=20,
            image_token_id=21,
            vision_end_token_id=22,
            video_token_id=23,
        )
    )


def _clip(kind, config, text, vision):
    return kind(
        config(
            text_config=text(**_TEXT_TOWER).to_dict(),
            vision_config=vision(**_VISION, projection_dim=8).to_dict(),
            projection_dim=8,
        )
    )


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=40,
            pad_token_id=0,
        )
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **_ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    ),
    "deberta_v2": lambda: hf.DebertaV2ForMaskedLM(
        hf.DebertaV2Config(
            **_ENCODER,
            relative_attention=True,
            position_buckets=8,
            max_relative_positions=16,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
        )
    ),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_ENCODER, embedding_size=12)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**_ENCODER, embedding_size=12)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**_BART)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=40,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=8, head_dim=4)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_EXPERTS, num_local_experts=4)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA)),
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "clip": lambda: _clip(hf.CLIPModel, hf.CLIPConfig, hf.CLIPTextConfig, hf.CLIPVisionConfig),
    "siglip": lambda: _clip(
        hf.SiglipModel, hf.SiglipConfig, hf.SiglipTextConfig, hf.SiglipVisionConfig
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION, num_labels=3)),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(
            **{k: v for k, v in _VISION.items() if k != "intermediate_size"}, mlp_ratio=2
        )
    ),
    "swinv2": lambda: hf.Swinv2ForImageClassification(
        hf.Swinv2Config(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            num_labels=3,
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_BART,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        )
    ),
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **{k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"},
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            ffn_dim=24,
            num_attention_heads=2,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_ENCODER, bos_token_id=1, eos_token_id=2)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_DECODER)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def save_tensors(
    directory: Path,
    values: Mapping[str, torch.Tensor],
    config: Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `model.safetensors`, and a copy of the config.json of another directory."""
    directory.mkdir(parents=True, exist_ok=True)
    copies = {name: value.detach().clone().contiguous() for name, value in values.items()}
    save_file(copies, directory / "model.safetensors", metadata={"format": "pt"} | (metadata or {}))
    if config is not None:
        (directory / "config.json").write_bytes((config / "config.json").read_bytes())
    return directory


def edit_config(directory: Path, name: str = "config.json", **changes) -> None:
    """Change entries of a JSON file; None removes an entry."""
    path = directory / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def tokenizer(size: int = VOCABULARY) -> hf.PreTrainedTokenizerFast:
    """Return a word tokenizer with `size` words; words after the first 24 are added tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )
    fast.add_tokens([f"added{i}" for i in range(VOCABULARY, size)])
    return fast


# Names at runtime, also saved by transformers 4.52 to 5 -> names of the first releases.
_TOWERS = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
OLD_NAMES: dict[str, Mapping[str, str]] = {
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "llava": _TOWERS | {"lm_head.": "language_model.lm_head."},
    "gemma3": _TOWERS,
}


def old_name(family_name: str, name: str) -> str:
    """Return the name of a tensor in files of the first releases of a vision-language model."""
    for new, old in OLD_NAMES[family_name].items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name
