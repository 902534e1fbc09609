"""The ledger after crashes, and checksums of runs."""

from __future__ import annotations

import json

import pytest

from configs import default
from modelstock_jax import flags
from modelstock_jax.errors import UserError
from studies.ledger import Ledger
from studies.runs import Run, training_checksum


def test_a_truncated_line_is_measured_again(tmp_path):
    path = tmp_path / "measured.jsonl"
    ledger = Ledger(path)
    for key in ("a", "b"):
        ledger.add(key, value={"id": 1.0}, what="score", seconds=2, commit="c")
    path.write_bytes(path.read_bytes()[:-9])
    ledger = Ledger(path)
    assert "a" in ledger and "b" not in ledger
    ledger.add("b", value=3, what="score", seconds=4, commit="d")
    ledger = Ledger(path)
    assert ledger["a"] == {"id": 1.0} and ledger["b"] == 3
    assert ledger.median_seconds("score") == 4 and ledger.median_seconds("angles") is None
    assert ledger.commits(["a", "b"]) == ["c", "d"]


def test_invalid_lines_are_ignored(tmp_path):
    path = tmp_path / "measured.jsonl"
    Ledger(path).add("a", value={"steps": 4}, what="Trained", seconds=2, commit="c")
    invalid = [
        {"key": "x"},
        {"key": 1, "what": "Trained", "value": 1, "seconds": 1, "commit": "c"},
        {"key": "y", "what": "Trained", "value": 1, "seconds": "1", "commit": "c"},
        {"key": "z", "what": "Trained", "seconds": 1, "commit": "c"},
        {"key": "no steps", "what": "Trained", "value": {"steps": 0}, "seconds": 1, "commit": "c"},
        {"key": "nothing", "what": "Trained", "value": None, "seconds": 1, "commit": "c"},
        [],
    ]
    with path.open("ab") as file:
        file.write(b"\n".join(json.dumps(line).encode() for line in invalid) + b"\n")
        file.write(b"[" * 200_000 + b"\n\xff\xfe\n")
    ledger = Ledger(path)
    assert ledger["a"] == {"steps": 4} and not any(key in ledger for key in "xyz")
    assert ledger.median_seconds("Trained", lambda value: value["steps"]) == 0.5
    assert ledger.commits(["a", "nothing"]) == ["c"]


def test_an_unwritable_ledger_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/measured.jsonl"):
        Ledger(tmp_path / "file" / "measured.jsonl").add(
            "a", value=1, what="score", seconds=1, commit="c"
        )


def test_a_checksum_covers_only_what_weights_depend_on():
    base = default.get_config()

    def run_checksum(**options):
        options = {key.replace("__", "."): value for key, value in options.items()}
        return training_checksum(Run.of(0, options).config(base), "a checksum")

    plain = run_checksum()
    assert (
        run_checksum(evaluation__batch_size=7, checkpoint__save_every_steps=3, mesh__data=2)
        == plain
    )
    assert run_checksum(compute__replica_mode="map", data__loader__threads=3) == plain
    for options in (
        {"epochs": 3},
        {"optimizer__learning_rate": 0.1},
        {"merge__unit": "head"},
        {"num_replicas": 5},
        {"compute__dtype": "bfloat16"},
        {"data__augment__flip": True},
        {"per_replica__randaugment_ops": (0, 2)},
    ):
        assert run_checksum(**options) != plain, options
    assert training_checksum(base, "other") != plain
    before = base.copy_and_resolve_references()
    del before.per_replica.randaugment_ops, before.per_replica.randaugment_magnitude
    assert training_checksum(before, "a checksum") == plain, "later options"


def test_a_checksum_uses_the_first_names_of_options_and_values(monkeypatch):
    first = default.get_config()
    before = training_checksum(first, "a checksum")
    monkeypatch.setitem(flags.RENAMED, "merge.unit", "merge.rule")
    monkeypatch.setitem(flags.RENAMED, "data.augment.", "view.")
    monkeypatch.setitem(flags.RENAMED_VALUES, "merge.rule", {"tensor": "by_tensor"})
    now = first.copy_and_resolve_references()
    with now.unlocked():
        del now.merge["unit"], now.data["augment"]
        now.merge.rule, now.view = "by_tensor", first.data.augment
    assert training_checksum(now, "a checksum") == before
    now.merge.rule = "filter"
    assert training_checksum(now, "a checksum") != before


def test_an_unknown_option_is_one_line():
    with pytest.raises(UserError, match="merge.ratoi"):
        Run.of(0, {"merge.ratoi": 1}).config(default.get_config())
