"""Every image model on a small image folder: runs, resumed and exported; dry runs; mistakes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import run
from modelstock_jax.experiment.dry_run import abstract_step_functions, dry_run
from modelstock_jax.experiment.setup import open_experiment
from modelstock_jax.merging import UNITS, model_stock
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.model import MODELS
from modelstock_jax.models.published import PUBLISHED
from modelstock_jax.training.finetune import make_trainer
from modelstock_jax.training.stages import linear_probe
from modelstock_jax.training.state import is_statistic
from modelstock_jax.training.step_fns import StepFunctions
from tests.checkpoint_merge.test_training_agrees import assert_same_merge
from tests.compiler_flags import QUICK
from tests.experiment import image_models, small_run
from tests.experiment.image_models import CLASSES, KINDS, SIDE, STEPS, leaves

# One transformer and one convolutional net run in the fast tests.
FAST = ("dinov2", "resnet")
EVERY_KIND = [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in KINDS]
CONVOLUTIONAL = [kind for kind in KINDS if KINDS[kind].config.is_convolutional]
# In the slow tests too: most of the time of these processes is that of the compiler.
ENVIRONMENT = {"XLA_FLAGS": QUICK}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run."""

    anchor: Path
    images: Path
    workdir: Path
    output: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_models.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the directory of the checkpoint of a kind."""
    return cache(lambda kind: image_models.save(kind, tmp_path_factory.mktemp("anchor")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder, saved):
    """Returns the uninterrupted run of a kind."""

    @cache
    def finish(kind: str) -> Finished:
        workdir = tmp_path_factory.mktemp("run") / kind
        arguments = image_models.arguments(kind, saved(kind), folder, workdir)
        code, output = small_run.finish(*arguments, environment=ENVIRONMENT)
        assert code == 0, output
        return Finished(saved(kind), folder, workdir, output)

    return finish


def test_there_is_a_checkpoint_of_every_model():
    assert KINDS.keys() == MODELS.keys() - {"clip"}, "add a checkpoint of the new model"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_run_ends_with_a_table_and_a_model(finished, kind):
    done, case = finished(kind), KINDS[kind]
    rows = json.loads((done.workdir / "results.json").read_text())["rows"]
    probed = "name=lp_ft" in case.objective
    row = "pretrained" if case.own_head else "zero_shot" if kind == "siglip" else "random_head"
    start = [row] + ["probed"] * probed
    methods = [row["method"] for row in rows]
    assert methods[: len(start)] == start
    assert methods.count("lp_ft" if probed else "single_model") == 2
    assert methods[-1] == "periodic_model_stock"
    assert "Model Stock, periodic" in done.output
    assert all(row["distance_to_anchor"] > 0 for row in rows[len(start) :])

    base, model = (checkpoint_io.load(path) for path in (done.anchor, done.workdir / "model"))
    assert model.config == base.config and model.preprocessor == base.preprocessor
    assert model.labels == CLASSES
    raw = json.loads((done.workdir / "model/config.json").read_text())
    assert raw["architectures"] == [case.architecture]
    assert raw["id2label"] == {str(i): name for i, name in enumerate(CLASSES)}
    assert raw["label2id"] == {name: i for i, name in enumerate(CLASSES)}
    assert_trained(base, model)


def assert_trained(base, model, trained=("image_tower", "head"), frozen=is_statistic):
    """Every tensor of the trained parts has moved; all others are bitwise those of the base."""
    before, after = ({**leaves(x.params), **leaves({"head": x.head or {}})} for x in (base, model))
    assert before.keys() <= after.keys()
    for name, value in before.items():
        if not name.startswith(trained) or frozen(name):
            assert after[name].tobytes() == value.tobytes(), f"{name} has changed"
        # A key bias receives no gradient, only noise, which a merge removes where it is opposite.
        elif not name.endswith("k_proj.bias"):
            assert not np.array_equal(after[name], value), f"{name} was not trained"


# test_run.py kills runs of a transformer. A resnet also has the statistics of its batch norms.
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "resnet" else pytest.mark.slow) for k in KINDS]
)
def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path, kind):
    done, moment = finished(kind), random.Random(kind)
    workdir = tmp_path / "killed"
    arguments = image_models.arguments(kind, done.anchor, done.images, workdir)
    for part in ("merged",) if kind in FAST else ("unmerged", "merged"):
        state = workdir / f"runs/seed_0/{part}/state/{moment.randrange(2, STEPS, 2)}"
        process = small_run.start(*arguments, environment=ENVIRONMENT)
        while not state.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert not (workdir / "results.json").exists(), f"killed too late, after {state}"
    code, output = small_run.finish(*arguments, environment=ENVIRONMENT)
    assert code == 0 and "from step" in output, output
    names = ["results.json", "metrics.jsonl"]
    names += [f"model/{path.name}" for path in (done.workdir / "model").iterdir()]
    for name in names:
        expected = (done.workdir / name).read_bytes()
        # The model card quotes the command.
        expected = expected.replace(bytes(done.workdir), bytes(workdir))
        assert (workdir / name).read_bytes() == expected, name


@pytest.fixture(scope="module")
def exported(tmp_path_factory, finished):
    """Returns the anchor and two replicas trained without merging, as trees and directories."""

    @cache
    def export(kind: str):
        done, root = finished(kind), tmp_path_factory.mktemp("exported")
        workdir = root / "run"
        shutil.copytree(done.workdir, workdir)
        config = image_models.config(kind, done.anchor, done.images, merge__every="never")
        pretrained, data, anchor = open_experiment(config, None)
        anchor = linear_probe(config, anchor, data, workdir)
        state = make_trainer(config, anchor, data, workdir, "seed_0/unmerged").run().state
        assert int(state.step) == STEPS
        replicas = jax.device_get(state.params)
        trees = [anchor.params, *(jax.tree.map(lambda x, r=r: x[r], replicas) for r in (0, 1))]
        paths = [
            str(checkpoint_io.save(root / str(i), pretrained.with_replica(tree, CLASSES)))
            for i, tree in enumerate(trees)
        ]
        return trees, paths

    return export


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        pytest.param(
            kind, unit, marks=() if (kind in FAST and unit == "tensor") else pytest.mark.slow
        )
        for kind in KINDS
        for unit in UNITS
        if unit != "head" or kind not in CONVOLUTIONAL
    ],
)
# A convolutional net has no attention whose projections 'layer' could join.
@pytest.mark.filterwarnings("ignore:unit 'layer' found no attention:UserWarning")
def test_files_are_merged_as_in_training(exported, tmp_path, monkeypatch, kind, unit):
    trees, paths = exported(kind)
    monkeypatch.setattr(commands.PlotProcess, "finish", lambda plot: None)
    out = tmp_path / "out"
    assert main(["merge", *paths, "--out", str(out), "--unit", unit]) == 0
    stacked = jax.tree.map(lambda *replicas: np.stack(replicas), *trees[1:])
    heads = KINDS[kind].config.num_heads
    merged, _ = model_stock(trees[0], stacked, unit=unit, num_heads=heads)
    assert_same_merge(trees, jax.device_get(merged), checkpoint_io.load(out).replica())


def test_statistics_do_not_take_part_in_a_merge(finished):
    document = json.loads((finished("resnet").workdir / "runs/seed_0/results.json").read_text())
    rows = [row for row in document["geometry"] if is_statistic(row["name"])]
    assert len(rows) == 24
    assert {row["outcome"] for row in rows} == {"unchanged"}
    assert all(row["norms"] == [0.0, 0.0] for row in rows)


ALL = ("image_tower", "head")
# Options, trained parts, and which of their tensors are frozen besides statistics.
METHODS = {
    "bitfit": (
        {"objective__name": "bitfit"},
        ALL,
        lambda name: not name.startswith("head") and not name.endswith("bias"),
    ),
    "linear_probe": ({"objective__name": "linear_probe"}, ("head",), is_statistic),
    "l2_sp": ({"objective__name": "l2_sp"}, ALL, is_statistic),
    "decay": ({"optimizer__decay_to_pretrained": 0.1}, ALL, is_statistic),
    "sgd": ({"optimizer__name": "sgd"}, ALL, is_statistic),
    # A projection needs a pretrained head, which is the probed one.
    **{
        name: (
            {
                "objective__name": "lp_ft",
                "objective__head": "zero_shot",
                "objective__probe_epochs": 1,
                "optimizer__projection__name": name,
                "optimizer__projection__steps": 2,
                "compare": name == "tpgm",  # It changes replicas trained without merging.
            },
            ALL,
            is_statistic,
        )
        for name in ("ftp", "tpgm")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_method_trains_statistics(saved, folder, tmp_path, method):
    """Despite a weight decay of 0.1, which would move them."""
    more, trained, frozen = METHODS[method]
    options = {"epochs": 1, "mesh__replica": 1, "mesh__data": 1, "compare": False} | more
    config = image_models.config("resnet", saved("resnet"), folder, **options)
    assert config.optimizer.weight_decay == 0.1
    run(config, tmp_path / "run")
    models = (checkpoint_io.load(path) for path in (saved("resnet"), tmp_path / "run/model"))
    assert_trained(*models, trained, frozen)
    document = json.loads((tmp_path / "run/runs/seed_0/results.json").read_text())
    for row in document.get("geometry", ()):
        assert (row["outcome"] == "unchanged") == is_statistic(row["name"]), row


@pytest.mark.slow
def test_flyp_trains_both_towers_scale_and_bias(saved, folder, tmp_path):
    config = image_models.config("siglip", saved("siglip"), folder, objective__name="flyp")
    config.epochs, config.mesh.replica, config.mesh.data = 1, 1, 1
    run(config, tmp_path / "run")
    base, model = map(checkpoint_io.load, (saved("siglip"), tmp_path / "run/model"))
    everything = ("image_tower", "text_tower", "logit_scale", "logit_bias")
    assert_trained(base, model, everything)
    head = model.head
    np.testing.assert_array_equal(head["bias"], np.full(3, model.params["logit_bias"]))
    scale = np.exp(model.params["logit_scale"])
    np.testing.assert_allclose(np.linalg.norm(head["kernel"], axis=0), scale, rtol=1e-6)


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_of_a_directory(kind, compiles, saved, folder, tmp_path, capsys, monkeypatch):
    if not compiles:
        cheap = {"step": jax.jit(lambda x: x).lower(1.0)}
        monkeypatch.setattr(StepFunctions, "lower", lambda self, batch: cheap)
    config = image_models.config(kind, saved(kind), folder, mesh__replica=1, mesh__data=1)
    assert dry_run(config, tmp_path / "run") == []
    printed = capsys.readouterr().out
    checkpoint = checkpoint_io.load(saved(kind))
    features = checkpoint.config.feature_size
    tower = sum(x.size for x in jax.tree.leaves(checkpoint.params["image_tower"]))
    for words in (
        # At the size of the preprocessor, also if the position embeddings are those of another.
        f"{tower:,} parameters: {checkpoint.config.with_image_size(SIDE).describe()}",
        f"{3 * (features + 1)} parameters: {features} features, 3 classes",
        "image uint8 [2, 8, 32, 32, 3]",
        "6 per epoch, 12 in 2 epochs; 2 merges",
        "peak of a step",
        "exported model",
        "nothing is missing",
    ):
        assert words in printed, (words, printed)
    assert not (tmp_path / "run").exists()


# Parameters of the image tower without classifier, pooler and mask token, counted by hand from the
# papers' sizes; a ResNet-50 also has 53,120 statistics.
COUNTS = {
    "google/siglip2-base-patch16-224": 92_884_224,
    "facebook/dinov2-base": 86_579_712,
    "google/vit-base-patch16-224-in21k": 85_798_656,
    "facebook/convnext-base-224-22k": 87_566_464,
    "microsoft/resnet-50": 23_508_032 + 53_120,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_model_is_planned_without_its_files(name, folder, monkeypatch):
    def not_found(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.snapshot_download", not_found)
    config = image_models.config("dinov2", name, folder, mesh__replica=1, mesh__data=1)
    programs, found = abstract_step_functions(config)
    assert found == PUBLISHED[name] and found.image_size == 224
    leaves = jax.tree.leaves(programs.task.params["image_tower"])
    assert sum(x.size for x in leaves) == COUNTS[name]


def error_of(config, tmp_path) -> str:
    """Return the error of a run, which has trained nothing."""
    with pytest.raises(UserError) as error:
        run(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("runs/*/*/state"))
    message = str(error.value)
    assert "\n" not in message and not message.endswith(".")
    return message


MISTAKES = [
    ("dinov2", {"objective__head": "zero_shot"}, ["dinov2", "objective.head='random'", "lp_ft"]),
    ("vit", {"objective__name": "car_ft"}, ["objective.name='car_ft'", "text tower"]),
    ("vit", {"objective__name": "flyp"}, ["objective.name='flyp'", "text tower"]),
    ("dinov2", {"objective__name": "flyp", "objective__head": "zero_shot"},
     ["objective.name='flyp'", "text tower"]),
    ("dinov2", {"objective__name": "car_ft"}, ["objective.name='car_ft'", "text tower"]),
    ("vit", {"image_size": 7}, ["image_size 7", "smaller than 8"]),
    ("convnextv2", {"image_size": 7}, ["image_size 7", "smaller than 8"]),
    ("resnet", {"merge__unit": "head"}, ["'head'", "attention"]),
    ("convnextv2", {"merge__unit": "head"}, ["'head'", "attention"]),
    ("resnet", {"export__formats": ("open_clip",)}, ["export.formats", "hugging_face"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "words"), MISTAKES)
def test_mistake_is_one_line_before_training(kind, options, words, saved, folder, tmp_path):
    message = error_of(image_models.config(kind, saved(kind), folder, **options), tmp_path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("labels", "words"),
    [(("black cat", "wolf", "hen"), ["class 1 ", "'wolf'", "'dog'"]),
     (("dog", "black cat", "owl"), ["class 0 ", "'dog'", "'black cat'"]),
     (("black cat", "dog"), ["2 classes", "has 3"])],
)  # fmt: skip
def test_classifier_of_other_classes(labels, words, folder, tmp_path):
    checkpoint = image_models.checkpoint("vit")
    head = {name: x[..., : len(labels)] for name, x in checkpoint.head.items()}
    other = dataclasses.replace(checkpoint, head=head, labels=labels)
    anchor = checkpoint_io.save(tmp_path / "vit", other)
    message = error_of(image_models.config("vit", anchor, folder), tmp_path)
    assert all(word in message for word in (*words, "objective.head='random'", "lp_ft")), message


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_model_of_other_channels_than_the_images(kind, folder, tmp_path):
    config = dataclasses.replace(KINDS[kind].config, num_channels=1)
    checkpoint = image_models.checkpoint(kind)
    gray = dataclasses.replace(
        checkpoint, config=config, params=image_models.perturbed(config), head=None, labels=None
    )
    anchor = checkpoint_io.save(tmp_path / kind, gray)
    message = error_of(
        image_models.config(kind, anchor, folder, objective__head="random"), tmp_path
    )
    assert "channel" in message, message
