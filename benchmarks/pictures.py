"""Pictures of a report: speed-ups with the noise floor, the ceilings, scaling over one size, overhead over the frozen model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe and Ito's colours; fastprompt is the first one everywhere.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
Result = dict[str, Any]


def pyplot() -> Any:
    """matplotlib's pyplot, without a screen. ImportError says how to get it."""
    try:
        import matplotlib
    except ImportError as missing:
        raise ImportError("--plot needs matplotlib: pip install 'fastprompt[plot]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draws every picture that the report has figures for; the SVG files."""
    plt, out = pyplot(), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    timed = [result for result in report["results"] if "speedup" in result]
    drawn = []
    for name, figure in _figures(plt, timed, report["ceilings"]):
        facts = (f"{key} {report['conditions'].get(key)}" for key in ("device", "threads", "torch", "date", "commit"))
        figure.text(0.005, 0.004, ", ".join(facts), fontsize=6, color="grey")
        drawn.append(out / f"{name}.svg")
        figure.savefig(drawn[-1], bbox_inches="tight")
        plt.close(figure)
    return drawn


def _figures(plt: Any, timed: list[Result], ceilings: dict[str, float]) -> Iterator[tuple[str, Any]]:
    for family in dict.fromkeys(result["family"] for result in timed):
        own = [result for result in timed if result["family"] == family]
        if with_rivals := [result for result in own if result["speedup"]]:
            yield f"speedup_{family}", _speedup(plt, with_rivals)
        if sweeps := _sweeps(own):
            yield f"scaling_{family}", _scaling(plt, sweeps)
    if timed:
        yield "ceilings", _ceilings(plt, timed, ceilings)
    if over := [result for result in timed if result.get("overhead")]:
        yield "overhead", _overhead(plt, over)


def _label(result: Result) -> str:
    return f"{result['case']} {result['mode']}\n{result['shape']} {result['dtype']}"


def _ours(result: Result) -> tuple[str, float]:
    name, row = next(iter(result["rows"].items()))
    return name, row["median_s"]


def _bars(plt: Any, rows: list[tuple[str, dict[str, float]]], first: str | None = None) -> tuple[Any, Any]:
    """Horizontal bars, a group a case, a colour a provider."""
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    colours = {name: COLOURS[(place + (first is None)) % len(COLOURS)] for place, name in enumerate(names)}
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.16 * sum(len(values) + 1 for _, values in rows)))
    place, ticks = 0.0, []
    for _, values in rows:
        ticks.append(place + (len(values) - 1) / 2)
        for name, value in values.items():
            axes.barh(place, value - 1, left=1, color=colours[name], height=0.9)  # from 1, where both are as fast
            axes.text(value, place, f" {value:.2f}", va="center", fontsize=6)
            place += 1
        place += 1
    axes.set_yticks(ticks, [label for label, _ in rows], fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    axes.legend(
        handles, names, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(6, len(names)), frameon=False
    )
    return figure, axes


def _speedup(plt: Any, results: list[Result]) -> Any:
    rows = [(_label(result), {n: r for n, r in result["speedup"].items() if n != "frozen"}) for result in results]
    figure, axes = _bars(plt, rows)
    noise = max(result["noise"] for result in results)
    axes.axvspan(1 / (1 + noise), 1 + noise, color="grey", alpha=0.3, lw=0)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel(f"the rival's time over fastprompt's; left of 1 the rival is faster; grey: noise, A/A up to {noise:.1%}")
    return figure


def _overhead(plt: Any, results: list[Result]) -> Any:
    figure, axes = _bars(plt, [(_label(result), result["overhead"]) for result in results], _ours(results[0])[0])
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("time over the same model without a prompt")
    return figure


def _ceilings(plt: Any, results: list[Result], ceilings: dict[str, float]) -> Any:
    """Left: bytes a second against bytes. Right, where FLOPs count: the roofline."""
    counted = [result for result in results if result["flops"]]
    figure, panels = plt.subplots(1, 1 + bool(counted), figsize=(5 * (1 + bool(counted)), 4), squeeze=False)
    families = list(dict.fromkeys(result["family"] for result in results))
    colours = {family: COLOURS[place % len(COLOURS)] for place, family in enumerate(families)}
    left = panels[0][0]
    for result in results:
        seconds = _ours(result)[1]
        left.plot(result["bytes"], result["bytes"] / seconds, "o", ms=4, color=colours[result["family"]])
        if result["flops"]:
            panels[0][1].plot(
                result["flops"] / result["bytes"], result["flops"] / seconds, "o", ms=4, color=colours[result["family"]]
            )
    left.axhline(ceilings["copy"], color="black", lw=1, label="copy, measured")
    left.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="bytes a second")
    if counted:
        right, ridge = panels[0][1], ceilings["matmul"] / ceilings["copy"]
        reach = [result["flops"] / result["bytes"] for result in counted] + [ridge]
        corners = [min(reach) / 2, ridge, max(reach) * 2]
        right.plot(
            corners,
            [min(x * ceilings["copy"], ceilings["matmul"]) for x in corners],
            color="black",
            lw=1,
            label="ceilings, measured",
        )
        right.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="FLOP a second")
    for family in families:
        left.plot([], [], "o", ms=4, color=colours[family], label=family)
    for panel in panels[0]:
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _sweeps(results: list[Result]) -> dict[str, list[tuple[int, Result]]]:
    """Results that differ in one size alone, three sizes at least: title -> (size, result), sorted."""
    groups: dict[str, list[tuple[int, Result]]] = {}
    for result in results:
        for size in re.finditer(r"\b([A-Za-z]+)=(\d+)", result["shape"]):
            rest = f"{result['shape'][: size.start(2)]}*{result['shape'][size.end(2) :]}"
            title = f"{result['case']} {result['mode']} {result['dtype']}\n{rest}, over {size[1]}"
            groups.setdefault(title, []).append((int(size[2]), result))
    ranked = {title: sorted(points, key=lambda point: point[0]) for title, points in groups.items()}
    return {title: points for title, points in ranked.items() if len({size for size, _ in points}) >= 3}


def _scaling(plt: Any, sweeps: dict[str, list[tuple[int, Result]]]) -> Any:
    columns = min(3, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False)
    for panel, (title, points) in zip(panels.flat, sweeps.items(), strict=False):
        names = dict.fromkeys(n for _, result in points for n, row in result["rows"].items() if "median_s" in row and n != "A/A")
        across = [size for size, _ in points]
        for place, name in enumerate(names):
            timed = [(size, result["rows"][name]) for size, result in points if "median_s" in result["rows"].get(name, {})]
            at, colour = [size for size, _ in timed], COLOURS[place % len(COLOURS)]
            panel.plot(at, [row["median_s"] * 1e3 for _, row in timed], "o-", ms=3, color=colour, label=name)
            low, high = ([row[key] * 1e3 for _, row in timed] for key in ("p20_s", "p80_s"))
            panel.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        panel.set(xscale="log", yscale="log", ylabel="ms, median and p20 to p80")
        panel.set_xticks(across, across, minor=False)
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:.3g}")
        panel.tick_params(which="both", labelsize=6)
        panel.set_title(title, fontsize=7)
        panel.legend(fontsize=6)
        panel.grid(alpha=0.3, which="both")
    for panel in list(panels.flat)[len(sweeps) :]:
        panel.axis("off")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure
