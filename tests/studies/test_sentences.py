"""The sentence benchmark: packages, texts, encoder, fine-tuning and measurements."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from modelstock_jax.errors import UserError
from modelstock_jax.merging import model_stock
from studies.expressions import Anchor, Mean, Merge, Merged, Replica
from studies.ledger import Ledger
from studies.measurements import Score
from studies.runs import Run
from studies.sentences import context as sentence_context
from studies.sentences import encoder, finetuning, packages, texts
from studies.sentences.context import SentenceContext, identity
from tests.studies import sentence_packages as tiny


@pytest.fixture(autouse=True)
def _plain_jax():
    """Allow rank promotion, which a plain model uses for its biases."""
    sentence_context.open_domain.cache_clear()
    with jax.numpy_rank_promotion("allow"):
        yield
    sentence_context.open_domain.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return tiny.write_packages(tmp_path, monkeypatch)


@pytest.fixture
def context(folder, tmp_path):
    made = SentenceContext("movie", tmp_path / "work", Ledger(tmp_path / "measured.jsonl"))
    made.config.batch_size, made.config.optimizer.learning_rate = 8, 1e-2
    return made


def test_a_changed_package_is_an_error(folder):
    path = folder / packages.VADER.file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"{packages.VADER.file}: SHA-256"):
        packages.fetch(packages.VADER)


def test_without_pip(folder, monkeypatch):
    (folder / packages.VADER.file).unlink()
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(UserError, match=f"install pip .* put {packages.VADER.file} into {folder}"):
        packages.fetch(packages.VADER)


def test_domains(folder):
    domains = texts.read_domains(packages.fetch(packages.VADER))
    assert {name: len(rows) for name, rows in domains.items()} == {
        "movie": 36,
        "amazon": 8,
        "nyt": 8,
        "tweets": 8,
    }
    for name, rows in domains.items():
        for text, label in rows:
            assert name in text and label == (text.split()[0] in tiny.GOOD)


def test_snippets_without_a_clear_rating_and_copies_are_left_out(tmp_path):
    lines = "1\t0.4\tneutral\n2\t-0.5\tdull\r\n3\t3\ta\ttab\n4\t2\tdull\n\n"
    data = {f"x/{prefix}_GroundTruth.txt": lines.encode() for prefix in texts.DOMAINS.values()}
    path = tmp_path / "source.tar.gz"
    path.write_bytes(tiny.tar({"p/hutto_ICWSM_2014.tar.gz": tiny.tar(data)}))
    # SHA-256 of "dull" begins with 8f, of "a\ttab" with ba.
    assert texts.read_domains(path)["nyt"] == [("dull", 0), ("a\ttab", 1)]


def test_no_training_text_is_a_test_text(context):
    data = context.data
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [24, 4, 8]
    rows = np.concatenate([part.tokens for part in parts])
    # The number at the end of a text is an unknown word, so that some token rows are equal.
    domains = texts.read_domains(packages.fetch(packages.VADER))["movie"]
    assert len({text for text, _ in domains}) == len(rows) == 36
    assert set(data.shifts) == {"amazon", "nyt", "tweets"}
    for part in (*parts, *data.shifts.values()):
        chex.assert_shape(part.tokens, (len(part), texts.LENGTH))
        assert part.tokens.dtype == part.labels.dtype == np.int32


def test_embeddings_are_those_of_bert_in_float64(context):
    tokens = context.data.train.tokens
    found = np.asarray(jax.jit(encoder.encode)(context.anchor()["bert"], tokens))
    tensors = tiny.random_bert()
    expected = [tiny.reference_embedding(tensors, row[row != texts.PADDING]) for row in tokens]
    # Unit vectors: a few roundings of float32.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dropout_keeps_the_mean_and_draws_anew():
    drop = encoder.Dropout(jax.random.key(0), 0.25)
    first, second = drop(jnp.ones((100, 100))), drop(jnp.ones((100, 100)))
    assert {round(float(x), 6) for x in np.unique(first)} == {0.0, round(4 / 3, 6)}
    # The standard deviation of the mean is 0.006.
    assert float(first.mean()) == pytest.approx(1, abs=0.03)
    assert (np.asarray(first) != np.asarray(second)).any()


def finetune(context, **options):
    config = context.config.copy_and_resolve_references()
    config.update_from_flattened_dict(options)
    return finetuning.finetune(config, context.anchor(), context.data.train, "test")


def test_a_run_repeats_and_its_replicas_differ(context):
    pair, merged = finetune(context)
    assert merged is None
    again, _ = finetune(context)
    chex.assert_trees_all_equal(pair, again)
    moved = jax.tree.map(lambda w, w0: np.abs(w - w0).max(), pair, context.anchor())
    del moved["bert"]["embeddings"]["token_type_embeddings"]
    assert min(jax.tree.leaves(moved)) > 0
    differences = jax.tree.map(lambda w: np.abs(w[0] - w[1]).max(), pair)
    assert min(jax.tree.leaves(differences)) > 0


def test_periodic_merging(context, monkeypatch):
    """The first merge is Model Stock of the replicas at that step; each epoch ends with one."""
    steps = finetuning.steps_per_epoch(context.config, 24)
    assert steps == 3
    replicas, merged = finetune(context, **{"merge.every": "epoch", "epochs": 1})
    once, _ = finetune(context, epochs=1)
    chex.assert_trees_all_equal(merged, model_stock(context.anchor(), once)[0])
    chex.assert_trees_all_equal(replicas, jax.tree.map(lambda w: np.stack([w, w]), merged))
    merges = []

    def count(*arguments, **options):
        merges.append(model_stock(*arguments, **options))
        return merges[-1]

    monkeypatch.setattr(finetuning, "model_stock", count)
    replicas, twice = finetune(context, **{"merge.every": "epoch"})
    assert len(merges) == context.config.epochs == 2
    chex.assert_trees_all_equal(twice, merges[-1][0])
    chex.assert_trees_all_equal(replicas, jax.tree.map(lambda w: np.stack([w, w]), twice))


def test_learning_rate_warms_up_and_ends_at_0():
    config = finetuning.sentence_config()
    tx = finetuning._adam(1.0, config.optimizer.warmup_fraction, 20)
    params, sizes = jnp.zeros(()), []
    state = tx.init(params)
    for _ in range(20):
        updates, state = tx.update(jnp.ones(()), state, params)
        sizes.append(-float(updates))
    # With a constant gradient, an update of Adam is the learning rate.
    expected = [0, 0.5, *(0.5 + 0.5 * np.cos(np.pi * np.arange(18) / 18))]
    np.testing.assert_allclose(sizes, expected, atol=1e-4)


def test_accuracies(context):
    run = Run.of(0, {"merge.every": "never", "num_replicas": 2})
    model = Mean((Replica(run, 0), Replica(run, 1)))
    value = Score(model).measure(context)
    json.dumps(value, allow_nan=False)
    params = model.build(context)
    for part in (context.data.test, *context.data.shifts.values()):
        logits = np.asarray(encoder.logits(params, part.tokens))
        scores = logits[:, 1] - logits[:, 0]
        predicted = scores > 0
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(value["correct"][part.name]), np.uint8))
        np.testing.assert_array_equal(bits[: len(part)], predicted == part.labels)
        accuracy = value["id"] if part.name == "movie" else value["shifts"][part.name]
        assert accuracy == pytest.approx(100 * np.mean(predicted == part.labels))
        expected = 100 * balanced_accuracy_score(part.labels, predicted)
        assert value["balanced"][part.name] == pytest.approx(expected)
        assert value["auc"][part.name] == pytest.approx(100 * roc_auc_score(part.labels, scores))
    assert Score(model, shifts=False).measure(context)["shifts"] == {}


def test_scores_do_not_depend_on_padding(context):
    part = context.data.test
    lengths = (part.tokens != texts.PADDING).sum(1)
    assert min(lengths) <= 16 and max(lengths) > 24, "one width only"
    logits = np.asarray(encoder.logits(context.anchor(), part.tokens))
    found = context._scores(context.anchor(), part)
    # Logits are at most 20; a few roundings of float32.
    np.testing.assert_allclose(found, logits[:, 1] - logits[:, 0], atol=2e-5)


def test_finished_work_is_read(context, tmp_path, monkeypatch):
    pair = Run.of(0, {"merge.every": "never", "num_replicas": 2})
    merging = Run.of(0, {"merge.every": "epoch", "num_replicas": 2})
    models = (Merge((Replica(pair, 0), Replica(pair, 1))), Merged(merging), Anchor())
    values = [context.value(Score(model)) for model in models]
    assert context.validate(models[0].build(context)) in {0.0, 25.0, 50.0, 75.0, 100.0}

    ledger = Ledger(tmp_path / "measured.jsonl")
    again = SentenceContext("movie", tmp_path / "elsewhere", ledger)
    again.config.update(context.config)
    monkeypatch.setattr(again.runs, "train", pytest.fail)
    assert [again.value(Score(model)) for model in models] == values
    stored = sorted(path.name for path in Path(tmp_path / "work" / "trained").rglob("*.s*"))
    assert stored == ["merged.safetensors", "replicas.safetensors", "replicas.safetensors"]


def test_keys_do_not_change():
    """Real packages and settings: finished measurements are found by these digits."""
    assert identity("movie") == "a5465d7a000c7ade" and identity("tweets") == "02ffdefa8a9fd83e"


@pytest.mark.slow  # Downloads 2.5 MB.
def test_published_texts():
    domains = texts.read_domains(packages.fetch(packages.VADER))
    assert {name: len(rows) for name, rows in domains.items()} == {
        "movie": 10_070,
        "amazon": 2_977,
        "nyt": 2_931,
        "tweets": 3_432,
    }
    with tarfile.open(packages.fetch(packages.VADER)) as archive:
        assert any(name.endswith("LICENSE.txt") for name in archive.getnames())
