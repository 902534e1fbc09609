"""Markdown tables of the results of gpu.py; needs no other package."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.turns import table

Results = Mapping[str, Any]
SIZES = ("b16", "l14", "b32")


def document(results: Results) -> str:
    """Return a Markdown page with a table for each kind of result."""
    sections = {
        "Device": device_lines(results),
        "Correctness": check_rows(results),
        "Training step": step_rows(results),
        "Compared with one replica and with PyTorch": peer_rows(results),
        "Time by kind of kernel": kernel_rows(results),
        "Merge": merge_rows(results),
        "Input": input_rows(results),
        "Parts": part_rows(results),
    }
    lines = [f"# {device_name(results)}"]
    if results["rehearsal"]:
        lines.append("A rehearsal with tiny sizes: the values say nothing about a device.")
    for title, content in sections.items():
        if content:
            text = content if isinstance(content, str) else table(content)
            lines.append(f"## {title}\n\n{text}")
    return "\n\n".join(lines) + "\n"


def device_name(results: Results) -> str:
    """Return the name of the device, or "unknown"."""
    return stored(results, "device").get("device", "unknown")


def stored(results: Results, part: str) -> Mapping[str, Any]:
    """Return what a part has stored; empty if it was not run."""
    return results["parts"].get(part, {}).get("results", {})


def progress(name: str, record: Results) -> str:
    """Return the line that is printed when a part ends."""
    seconds = f" after {record['seconds']:.0f} s" if "seconds" in record else ""
    error = f": {record['error']}" if "error" in record else ""
    return f"{name}: {record['status']}{seconds}{error}"


def problems(results: Results) -> list[str]:
    """Return the parts that failed, and the checks that did not pass or were not all made."""
    statuses = {name: record["status"] for name, record in results["parts"].items()}
    incomplete = [
        (name, status)
        for name, status in statuses.items()
        if status == "failed" or (name == "correct" and status != "done")
    ]
    wrong = [row["check"] for row in checks(results) if not row["ok"]]
    parts = [f"part {name} {status}" for name, status in incomplete]
    return parts + [f"{name}: wrong" for name in wrong]


def checks(results: Results) -> list[Mapping[str, Any]]:
    """Return the rows of all checks."""
    return [
        row for part in ("correct", "glyphs") for row in stored(results, part).get("checks", ())
    ]


def device_lines(results: Results) -> str:
    """Return the versions, and the measured peaks next to those of the data sheet."""
    found = stored(results, "device")
    if not found:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [
        {
            "limit": limit["name"],
            "unit": limit["unit"],
            "measured": f"{limit['measured']:.4g}",
            "data sheet": number(limit["data_sheet"]),
        }
        for limit in found.get("limits", ())
    ]
    line = f"{found['device']}; {found['host']}; {versions}. `{results['command']}`"
    return "\n\n".join([line, *([table(rows)] if rows else [])])


def check_rows(results: Results) -> list[dict[str, str]]:
    """Return a row per check."""
    return [
        {
            "check": row["check"],
            "found": number(row.get("found")),
            "allowed": number(row.get("allowed")),
            "result": "passed" if row["ok"] else row.get("error", "wrong"),
            "reason for the tolerance": row.get("reason", ""),
        }
        for row in checks(results)
    ]


def step_rows(results: Results) -> list[dict[str, str]]:
    """Return a row per measured step, with PyTorch's."""
    return [_step_row(part, row) for part, row in all_steps(results)]


def all_steps(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (part, row) of all measured steps."""
    return [
        (name, row) for name, record in results["parts"].items()
        for row in record.get("results", {}).get("steps", ())
    ]  # fmt: skip


def _step_row(part: str, row: Mapping[str, Any]) -> dict[str, str]:
    way = f"{row['way']} ({part})" if part.startswith("XLA") else row["way"]
    line = {"model": row["size"], "step": way, "batch": str(row["batch"])}
    failed = "failed" in row
    median = None if failed else 1000 * statistics.median(row["seconds"])
    memory = row.get("memory_bytes")
    return line | {
        "images/s": row["failed"] if failed else number(row["images_per_second"]),
        "ms per step": number(median),
        "% of measured peak": percent(row.get("of_peak")),
        "% of data sheet": percent(row.get("of_data_sheet")),
        "memory, GB": number(memory and memory / 1e9),
        "compile time, s": number(row.get("compile_seconds")),
    }


def fastest(rows: Iterable[Mapping[str, Any]], replicas: str) -> Mapping[str, Any] | None:
    """Return the row with the most images per second among those of vmap, map, one or PyTorch."""
    rows = [row for row in rows if row.get("replicas") == replicas and "failed" not in row]
    return max(rows, key=lambda row: row["images_per_second"], default=None)


def peer_rows(results: Results) -> list[dict[str, str]]:
    """Return, for each size, the fastest step of each kind relative to the pair."""
    rows = []
    for size in dict.fromkeys(row["size"] for _, row in all_steps(results)):
        steps = [row for _, row in all_steps(results) if row["size"] == size]
        best = {kind: fastest(steps, kind) for kind in ("vmap", "map", "one", "PyTorch")}
        rate = {kind: row["images_per_second"] for kind, row in best.items() if row}
        if "vmap" in rate:
            rows.append({
                "model": size,
                "pair by vmap, images/s": number(rate["vmap"]),
                **{
                    f"relative to {name}": number(rate["vmap"] / rate[kind], 3)
                    if kind in rate else ""
                    for kind, name in (
                        ("map", "the pair by map"), ("one", "one replica"), ("PyTorch", "PyTorch")
                    )
                },
            })  # fmt: skip
    return rows


def kernel_rows(results: Results) -> list[dict[str, str]]:
    """Return a row per size and kind of kernel, the three slowest kinds and the idle time."""
    rows = []
    for size in SIZES:
        profile = stored(results, size).get("profile", {})
        kinds = sorted(profile.get("kinds", {}).items(), key=lambda item: -item[1])[:3]
        if kinds:
            kinds.append(("idle", profile["idle"]))
        elif profile:
            kinds = [(profile["failed"], None)]
        for kind, seconds in kinds:
            rows.append({
                "model": size,
                "step": profile.get("way", ""),
                "kind": kind,
                "ms per step": number(seconds and 1000 * seconds),
                "% of the step": percent(seconds and seconds / profile["seconds"]),
                "slowest kernel": profile.get("slowest", {}).get(kind, ""),
            })  # fmt: skip
    return rows


def merge_rows(results: Results) -> list[dict[str, str]]:
    """Return a row per merge."""
    return [
        {
            "model": row["size"],
            "merge": row["way"],
            "ms": number(1000 * statistics.median(row["seconds"])),
            "GB moved": number(row["moved_bytes"] / 1e9, 3),
            "% of measured copy": percent(row["of_copy"]),
            "% of data sheet": percent(row.get("of_data_sheet")),
        }
        for row in stored(results, "merge").get("merges", ())
    ]


def input_rows(results: Results) -> list[dict[str, str]]:
    """Return a row per source of images."""
    return [
        {
            "images from": row["source"],
            "resize on the": row["resize_on"],
            "model": row["size"],
            "cores": str(row["cores"]),
            "images/s": number(row["images_per_second"]),
            "images/s without input": number(row["step_images_per_second"]),
            "wait per step, ms": number(1000 * row["wait_seconds"], 3),
            "step, ms": number(1000 * row["step_seconds"], 3),
        }
        for row in stored(results, "input").get("sources", ())
    ]


def part_rows(results: Results) -> list[dict[str, str]]:
    """Return a row per part: whether it is complete."""
    return [
        {
            "part": name,
            "status": record["status"],
            "seconds": number(record.get("seconds")),
            "last line": record.get("error", "")[:200],
        }
        for name, record in results["parts"].items()
    ]


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with this many significant digits; "" if there is none."""
    if value is None or value == "":
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """Return a fraction in percent; "" if there is none."""
    return "" if value is None else f"{100 * value:.1f} %"
