"""adapter_config.json of a merged adapter: PEFT loads all of its tensors and no others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modelstock_jax.checkpoint_merge.adapter_sources import AdapterSource
from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.options import Options, model_index
from modelstock_jax.checkpoint_merge.sources import same_model
from modelstock_jax.errors import listed

_BASE, _TASK = "base_model_name_or_path", "task_type"
# Keys that choose the modules with factors.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Keys that have no effect after training -> their values in the merged config.
_OF_TRAINING = {
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}
_BIAS = ("none", "lora_only", "all")  # each trains the biases of those before it, and more
# Keys that the merged config sets, or that do not describe the weights.
_MERGED = (
    *_SELECTION,
    *_OF_TRAINING,
    *(_BASE, _TASK, "bias", "modules_to_save", "fan_in_fan_out", "peft_version"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
)


def config_source(sources: Sequence[AdapterSource], options: Options, issues: PlanIssues) -> int:
    """Return the index of the adapter whose config is edited, and compare the other configs.

    Args:
      sources: the adapters
      options: options of the merge
      issues: receives a problem or a note for each key in which the configs differ
    """
    chosen = max(model_index(options.config_from), 1) - 1
    if chosen >= len(sources):
        issues.problems.append(
            f"--config-from {options.config_from}: there are {len(sources)} adapters; choose "
            f"model:1 to model:{len(sources)}"
        )
        return 0
    config = sources[chosen].adapter.config
    tasks = {source.adapter.config.get(_TASK) for source in sources}
    if len(tasks) > 1 and options.config_from is None:
        issues.problems.append(
            f"{_TASK} differs between the adapters ({listed(map(str, sorted(tasks, key=str)))}); "
            "pass --config-from model:1 to write that adapter's"
        )
    for source in sources:
        other = source.adapter.config
        keys = (config.keys() | other.keys()) - {*_MERGED}
        if differing := sorted(key for key in keys if config.get(key) != other.get(key)):
            issues.notes.append(
                f"{listed(differing)} of adapter_config.json in {source.label} differs from "
                f"{sources[chosen].label}, whose value is written"
            )
    return chosen


def check_bases(sources: Sequence[AdapterSource], options: Options, issues: PlanIssues) -> None:
    """Add a problem if adapters that are merged without their base name different bases.

    Args:
      sources: the adapters
      options: options of the merge
      issues: receives the problem
    """
    named = [source for source in sources if source.adapter.base]
    if len({source.adapter.base for source in named}) > 1:
        bases = listed(dict.fromkeys(source.adapter.base for source in named))
        issues.notes.append(
            f"the adapters name their base differently ({bases}); only the last part of the names "
            "is compared"
        )
    others = [s for s in named if not same_model(s.adapter.base, named[0].adapter.base)]
    if others and options.config_from is None:
        issues.problems.append(
            f"the adapters have different bases: {named[0].adapter.base!r} in {named[0].label}, "
            f"{others[0].adapter.base!r} in {others[0].label}; pass BASE, or --config-from model:1 "
            "to write the base of that adapter"
        )


def merged_config(
    sources: Sequence[AdapterSource],
    chosen: int,
    modules: Sequence[Collection[str]],
    ranks: Mapping[str, int],
    replaced: Collection[str],
) -> dict[str, Any]:
    """Return the config of the merged adapter: that of one adapter with the merged values.

    Args:
      sources: the adapters
      chosen: index of the adapter whose config is edited
      modules: modules with factors in each adapter, as the merged adapter names them
      ranks: rank of each module with factors in the merged adapter
      replaced: names of the tensors that the merged adapter stores in full
    """
    configs = [source.adapter.config for source in sources]
    config = dict(configs[chosen])
    config |= {key: value for key, value in _OF_TRAINING.items() if key in config}
    config |= {"inference_mode": True, "init_lora_weights": True, "use_rslora": False}
    config |= rank_keys(ranks, config.get("r"))
    saved = dict.fromkeys(name for c in configs for name in c.get("modules_to_save") or ())
    saved = [name for name in saved if any(f".{name}." in f".{tensor}" for tensor in replaced)]
    config["modules_to_save"] = saved or None
    biases = [c.get("bias") or "none" for c in configs]
    has_bias = any(name.endswith(".bias") for name in replaced)
    config["bias"] = max(biases, key=_BIAS.index) if has_bias else "none"
    return config | _selection(configs, config, modules, list(ranks))


def rank_keys(ranks: Mapping[str, int], default: Any = None) -> dict[str, Any]:
    r"""Return the keys of the ranks; every alpha equals its rank, so that the scale is 1.

    A pattern is for modules whose rank is not the most frequent one. PEFT compares patterns with
    the end of a module's name and uses the first that matches, so longer names come first, and a
    module that ends with the name of another one gets a pattern too.

    Args:
      ranks: rank of each module
      default: rank if there are no modules

    Example:
      >>> rank_keys({"h.0.q": 4, "h.1.q": 8, "h.2.q": 8})["rank_pattern"]
      {'h\\.0\\.q': 4}
    """
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda r: (counts[r], r)) if counts else default
    special = {module for module, r in ranks.items() if r != rank}
    ends = {module for module in ranks if _ends_with(module, special)}
    ordered = sorted(special | ends, key=lambda module: (-len(module), module))
    patterns = {re.escape(module): ranks[module] for module in ordered}
    return {
        "r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": dict(patterns)
    }  # fmt: skip


def _selection(
    configs: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    modules: Sequence[Collection[str]],
    merged: Sequence[str],
) -> dict[str, Any]:
    """Return the keys that choose the modules: as they are, their union, or a pattern of all names.

    The union of the adapters' names is written only if each adapter has all modules that its own
    names match. Otherwise PEFT would create factors in modules that have none.
    """
    if not merged:
        return {}
    is_complete = all(set(names) == set(merged) for names in modules)
    is_equal = all(
        _value(c.get(key)) == _value(config.get(key)) for c in configs for key in _SELECTION
    )
    if is_complete and is_equal and config.get("target_modules"):
        return {}
    targets = [c.get("target_modules") for c in configs]
    is_plain = all(isinstance(names, list) for names in targets) and not any(
        c.get(key) for c in configs for key in _SELECTION[1:]
    )
    cleared = {key: None for key in _SELECTION[1:] if key in config}
    if is_plain:
        each = [set(names) for names in targets if names is not None]
        union = sorted({name for names in each for name in names})
        if set().union(*modules) == set(merged) and all(
            {m for m in merged if m in names or _ends_with(m, names)} == set(present)
            for names, present in zip(each, modules, strict=True)
        ):
            return {"target_modules": union} | cleared
    # In a list, a name would also choose modules that end with it. PEFT compares a text completely.
    return {"target_modules": "|".join(map(re.escape, sorted(merged)))} | cleared


def _value(value: Any) -> Any:
    """Return a list of names in order, and None for an empty value."""
    return sorted(map(str, value)) if isinstance(value, list) and value else value or None


def _ends_with(module: str, names: Collection[str]) -> bool:
    """Return whether a module ends with a dot and one of the names, as PEFT compares them.

    Example:
      >>> _ends_with("layers.0.q_proj", {"q_proj"}), _ends_with("q_proj", {"q_proj"})
      (True, False)
    """
    return any(module[i + 1 :] in names for i, character in enumerate(module) if character == ".")
