"""`python -m benchmarks.report`: the tables of README.md and docs/performance.md, made from the files under results/.

README.md holds blocks between `<!-- table: NAME -->` and `<!-- /table -->`; what is between is written by `BLOCKS[NAME]` and
never by hand. CPU results are cpu.json and cpu_<family>*.json: a case that several files have counts from the newest. GPU results
are results/gpu_<part>.json. `--check` writes nothing and fails when a file is not what the results say.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import goals, pictures

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("correctness", "kernels", "steps", "memory", "sanitizer", "ncu")
NOT_MEASURED = "not yet measured"

# ---- What README shows: a selection of cases, and of their rivals ----

_PERTURBATION = (
    "pad forward B=32 3x32->224", "pad backward B=32 3x32->224", "pad both B=32 3x32->224", "pad forward B=32 3x192->224",
    "pad backward B=32 3x192->224", "pad both B=32 3x192->224", "pad forward B=256 3x32->224", "pad backward B=256 3x192->224",
    "watermark both B=32 3x224", "frame both B=32 3x224", "smm both B=32 3x224 patch 8", "dam-vp forward B=32 3x224 N=10",
    "dam-vp backward B=32 3x224 N=10", "dvp forward B=32 3x192->224 K=3", "blackvip forward B=32 3x224",
    "clamp forward B=32 3x224", "clamp backward B=32 3x224", "series forward B=32 8x500->16000",
    "one image forward B=1 3x192->224", "demo size forward B=64 3x16->32", "demo size both B=64 3x16->32",
)  # fmt: skip
_ATTENTION = (
    "decode forward B=16 H=8/8 T=1 S=1 P=1024 D=64", "decode both B=16 H=8/2 T=1 S=256 P=1024 D=64",
    "decode forward B=64 H=8/8 T=1 S=256 P=16 D=64", "decode forward B=2 H=8/8 T=1 S=256 P=16 D=64",
    "ViT-S forward B=16 H=6/6 T=197 S=197 P=50 D=64", "ViT-S backward B=16 H=6/6 T=197 S=197 P=50 D=64",
    "prompt only backward B=16 H=6/6 T=197 S=197 P=50 D=64", "Llama forward B=2 H=12/4 T=512 S=512 P=128 D=64 causal",
    "Llama backward B=2 H=12/4 T=512 S=512 P=128 D=64 causal", "cached backward B=4 H=8/2 T=16 S=272 P=128 D=64 causal",
    "CoOp forward B=64 H=8/8 T=8 S=8 P=17 D=64 causal",
)  # fmt: skip
_MAPPING = (
    "map + cross-entropy both B=32 S=1000 T=10", "map + cross-entropy both B=4096 S=1000 T=100",
    "many-to-one mean + cross-entropy both B=256 S=1000 T=100 m=10",
    "many-to-one mean + cross-entropy both B=64 S=32157 T=397 m=81",
    "many-to-one mean + cross-entropy forward B=32 S=1000 T=10 m=100",
    "many-to-one mean + cross-entropy both B=32 S=1000 T=10 m=100",
    "many-to-one probabilities + cross-entropy both B=256 S=1000 T=10 m=6",
    "many-to-one top-3 mean + cross-entropy both B=64 S=7940 T=397 m=20", "matrix + cross-entropy both B=256 S=8100 T=100",
    "label head + cross-entropy both B=64 V=50257 d=1024 K=32", "count forward N=50000 S=1000 T=10",
    "count top-k forward N=15880 S=8100 T=397", "match forward S=8100 T=100", "match forward S=32157 T=397",
)  # fmt: skip
# What the picture shows: a case and the rival that somebody would otherwise run.
_PICTURE = (
    (
        "perturbation",
        "pad forward B=256 3x32->224",
        "plain",
        "256 uint8 images to a model input;\nbest plain PyTorch",
    ),
    ("perturbation", "pad forward B=256 3x32->224", "eager", "the same; the public repositories' chain"),
    (
        "attention",
        "decode forward B=16 H=8/8 T=1 S=1 P=1024 D=64",
        "concat",
        "decoding, prefix of 1024; copied prefix",
    ),
    (
        "reprogrammed",
        "vpt-deep both ViT-384/16 L=12 B=16 P=50",
        "tokens",
        "VPT-deep step, P=50; tokens in every sample",
    ),
    ("reprogrammed", "soft prompt both Llama L=8 d=384 V=32000 B=16 T=64 P=100", "peft", "soft prompt step, P=100; PEFT"),
    ("clip", "CoOp both C=50 M=16 d=512 L=12", "77 tokens", "CoOp text side, 50 classes;\n77 tokens a class"),
    ("mapping", "label head + cross-entropy both B=64 V=50257 d=1024 K=32", "full head", "32 label words of 50,257; full head"),
    ("mapping", "count forward N=50000 S=1000 T=10", "loops", "label counts of an epoch; public loops"),
    ("mapping", "match forward S=32157 T=397", "repeated argmax", "label matching; repeated arg-max"),
)
_PUBLIC = ("loops", "full head", "repeated argmax", "eager")


# ---- Results ----


class Results:
    """All result files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        families = {name: {result["family"] for result in found.get("results", ())} for name, found in self.files.items()}
        cpu = [
            name for name, found in families.items()
            if name == "cpu.json" or (len(found) == 1 and name.startswith(f"cpu_{next(iter(found))}"))
        ]  # fmt: skip
        self.cpu = sorted(cpu, key=lambda name: self.files[name]["conditions"]["date"])
        self.gpu = {
            part: found for part in PARTS if (found := self.files.get(f"gpu_{part}.json")) is not None and not found.get("dry")
        }  # fmt: skip
        self.cases: dict[str, dict[str, Any]] = {}
        self.of: dict[str, str] = {}  # title -> file
        for name in self.cpu:
            for result in self.files[name]["results"]:
                title = goals.title(result).strip()
                self.cases[title], self.of[title] = result, name

    def case(self, family: str, words: str) -> dict[str, Any]:
        """The case of a family whose title, but for the dtype, is this."""
        found = [result for title, result in self.cases.items() if title.rpartition(" ")[0] == f"{family}/{words}"]
        if len(found) != 1:
            raise ValueError(f"{family}/{words}: {len(found)} such cases in {', '.join(self.cpu) or 'no result file'}")
        return found[0]

    def rows(self) -> list[dict[str, Any]]:
        """Every row of the goals with its verdict."""
        parts = dict(self.gpu)
        if self.cpu:
            newest = self.files[self.cpu[-1]]
            parts["cpu"] = {"results": list(self.cases.values()), "ceilings": newest["ceilings"]}
        return goals.evaluate(parts)


def ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.2f} ms" if value >= 0.1 else f"{value:.3f} ms"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _label(result: dict[str, Any]) -> str:
    return f"{result['case']} {result['mode']}, {result['shape']}".replace("->", " to ")


def _median(result: dict[str, Any]) -> float:
    return next(iter(result["rows"].values()))["median_s"]


def table(results: Results, family: str, chosen: Sequence[str], columns: dict[str, Sequence[str]]) -> str:
    """A row a case: our time, and for each column the ratio of the first of these rivals that the case has.

    "best" is the fastest of the best plain forms, and nothing where a column before has it.
    """
    lines = [f"| case | ours | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for words in chosen:
        result = results.case(family, words)
        cells, used = [], set()
        for rivals in columns.values():
            left = [name for name in result["speedup"] if name not in used]
            known = sorted((name for name in result["best"] if name in left), key=result["speedup"].__getitem__)
            name = next((name for rival in rivals for name in (known[:1] if rival == "best" else [rival]) if name in left), None)
            used.add(name)
            cells.append("" if name is None else ratio(result["speedup"][name]))
        lines.append(f"| {_label(result)} | {ms(_median(result))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(found: dict[str, Any]) -> str:
    """The device, the versions, the date and the commit of a file, in a line."""
    c = found["conditions"]
    triton = f", Triton {c['triton']}" if c.get("triton") else ""
    where = f"driver {c['driver']}" if "driver" in c else f"{c['threads']} thread{'s' if c['threads'] > 1 else ''}"
    changed = ", with uncommitted changes" if c.get("changed_files") else ""
    return (
        f"{c['device']}, {where}, torch {c['torch'].split('+')[0]}{triton}, {c['date'][:10]}, commit {c['commit'][:7]}{changed}"
    )


def _clock(found: dict[str, Any]) -> str:
    clocks = {row["clock"] for result in found["results"] for row in result["rows"].values() if "clock" in row}
    said = {"process": "CPU time (the machine was busy with other work)", "host": "wall time"}
    return " and ".join(sorted(said.get(clock, clock) for clock in clocks))


# ---- The blocks of README ----


def _cpu_conditions(results: Results) -> str:
    """A line for all files of the same conditions."""
    files: dict[str, list[str]] = {}
    for name in results.cpu:
        found = results.files[name]
        said = f"{conditions(found)}, {_clock(found)}, float32, medians"
        files.setdefault(said, []).append(f"[{name}](benchmarks/results/{name})")
    return "\n".join(f"- {', '.join(names)}: {said}." for said, names in files.items())


def _models(results: Results) -> str:
    """Whole models: fastprompt's time over the bare frozen model's, and every rival's over fastprompt's."""
    lines = ["| case | ours | over the frozen model | rivals, their time over ours | noise (A/A) |", "|---|---|---|---|---|"]
    for family in ("reprogrammed", "clip", "instruction", "steps"):
        for result in (case for case in results.cases.values() if case["family"] == family):
            gains = dict(result["speedup"])
            over = f"{1 / frozen:.2f}" if (frozen := gains.pop("frozen", None)) else ""
            rivals = ", ".join(f"{name} {ratio(gain)}" for name, gain in gains.items())
            if result["mode"] == "both" or family == "instruction":
                lines.append(f"| {_label(result)} | {ms(_median(result))} | {over} | {rivals} | {result['noise']:.0%} |")
    return "\n".join(lines)


def _notes(results: Results) -> str:
    pipeline = results.case("perturbation", "pipeline forward B=256 3x32->224 bicubic")
    resize = results.case("perturbation", "resize forward B=32 3x256->128 bilinear")
    match, count = (
        results.case("mapping", "match forward S=8100 T=100"),
        results.case("mapping", "count forward N=50000 S=1000 T=10"),
    )

    def against(result: dict[str, Any], rival: str, goal: float) -> str:
        found = result["speedup"][rival]
        return f"{ratio(found)}x, goal {goal:g}x: {'reached' if found >= goal else 'missed'}"

    uint8 = resize["speedup"]["uint8"]
    faster = f"{1 / uint8:.1f}x faster" if uint8 < 1 else f"{uint8:.1f}x slower"
    return "\n".join([
        f"- A batch of 256 uint8 32x32 images to 224, bicubic, normalised, every byte as Pillow's: {ms(_median(pipeline))}; the",
        f"  Pillow pipeline on one thread over it: {against(pipeline, 'Pillow', 5)}.",
        f"- The same with PyTorch's own uint8 resize is {faster} for 256 to 128. Where its weights must give",
        "  Pillow's bytes, as there, fastprompt runs it too; elsewhere it differs from Pillow by up to 2 levels.",
        f"- Matching at S=8100 over repeated arg-max: {against(match, 'repeated argmax', 100)}. Counting over loops:",
        f"  {against(count, 'loops', 30)}.",
    ])  # fmt: skip


def _gpu(results: Results) -> str:
    if not results.gpu:
        return f"**On a GPU: {NOT_MEASURED}.**"
    lines = [f"- {part}: {conditions(found)}" for part, found in results.gpu.items() if "conditions" in found]
    return "\n".join([*lines, "", goal_table([row for row in results.rows() if not row["row"].startswith("C")])])


BLOCKS: dict[str, Callable[[Results], str]] = {
    "cpu conditions": _cpu_conditions,
    "cpu models": _models,
    "cpu perturbation": lambda r: table(r, "perturbation", _PERTURBATION, {"eager": ("eager",), "plain": ("plain",)}),
    "cpu attention": lambda r: table(r, "attention", _ATTENTION, {"concat": ("concat",), "eager": ("eager",)}),
    "cpu mapping": lambda r: table(r, "mapping", _MAPPING, {"public form": _PUBLIC, "plain": ("best",)}),
    "cpu notes": _notes,
    "gpu": _gpu,
}
_BLOCK = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def fill(text: str, results: Results) -> str:
    """A text with its blocks written anew.

    Raises:
        ValueError: a block that nothing writes, or one that is not closed.
    """
    if text.count("<!-- table: ") != len(_BLOCK.findall(text)) or text.count("<!-- /table -->") != text.count("<!-- table: "):
        raise ValueError("a table block is not closed")

    def written(block: re.Match[str]) -> str:
        if block["name"] not in BLOCKS:
            raise ValueError(f"table: expected one of {', '.join(BLOCKS)}, got {block['name']!r}")
        return f"{block[1]}\n{BLOCKS[block['name']](results)}\n\n{block[3]}"

    return _BLOCK.sub(written, text)


# ---- docs/performance.md ----


def _measured(row: dict[str, Any]) -> str:
    said = []
    for bar in row["bars"]:
        if "measured" in bar:
            rival = bar["bar"].rpartition(" over ")[2] if " over " in bar["bar"] else ""
            what = f"over {rival}" if rival else bar["bar"].split()[-1].lstrip("<")
            share = what in ("copy", "matmul")
            value = bar["measured"]
            said.append(
                f"{100 * value:.0f} % {what}" if share else f"{value:.0f} {what}" if value >= 100 else f"{value:.3g} {what}"
            )
    return "; ".join(said)


def goal_table(rows: Sequence[dict[str, Any]]) -> str:
    """Row, work, must, moonshot, the worst that was measured, verdict."""
    lines = ["| row | work | must | moonshot | measured | verdict |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = row["verdict"] + (f" ({row['reason']})" if row["verdict"] == "not measured" else "")
        cells = (row["row"], row["work"], row["must"], row["moonshot"], _measured(row), verdict)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _all_cases(cases: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | dtype | ours | p20 to p80 | rivals, their time over ours | share of the copy rate | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in cases:
        ours = next(iter(result["rows"].values()))
        if "median_s" not in ours:
            lines.append(f"| {_label(result)} | {result['dtype']} | refused: {ours['refused']} | | | | |")
            continue
        rivals = ", ".join(f"{name} {ratio(value)}" for name, value in result["speedup"].items())
        spread = f"{ms(ours['p20_s'])} to {ms(ours['p80_s'])}"
        share = f"{100 * result['of_copy_ceiling']:.0f} %"
        cells = (_label(result), result["dtype"], ms(ours["median_s"]), spread, rivals, share, f"{ours['error']:.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def performance(results: Results) -> str:
    """docs/performance.md."""
    parts = [
        "# Performance",
        "`python -m benchmarks.report` writes this page from the files under [benchmarks/results](../benchmarks/results).\n"
        "Nothing here is typed. A ratio is a rival's time over ours: below 1 is a loss.\n"
        "[benchmarks/README.md](../benchmarks/README.md) says what is compared and how it is timed.",
        "## Goals",
        "Of several cases the worst counts. M and C are the matrix-product and copy rates measured in the same run.",
        goal_table(results.rows()),
        "## On a CPU",
    ]
    for name in results.cpu:
        found = results.files[name]
        cases = [result for result in found["results"] if results.of[goals.title(result).strip()] == name]
        parts += [f"### {name}", f"{conditions(found)}; {_clock(found)}."]
        for family in dict.fromkeys(result["family"] for result in cases):
            parts += [f"**{family}**", _all_cases([result for result in cases if result["family"] == family])]
    parts.append("## On a GPU")
    for part in PARTS:
        parts += [f"### {part}", _gpu_part(results.gpu.get(part))]
    return "\n\n".join(parts) + "\n"


def _gpu_part(found: dict[str, Any] | None) -> str:
    if found is None or "conditions" not in found:
        return f"{NOT_MEASURED.capitalize()}."
    parts = [f"{conditions(found)}."]
    if found["results"]:
        parts.append(_all_cases(found["results"]))
    if found["checks"]:
        parts.append("\n".join(f"- {name}: `{json.dumps(what)}`" for name, what in found["checks"].items()))
    for kind in ("failed", "not_run"):
        if found[kind]:
            parts.append("\n".join(f"- {kind.replace('_', ' ')}: {name}: {reason[:200]}" for name, reason in found[kind].items()))
    return "\n\n".join(parts)


# ---- The picture ----


def draw(results: Results, path: Path) -> None:
    """What fastprompt is faster than, and by how much, on a CPU."""
    plt = pictures.pyplot()
    plt.rcParams["svg.hashsalt"] = "fastprompt"  # the same file from the same results
    figure, axes = plt.subplots(figsize=(8, 4.2))
    cases = [results.case(family, words) for family, words, _, _ in _PICTURE]
    gains = [case["speedup"][rival] for case, (_, _, rival, _) in zip(cases, _PICTURE, strict=True)]
    axes.barh(range(len(gains)), [gain - 1 for gain in gains], left=1, color=pictures.COLOURS[0])
    for place, (case, gain) in enumerate(zip(cases, gains, strict=True)):
        axes.text(gain, place, f" {ratio(gain)}x (noise {case['noise']:.0%})", va="center", fontsize=7)
    axes.set_yticks(range(len(gains)), [label for *_, label in _PICTURE], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.9, 4 * max(gains))
    axes.xaxis.set_major_formatter("{x:g}x")
    first = results.files[results.of[goals.title(cases[0]).strip()]]["conditions"]
    day = first["date"][:10]
    axes.set_xlabel(
        f"the rival's time over fastprompt's, float32; {first['device']}, one thread, torch {first['torch']}, {day}\n"
        "docs/performance.md has every case, the losses too", fontsize=7,
    )  # fmt: skip
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


# ---- The command ----


def written(root: Path, folder: Path) -> dict[Path, str]:
    """What each file should hold."""
    results = Results(folder)
    readme = root / "README.md"
    return {readme: fill(readme.read_text(), results), root / "docs" / "performance.md": performance(results)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files; with --check, 1 when one differs from what the results say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a file is not what the results say")
    parser.add_argument("--plot", action="store_true", help="also draw docs/speed.svg (needs matplotlib)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    differ = 0
    for path, text in written(options.root, options.results).items():
        now = path.read_text() if path.exists() else ""
        if now == text:
            continue
        if options.check:
            differ = 1
            lines = difflib.unified_diff(now.splitlines(), text.splitlines(), str(path), "from the results", lineterm="", n=0)
            print("\n".join(list(lines)[:20]))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"written: {path}")
    if options.plot:
        draw(Results(options.results), options.root / "docs" / "speed.svg")
    if differ:
        print("run `python -m benchmarks.report`", file=sys.stderr)
    return differ


if __name__ == "__main__":
    sys.exit(main())
