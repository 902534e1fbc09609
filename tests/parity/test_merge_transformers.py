"""Models of transformers, merged by `modelstock merge` and opened by transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from tests.parity.merge_inputs import (
    FAMILIES,
    OLD_NAMES,
    VOCABULARY,
    assert_close,
    assert_merged,
    config_of,
    edit_config,
    family,
    fine_tuned,
    merge,
    merged,
    old_name,
    opened,
    outputs,
    save_all,
    save_tensors,
    tensors,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
ADDED = 2
RESIZED = (
    "bert",
    "distilbert",
    "modernbert",
    "deberta_v2",
    "electra",
    "albert",
    "roberta",
    "bart",
    "marian",
    "t5",
    "whisper",
    "mamba",
    "llama",
    "gpt_neox",
    "gemma3",
    "llava",
    "qwen2_vl",
)


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]


def finite(model: torch.nn.Module) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_merged_and_opens(tmp_path, name):
    model = family(name)
    paths, out = save_all(tmp_path, model), tmp_path / "out"
    assert merge(paths, out) == 0
    assert_merged(out, paths)
    again = opened(type(model), out)
    assert finite(again)
    changes = [(a - b).norm() for a, b in zip(outputs(again), outputs(model), strict=True)]
    assert max(changes) > 0


def resized(root, name):
    """Write a base and a fine-tune with V rows, and a fine-tune with V + 2 and an own tokenizer."""
    model = family(name)
    paths = save_all(root, model)
    longer = fine_tuned(model, 2)
    longer.resize_token_embeddings(VOCABULARY + ADDED)
    with torch.no_grad():
        for tensor in longer.state_dict().values():  # Biases of added tokens begin at 0.
            if VOCABULARY + ADDED in tensor.shape:
                tensor.add_(
                    0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4))
                )
    longer.save_pretrained(paths[2])
    for path in paths:
        tokenizer(VOCABULARY + ADDED * (path == paths[2])).save_pretrained(path)
    return model, paths


def rows_of(value, rows):
    return value[
        tuple(
            slice(rows if size > rows and size == VOCABULARY + ADDED else None)
            for size in value.shape
        )
    ]


@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("rows_from", ["longest", "base"])
def test_a_resized_vocabulary(tmp_path, name, rows_from):
    model, paths = resized(tmp_path, name)
    out, size = tmp_path / "out", VOCABULARY + ADDED * (rows_from == "longest")
    assert merge(paths, out, "--vocab-mismatch", rows_from) == 0
    config = config_of(out)
    assert config.get("text_config", config)["vocab_size"] == size
    assert len(hf.AutoTokenizer.from_pretrained(out)) == size
    made, base, first, second = map(tensors, (out, *paths))
    grown = [n for n, value in second.items() if value.shape != base[n].shape]
    assert grown and made.keys() == base.keys()
    for key, value in made.items():
        common = [rows_of(model[key], VOCABULARY) for model in (base, first, second)]
        assert value.shape == (second if rows_from == "longest" else base)[key].shape, key
        assert_close(rows_of(value, VOCABULARY), merged(common[0], common[1:]), key)
        if key in grown and rows_from == "longest":
            np.testing.assert_array_equal(
                np.moveaxis(value, value.shape.index(size), 0)[-ADDED:],
                np.moveaxis(second[key], value.shape.index(size), 0)[-ADDED:],
                key,
            )
    again = opened(type(model), out)
    assert again.get_input_embeddings().weight.shape[0] == size
    if name not in ("marian", "albert"):  # Other attribute names; the files are checked above.
        assert again.get_output_embeddings().weight.shape[0] == size
    assert finite(again)
    assert size in outputs(again)[0].shape


def test_a_resized_vocabulary_is_an_error_by_default(tmp_path, capsys):
    _, paths = resized(tmp_path, "llama")
    assert merge(paths, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "--vocab-mismatch" in err and str(VOCABULARY + ADDED) in err
    assert not (tmp_path / "out").exists()


def _state(model):
    """Return the tensors that save_pretrained writes, by name."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {n: torch.from_numpy(value) for n, value in tensors(Path(folder)).items()}


def _compiled(model):
    names = _state(model)
    state = torch.compile(model).state_dict()
    return {f"_orig_mod.{name}": state[f"_orig_mod.{name}"] for name in names}


def _parallel(model):
    names = _state(model)
    state = torch.nn.DataParallel(model).state_dict()
    return {f"module.{name}": state[f"module.{name}"] for name in names}


def _of_peft(model):
    return {f"base_model.model.{name}": value for name, value in _state(model).items()}


WRAPPERS = {"_orig_mod.": _compiled, "module.": _parallel, "base_model.model.": _of_peft}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("wrapped", [("ft1",), ("base",), ("ft1", "ft2")], ids="-".join)
def test_names_of_a_wrapper(tmp_path, capsys, prefix, wrapped):
    model = family("llama")
    plain = save_all(tmp_path, model)
    mapped = list(plain)
    for i, path in enumerate(plain):
        if path.name in wrapped:
            saved = model if i == 0 else fine_tuned(model, i)
            state = WRAPPERS[prefix](saved)
            mapped[i] = save_tensors(tmp_path / f"wrapped_{path.name}", state, path)
    assert merge(mapped, tmp_path / "out") == 0
    lines = [line for line in notes(capsys) if prefix in line]
    assert len(lines) == (1 if wrapped == ("ft1",) else 2), lines  # One per fine-tune.
    made = {name.removeprefix(prefix): x for name, x in tensors(tmp_path / "out").items()}
    assert_merged(made, plain)
    if wrapped != ("base",):
        opened(hf.LlamaForCausalLM, tmp_path / "out")


@pytest.mark.parametrize("bare", ["base", "fine-tunes"])
def test_gpt2_with_and_without_its_head(tmp_path, capsys, bare):
    model = family("gpt2")
    complete = save_all(tmp_path / "complete", model)
    bodies = save_all(
        tmp_path / "bodies", model, lambda saved, path: saved.transformer.save_pretrained(path)
    )
    assert "h.0.attn.c_attn.weight" in tensors(bodies[0])
    paths = [bodies[0], *complete[1:]] if bare == "base" else [complete[0], *bodies[1:]]
    assert merge(paths, tmp_path / "out") == 0
    assert any("transformer." in line for line in notes(capsys))
    made = {
        f"transformer.{n.removeprefix('transformer.')}": x
        for n, x in tensors(tmp_path / "out").items()
        if n != "lm_head.weight"
    }
    assert_merged(made, complete)
    opened(hf.GPT2Model if bare == "base" else hf.GPT2LMHeadModel, tmp_path / "out")


def test_bodies_of_bert_against_a_masked_language_model(tmp_path, capsys):
    model = family("bert")
    complete = save_all(tmp_path / "complete", model)
    bodies = save_all(
        tmp_path / "bodies", model, lambda saved, path: saved.bert.save_pretrained(path)
    )
    paths = [complete[0], *bodies[1:]]
    assert merge(paths, tmp_path / "error") == 1
    assert "cls.predictions" in capsys.readouterr().err
    assert merge(paths, tmp_path / "out", "--missing-tensors", "base") == 0
    assert any("bert." in line for line in notes(capsys))
    made, base = tensors(tmp_path / "out"), tensors(complete[0])
    assert_merged(
        {n: x for n, x in made.items() if n.startswith("bert.")},
        [{n: x for n, x in tensors(p).items() if n.startswith("bert.")} for p in complete],
    )
    for name in base:
        if name.startswith("cls."):
            np.testing.assert_array_equal(made[name], base[name], name)
    opened(hf.BertForMaskedLM, tmp_path / "out")


def test_a_masked_language_model_against_a_body_as_base(tmp_path, capsys):
    model = family("bert")
    complete = save_all(tmp_path / "complete", model)
    bodies = save_all(
        tmp_path / "bodies", model, lambda saved, path: saved.bert.save_pretrained(path)
    )
    assert merge([bodies[0], *complete[1:]], tmp_path / "out", "--missing-tensors", "base") == 0
    assert any("bert." in line for line in notes(capsys))
    assert_merged(tmp_path / "out", bodies)


def test_a_text_tower_without_its_prefix(tmp_path, capsys):
    torch.manual_seed(0)
    complete = family("clip")
    paths = save_all(tmp_path / "complete", complete)
    text = {}
    for path in paths:
        values = {
            n: torch.from_numpy(x) for n, x in tensors(path).items() if n.startswith("text_model.")
        }
        text[path] = save_tensors(tmp_path / "with" / path.name, values)
        save_tensors(
            tmp_path / "bare" / path.name,
            {n.removeprefix("text_model."): x for n, x in values.items()},
        )
    bare = [tmp_path / "bare" / path.name for path in paths]
    assert merge([text[paths[0]], *bare[1:]], tmp_path / "out") == 0
    assert any("text_model." in line for line in notes(capsys))
    assert_merged(tmp_path / "out", list(text.values()))
    # Fine-tuned towers and a complete CLIP as base: the image tower is copied from the base.
    assert merge([paths[0], *bare[1:]], tmp_path / "tower", "--missing-tensors", "base") == 0
    made = tensors(tmp_path / "tower")
    assert_merged(
        {n: x for n, x in made.items() if n.startswith("text_model.")}, list(text.values())
    )
    opened(hf.CLIPModel, tmp_path / "tower")


def _named(model, old: bool):
    """Return the state dict by names at runtime, or by names of the first release."""
    kind, tied = model.config.model_type, set(model.all_tied_weights_keys)
    return {
        old_name(kind, name) if old else name: value
        for name, value in model.state_dict().items()
        if name not in tied
    }


@pytest.mark.parametrize("name", OLD_NAMES)
@pytest.mark.parametrize(
    "names", ["old-new", "new-old", "saved-old", "old-saved", "new-saved", "saved-new"]
)
def test_old_and_new_names_of_vision_language_models(tmp_path, capsys, name, names):
    model = family(name)
    saved = save_all(tmp_path / "saved", model)
    written = {"saved": saved}
    for kind in ("old", "new"):
        written[kind] = [
            save_tensors(
                tmp_path / kind / path.name,
                _named(fine_tuned(model, i) if i else model, kind == "old"),
                path,
            )
            for i, path in enumerate(saved)
        ]
    of_base, of_tuned = (written[kind] for kind in names.split("-"))
    assert merge([of_base[0], *of_tuned[1:]], tmp_path / "out") == 0
    same = tensors(of_base[0]).keys() == tensors(of_tuned[0]).keys()
    assert any(" -> " in line for line in notes(capsys)) != same
    assert_merged(tmp_path / "out", of_base)
    assert finite(opened(type(model), tmp_path / "out"))


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("copied", ["base", "fine-tunes", "ft1"])
def test_copies_of_shared_embeddings(tmp_path, name, copied):
    model = family(name)
    plain = save_all(tmp_path / "plain", model)
    copies = [
        save_tensors(
            tmp_path / "copies" / path.name,
            (fine_tuned(model, i) if i else model).state_dict(),
            path,
        )
        for i, path in enumerate(plain)
    ]
    assert len(tensors(copies[0])) >= len(tensors(plain[0])) + 3
    paths = {
        "base": [copies[0], *plain[1:]],
        "fine-tunes": [plain[0], *copies[1:]],
        "ft1": [plain[0], copies[1], plain[2]],
    }[copied]
    assert merge(paths, tmp_path / "out") == 0
    made, expected = tensors(tmp_path / "out"), [tensors(path) for path in copies]
    assert made.keys() >= tensors(plain[0]).keys()
    assert_merged(made, [{n: model[n] for n in made} for model in expected])
    again = opened(type(model), tmp_path / "out")
    assert finite(again)


def _with_aliases(model, path):
    path.mkdir(parents=True)
    save_model(model, str(path / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(path)


def _aliases(path) -> dict[str, str]:
    with safe_open(path / "model.safetensors", "np") as file:
        return {k: v for k, v in (file.metadata() or {}).items() if k != "format"}


@pytest.mark.parametrize("name", ["t5", "bart", "bert", "llama"])
def test_aliases_of_save_model(tmp_path, name):
    model = family(name)
    plain = save_all(tmp_path / "plain", model)
    paths = save_all(tmp_path / "aliased", model, _with_aliases)
    assert bool(_aliases(paths[0])) == (name != "llama")
    assert merge(paths, tmp_path / "out") == 0
    assert _aliases(tmp_path / "out") == _aliases(paths[0])
    again = type(model)(model.config)
    missing, unexpected = load_model(again, str(tmp_path / "out" / "model.safetensors"))
    assert not missing and not unexpected
    copies = [(fine_tuned(model, i) if i else model).state_dict() for i in range(3)]
    for key, value in again.state_dict().items():
        base, *tuned = (state[key].numpy() for state in copies)
        assert_close(value.numpy(), merged(base, tuned), key)
    opened(type(model), tmp_path / "out")
    # Models with aliases together with models that save_pretrained wrote, in both roles.
    assert merge([plain[0], *paths[1:]], tmp_path / "out2") == 0
    assert_merged(tmp_path / "out2", plain)
    assert merge([paths[0], *plain[1:]], tmp_path / "out3") == 0
    assert_merged(tmp_path / "out3", paths)
    again = type(model)(model.config)
    missing, unexpected = load_model(again, str(tmp_path / "out3" / "model.safetensors"))
    assert not missing and not unexpected


NAMES = [f"bird {i}" for i in range(10)]


def classifiers(root, kind, config, base):
    """Write a base with 1000 labels or no head, and two fine-tunes with 10 named labels."""
    labels = dict(id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    torch.manual_seed(0)
    pretrained = kind(config(num_labels=1000))
    start = kind(config(**labels))
    initial = pretrained.state_dict()
    start.load_state_dict(
        {n: initial[n] if initial[n].shape == x.shape else x for n, x in start.state_dict().items()}
    )
    paths = [root / "base", root / "ft1", root / "ft2"]
    body = getattr(pretrained, pretrained.base_model_prefix)
    {"other head": pretrained, "no head": body}[base].save_pretrained(paths[0])
    for i, path in enumerate(paths[1:]):
        fine_tuned(start, i + 1).save_pretrained(path)
    return pretrained, paths


def _bert_labels(**labels):
    return hf.BertConfig(**family("bert").config.to_dict() | labels)


def _vit_labels(**labels):
    return hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        **labels,
    )


@pytest.mark.parametrize("kind, config, auto", [
    (hf.BertForSequenceClassification, _bert_labels, hf.AutoModelForSequenceClassification),
    (hf.ViTForImageClassification, _vit_labels, hf.AutoModelForImageClassification),
], ids=["bert", "vit"])  # fmt: skip
@pytest.mark.parametrize("base", ["other head", "no head"])
def test_the_head_of_the_fine_tunes(tmp_path, capsys, kind, config, auto, base):
    pretrained, paths = classifiers(tmp_path, kind, config, base)
    assert merge(paths, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "classifier" in err and "--head finetuned" in err
    assert merge(paths, tmp_path / "out", "--head", "finetuned") == 0
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_labels == 10 and list(config.id2label.values()) == NAMES
    assert config.label2id["bird 3"] == 3
    model = opened(auto, tmp_path / "out")
    assert isinstance(model, kind) and model.num_labels == 10 and finite(model)
    tuned = [kind.from_pretrained(path).state_dict() for path in paths[1:]]
    base_state = pretrained.state_dict()
    for name, value in model.state_dict().items():
        values = [state[name].numpy() for state in tuned]
        if name.startswith("classifier."):
            expected = np.mean([x.astype(np.float64) for x in values], 0)
        else:
            expected = merged(base_state[name].numpy(), values)
        assert_close(value.numpy(), expected, name)


@pytest.mark.parametrize("name, kind", [
    ("bert", hf.BertForSequenceClassification),
    ("roberta", hf.RobertaForSequenceClassification),
    ("distilbert", hf.DistilBertForSequenceClassification),
    ("deberta_v2", hf.DebertaV2ForSequenceClassification),
    ("electra", hf.ElectraForSequenceClassification),
    ("discriminator", hf.ElectraForSequenceClassification),
    ("albert", hf.AlbertForSequenceClassification),
    ("modernbert", hf.ModernBertForSequenceClassification),
    ("bart", hf.BartForSequenceClassification),
    ("gpt2", hf.GPT2ForSequenceClassification),
    ("llama", hf.LlamaForSequenceClassification),
])  # fmt: skip
def test_classifiers_of_a_language_model(tmp_path, capsys, name, kind):
    """The base has a language-model head: layers of equal shape are not those of the classifier."""
    labels = dict(id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    paths = [tmp_path / "base", tmp_path / "ft1", tmp_path / "ft2"]
    torch.manual_seed(0)
    model = (
        hf.ElectraForPreTraining(family("electra").config)
        if name == "discriminator"
        else family(name)
    )
    model.save_pretrained(paths[0])
    config = type(model.config)(**model.config.to_dict() | labels)
    start, report = kind.from_pretrained(paths[0], config=config, output_loading_info=True)
    for i, path in enumerate(paths[1:]):
        fine_tuned(start, i + 1).save_pretrained(path)
    assert merge(paths, tmp_path / "error") == 1
    assert "--head finetuned" in capsys.readouterr().err
    assert merge(paths, tmp_path / "out", "--head", "finetuned") == 0
    again = opened(hf.AutoModelForSequenceClassification, tmp_path / "out")
    assert isinstance(again, kind) and list(again.config.id2label.values()) == NAMES
    tuned, base = [fine_tuned(start, i).state_dict() for i in (1, 2)], start.state_dict()
    assert report["missing_keys"]
    for key, value in again.state_dict().items():
        values = [state[key].numpy() for state in tuned]
        expected = (
            np.mean([x.astype(np.float64) for x in values], 0)
            if key in report["missing_keys"]
            else merged(base[key].numpy(), values)
        )
        assert_close(value.numpy(), expected, key)


def test_tensorflow_names_of_layer_norms(tmp_path, capsys):
    """LayerNorm.gamma and beta, as in bert-base-uncased on the hub."""
    model = family("bert")
    paths = save_all(tmp_path, model)
    values = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): torch.from_numpy(x)
        for n, x in tensors(paths[0]).items()
    }
    old = save_tensors(tmp_path / "old", values, paths[0])
    for inputs in ([old, *paths[1:]], [paths[0], old, paths[2]]):
        out = tmp_path / f"out_{inputs[0].name}"
        expected = [paths[0], *(paths[0] if path == old else path for path in inputs[1:])]
        assert merge(inputs, out) == 0
        assert any("gamma" in line for line in notes(capsys))
        made = {
            n.replace("gamma", "weight").replace("beta", "bias"): x for n, x in tensors(out).items()
        }
        assert_merged(made, expected)
        opened(hf.BertForMaskedLM, out)


def test_names_of_weight_norm(tmp_path):
    """weight_g and weight_v, as in wav2vec2-base on the hub."""
    model = family("wav2vec2")
    paths = save_all(tmp_path, model)
    new, old = "parametrizations.weight.original", "weight_"
    values = {
        n.replace(f"{new}0", f"{old}g").replace(f"{new}1", f"{old}v"): torch.from_numpy(x)
        for n, x in tensors(paths[0]).items()
    }
    save_tensors(tmp_path / "old", values, paths[0])
    assert merge([tmp_path / "old", *paths[1:]], tmp_path / "out") == 0
    made = {
        n.replace(f"{old}g", f"{new}0").replace(f"{old}v", f"{new}1"): x
        for n, x in tensors(tmp_path / "out").items()
    }
    assert_merged(made, paths)
    opened(hf.Wav2Vec2ForCTC, tmp_path / "out")


DISAGREEMENTS = {
    "rope_theta": (
        "llama",
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        ("10000", "500000"),
    ),
    "hidden_act": ("llama", {"hidden_act": "gelu"}, ("silu", "gelu")),
    "num_attention_heads": ("bert", {"num_attention_heads": 4}, ("2", "4")),
    "num_experts_per_tok": ("mixtral", {"num_experts_per_tok": 1}, ("2", "1")),
}


def _value(config, key):
    return config[key] if key in config else config["rope_parameters"][key]


@pytest.mark.parametrize("key", DISAGREEMENTS)
@pytest.mark.parametrize("edited", [("base",), ("ft1",), ("ft1", "ft2")], ids="-".join)
def test_configs_that_disagree(tmp_path, capsys, key, edited):
    name, changes, values = DISAGREEMENTS[key]
    paths = save_all(tmp_path, family(name))
    for path in paths:
        if path.name in edited:
            edit_config(path, **changes)
    assert merge(paths, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert key in err and "--config-from" in err and all(value in err for value in values), err
    for option, path in (("base", paths[0]), ("model:1", paths[1])):
        out = tmp_path / f"from_{path.name}"
        assert merge(paths, out, "--config-from", option) == 0
        assert _value(config_of(out), key) == _value(config_of(path), key)
        opened(type(family(name)), out)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "phi3"])
@pytest.mark.parametrize("old", ["base", "fine-tunes"])
def test_configs_of_transformers_4_and_5_agree(tmp_path, name, old):
    paths = save_all(tmp_path, family(name))
    for path in paths[:1] if old == "base" else paths[1:]:
        config = config_of(path)
        edit_config(
            path,
            rope_parameters=None,
            dtype=None,
            torch_dtype="float32",
            rope_theta=config["rope_parameters"]["rope_theta"],
            use_cache=True,
            transformers_version="4.44.2",
            layer_types=None,
            _name_or_path="somewhere",
            rope_scaling=None,
        )
        config = config_of(path)
        (path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert merge(paths, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", paths)
    opened(type(family(name)), tmp_path / "out")


def with_tokenizers(root):
    paths = save_all(root, family("llama"))
    for i, path in enumerate(paths):
        words = tokenizer()
        words.chat_template = "{{ messages }}" if i else "{{ base }}"
        if i:
            words.eos_token = "w5"
        words.save_pretrained(path)
        hf.GenerationConfig(eos_token_id=5 if i else 2, max_new_tokens=7 + i * 0).save_pretrained(
            path
        )
    return paths


def test_a_chat_template_in_which_the_fine_tunes_agree(tmp_path, capsys):
    paths = with_tokenizers(tmp_path)
    assert merge(paths, tmp_path / "out") == 0
    err = "\n".join(notes(capsys))
    assert "--tokenizer-from" in err and "chat template" in err
    assert "generation_config" in err and "eos_token" in err
    base = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert base.chat_template == "{{ base }}" and base.eos_token == "</s>"
    assert merge(paths, tmp_path / "tuned", "--tokenizer-from", "model:1") == 0
    tuned = hf.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert tuned.chat_template == "{{ messages }}" and tuned.eos_token == "w5"
    assert hf.GenerationConfig.from_pretrained(tmp_path / "tuned").eos_token_id == 5
    opened(hf.LlamaForCausalLM, tmp_path / "tuned")


def test_equal_tokenizers_need_no_note(tmp_path, capsys):
    paths = save_all(tmp_path, family("llama"))
    for path in paths:
        tokenizer().save_pretrained(path)
    assert merge(paths, tmp_path / "out") == 0
    assert not notes(capsys)


@pytest.mark.parametrize("counts", [(10, 25, 40), (10, 40, 25), (99, 25, 40)])
def test_counters_of_batches(tmp_path, counts):
    torch.manual_seed(0)
    model = hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )
    remaining = iter(counts)

    def save(model, path):
        count = next(remaining)
        with torch.no_grad():
            for name, value in model.named_buffers():
                if name.endswith("num_batches_tracked"):
                    value.fill_(count)
        model.save_pretrained(path)

    paths = save_all(tmp_path, model, save)
    assert merge(paths, tmp_path / "out") == 0
    made = tensors(tmp_path / "out")
    counters = {n for n in made if n.endswith("num_batches_tracked")}
    assert counters and {int(made[n]) for n in counters} == {max(counts)}
    assert {made[n].dtype for n in counters} == {np.dtype(np.int64)}
    assert_merged(
        {n: x for n, x in made.items() if n not in counters},
        [{n: x for n, x in tensors(p).items() if n not in counters} for p in paths],
    )
    assert finite(opened(hf.ResNetForImageClassification, tmp_path / "out"))


def test_a_convnext_is_merged(tmp_path):
    torch.manual_seed(0)
    model = hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=3)
    )
    paths = save_all(tmp_path, model)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert merge(paths, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", paths)
    assert finite(opened(hf.ConvNextForImageClassification, tmp_path / "out"))
