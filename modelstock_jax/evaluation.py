"""Top-1 accuracy on the in-distribution set and on every shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import LoaderOptions, eval_batches
from modelstock_jax.errors import UserError
from modelstock_jax.merging import distance
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.reporting.tables import make_row
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.multihost import block_on_multihost_cpu
from modelstock_jax.training.sharding import device_put_global, local_indices, make_global_array

Evaluate = Callable[..., dict[str, float]]

# A batch's result is awaited when so many more have been sent: the device never waits for the
# host, and a large set does not pile up in its memory.
_AHEAD = 2


class ModelEvaluator:
    """Rows of results: each model's accuracy on every set of a benchmark.

    Attributes:
      num_images: that a row takes, of all sets.
    """

    def __init__(self, config: ConfigDict, anchor: Classifier, data: Benchmark, mesh: Mesh) -> None:
        """Prepares the evaluator for the classifiers of one architecture."""
        self._anchor, self._data = anchor, data
        most = config.evaluation.max_shift_images
        self._sets = [data.test, *(s.first(most or len(s)) for s in data.shifts.values())]
        if data.real_labels is not None:
            self._sets.append(data.real_labels)
        self.num_images = sum(len(image_set) for image_set in self._sets)
        self._evaluate = classifier_evaluator(config, anchor, mesh)

    def row(
        self,
        method: str,
        params: PyTree,
        *,
        measured: Callable[[int], None] = lambda images: None,
        **details: Any,
    ) -> dict[str, Any]:
        """A row as `tables.make_row` gives it.

        Args:
          method: the row's.
          params: whole on every process.
          measured: told how many images of this row are done.
          **details: go into the row.
        """
        data, accuracy = self._data, self._evaluate(params, self._sets, measured)
        if data.real_labels is not None:
            details["real"] = accuracy[data.real_labels.name]
        if "distance_to_anchor" not in details:
            details["distance_to_anchor"] = float(distance(self._anchor.params, params))
        return make_row(
            method,
            id=accuracy[data.test.name],
            shifts={name: accuracy[s.name] for name, s in data.shifts.items()},
            **details,
        )


def classifier_evaluator(config: ConfigDict, anchor: Classifier, mesh: Mesh) -> Evaluate:
    """What `make_evaluator` builds for the replicas of a classifier, as a run's config says.

    Args:
      config: its `evaluation.batch_size` and `data.loader` are used.
      anchor: computes and normalizes as they do; its weights are not looked at.
      mesh: see `make_evaluator`.
    """
    return make_evaluator(
        anchor.apply,
        anchor.normalize,
        mesh,
        config.evaluation.batch_size,
        image_size=anchor.normalize.image_size,
        loader=LoaderOptions(**config.data.loader),
    )


def make_evaluator(
    apply: Callable[[PyTree, jax.Array], jax.Array],
    prepare: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    batch_size: int,
    *,
    image_size: int | None = None,
    loader: LoaderOptions | None = None,
) -> Evaluate:
    """Builds (params, image sets, measured) -> {set's name: top-1 accuracy in percent}.

    Every image counts once, as its set says (`ImageSet`): among some classes only for R and A, by
    the best of an object's classes for ObjectNet, by sets of labels for ReaL. `measured`, if given,
    is told again and again how many images of all sets are done.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      prepare: images uint8 -> float, normalized.
      mesh: batches are split over all of its devices, of all processes.
      batch_size: B; rounded up to a multiple of the devices.
      image_size: side of the model's input, for sets of encoded images.
      loader: how those are read.
    """
    devices = mesh.devices.size
    batch_size = -(-batch_size // devices) * devices
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    (examples,) = local_indices(split, (batch_size,))
    # Two programs: the large one is compiled once for all sets.
    logits_of = jax.jit(lambda params, images: apply(params, prepare(images)), out_shardings=split)
    count_of = jax.jit(count_correct, out_shardings=whole)

    def counts(params, image_set, num_classes):
        """Right and counted, batch by batch."""
        candidate, pending = candidate_classes(image_set, num_classes), []
        reading = dict(examples=examples, image_size=image_size, loading=loader)
        for batch in scored_batches(image_set, batch_size, **reading):
            images, target = (
                make_global_array(split, batch[name], (batch_size,)) for name in ("image", "target")
            )
            found = count_of(logits_of(params, images), target, candidate)
            pending.append(block_on_multihost_cpu(found))
            if len(pending) > _AHEAD:
                yield jax.device_get(pending.pop(0))
        yield from jax.device_get(pending)

    def everywhere(leaf):
        """Weights that this process has whole are placed once; a sharded array stays as it is."""
        placed = isinstance(leaf, jax.Array) and leaf.sharding.device_set == split.device_set
        return leaf if placed else device_put_global(leaf, whole)

    def evaluate(params, image_sets, measured=lambda images: None):
        params, before = jax.tree.map(everywhere, params), 0
        num_classes = params["head"]["bias"].shape[-1]
        accuracies = {}
        for image_set in image_sets:
            total = np.zeros(2, int)
            for number, some in enumerate(counts(params, image_set, num_classes), 1):
                total += some
                measured(before + min(number * batch_size, len(image_set)))
            right, counted = total.tolist()
            if not counted:
                raise UserError(f"{image_set.name}: no image to measure on, or none with a label")
            accuracies[image_set.name] = 100.0 * right / counted
            before += len(image_set)
        return accuracies

    return evaluate


def scored_batches(
    image_set: ImageSet, batch_size: int, **reading: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, with its `targets`; padding has none and so is not counted.

    Args:
      image_set: M images.
      batch_size: B, over all processes.
      **reading: as `eval_batches` takes it.

    Returns:
      Iterator of {"image": uint8 [b, H, W, 3], "target": int32 [b, L]}, b of the B.
    """
    right = targets(image_set)
    # The number of an image stands as its label: whatever is padded or left out on the way, an
    # image is scored by its own targets.
    numbered = ImageSet(
        image_set.name,
        image_set.images,
        np.arange(len(image_set), dtype=np.int32),
        crop_border=image_set.crop_border,
    )
    for batch in eval_batches(numbered, batch_size, **reading):
        rows = right[batch["label"]]
        rows[~batch["mask"]] = -1
        yield {"image": batch["image"], "target": rows}


def targets(image_set: ImageSet) -> np.ndarray:
    """Which rows of `candidate_classes` are right for each image.

    Returns:
      int32 [M, L], filled up with -1; an image with no right answer is not counted.

    >>> images, labels = np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, np.int32)
    >>> targets(ImageSet("real", images, labels, label_sets=((3, 5), ()))).tolist()
    [[3, 5], [-1, -1]]
    """
    if image_set.label_sets is not None:
        widest = max(map(len, image_set.label_sets), default=1)
        rows = np.full((len(image_set), max(1, widest)), -1, np.int32)
        for row, right in zip(rows, image_set.label_sets, strict=True):
            row[: len(right)] = right
        return rows
    labels = image_set.labels
    if image_set.classes is not None:
        labels = np.searchsorted(image_set.classes, labels).astype(np.int32)
    return labels[:, None]


def candidate_classes(image_set: ImageSet, num_classes: int) -> np.ndarray:
    """What a prediction is chosen from: rows of class ids, the best logit of a row is its score.

    Args:
      image_set: its `classes` or `groups` count; without them, every class is a row.
      num_classes: K.

    Returns:
      int32 [C, m]; a shorter group repeats its first class.

    Raises:
      UserError: a class that the classifier does not have.

    >>> images, labels = np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int32)
    >>> candidate_classes(ImageSet("objects", images, labels, groups=((4,), (0, 7))), 9).tolist()
    [[4, 4], [0, 7]]
    """
    groups = image_set.groups
    if groups is None:
        ids = range(num_classes) if image_set.classes is None else image_set.classes
        groups = [(one,) for one in ids]
    if (largest := max(max(group) for group in groups)) >= num_classes:
        raise UserError(
            f"{image_set.name}: needs a logit of class {largest}, the classifier has {num_classes}"
        )
    widest = max(map(len, groups))
    return np.array([[*row, *[row[0]] * (widest - len(row))] for row in groups], np.int32)


def count_correct(logits, target, candidate):
    """How many predictions are right, and how many images count; of NumPy or JAX arrays.

    Args:
      logits: [B, K].
      target: int32 [B, L], as `targets` gives them.
      candidate: int32 [C, m], as `candidate_classes` gives them.

    Returns:
      Two scalars, right and counted.

    >>> logits = np.array([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    >>> right, counted = count_correct(logits, np.array([[0], [-1]]), np.array([[2, 1], [0, 0]]))
    >>> int(right), int(counted)
    (1, 1)
    """
    choice = logits[:, candidate].max(-1).argmax(-1)
    right = (choice[:, None] == target).any(-1)
    return right.sum(), (target >= 0).any(-1).sum()
