"""The environment of the image studies: image classifiers on the dataset of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import classifier_evaluator
from modelstock_jax.experiment.setup import check_and_set_up
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.sharding import make_mesh
from studies.context import StudyContext, commit
from studies.image_runs import ImageRuns, anchor_opener
from studies.ledger import Ledger
from studies.runs import checksum, identity
from studies.study import Setup


class ImageContext(StudyContext):
    """Measures image classifiers on the dataset of a config.

    Attributes:
      data: training and evaluation data.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | Path,
        ledger: Ledger,
        data: Benchmark | None = None,
    ) -> None:
        """Open the anchor and the data; train and measure nothing.

        Args:
          config: base config of every run of a study.
          workdir: trained runs are stored in workdir/trained.
          ledger: finished measurements; may be stored elsewhere.
          data: of `config.data`, if another context has opened it.

        Raises:
          UserError: for a wrong config, as in `launch.py`.
        """
        check_and_set_up(config)
        if jax.process_count() > 1:
            raise UserError("studies run in one process; launch.py trains on many hosts")
        self.config, self.ledger = config, ledger
        commit()  # Cache it now: another commit may be checked out while this process runs.
        workdir = Path(workdir)
        open_anchor = anchor_opener(config)
        self.data = data = data or benchmark.load(config.data)
        self._anchor = open_anchor(data, workdir)
        outline = self._anchor.outline
        self.checksum = identity(config, outline.checksum, data)
        self.num_heads = outline.num_heads
        self.runs = ImageRuns(config, workdir, self._anchor, data, self.checksum, self._record)
        max_images = config.evaluation.max_shift_images
        self._validation, self._test = data.validation, data.test
        self._shifts = {
            name: images.first(max_images or len(images)) for name, images in data.shifts.items()
        }
        mesh = make_mesh(1, 0, num_replicas=1, batch_size=jax.device_count())
        self._evaluate = classifier_evaluator(config, outline, mesh)

    def _key_checksum(self, key: list[Any]) -> str:
        # Sets of different data may have equal names and sizes, so the key includes the data's
        # name. The lines of the glyphs are older and do not include it.
        name = self.config.data.name
        return checksum([self.checksum, key, *([name] if name != "glyphs" else [])])

    def setup(self, num_seeds: int) -> Setup:
        """See `StudyContext`."""
        config = self.config
        return Setup(
            tuple(range(config.seed, config.seed + num_seeds)),
            config.epochs,
            self.runs.steps_per_epoch,
            config.optimizer.learning_rate,
            shifts=bool(self.data.shifts),
            stored_images=config.data.name != "glyphs",
        )

    def details(self) -> dict[str, Any]:
        """See `StudyContext`."""
        return {
            "pretrained": self.config.pretrained,
            "data": self.config.data.name,
            "max_shift_images": self.config.evaluation.max_shift_images,
        }

    def sets(self, shifts: bool) -> list[Any]:
        """Return names and sizes of the test sets, which are part of an accuracy's key.

        Raises:
          UserError: if shifts are requested and the data has none.
        """
        if shifts and not self._shifts:
            raise UserError(
                f"data.name={self.config.data.name!r}: this study measures distribution shifts, "
                "and the data has none; name shifts with --config.data.shifts, or choose other data"
            )
        image_sets = [self._test, *self._shifts.values()] if shifts else [self._test]
        return [[images.name, len(images)] for images in image_sets]

    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """Return top-1 accuracies in percent: {"id": ..., "shifts": {name: ...}}."""
        shift_sets = self._shifts if shifts else {}
        accuracies = self._evaluate(params, [self._test, *shift_sets.values()])
        return {
            "id": accuracies[self._test.name],
            "shifts": {name: accuracies[images.name] for name, images in shift_sets.items()},
        }

    def validation_set(self) -> list[Any]:
        """Return name and size of the validation set, which are part of a measurement's key."""
        return [self._validation.name, len(self._validation)]

    def validate(self, params: PyTree) -> float:
        """See `ModelSource`."""
        return self._evaluate(params, [self._validation])[self._validation.name]

    def anchor(self) -> PyTree:
        """See `ModelSource`."""
        return self._anchor.load().params
