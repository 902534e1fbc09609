"""Zero-shot heads."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io, tokenizer, zero_shot
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.model import encode_text
from modelstock_jax.models.tokenizer import tokenize
from modelstock_jax.models.zero_shot import cached_zero_shot_head, head_key, zero_shot_head
from modelstock_jax.tensor_files.writer import write_tensors
from tests.models import small
from tests.models.prompts import CAPTIONS, CLASSES, EOS, TEMPLATES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "t"
    tokenizer.build(CAPTIONS, directory, context_length=16)
    vocabulary = json.loads((directory / "vocab.json").read_text())
    return small.checkpoint(small.config(vocab_size=len(vocabulary), eos_token_id=EOS), directory)


@pytest.fixture(scope="module")
def head(checkpoint):
    # With 9 prompts, a batch size of 2 leaves a last batch of 1.
    return zero_shot_head(checkpoint, CLASSES, TEMPLATES, batch_size=2)


def by_numpy(checkpoint) -> np.ndarray:
    """The kernel [E, K] from its formula, at full context length, in float64 after the tower."""
    encode, columns = jax.jit(encode_text, static_argnums=0), []
    for name in CLASSES:
        ids = tokenize(checkpoint.directory, [t.replace("{}", name) for t in TEMPLATES], 16)
        f = np.asarray(encode(checkpoint.config, checkpoint.params["text_tower"], ids), np.float64)
        u = np.mean([x / np.linalg.norm(x) for x in f], axis=0)
        columns.append(np.exp(np.float64(checkpoint.params["logit_scale"])) * u / np.linalg.norm(u))
    return np.stack(columns, 1)


def test_head_by_numpy(checkpoint, head):
    assert head["kernel"].shape == (64, 3) and head["bias"].shape == (3,)
    assert head["kernel"].dtype == head["bias"].dtype == np.float32
    # Columns have norm exp(logit_scale), about 14. With fewer positions the tower sums in another
    # order, which changes unit features by about 1e-7.
    np.testing.assert_allclose(head["kernel"], by_numpy(checkpoint), atol=1.4e-5, rtol=0)
    assert not head["bias"].any()


def test_prompts_are_truncated_after_their_ends(checkpoint, head, monkeypatch):
    seen = []
    embed = zero_shot._embed

    def spy(config, params, ids, compute):
        seen.append(ids.shape)
        return embed(config, params, ids, compute)

    monkeypatch.setattr(zero_shot, "_embed", spy)
    cut = zero_shot_head(checkpoint, CLASSES, TEMPLATES, batch_size=2)
    np.testing.assert_array_equal(cut["kernel"], head["kernel"])
    # Nine prompts of 4 to 13 tokens, context length 16, shortest first.
    assert seen == [(2, 8)] + [(2, 16)] * 4
    monkeypatch.setattr(zero_shot, "_LENGTH_STEP", 16)
    whole = zero_shot_head(checkpoint, CLASSES, TEMPLATES, batch_size=2)
    assert seen[5:] == [(2, 16)] * 5
    # Equal except for the order of float32 sums.
    np.testing.assert_allclose(whole["kernel"], head["kernel"], atol=1.4e-5, rtol=0)


@pytest.mark.parametrize("legacy", [False, True])
def test_padding_does_not_matter(checkpoint, monkeypatch, legacy):
    # OpenAI's code pads with 0, transformers with the end of text. The legacy rule pools at the
    # highest id, so there the end of text must be it, as in CLIP's vocabulary.
    def padded_with(pad, end):
        def padded(directory, texts, length, **options):
            ids = tokenize(directory, texts, length)
            place = (ids == EOS).argmax(1)[:, None]
            ids = np.where(np.arange(length)[None] > place, pad, ids)
            ids[np.arange(len(ids)), place[:, 0]] = end
            return ids.astype(np.int32)

        return padded

    end = checkpoint.config.text.vocab_size - 1 if legacy else EOS
    rule = small.replaced(checkpoint.config, "text", eos_token_id=2 if legacy else EOS)
    model = dataclasses.replace(checkpoint, config=rule)
    kernels = []
    monkeypatch.setattr(zero_shot, "_LENGTH_STEP", 16)  # One program.
    for pad in (0, end):
        monkeypatch.setattr(zero_shot, "tokenize", padded_with(pad, end))
        kernels.append(zero_shot_head(model, CLASSES, TEMPLATES, batch_size=2)["kernel"])
    np.testing.assert_array_equal(*kernels)


def test_products_are_in_full_float32_on_any_accelerator(checkpoint):
    def text(ids):
        compute = Compute()
        return zero_shot._embed(checkpoint.config, checkpoint.params["text_tower"], ids, compute)

    jaxpr = str(jax.make_jaxpr(text)(np.zeros((2, 8), np.int32)))
    assert jaxpr.count("dot_general") == jaxpr.count("precision=(Precision.HIGHEST") > 0


def test_progress(checkpoint):
    seen = []
    zero_shot_head(
        checkpoint,
        CLASSES,
        TEMPLATES,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_head_of_a_saved_checkpoint(checkpoint, head, tmp_path):
    loaded = checkpoint_io.load(checkpoint_io.save(tmp_path / "m", checkpoint))
    assert loaded.directory != checkpoint.directory
    one = zero_shot_head(loaded, CLASSES, TEMPLATES, batch_size=2)
    np.testing.assert_array_equal(one["kernel"], head["kernel"])
    assert head_key(loaded, CLASSES, TEMPLATES) == head_key(checkpoint, CLASSES, TEMPLATES)


def test_repeated_names_get_equal_columns_if_allowed(checkpoint, head):
    names = (*CLASSES, CLASSES[0])
    with pytest.raises(UserError, match="repeated class names: uppercase letter a"):
        zero_shot_head(checkpoint, names, TEMPLATES)
    kernel = zero_shot_head(checkpoint, names, TEMPLATES, batch_size=2, allow_repeats=True)[
        "kernel"
    ]
    # Rows are computed alike, whatever batch they are in.
    np.testing.assert_allclose(kernel[:, 3], kernel[:, 0], atol=1.4e-5, rtol=0)
    np.testing.assert_allclose(kernel[:, :3], head["kernel"], atol=1.4e-5, rtol=0)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], TEMPLATES, "class names"),
        (CLASSES, [], "templates"),
        (("cat", "dog", "cat"), TEMPLATES, "repeated class names: cat"),
        (CLASSES, ("a {}", "a photo"), r"templates .*'\{\}': 'a photo'"),
        ("cat", TEMPLATES, "class names .*list"),
        (("cat", 3), TEMPLATES, "class names .*list .*texts"),
        (("cat " * 16,), TEMPLATES, "context length .*16"),
    ],
)
def test_errors(checkpoint, classes, templates, message):
    with pytest.raises(UserError, match=message):
        zero_shot_head(checkpoint, classes, templates)


def test_a_tokenizer_of_another_model_is_an_error(checkpoint, tmp_path):
    homeless = dataclasses.replace(checkpoint, directory=None)
    for make in (zero_shot_head, lambda *a: cached_zero_shot_head(tmp_path, *a)):
        with pytest.raises(UserError, match="tokenizer directory"):
            make(homeless, CLASSES, TEMPLATES)
    for change, message in (
        ({"eos_token_id": 5}, "eos_token_id 5"),
        ({"vocab_size": 20}, "20 tokens"),
    ):
        other = dataclasses.replace(
            checkpoint, config=small.replaced(checkpoint.config, "text", **change)
        )
        with pytest.raises(UserError, match=message):
            zero_shot_head(other, CLASSES, TEMPLATES)


class TestCache:
    @pytest.fixture
    def made(self, monkeypatch, head):
        """Count how often a head is computed; the text tower is not run."""
        calls = []

        def make(checkpoint, class_names, templates, *, compute, **options):
            calls.append((class_names, options))
            return dict(head)

        monkeypatch.setattr("modelstock_jax.models.zero_shot.zero_shot_head", make)
        return calls

    def test_the_second_call_reads(self, checkpoint, head, made, tmp_path):
        for _ in range(2):
            kept = cached_zero_shot_head(
                tmp_path / "new", checkpoint, CLASSES, TEMPLATES, batch_size=2
            )
            for name in ("kernel", "bias"):
                np.testing.assert_array_equal(kept[name], head[name])
        assert made == [(CLASSES, {"batch_size": 2})]
        # Other users of the directory may read it, as any other file.
        (path,) = (tmp_path / "new").iterdir()
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
        key = head_key(checkpoint, CLASSES, TEMPLATES)
        assert [path.name] == [f"zero_shot_head_{key[:16]}.safetensors"]

    def test_the_key_is_of_all_that_the_head_depends_on(self, checkpoint, tmp_path):
        def with_weights(change):
            params = jax.tree.map(np.copy, checkpoint.params)
            change(params)
            return dataclasses.replace(checkpoint, params=params)

        def one_bit(array):
            array.reshape(-1)[0] = np.nextafter(array.reshape(-1)[0], np.float32(9))

        other_text = with_weights(lambda p: one_bit(p["text_tower"]["projection"]["kernel"]))
        other_scale = with_weights(lambda p: p.update(logit_scale=np.float32(1.5)))
        other_image = with_weights(lambda p: one_bit(p["image_tower"]["projection"]["kernel"]))
        other_act = small.replaced(checkpoint.config, "text", hidden_act="gelu")
        directory = shutil.copytree(checkpoint.directory, tmp_path / "t")
        same = dataclasses.replace(checkpoint, directory=directory)
        other = tmp_path / "u"
        tokenizer.build([*CAPTIONS, "more more words words"], other)

        base = head_key(checkpoint, CLASSES, TEMPLATES)
        assert base == head_key(same, list(CLASSES), list(TEMPLATES))
        assert base == head_key(checkpoint, CLASSES, TEMPLATES, Compute(remat=True))
        assert base == head_key(other_image, CLASSES, TEMPLATES)
        keys = [
            base,
            head_key(other_text, CLASSES, TEMPLATES),
            head_key(other_scale, CLASSES, TEMPLATES),
            head_key(dataclasses.replace(checkpoint, config=other_act), CLASSES, TEMPLATES),
            head_key(dataclasses.replace(checkpoint, directory=other), CLASSES, TEMPLATES),
            head_key(checkpoint, CLASSES[::-1], TEMPLATES),
            head_key(checkpoint, CLASSES, TEMPLATES[:2]),
            head_key(checkpoint, (*CLASSES, TEMPLATES[0]), TEMPLATES[1:]),
            head_key(checkpoint, CLASSES, TEMPLATES, Compute(dtype="bfloat16")),
            head_key(checkpoint, CLASSES, TEMPLATES, Compute("bfloat16", attention_impl="cudnn")),
        ]
        assert len(set(keys)) == len(keys)

    @pytest.mark.parametrize(
        "damage",
        ["empty", "cut", "one bit", "another's", "another head", "misshapen", "no digest", "extra"],
    )
    def test_an_invalid_file_is_recomputed(self, checkpoint, head, made, tmp_path, damage):
        arguments = (tmp_path, checkpoint, CLASSES, TEMPLATES)
        cached_zero_shot_head(*arguments)
        (path,) = tmp_path.iterdir()
        whole, key = path.read_bytes(), head_key(*arguments[1:])
        wrong = {"kernel": head["kernel"] + 1, "bias": head["bias"]}
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "cut":
            path.write_bytes(whole[:-8])
        elif damage == "one bit":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        elif damage == "another's":
            write_tensors(path, head)
        elif damage == "another head":
            cached_zero_shot_head(tmp_path / "o", checkpoint, CLASSES[::-1], TEMPLATES)
            made.pop()
            path.write_bytes(next((tmp_path / "o").iterdir()).read_bytes())
        elif damage == "misshapen":
            write_tensors(path, {"kernel": head["kernel"].T, "bias": head["bias"]}, {"key": key})
        elif damage == "no digest":
            write_tensors(path, wrong, {"key": key})
        else:
            write_tensors(path, head | {"more": head["bias"]}, {"key": key})
        kept = cached_zero_shot_head(*arguments)
        np.testing.assert_array_equal(kept["kernel"], head["kernel"])
        cached_zero_shot_head(*arguments)
        # Computed once at first and once after the damage; then read.
        assert len(made) == 2

    def test_a_directory_that_cannot_be_written_is_an_error(self, checkpoint, made, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file/heads: "):
            cached_zero_shot_head(tmp_path / "file" / "heads", checkpoint, CLASSES, TEMPLATES)
