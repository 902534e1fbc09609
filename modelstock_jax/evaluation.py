"""Top-1 accuracy on the in-distribution test set and on every shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.device_resize import resize_batch
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import LoaderOptions, eval_batches
from modelstock_jax.data.transforms import EvalTransform
from modelstock_jax.data.views import VIEW_ARRAYS
from modelstock_jax.errors import UserError
from modelstock_jax.merging import distance
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.reporting.tables import make_row
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.multihost import block_on_multihost_cpu
from modelstock_jax.training.sharding import device_put_global, local_indices, make_global_array
from modelstock_jax.training.state import drop_statistics

Evaluate = Callable[..., dict[str, float]]

# Number of batches sent ahead of the one whose result is awaited: the device never waits for the
# host, and the batches of a large dataset do not accumulate in its memory.
_AHEAD = 2


class ModelEvaluator:
    """Evaluate models on every dataset of a benchmark.

    Attributes:
      num_images: number of images per row, over all datasets
    """

    def __init__(
        self,
        config: ConfigDict,
        anchor: Classifier,
        data: Benchmark,
        mesh: Mesh,
        *,
        validate: bool = False,
    ) -> None:
        """Prepare the evaluation of classifiers with the architecture of `anchor`.

        Args:
          config: options of the run
          anchor: see `classifier_evaluator`
          data: the datasets
          mesh: see `make_evaluator`
          validate: whether rows have the accuracy on the validation images, to select a model
        """
        self._anchor, self._data, self._validate = anchor, data, validate
        max_images = config.evaluation.max_shift_images
        shifts = [shift.first(max_images or len(shift)) for shift in data.shifts.values()]
        self._sets = [data.test, *shifts]
        if data.real_labels is not None:
            self._sets.append(data.real_labels)
        self.num_images = sum(len(image_set) for image_set in self._sets)
        self._evaluate = classifier_evaluator(config, anchor, mesh)

    def row(
        self,
        method: str,
        params: PyTree,
        *,
        on_progress: Callable[[int], None] = lambda images: None,
        **details: Any,
    ) -> dict[str, Any]:
        """Return the row of `tables.make_row` of one model.

        Args:
          method: method of the row
          params: weights, complete on every process
          on_progress: called with the number of evaluated images of this row
          **details: other entries of the row
        """
        data, accuracy = self._data, self._evaluate(params, self._sets, on_progress)
        if self._validate:
            (details["validation"],) = self._evaluate(params, [data.validation]).values()
        if data.real_labels is not None:
            details["real"] = accuracy[data.real_labels.name]
        if "distance_to_anchor" not in details:
            details["distance_to_anchor"] = float(
                distance(drop_statistics(self._anchor.params), drop_statistics(params))
            )
        return make_row(
            method,
            id=accuracy[data.test.name],
            shifts={name: accuracy[s.name] for name, s in data.shifts.items()},
            **details,
        )


def classifier_evaluator(config: ConfigDict, anchor: Classifier, mesh: Mesh) -> Evaluate:
    """Return `make_evaluator` for the replicas of a classifier.

    Args:
      config: options `evaluation.batch_size`, `data.loader` and `data.resize_on` of the run
      anchor: classifier with the same forward pass and normalization; its weights are not used
      mesh: see `make_evaluator`
    """
    return make_evaluator(
        anchor.apply,
        anchor.normalize,
        mesh,
        config.evaluation.batch_size,
        transform=anchor.normalize.eval_transform(config.data.resize_on),
        loader=LoaderOptions(**config.data.loader),
    )


def make_evaluator(
    apply: Callable[[PyTree, jax.Array], jax.Array],
    prepare: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    batch_size: int,
    *,
    transform: EvalTransform | None = None,
    loader: LoaderOptions | None = None,
) -> Evaluate:
    """Return a function (params, image sets, on_progress) -> {set name: top-1 accuracy in percent}.

    Every image counts once, by the rules of its `ImageSet`: R and A use a subset of the classes,
    ObjectNet uses the best logit of an object's classes, and ReaL accepts any label of a set.
    `on_progress`, if passed, is called repeatedly with the number of evaluated images of all sets.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K]
      prepare: images uint8 -> normalized float images
      mesh: batches are split over all devices of all processes
      batch_size: B, rounded up to a multiple of the number of devices
      transform: resize and crop of encoded images
      loader: how encoded images are read
    """
    devices = mesh.devices.size
    batch_size = -(-batch_size // devices) * devices
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    replicated = NamedSharding(mesh, PartitionSpec())
    (examples,) = local_indices(split, (batch_size,))
    # Two programs, so that the large one is compiled only once for all sets.
    logits_of = jax.jit(lambda params, images: apply(params, prepare(images)), out_shardings=split)
    count_of = jax.jit(count_correct, out_shardings=replicated)

    def counts(params, image_set, num_classes):
        """Yield the numbers of correct and counted images of each batch."""
        candidate, pending = candidate_classes(image_set, num_classes), []
        options = dict(examples=examples, transform=transform, loader=loader)
        for batch in scored_batches(image_set, batch_size, **options):
            placed = {
                name: make_global_array(split, value, (batch_size,))
                for name, value in batch.items()
            }
            if transform is not None:
                placed = resize_batch(placed, split, transform.size, transform.resample)
            count = count_of(logits_of(params, placed["image"]), placed["target"], candidate)
            pending.append(block_on_multihost_cpu(count))
            if len(pending) > _AHEAD:
                yield jax.device_get(pending.pop(0))
        yield from jax.device_get(pending)

    def on_mesh(leaf):
        """Replicate weights that this process has complete; return a sharded array unchanged."""
        placed = isinstance(leaf, jax.Array) and leaf.sharding.device_set == split.device_set
        return leaf if placed else device_put_global(leaf, replicated)

    def evaluate(params, image_sets, on_progress=lambda images: None):
        params, before = jax.tree.map(on_mesh, params), 0
        num_classes = params["head"]["bias"].shape[-1]
        accuracies = {}
        for image_set in image_sets:
            total = np.zeros(2, int)
            for number, count in enumerate(counts(params, image_set, num_classes), 1):
                total += count
                on_progress(before + min(number * batch_size, len(image_set)))
            correct, counted = total.tolist()
            if not counted:
                raise UserError(f"{image_set.name}: no images, or no image with a label")
            accuracies[image_set.name] = 100.0 * correct / counted
            before += len(image_set)
        return accuracies

    return evaluate


def scored_batches(
    image_set: ImageSet, batch_size: int, **options: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every image once with its `targets`; padding has no target and is not counted.

    Args:
      image_set: M images
      batch_size: B, over all processes
      **options: options of `eval_batches`

    Returns:
      iterator of {"image": uint8 [b, H, W, 3], "target": int32 [b, L]}, b of the B examples, and
      "geometry" as in `eval_batches`
    """
    image_targets = targets(image_set)
    # The index of each image replaces its label, so that padded or skipped images cannot shift
    # the targets.
    numbered = ImageSet(
        image_set.name,
        image_set.images,
        np.arange(len(image_set), dtype=np.int32),
        crop_border=image_set.crop_border,
    )
    for batch in eval_batches(numbered, batch_size, **options):
        rows = image_targets[batch["label"]]
        rows[~batch["mask"]] = -1
        arrays = {name: batch[name] for name in VIEW_ARRAYS if name in batch}
        yield arrays | {"target": rows}


def targets(image_set: ImageSet) -> np.ndarray:
    """Return the correct rows of `candidate_classes` for each image.

    Args:
      image_set: M images

    Returns:
      int32 [M, L], padded with -1; an image without a correct row is not counted

    Example:
      >>> images, labels = np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, np.int32)
      >>> targets(ImageSet("real", images, labels, label_sets=((3, 5), ()))).tolist()
      [[3, 5], [-1, -1]]
    """
    if image_set.label_sets is not None:
        width = max(map(len, image_set.label_sets), default=1)
        rows = np.full((len(image_set), max(1, width)), -1, np.int32)
        for row, labels in zip(rows, image_set.label_sets, strict=True):
            row[: len(labels)] = labels
        return rows
    labels = image_set.labels
    if image_set.classes is not None:
        labels = np.searchsorted(image_set.classes, labels).astype(np.int32)
    return labels[:, None]


def candidate_classes(image_set: ImageSet, num_classes: int) -> np.ndarray:
    """Return the possible predictions: rows of class ids; the score of a row is its best logit.

    Args:
      image_set: defines the rows by its `classes` or `groups`; without them every class is a row
      num_classes: K

    Returns:
      int32 [C, m]; a shorter group repeats its first class

    Raises:
      UserError: the classifier lacks a class

    Example:
      >>> images, labels = np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int32)
      >>> candidate_classes(ImageSet("objects", images, labels, groups=((4,), (0, 7))), 9).tolist()
      [[4, 4], [0, 7]]
    """
    groups = image_set.groups
    if groups is None:
        ids = range(num_classes) if image_set.classes is None else image_set.classes
        groups = [(class_id,) for class_id in ids]
    if (largest := max(max(group) for group in groups)) >= num_classes:
        raise UserError(
            f"{image_set.name}: needs the logit of class {largest}, but the classifier has only "
            f"{num_classes} classes"
        )
    width = max(map(len, groups))
    return np.array([[*row, *[row[0]] * (width - len(row))] for row in groups], np.int32)


def count_correct(logits, target, candidate):
    """Count correct predictions and counted images of NumPy or JAX arrays.

    Args:
      logits: [B, K]
      target: int32 [B, L] of `targets`
      candidate: int32 [C, m] of `candidate_classes`

    Returns:
      two scalars: the numbers of correct and of counted images

    Example:
      >>> logits = np.array([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
      >>> target, candidate = np.array([[0], [-1]]), np.array([[2, 1], [0, 0]])
      >>> correct, counted = count_correct(logits, target, candidate)
      >>> int(correct), int(counted)
      (1, 1)
    """
    choice = logits[:, candidate].max(-1).argmax(-1)
    correct = (choice[:, None] == target).any(-1)
    return correct.sum(), (target >= 0).any(-1).sum()
