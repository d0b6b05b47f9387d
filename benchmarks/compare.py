"""Two reports case by case: did fastprompt become slower?

A case is slower when new / old passes 1 + the bound and 1 + the noise (the larger A/A of the two reports), as measured and also
divided by what happened to the best plain PyTorch in the same two reports: a machine that became slower is not a regression.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

# A difference in one of these and the times say nothing about the code.
MATTERS = ("device", "threads", "torch", "triton", "driver", "huge_pages", "system")


def title(result: dict[str, Any]) -> str:
    return f"{result['family']}/{result['case']} {result['mode']} {result['shape']} {result['dtype']}"


def read(path: str) -> dict[str, Any]:
    """A report that --json wrote. ValueError: it is none."""
    with open(path) as file:
        try:
            report = json.load(file)
        except ValueError:
            report = None
    if not isinstance(report, dict) or not {"conditions", "results"} <= report.keys():
        raise ValueError(f"{path}: expected a report that --json wrote, with conditions and results")
    return report


def compare(old: dict[str, Any], new: dict[str, Any], bound: float) -> int:
    """Prints a line a case; 1 when one is slower, lost its time, or when there is nothing to compare."""
    before, after = ({title(result): result for result in report["results"]} for report in (old, new))
    print(f"\ncompared with {old['conditions'].get('date')}, commit {old['conditions'].get('commit')}:")
    for key in MATTERS:
        then, now = (report["conditions"].get(key) for report in (old, new))
        if key in old["conditions"] and then != now:
            print(f"  OTHER CONDITIONS  {key}: {then} then, {now} now")
    print(f"  {'old us':>12}{'new us':>12}{'old/new':>9}{'rivals':>9}{'A/A':>8}  case")
    slower = both = 0
    for name in before.keys() & after.keys():
        both += "noise" in before[name]
    for name, result in after.items():
        if name not in before or "noise" not in before[name]:
            print(f"  {'':50}  {name}: no time then")
            continue
        if "noise" not in result:
            slower += 1
            print(f"  {'':50}  {name}: REGRESSION, no time now")
            continue
        then, now = (_median(r) for r in (before[name], result))
        rivals = [n for n in result["best"] if n in before[name]["best"]]
        drift = statistics.median(_median(before[name], n) / _median(result, n) for n in rivals) if rivals else None
        noise = max(result["noise"], before[name]["noise"])
        least = 1 + max(bound, noise)  # a ratio beyond it is a change
        ratios = [then / now, *([then / now / drift] if drift else [])]
        verdict = "  REGRESSION" if max(ratios) < 1 / least else "  faster" if min(ratios) > least else ""
        slower += "REG" in verdict
        print(
            f"  {then * 1e6:>12,.1f}{now * 1e6:>12,.1f}{f'{then / now:.2f}x':>9}{f'{drift:.2f}x' if drift else '':>9}"
            f"{noise:>8.1%}  {name}{verdict}"
        )
    for name in before.keys() - after.keys():
        print(f"  {'':50}  {name}: only then")
    print(f"  {both} cases compared, {slower} slower by more than {bound:.0%} and the noise")
    return int(slower > 0 or not both)


def _median(result: dict[str, Any], name: str | None = None) -> float:
    """Of a provider; of fastprompt, the first row."""
    row = result["rows"][name] if name else next(iter(result["rows"].values()))
    return row["median_s"]
