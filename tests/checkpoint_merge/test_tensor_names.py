"""Models with other names than the base: names are mapped if that is certain, else an error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo, renames
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.engine import deltas, models, stock_ratio

WIDTH, LAYERS = 8, 3


def layers(prefix, width=WIDTH, number=LAYERS):
    shapes = {}
    for i in range(number):
        start = f"{prefix}layers.{i}."
        shapes |= {f"{start}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {
            f"{start}mlp.up_proj.weight": (2 * width, width),
            f"{start}input_layernorm.weight": (width,),
        }
    return shapes


def gpt2(prefix="transformer."):
    shapes = {f"{prefix}wte.weight": (20, WIDTH), f"{prefix}ln_f.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"{prefix}h.{i}.attn.c_attn.weight": (WIDTH, 3 * WIDTH),
            f"{prefix}h.{i}.mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
        }
    return shapes


def clip(text="text_model."):
    return (
        layers("vision_model.encoder.")
        | layers(f"{text}encoder.")
        | {
            f"{text}embeddings.token_embedding.weight": (20, WIDTH),
            "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 2, 2),
            "visual_projection.weight": (4, WIDTH),
            "text_projection.weight": (4, WIDTH),
        }
    )


def qwen2_vl(language, vision):
    return (
        layers(language)
        | {
            f"{language}embed_tokens.weight": (20, WIDTH),
            f"{language}norm.weight": (WIDTH,),
            "lm_head.weight": (20, WIDTH),
        }
        | {f"{vision}blocks.{i}.attn.qkv.weight": (3 * WIDTH, WIDTH) for i in range(LAYERS)}
        | {f"{vision}merger.mlp.0.weight": (WIDTH, WIDTH)}
    )


def llava(language, head, vision, projector):
    return (
        layers(language)
        | {
            f"{language}embed_tokens.weight": (20, WIDTH),
            f"{language}norm.weight": (WIDTH,),
            head: (20, WIDTH),
        }
        | layers(f"{vision}vision_model.encoder.")
        | {
            f"{projector}linear_1.weight": (WIDTH, WIDTH),
            f"{projector}linear_2.weight": (WIDTH, WIDTH),
        }
    )


OLD_LLAVA = llava(
    "language_model.model.",
    "language_model.lm_head.weight",
    "vision_tower.",
    "multi_modal_projector.",
)
NEW_LLAVA = llava(
    "model.language_model.", "lm_head.weight", "model.vision_tower.", "model.multi_modal_projector."
)
LLAMA = layers("model.") | {"model.embed_tokens.weight": (20, WIDTH), "lm_head.weight": (20, WIDTH)}


def wrapped(shapes, *parts):
    return {"".join(parts) + name: shape for name, shape in shapes.items()}


def wrapped_within(shapes, part):
    """Names with a wrapper in each block, from per-layer compilation or checkpointing."""
    return {
        name.replace(".self_attn.", f".{part}.self_attn.").replace(".mlp.", f".{part}.mlp."): shape
        for name, shape in shapes.items()
    }


# Shapes of the base, and the same shapes under the names of the fine-tunes, in the same order.
PAIRS = {
    "gpt2 without its prefix": (gpt2(), gpt2("")),
    "gpt2 with a prefix that the base lacks": (gpt2(""), gpt2()),
    "torch.compile": (LLAMA, wrapped(LLAMA, "_orig_mod.")),
    "DataParallel": (LLAMA, wrapped(LLAMA, "module.")),
    "DataParallel and torch.compile": (LLAMA, wrapped(LLAMA, "module.", "_orig_mod.")),
    "a wrapped base": (wrapped(LLAMA, "_orig_mod."), LLAMA),
    "PEFT's wrapper": (LLAMA, wrapped(LLAMA, "base_model.model.")),
    "torch.compile per block": (LLAMA, wrapped_within(LLAMA, "_orig_mod")),
    "activation checkpointing": (LLAMA, wrapped_within(LLAMA, "_checkpoint_wrapped_module")),
    "a CLIP text tower without text_model": (clip(), clip("")),
    "Qwen2-VL, old base": (
        qwen2_vl("model.", "visual."),
        qwen2_vl("model.language_model.", "model.visual."),
    ),
    "Qwen2-VL, new base": (
        qwen2_vl("model.language_model.", "model.visual."),
        qwen2_vl("model.", "visual."),
    ),
    "LLaVA, old base": (OLD_LLAVA, NEW_LLAVA),
    "LLaVA, new base": (NEW_LLAVA, OLD_LLAVA),
}


def save(root, inputs, names=None, configs=None):
    paths = []
    for k, model in enumerate(inputs):
        path = root / (f"ft{k}" if k else "base")
        path.mkdir(parents=True)
        if names and k:
            model = {names[name]: array for name, array in model.items()}
        write_directory_tensors(path, model)
        (path / "config.json").write_text(json.dumps(configs[k] if configs else {}))
        paths.append(path)
    return paths


def run(paths, out, *typed):
    return main(["merge", *map(str, paths), "--out", str(out), *typed])


@pytest.mark.parametrize("kind", PAIRS)
def test_mapped_names_give_the_same_merge_as_equal_names(tmp_path, capsys, kind):
    base_shapes, tuned_shapes = PAIRS[kind]
    inputs = models(base_shapes)
    paths = save(tmp_path, inputs, dict(zip(base_shapes, tuned_shapes, strict=True)))
    assert run(paths, tmp_path / "out") == 0
    stderr = capsys.readouterr().err
    assert all(stderr.count(f"note: {p}: ") == 1 for p in paths[1:])  # one line per fine-tune
    merged = TensorFiles(tmp_path / "out")
    assert set(merged) == set(base_shapes)
    for name in base_shapes:
        base, d = inputs[0][name].astype(np.float64), deltas(inputs, name)
        expected = base + stock_ratio(d) * d.mean(axis=0).reshape(base.shape)
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=4e-7)


def test_one_tower_of_a_base_with_two_similar_towers(tmp_path, capsys):
    """Only the text tower: its embedding distinguishes it from the image tower."""
    inputs = models(clip())
    text = {
        name: name.removeprefix("text_model.") for name in clip() if name.startswith("text_model.")
    }
    paths = save(tmp_path, [inputs[0], *({n: m[n] for n in text} for m in inputs[1:])], text)
    assert run(paths, tmp_path / "out") == 1
    stderr = capsys.readouterr().err
    assert "vision_model." in stderr and "text_model.encoder" not in stderr
    assert "--missing-tensors base" not in stderr  # It would copy most parameters from the base.
    assert run(paths, tmp_path / "out", "--missing-tensors", "base") == 0
    stderr = capsys.readouterr().err
    fraction = sum(w.size for n, w in inputs[0].items() if n not in text) / sum(
        w.size for w in inputs[0].values()
    )
    assert f"{100 * fraction:.0f} % " in stderr
    merged = TensorFiles(tmp_path / "out")
    np.testing.assert_array_equal(
        merged["visual_projection.weight"], inputs[0]["visual_projection.weight"]
    )
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(merged[name], inputs[0][name])


def infos(shapes):
    return {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}


def test_ambiguous_names_are_not_mapped():
    """Blocks that match the encoder as well as the decoder."""
    base = layers("encoder.") | layers("decoder.")
    mapped = renames(infos(base), infos(layers("")))
    assert not mapped.names and len(mapped.ambiguous) == len(layers(""))


@pytest.mark.parametrize(
    "other",
    [
        {"layers.7.w.weight": (4, 4)},  # another layer
        {"score.weight": (4, 4)},  # only `weight` is equal
        {"model.layers.0.w.weight": (4, 5)},  # another shape
    ],
)
def test_names_that_differ_in_more_than_a_prefix_are_not_mapped(other):
    base = {"layers.0.w.weight": (4, 4), "classifier.weight": (4, 4)}
    assert not renames(infos(base), infos(other)).names


def test_head_is_not_mapped_to_another_head_of_equal_shape():
    """A classifier with a dense layer is not the head of a masked language model."""
    base = layers("bert.") | {
        "cls.predictions.transform.dense.weight": (WIDTH, WIDTH),
        "cls.predictions.transform.dense.bias": (WIDTH,),
    }
    tuned = layers("bert.") | {
        "bert.pooler.dense.weight": (WIDTH, WIDTH),
        "bert.pooler.dense.bias": (WIDTH,),
    }
    assert not renames(infos(base), infos(tuned)).names
    base = layers("roberta.") | {"lm_head.dense.weight": (WIDTH, WIDTH)}
    tuned = layers("roberta.") | {"classifier.dense.weight": (WIDTH, WIDTH)}
    assert not renames(infos(base), infos(tuned)).names


def test_another_name_of_the_model_is_a_prefix():
    mapped = renames(infos(layers("bert.")), infos(layers("roberta.")))
    assert len(mapped.names) == len(layers("bert.")) and not mapped.ambiguous


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ("encoder.encoder_layer_{}.", "encoder.encoder_layer_{}."),
        ("layer{}.0.", "layer{}.0."),
    ],
)
def test_numbers_within_a_part_of_a_name_are_layers(base, tuned):
    shapes = {base.format(i) + "w.weight": (WIDTH, WIDTH) for i in range(4)}
    shifted = {tuned.format(i) + "w.weight": (WIDTH, WIDTH) for i in range(1, 5)}
    assert not renames(infos(shapes), infos(shifted)).names


def test_head_is_not_mapped_to_the_head_of_another_task():
    base = layers("") | {f"heads.mnli.{n}.weight": (WIDTH, WIDTH) for n in ("dense", "out")}
    tuned = layers("") | {f"heads.sst2.{n}.weight": (WIDTH, WIDTH) for n in ("dense", "out")}
    assert not renames(infos(base), infos(tuned)).names


def test_adapter_that_matches_two_towers_is_ambiguous():
    """The longest common suffix of the names does not decide."""
    base = layers("audio.model.") | layers("text.")
    adapter = {n: s for n, s in layers("model.").items() if "q_proj" in n}
    mapped = renames(infos(base), infos(adapter), partial=True)
    assert not mapped.names and set(mapped.ambiguous) == set(adapter)


def test_name_that_matches_unchanged_is_not_mapped():
    base = layers("model.") | layers("model.language_model.")
    mapped = renames(infos(base), infos(layers("model.")))
    assert not mapped.names and not mapped.ambiguous


def test_no_option_is_suggested_that_discards_the_training(tmp_path, capsys):
    """If no name can be mapped, the message suggests no option that copies the base."""
    inputs = models(layers("a."))
    paths = save(tmp_path, inputs, {n: f"x{i}" for i, n in enumerate(layers("a."))})
    assert run(paths, tmp_path / "out") == 1
    stderr = capsys.readouterr().err
    assert "100 % " in stderr and "--missing-tensors" not in stderr


@pytest.mark.parametrize("fused_base", [True, False])
def test_error_names_fused_and_separate_experts(tmp_path, capsys, fused_base):
    start = "model.layers.0.mlp."
    common = layers("model.")
    fused = common | {
        f"{start}experts.gate_up_proj": (4, WIDTH, 6),
        f"{start}experts.down_proj": (4, 3, WIDTH),
    }
    apart = common | {
        f"{start}experts.{e}.{p}_proj.weight": (3, WIDTH)
        for e in range(4)
        for p in ("gate", "up", "down")
    }
    base, tuned = (fused, apart) if fused_base else (apart, fused)
    paths = save(tmp_path, [models(base)[0], *models(tuned)[1:]])
    assert run(paths, tmp_path / "out") == 1
    stderr = capsys.readouterr().err
    assert "fused" in stderr and f"{start}experts." in stderr
    assert "--missing-tensors base" not in stderr


@pytest.mark.parametrize(
    ("fused", "parts"),
    [
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ],
)
def test_error_names_fused_projections(tmp_path, capsys, fused, parts):
    base = {f"layers.0.{fused}.weight": (24, 8), "norm.weight": (8,)}
    tuned = {f"layers.0.{p}.weight": (8, 8) for p in parts} | {"norm.weight": (8,)}
    paths = save(tmp_path, [models(base)[0], *models(tuned)[1:]])
    assert run(paths, tmp_path / "out") == 1
    stderr = capsys.readouterr().err
    assert fused in stderr and "parts" in stderr and "--missing-tensors base" not in stderr


T5 = {
    "shared.weight": (20, WIDTH),
    "encoder.block.0.w.weight": (WIDTH, WIDTH),
    "decoder.block.0.w.weight": (WIDTH, WIDTH),
}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def with_copies(model):
    return model | {name: model["shared.weight"] for name in COPIES}


@pytest.mark.parametrize("who", ["base", "one", "both"])
def test_copies_of_a_shared_embedding(tmp_path, capsys, who):
    """Some versions of T5 and BART store copies of `shared`, others do not."""
    inputs = [dict(m) for m in models(T5)]
    copied = {"base": (0,), "one": (1,), "both": (1, 2)}[who]
    paths = save(tmp_path, [with_copies(m) if k in copied else m for k, m in enumerate(inputs)])
    assert run(paths, tmp_path / "out") == 0
    merged = TensorFiles(tmp_path / "out")
    assert set(merged) == set(T5) | (set(COPIES) if who == "base" else set())
    d = deltas(inputs, "shared.weight")
    expected = inputs[0]["shared.weight"] + stock_ratio(d) * d.mean(axis=0).reshape(20, WIDTH)
    for name in ("shared.weight", *(COPIES if who == "base" else ())):
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=4e-7)
    assert "shared.weight" in capsys.readouterr().err


def test_separately_trained_copy_is_not_a_copy(tmp_path, capsys):
    inputs = [dict(m) for m in models(T5)]
    inputs[1] = with_copies(inputs[1])
    inputs[1][COPIES[0]] = inputs[1][COPIES[0]] + np.float32(0.01)
    assert run(save(tmp_path, inputs), tmp_path / "out") == 1
    assert COPIES[0] in capsys.readouterr().err


def test_tensors_of_zeros_are_not_copies(tmp_path, capsys):
    """A bias that a fine-tune lacks is not read from another bias that happens to be zero."""
    shapes = {"w": (4, 4), "a.first.bias": (8,), "b.second.bias": (8,)}
    inputs = [dict(m) for m in models(shapes)]
    for name in ("a.first.bias", "b.second.bias"):
        inputs[0][name] = np.zeros(8, np.float32)
    del inputs[1]["a.first.bias"]
    assert run(save(tmp_path, inputs), tmp_path / "out") == 1
    assert "a.first.bias" in capsys.readouterr().err


def test_equal_tensors_that_are_not_copies(tmp_path, capsys):
    """A decoder that started from the encoder, and norms of ones."""
    encoder = {f"encoder.layer.{i}.w.weight": (WIDTH, WIDTH) for i in range(2)}
    inputs = [dict(m) for m in models(encoder | {"x.weight": (40, 40)})]
    inputs[0] |= {n.replace("encoder", "decoder"): inputs[0][n] for n in encoder}
    assert run(save(tmp_path / "a", inputs), tmp_path / "out") == 1
    assert "decoder.layer.0.w.weight" in capsys.readouterr().err
    inputs = [
        dict(m, **{"fc.norm.weight": m["norm.weight"]})
        for m in models({"l.weight": (4, 4), "norm.weight": (8,)})
    ]
    for name in ("norm.weight", "fc.norm.weight"):
        inputs[0][name] = np.ones(8, np.float32)
    for model in inputs[1:]:
        del model["norm.weight"]
    assert run(save(tmp_path / "b", inputs), tmp_path / "out") == 1
    assert " norm.weight" in capsys.readouterr().err


def test_models_of_unequal_depth_get_no_hint(tmp_path, capsys):
    inputs = models(layers("model.", number=4))
    last = {n for n in inputs[0] if n.startswith("model.layers.3.")}
    tuned = [{n: w for n, w in m.items() if n not in last} for m in inputs[1:]]
    assert run(save(tmp_path, [inputs[0], *tuned]), tmp_path / "out") == 1
    stderr = capsys.readouterr().err
    assert "depth" in stderr and "--missing-tensors" not in stderr


def store(path, tensors, aliases):
    """Save a model with shared tensors as `safetensors.torch.save_model` does."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt", **aliases})
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("stored", ["shared.weight", "lm_head.weight"])
def test_aliases_in_the_metadata_are_read_and_written_back(tmp_path, stored):
    """Fine-tunes may have stored the tensor under the other name, or under both."""
    inputs = [dict(m) for m in models(T5)]
    alias = {"lm_head.weight": "shared.weight"}
    paths = [store(tmp_path / "base", inputs[0], alias)]
    if stored == "shared.weight":
        paths.append(store(tmp_path / "ft1", inputs[1], alias))
    else:
        model = {("lm_head.weight" if n == "shared.weight" else n): w for n, w in inputs[1].items()}
        paths.append(store(tmp_path / "ft1", model, {"shared.weight": "lm_head.weight"}))
    paths.append(
        store(tmp_path / "ft2", inputs[2] | {"lm_head.weight": inputs[2]["shared.weight"]}, {})
    )
    assert run(paths, tmp_path / "out") == 0
    merged = TensorFiles(tmp_path / "out")
    assert set(merged) == set(T5) and merged.aliases == alias
    d = deltas(inputs, "shared.weight")
    expected = inputs[0]["shared.weight"] + stock_ratio(d) * d.mean(axis=0).reshape(20, WIDTH)
    np.testing.assert_allclose(merged["shared.weight"], expected, rtol=0, atol=4e-7)


def test_aliases_are_written_to_the_file_with_the_tensor(tmp_path):
    inputs = [dict(m) for m in models(T5)]
    paths = [
        store(tmp_path / n, m, {"lm_head.weight": "shared.weight"})
        for n, m in zip(("base", "ft1", "ft2"), inputs, strict=True)
    ]
    assert run(paths, tmp_path / "out", "--max-shard-size", "300") == 0
    merged = TensorFiles(tmp_path / "out")
    assert (
        merged.aliases == {"lm_head.weight": "shared.weight"}
        and len(set(merged.files.values())) > 1
    )


@pytest.mark.parametrize("legacy", ["base", "fine-tunes"])
def test_legacy_names_of_layer_norms(tmp_path, legacy):
    shapes = {"bert.LayerNorm.weight": (8,), "bert.LayerNorm.bias": (8,), "bert.w.weight": (4, 4)}
    inputs = models(shapes)
    names = {
        "bert.LayerNorm.weight": "bert.LayerNorm.gamma",
        "bert.LayerNorm.bias": "bert.LayerNorm.beta",
        "bert.w.weight": "bert.w.weight",
    }
    name = "bert.LayerNorm.weight"
    d = deltas(inputs, name)
    expected = inputs[0][name] + stock_ratio(d) * d.mean(axis=0)
    if legacy == "base":
        inputs = [{names[n]: w for n, w in model.items()} for model in inputs]
        names = {old: new for new, old in names.items()}
        name = "bert.LayerNorm.gamma"
    assert run(save(tmp_path, inputs, names), tmp_path / "out") == 0
    np.testing.assert_allclose(TensorFiles(tmp_path / "out")[name], expected, rtol=0, atol=4e-7)


def test_weight_norm_in_both_spellings(tmp_path):
    shapes = {"conv.weight_g": (8, 1, 1), "conv.weight_v": (8, 4, 3), "conv.bias": (8,)}
    inputs = models(shapes)
    names = {
        "conv.weight_g": "conv.parametrizations.weight.original0",
        "conv.weight_v": "conv.parametrizations.weight.original1",
        "conv.bias": "conv.bias",
    }
    assert run(save(tmp_path, inputs, names), tmp_path / "out") == 0
    d = deltas(inputs, "conv.weight_v")
    expected = inputs[0]["conv.weight_v"] + stock_ratio(d) * d.mean(axis=0).reshape(8, 4, 3)
    np.testing.assert_allclose(
        TensorFiles(tmp_path / "out")["conv.weight_v"], expected, rtol=0, atol=4e-7
    )


HEADS = {"model.embed_tokens.weight": (20, WIDTH), "lm_head.weight": (20, WIDTH), "w": (4, 4)}


def test_missing_head_is_not_tied_unless_the_config_ties_it(tmp_path, capsys):
    """The base has a separate head, so a fine-tune without a head did not tie it."""
    inputs = [dict(m) for m in models(HEADS)]
    del inputs[1]["lm_head.weight"]
    assert run(save(tmp_path / "a", inputs), tmp_path / "out") == 1
    assert "lm_head.weight" in capsys.readouterr().err
    tied = [{}, {"tie_word_embeddings": True}, {}]
    assert run(save(tmp_path / "b", inputs, configs=tied), tmp_path / "out") == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().err


def test_missing_head_is_the_embedding_if_they_are_equal_in_the_base(tmp_path):
    inputs = [dict(m) for m in models(HEADS)]
    inputs[0]["lm_head.weight"] = inputs[0]["model.embed_tokens.weight"]
    del inputs[1]["lm_head.weight"]
    assert run(save(tmp_path, inputs), tmp_path / "out") == 0
    merged = TensorFiles(tmp_path / "out")
    base = inputs[0]["lm_head.weight"].astype(np.float64)
    d = np.stack(
        [inputs[1]["model.embed_tokens.weight"] - base, inputs[2]["lm_head.weight"] - base]
    )
    expected = base + stock_ratio(d.reshape(2, -1)) * d.mean(axis=0)
    np.testing.assert_allclose(merged["lm_head.weight"], expected, rtol=0, atol=4e-7)
