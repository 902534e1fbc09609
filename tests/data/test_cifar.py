"""CIFAR-10 and CIFAR-100 from small datasets, as TensorFlow Datasets prepares them."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10
from modelstock_jax.data import benchmark
from modelstock_jax.data.cifar import CLASS_NAMES, TEMPLATES
from modelstock_jax.data.loader import eval_batches, train_batches
from modelstock_jax.data.published_sets import CIFAR
from modelstock_jax.data.transforms import EvalTransform, TrainTransform
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.options import check_options
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import make_trainer
from studies.catalog import STUDIES
from studies.expressions import Anchor
from studies.image_context import ImageContext
from studies.measurements import Score
from studies.study import Setup
from tests.data.made_records import cifar_set, colored, write_cifar10

NAMES = CLASS_NAMES["cifar10"]
EACH = 6
FOG = "cifar10_corrupted/fog_5"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("tfds"), EACH)


def config(root, **changes):
    data = cifar10.get_config().data
    data.root, data.check_counts, data.held_out_per_class = str(root), False, 2
    data.update(changes)
    return data


def test_published_class_names_and_prompts():
    """Names are in the order of the labels, which is alphabetical; 9 of 18 prompts have 'the'."""
    assert len(NAMES) == 10 and NAMES[:3] == ("airplane", "automobile", "bird")
    hundred = CLASS_NAMES["cifar100"]
    assert len(hundred) == 100 and (hundred[1], hundred[41]) == ("aquarium fish", "lawn mower")
    for names in (NAMES, hundred):
        assert list(names) == sorted(set(names)) and not any("_" in name for name in names)
    assert len(set(TEMPLATES)) == 18 and all(template.count("{}") == 1 for template in TEMPLATES)
    assert sum(" the " in template for template in TEMPLATES) == 9
    assert len(CIFAR["cifar10"].shifts) == 2 + 19 * 5 and not CIFAR["cifar100"].shifts


def test_sets_labels_and_bytes(root):
    opened = benchmark.load(config(root))
    assert (
        opened.class_names == NAMES and opened.templates == TEMPLATES and opened.real_labels is None
    )
    assert np.bincount(opened.train.labels).tolist() == [EACH - 2] * 10
    assert np.bincount(opened.validation.labels).tolist() == [2] * 10
    parts = [*opened.train.images, *opened.validation.images]
    assert sorted(parts) == sorted(colored(i % 10, i) for i in range(10 * EACH))
    assert (opened.test.name, opened.validation.name) == ("id", "validation")
    assert opened.test.labels.tolist() == [*range(10)] * 2
    assert list(opened.test.images) == [colored(i % 10, 100 + i) for i in range(20)]
    assert list(opened.shifts) == ["cifar10_1/v6"]
    assert opened.shifts["cifar10_1/v6"].labels.tolist() == [*range(10)]
    reopened = benchmark.load(config(root))
    assert list(reopened.validation.images) == list(opened.validation.images)
    assert "tensorflow" not in sys.modules


def test_shifts_by_name(root, tmp_path):
    named = benchmark.load(config(root, shifts=(FOG, "cifar10_1/v6"))).shifts
    assert list(named) == [FOG, "cifar10_1/v6"] and named[FOG].name == FOG
    cifar_set(tmp_path / "cifar10" / "3.0.2", NAMES, {"train": 3, "test": 1})
    assert benchmark.load(config(tmp_path)).shifts == {}, "CIFAR-10.1 is optional"


def test_images_are_resized_to_the_input_size(root):
    """32 x 32 pixels are resized to the tower's input; the center crop is the full image."""
    test = benchmark.load(config(root)).test
    for size in (24, 40):
        batch = next(eval_batches(test, 8, transform=EvalTransform(size)))
        assert batch["image"].shape == (8, size, size, 3) and batch["mask"].all()
    batch = next(eval_batches(test, 1, transform=EvalTransform(32)))
    color = np.random.default_rng(0).integers(40, 216, 3)
    # The mean over 1,024 pixels of noise of +-30 has a standard error of 0.55.
    np.testing.assert_allclose(batch["image"][0].mean((0, 1)), color, atol=3)


def test_canvases_are_as_large_as_the_images(root):
    """Their size is that of the features: the device pads to a result's side, not to 2 S + 64."""
    opened = benchmark.load(config(root))
    assert [sides.tolist() for sides in opened.test.images.sizes()] == [[32] * len(opened.test)] * 2
    for size, canvas in ((24, 32), (40, 48)):
        transform = EvalTransform(size, resize_on="device")
        batch = next(eval_batches(opened.test, 8, transform=transform))
        assert batch["image"].shape == (8, canvas, canvas, 3)
        stream = train_batches(
            opened.train,
            batch_size=8,
            seed=0,
            num_replicas=2,
            transform=TrainTransform(size, resize_on="device"),
        )
        assert next(stream)["image"].shape == (2, 8, canvas, canvas, 3)


def test_cifar100(tmp_path):
    stored = [name.replace(" ", "_") for name in CLASS_NAMES["cifar100"]]
    cifar_set(tmp_path / "cifar100" / "3.0.2", stored, {"train": 2, "test": 1})
    data = config(tmp_path, name="cifar100", held_out_per_class=1)
    opened = benchmark.load(data)
    assert opened.class_names[1] == "aquarium fish" and opened.shifts == {}
    assert len(opened.train) == len(opened.validation) == len(opened.test) == 100
    with pytest.raises(UserError, match="'cifar10_1/v6' .*CIFAR-100"):
        benchmark.missing(config(tmp_path, name="cifar100", shifts=("cifar10_1/v6",)))


def test_summary_without_the_data():
    summary = benchmark.summarize(config("nowhere", held_out_per_class=500))
    assert (summary.num_train, summary.num_classes) == (45_000, 10)
    assert "CIFAR-10" in summary.source and "5,000" in summary.source
    hundred = benchmark.summarize(config("nowhere", name="cifar100", held_out_per_class=0))
    assert (hundred.num_train, hundred.num_classes) == (50_000, 100)


def test_a_missing_dataset_is_one_line_with_its_command(tmp_path):
    data = config(tmp_path, shifts=("cifar10_1/v6",))
    with pytest.raises(UserError) as caught:
        benchmark.load(data)
    lines = benchmark.missing(data)
    assert str(caught.value) == "; ".join(lines) and len(lines) == 2
    assert f"data.root={tmp_path}" in lines[0]
    assert f"`tfds build cifar10 --file_format=array_record --data_dir={tmp_path}`" in lines[0]
    assert "cifar10_1/v6 " in lines[1] and "data.shifts" in lines[1]
    for root, message in (
        ("", "data.root "),
        (tmp_path / "none", f"data.root={tmp_path}/none: "),
    ):
        (line,) = benchmark.missing(config(root))
        assert line.startswith(message) and "data_dir" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cifar-10"}, "'cifar-10': .*glyphs, imagenet, cifar10, cifar10"),
        ({"shifts": ("cifar10_1/v5",)}, "'cifar10_1/v5' .*CIFAR-10; .* cifar10_1/v6; "),
        ({"shifts": ("snow",)}, "'snow' .*CIFAR-10; .* cifar10_corrupted/NAME_1 .*snow"),
        ({"paths": {"test": "x"}}, "data.paths.test=x: .*data.root"),
        ({"real_labels": True}, "data.real_labels=True: 'cifar10'"),
        ({"held_out_per_class": EACH}, f"'airplane' .*{EACH} images, .*{EACH}"),
        (
            {"check_counts": True},
            rf"train: .*'train': {10 * EACH} images .*50,000, 49,940 .*"
            r"\(airplane, automobile, bird, cat, deer and 5 more .*5000\)",
        ),
    ],
)
def test_user_errors(root, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        benchmark.load(config(root, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "size", "message"),
    [
        (
            NAMES,
            64,
            r"shape \(64, 64, 3\), .*\(32, 32, 3\); .*CIFAR-10",
        ),
        (NAMES[:9], 32, r"9 classes \(airplane, .*\) .*10 .*CIFAR-10"),
        (NAMES[::-1], 32, r"10 classes \(truck, .*\) .*10 .* order"),
    ],
)
def test_rejects_another_dataset_of_the_same_name(tmp_path, names, size, message):
    cifar_set(tmp_path / "cifar10" / "3.0.2", names, {"train": 3, "test": 1}, size=size)
    with pytest.raises(UserError, match=message) as caught:
        benchmark.load(config(tmp_path))
    assert f"{tmp_path}/cifar10/3.0.2, split train" in str(caught.value)


def test_a_misspelled_name_raises_before_anything_is_opened():
    options = cifar10.get_config()
    check_options(options)
    options.data.name = "cifar"
    with pytest.raises(UserError, match="data.name='cifar': .*cifar10, cifar100"):
        check_options(options)


def test_two_replicas_learn_the_classes(root, tmp_path):
    """Through the trainer's public functions, with a linear model that compiles quickly."""

    def apply(params, images):
        features = images.mean((1, 2)) * params["image_tower"]["scale"][None]
        return features @ params["head"]["kernel"] + params["head"]["bias"][None]

    options = cifar10.get_config()
    options.data = config(root)
    options.batch_size, options.epochs, options.log_every_steps = 20, 20, 1000
    options.merge.every = "end"
    options.optimizer.learning_rate = 0.3
    options.mesh.replica = options.mesh.data = 1
    data = benchmark.load(options.data)
    anchor = Classifier(
        params={
            "image_tower": {"scale": np.ones(3, np.float32)},
            "head": {"kernel": np.zeros((3, 10), np.float32), "bias": np.zeros(10, np.float32)},
        },
        apply=apply,
        normalize=Preprocessor((0.5,) * 3, (0.25,) * 3, 8),
        num_heads=1,
    )
    trainer = make_trainer(options, anchor, data, tmp_path, "run")
    assert trainer.task.num_steps == 40
    merged = jax.device_get(trainer.run().merged)
    batch = next(eval_batches(data.test, len(data.test), transform=EvalTransform(8)))
    predictions = np.argmax(apply(merged, anchor.normalize(jnp.asarray(batch["image"]))), -1)
    # Ten distinct colors in three channels; chance is 10 %.
    assert (predictions == batch["label"]).mean() >= 0.7


def test_a_study_without_shifts_measures_none():
    """TensorFlow Datasets has no shifts for CIFAR-100."""
    study = STUDIES["generality"]
    for shifts in (True, False):
        measurements = study.measurements(Setup((0, 1), 2, 10, 1e-5, shifts=shifts)).values()
        assert {m.shifts for m in measurements if isinstance(m, Score)} == {shifts}


def test_the_ledger_distinguishes_datasets(root):
    """The test sets of CIFAR-10 and CIFAR-100 have the same name and size, and may use one CLIP."""
    keys = {}
    for name in ("cifar10", "cifar100"):
        context = object.__new__(ImageContext)
        context.config, context.checksum = cifar10.get_config(), "of a CLIP"
        context.config.data.name = name
        context._test, context._shifts = benchmark.load(config(root)).test, {}
        keys[name] = context.key(Score(Anchor(), shifts=False))
        with pytest.raises(UserError, match=f"data.name='{name}': .*shifts"):
            context.key(Score(Anchor()))
    assert keys["cifar10"] != keys["cifar100"]
