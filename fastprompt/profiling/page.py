"""A profile as a page, as a report and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastprompt.profiling.results import Part, Profile


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _head_lines(p: Profile) -> list[str]:
    threads = f", threads: {torch.get_num_threads()}" if p.device == "cpu" else ""
    lines = [f"{p.kind} on {p.device}{threads}, torch {torch.__version__}, {p.steps} steps timed"]
    rates = [
        f"{amount:,.0f} {name}/s"
        for name, amount in (("samples", p.samples_per_second), ("tokens", p.tokens_per_second))
        if amount is not None
    ]
    of = f" of {p.samples:g} samples" if p.samples else ""
    lines.append(f"step    {p.step:9.3f} ms{of} (p20 {p.p20:.3f}, p80 {p.p80:.3f})  {'  '.join(rates)}".rstrip())
    if p.frozen is not None and p.spread is not None:
        way = "forward and backward" if p.kind == "training" else "forward"
        spread = "p20 {:.3f}, p80 {:.3f}".format(*p.spread)
        lines.append(
            f"frozen  {p.frozen:9.3f} ms, {way} alone on the same inputs, in turns; overhead {p.overhead:.3f}x ({spread})"
        )
    else:
        lines.append(f"frozen  not timed: {p.no_overhead}")
    return lines


def _part_rows(p: Profile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("part", "forward ms", "backward ms", "of a step", "at the peak")]
    for name, part in p.parts.items():
        if part == Part():
            continue
        both = f"{part.backward:.3f}" if part.backward else ""
        rows.append(
            (name, f"{part.forward:.3f}", both, f"{100 * p.share(name):.1f} %", _bytes(part.memory) if part.memory >= 100 else "")
        )
    total = sum(part.forward + part.backward for part in p.parts.values())
    return [*rows, ("sum", f"{total:.3f}", "", f"{100 * total / p.step:.1f} %", "")]


def _op_rows(p: Profile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("operator", "calls", "ms", "moves", "of the copy rate", "path")]
    for op in p.operations:
        rate = op.moved / max(op.milliseconds, 1e-9) * 1e3 / max(p.copy, 1)
        path = f"{op.path}, because {op.why}"
        rows.append((op.name, f"{op.calls:.2g}", f"{op.milliseconds:.3f}", _bytes(op.moved), f"{100 * rate:.0f} %", path))
    return rows


def _notes(p: Profile) -> list[str]:
    said = [f"{p.operators:.0f} operators called a step"]
    if p.launches is not None:
        said.append(f"{p.launches:.0f} launches, {p.syncs:.0f} host syncs, the GPU works {100 * (p.busy or 0):.0f} % of it")
    share = p.flops / max(p.step * 1e-3 * p.matmul, 1)
    said.append(
        f"{p.flops / 1e9:.3f} GFLOP in products and convolutions (those of convolutions forward only): {100 * share:.0f} % of "
        f"what a large product reaches here, {p.matmul / 1e9:,.0f} GFLOP/s; a large copy: {p.copy / 1e9:.1f} GB/s"
    )
    held = ", ".join(f"{name} {_bytes(size)}" for name, size in p.held.items() if size)
    said.append(f"peak memory {_bytes(p.peak)}: {held or 'nothing known'} from before; what the step makes is in the table")
    said.append(f"a step under the profiler took {p.traced:.3f} ms; the table has its shares of the step without it")
    return said


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right, a sixth column of words to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if place in (0, 5) else str.rjust for place in range(len(widths))]
    return ["  " + "  ".join(side(c, w) for side, c, w in zip(sides, row, widths, strict=True)) for row in rows]


def text(p: Profile) -> str:
    lines = [*_head_lines(p), "", "where the time goes", *_table(_part_rows(p)), ""]
    lines += [f"  {note}" for note in _notes(p)]
    if p.operations:
        lines += ["", "paths", *_table(_op_rows(p))]
    lines += ["", "what to change", *[f"  {n}. {advice}" for n, advice in enumerate(p.advice, 1)]]
    return "\n".join(line.rstrip() for line in (lines if p.advice else [*lines, "  nothing that the rules know of"]))


def report(p: Profile, folder: Path, trace: Any) -> None:
    """trace.json for Perfetto or chrome://tracing, report.md, and pictures where matplotlib is."""
    trace.export_chrome_trace(str(folder / "trace.json"))

    def table(rows: list[tuple[str, ...]]) -> list[str]:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]

    lines = ["# Profile", "", *[f"- {line}" for line in _head_lines(p)], "", "## Where the time goes", ""]
    try:
        _draw(p, folder)
        lines += ["![shares of a step](step.png)", ""]
    except ImportError:
        lines += ["(No pictures: matplotlib is not installed.)", ""]
    lines += [*table(_part_rows(p)), *[f"- {note}" for note in _notes(p)], ""]
    if p.operations:
        lines += ["## Paths", "", *table(_op_rows(p))]
    lines += ["## What to change", "", *[f"{n}. {advice}" for n, advice in enumerate(p.advice, 1)]]
    lines += [] if p.advice else ["Nothing that the rules know of."]
    lines += ["", "The trace is in trace.json: open it at https://ui.perfetto.dev or chrome://tracing.", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _draw(p: Profile, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    time_axes, memory_axes = figure.subplots(2, 1)
    names = [name for name, part in p.parts.items() if part != Part()][::-1]
    forward, backward = ([getattr(p.parts[name], way) for name in names] for way in ("forward", "backward"))
    time_axes.barh(names, forward, label="forward")
    time_axes.barh(names, backward, left=forward, label="backward")
    time_axes.set(xlabel="ms of a step", title=f"{p.step:.2f} ms a step")
    time_axes.legend()
    made = {f"{name}, in the step": part.memory for name, part in p.parts.items()}
    sizes = {name: size / 1e6 for name, size in (p.held | made).items() if 100 * size > p.peak}
    memory_axes.barh(list(sizes)[::-1], list(sizes.values())[::-1], color="tab:gray")
    memory_axes.set(xlabel="MB at the peak", title=f"{_bytes(p.peak)} at the peak")
    figure.savefig(folder / "step.png", dpi=120)
