"""What fastprompt must reach, row by row, and how each number is found in the result files: the verdicts are computed.

A bar names the cases it holds for by words of their titles and a number of theirs:
    over NAME[|NAME]   the time of the fastest of these rivals over fastprompt's        (at least)
    over best          the same against the best plain PyTorch of the case              (at least)
    copy, matmul       the share of the measured ceiling                                (at least)
    overhead           fastprompt's time over the bare frozen model's                   (at most)
    floor, us, launches: the time over the floor, microseconds, launches                (at most)
    check NAME.KEY     a number that a check of the part found                          (at least, or at most with a `<`)
Of several cases the worst counts. `limit` is what no design can pass: beyond it the measurement is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Results = dict[str, dict[str, Any]]  # part ("cpu", "kernels", ...) -> {"results", "ceilings", "checks", ...}


@dataclass(frozen=True)
class Bar:
    part: str
    where: tuple[str, ...]
    metric: str
    must: float | None
    moonshot: float | None = None
    limit: float | None = None
    without: tuple[str, ...] = ()  # words that the title does not hold

    @property
    def low(self) -> bool:
        """Whether less is better."""
        return self.metric in ("overhead", "floor", "us", "launches") or self.metric.startswith("check <")

    def holds_for(self, named: str) -> bool:
        """Whether the title of a case, as `title` gives it, has the words of the bar."""
        return all(word in named for word in self.where) and not any(word in named for word in self.without)

    def reaches(self, value: float, bar: float | None) -> bool:
        return bar is None or (value <= bar if self.low else value >= bar)

    @property
    def text(self) -> str:
        return " ".join([*self.where, self.metric])


@dataclass(frozen=True)
class Goal:
    row: str
    work: str
    must: str
    moonshot: str
    bars: tuple[Bar, ...]
    reason: str = ""  # why a row has no bar


_LLAMA, _VIT = ("attention/Llama", "T=2048", "causal"), ("attention/ViT-B", "B=256")
_PAD = ("perturbation/pad ", "B=256", "->224")
_LOSS = "mapping/map + cross-entropy"
_HEAD = "mapping/label head + cross-entropy"
_HEADLINE = (
    Goal("inference", "overhead of every method that needs one pass of f", "<= 1.05", "<= 1.02", (
        Bar("steps", ("reprogrammed/", " forward "), "overhead", 1.05, 1.02),
    )),
    Goal("training, deep", "overhead, deep prompts and prefixes, P <= 100, ViT-B/16 B=256", "<= 1.10", "<= 1.05", (
        Bar("steps", ("reprogrammed/vpt-deep", " both ", "ViT-768", "B=256"), "overhead", 1.10, 1.05),
    )),
    Goal("training, soft", "overhead, causal soft prompt, B >= 16", "<= 1.15", "<= P/(B T) + 1.05", (
        Bar("steps", ("reprogrammed/soft prompt", " both "), "overhead", 1.15),
        Bar("steps", ("reprogrammed/soft prompt", " both ", "B=64 T=64 P=100"), "overhead", 1.15, 1.05 + 100 / 4096),
    )),
    Goal("accuracy", "against the reference implementation", "same loss curve, mapping and prompt within rounding", "", (),
         "tests, not a benchmark: tests/test_trains.py and the families' own"),
)  # fmt: skip
_CPU = (
    Goal("C1", "VPT-deep step, ViT-S/16 B=16, P=50 / P=100, over tokens in every sample", "1.20x / 1.40x; overhead <= 1.06", "", (
        Bar("cpu", ("reprogrammed/vpt-deep", " both ", "ViT-384", "B=16", "P=50 "), "over tokens", 1.20),
        Bar("cpu", ("reprogrammed/vpt-deep", " both ", "ViT-384", "B=16", "P=100 "), "over tokens", 1.40),
        Bar("cpu", ("reprogrammed/vpt-deep", " both ", "ViT-384", "B=16", "P=50 "), "overhead", 1.06),
    )),
    Goal("C2", "causal soft prompt, training step, B=16 T=64 P=100, over PEFT", "4.5x; overhead <= 1.30", "", (
        Bar("cpu", ("reprogrammed/soft prompt", "B=16 T=64 P=100"), "over peft", 4.5),
        Bar("cpu", ("reprogrammed/soft prompt", "B=16 T=64 P=100"), "overhead", 1.30),
    )),
    Goal("C3", "CoOp text tower, 50+ classes, over 77 tokens a class", "5x", "", (
        Bar("cpu", ("clip/CoOp both",), "over 77 tokens", 5),
    )),
    Goal("C4", "label-only head, V=50257 d=1024 K=32 B=64, over the full head", "100x", "", (
        Bar("cpu", (_HEAD, "B=64 V=50257"), "over full head", 100),
    )),
    Goal("C5", "shared prefix, T=1 P=1024 B=16, over concatenation + SDPA", "20x", "", (
        Bar("cpu", ("attention/decode", " forward ", "B=16 ", "S=1 P=1024"), "over concat", 20),
    )),
    Goal("C6", "label counts of an epoch, N=50,000 S=1000 T=10, over loops", "30x", "", (
        Bar("cpu", ("mapping/count forward", "N=50000"), "over loops", 30),
    )),
    Goal("C7", "greedy one-to-one matching, S=8,100 and 32,157, over repeated argmax", "100x, bit-identical", "", (
        Bar("cpu", ("mapping/match",), "over repeated argmax", 100),
    )),
    Goal("C8", "many-to-one or matrix label map + cross-entropy, over the same in plain PyTorch", ">= 1.0x", "", (
        Bar("cpu", ("mapping/many-to-one",), "over best", 1.0), Bar("cpu", ("mapping/matrix",), "over best", 1.0),
    )),
    Goal("C9", "every other op, over the best plain-PyTorch form", ">= 0.95x", "", (
        Bar("cpu", ("/",), "over best", 0.95, without=("mapping/many-to-one", "mapping/matrix", "perturbation/pipeline")),
    )),
    Goal("C10", "input pipeline, 256 uint8 32x32 -> 224 normalised, over PIL transforms", "5x", "", (
        Bar("cpu", ("perturbation/pipeline",), "over Pillow", 5),
    )),
)  # fmt: skip
_GPU = (
    Goal("1", "prefix attention forward, B=8 H=32/8 D=128 T=2048 causal, P=32..128",
         "1.1x flash + cat; 2x dense mask; 1.2x FlexAttention; 42 % M", "1.5x; 3.3x; 58 % M; 0.9x cuDNN", (
        Bar("kernels", (*_LLAMA, " forward "), "over flash", 1.1, 1.5),
        Bar("kernels", (*_LLAMA, " forward "), "over dense mask", 2, 3.3),
        Bar("kernels", (*_LLAMA, " forward "), "over flex", 1.2), Bar("kernels", (*_LLAMA, " forward "), "over cuDNN", None, 0.9),
        Bar("kernels", (*_LLAMA, " forward "), "matmul", 0.42, 0.58, 0.74),
    )),
    Goal("2", "its backward", "1.0x flash + cat; 1.8x FlexAttention; 27 % M", "1.5x; 45 % M", (
        Bar("kernels", (*_LLAMA, " backward "), "over flash", 1.0, 1.5),
        Bar("kernels", (*_LLAMA, " backward "), "over flex", 1.8),
        Bar("kernels", (*_LLAMA, " backward "), "matmul", 0.27, 0.45, 0.55),
    )),
    Goal("3", "deterministic by default", "bitwise over 100 runs, costs <= 10 %", "<= 3 %", (
        Bar("correctness", (), "check determinism.runs", 100),
    )),
    Goal("4", "memory of prefix attention", "no [B, ., P+T, .] tensor; workspace <= 20 MB", "suffix + prefix + 1 %", (
        Bar("memory", (), "check <attention forward.workspace_mb", 20),
        Bar("memory", (), "check <attention backward.workspace_mb", 20),
        Bar("memory", (), "check <attention forward.of_operands", None, 1.01),
    )),
    Goal("5", "ViT attention, B=256 H=12 D=64 T=197, P=10..100, over the best of cat + {flash, cuDNN}",
         "forward 1.4x, backward 1.2x", "2.2x, 1.8x; forward <= 1.5x its byte floor", (
        Bar("kernels", (*_VIT, " forward "), "over flash|cuDNN|concat", 1.4, 2.2),
        Bar("kernels", (*_VIT, " backward "), "over flash|cuDNN|concat", 1.2, 1.8),
        Bar("kernels", (*_VIT, " forward "), "floor", None, 1.5, 1.0),
    )),
    Goal("6", "VPT-deep whole step, ViT-B/16, P=50 / 100, over tokens in every sample", "1.18x / 1.4x", "97 % of 1.25x / 1.51x", (
        Bar("steps", ("reprogrammed/vpt-deep", " both ", "ViT-768", "P=50 "), "over tokens", 1.18, 0.97 * 1.25),
        Bar("steps", ("reprogrammed/vpt-deep", " both ", "ViT-768", "P=100 "), "over tokens", 1.4, 0.97 * 1.51),
    )),
    Goal("7", "CoOp text tower, 1000 classes, forward+backward", "5x of 77 tokens; 2x of EOT-truncated", "9x; 2.8x", (
        Bar("steps", ("clip/CoOp both", "C=1000"), "over 77 tokens", 5, 9),
        Bar("steps", ("clip/CoOp both", "C=1000"), "over truncated", 2, 2.8),
    )),
    Goal("8", "causal soft prompt, B=64 T=64 P=100, over tokens in every sample", "2.1x", "2.4x", (
        Bar("steps", ("reprogrammed/soft prompt", "B=64 T=64 P=100"), "over tokens", 2.1, 2.4),
    )),
    Goal("9", "decode over a shared prefix, B=64 ctx=2048 P=1024", "3.5x cat; 1.25x unshared; 75 % C", "4.2x; 1.4x; 88 % C", (
        Bar("kernels", ("attention/decode ", "B=64", "S=2048 P=1024"), "over concat|flash", 3.5, 4.2),
        Bar("kernels", ("attention/decode ", "B=64", "S=2048 P=1024"), "over unshared", 1.25, 1.4, 1.49),
        Bar("kernels", ("attention/decode ", "B=64", "S=2048 P=1024"), "copy", 0.75, 0.88, 1.0),
    )),
    Goal("10", "decode at any P and B, over the unshared kernel", "never below 0.97x", "", (
        Bar("kernels", ("attention/decode",), "over unshared", 0.97),
    )),
    Goal("11", "perturbation forward, B=256, 3x224x224 bf16 out, from uint8 32/128/192",
         "85 % C; 6x eager; 1.0x torch.compile", "95 % C; 9x; 1.2x", (
        Bar("kernels", (*_PAD, " forward "), "copy", 0.85, 0.95, 1.0), Bar("kernels", (*_PAD, " forward "), "over eager", 6, 9),
        Bar("kernels", (*_PAD, " forward "), "over compile", 1.0, 1.2),
    )),
    Goal("12", "perturbation backward", "75 % C; 3.5x eager; 1.2x compile", "90 % C; 1.6x", (
        Bar("kernels", (*_PAD, " backward "), "copy", 0.75, 0.90, 1.0), Bar("kernels", (*_PAD, " backward "), "over eager", 3.5),
        Bar("kernels", (*_PAD, " backward "), "over compile", 1.2, 1.6),
    )),
    Goal("13", "label map + cross-entropy, forward+gradient, B=65536 S=1000",
         "70 % C; 4x eager; 1.4x compile", "90 % C; 6x; 2x", (
        Bar("kernels", (_LOSS, " both ", "B=65536"), "copy", 0.70, 0.90, 1.0),
        Bar("kernels", (_LOSS, " both ", "B=65536"), "over eager", 4, 6),
        Bar("kernels", (_LOSS, " both ", "B=65536"), "over compile", 1.4, 2),
    )),
    Goal("14", "the same, B=256", "one launch each way; 3x eager in a graph", "<= 4 us; 6x", (
        Bar("kernels", (_LOSS, " forward ", "B=256 S=1000"), "launches", 1),
        Bar("kernels", (_LOSS, " both ", "B=256 S=1000"), "launches", 2),
        Bar("kernels", (_LOSS, " both ", "B=256 S=1000"), "over eager", 3, 6),
        Bar("kernels", (_LOSS, " both ", "B=256 S=1000"), "us", None, 4),
    )),
    Goal("15", "label-only head + cross-entropy, V=128256 d=4096, B=64 K<=32",
         "30x full head; 1.3x `F.linear(W[ids])` + CE", "60x; 2x", (
        Bar("kernels", (_HEAD, "B=64 V=128256"), "over full head", 30, 60, 83),
        Bar("kernels", (_HEAD, "B=64 V=128256"), "over eager", 1.3, 2),
    )),
    Goal("16", "the same, B=16384, K=32 / 1000", "400x / 90x; 60 % C", "650x / 115x; 85 % C", (
        Bar("kernels", (_HEAD, "B=16384 V=128256", "K=32 "), "over full head", 400, 650, 774),
        Bar("kernels", (_HEAD, "B=16384 V=128256", "K=1000 "), "over full head", 90, 115, 128),
        Bar("kernels", (_HEAD, "B=16384 V=128256", "K=32 "), "copy", 0.60, 0.85, 1.0),
    )),
    Goal("17", "host cost a call; host syncs", "<= 15 us; 0", "<= 5 us", (
        Bar("correctness", (), "check <host_cost.largest_us", 15, 5), Bar("correctness", (), "check <syncs.syncs", 0),
    )),
    Goal("18", "first call of the whole package, cold cache", "< 60 s; at most 2 recompilations in 100 random batch sizes", "", (
        Bar("correctness", (), "check <cold.first_step_s", 60),
        Bar("correctness", (), "check <cold.compiled_for_new_batch_sizes", 2),
    )),
)  # fmt: skip
GOALS = (*_HEADLINE, *_CPU, *_GPU)


# ---- Numbers in results ----


def title(result: dict[str, Any]) -> str:
    """As `suite.Case.title`, and a blank behind it, so that "P=10 " is not "P=100"."""
    return f"{result['family']}/{result['case']} {result['mode']} {result['shape']} {result['dtype']} "


def number(result: dict[str, Any], metric: str, ceilings: dict[str, float]) -> float | None:
    """A case's number; None where it was not measured."""
    ours = next(iter(result["rows"].values()))
    over = result.get("speedup")
    if over is None or "median_s" not in ours:
        return None
    if metric == "over best":
        return min((over[name] for name in result["best"] if name in over), default=None)
    if metric.startswith("over "):
        return min((over[name] for name in metric[5:].split("|") if name in over), default=None)
    if metric == "overhead":
        return 1 / over["frozen"] if "frozen" in over else None
    if metric == "matmul":
        return result["flops"] / ours["median_s"] / ceilings["matmul"]
    if metric == "launches":
        return ours.get("launches")
    return {"copy": result["of_copy_ceiling"], "us": 1e6 * ours["median_s"], "floor": ours["median_s"] / result["floor_s"]}[
        metric
    ]


def _numbers(bar: Bar, part: dict[str, Any]) -> list[tuple[float, str]]:
    if bar.metric.startswith("check "):
        name, _, key = bar.metric.removeprefix("check ").removeprefix("<").rpartition(".")
        value = part.get("checks", {}).get(name, {}).get(key)
        return [] if value is None else [(float(value), name)]
    found = []
    for result in part.get("results", ()):
        named = title(result)
        if bar.holds_for(named):
            value = number(result, bar.metric, part["ceilings"])
            if value is not None and not math.isnan(value):
                found.append((value, named.strip()))
    return found


VERDICTS = ("beyond its limit", "MISSED", "must", "moonshot")  # the worst first


def measure(bar: Bar, results: Results) -> dict[str, Any]:
    """{"bar", "measured", "case", "verdict"} of the worst case, or {"bar", "verdict": "not measured", "reason"}."""
    part = results.get(bar.part)
    said = {"bar": bar.text, "must": bar.must, "moonshot": bar.moonshot, "limit": bar.limit}
    found = _numbers(bar, part) if part else []
    if not found:
        reason = f"no result of {bar.part}" if part is None else "no such case was measured"
        if part and any(all(word in named for word in bar.where) for named in part.get("not_run", ())):
            reason = "the time was up, or it cannot run here"
        return said | {"verdict": "not measured", "reason": reason}
    value, case = (max if bar.low else min)(found)
    best, best_case = (min if bar.low else max)(found)
    if bar.limit is not None and (best < bar.limit if bar.low else best > bar.limit):
        return said | {"measured": best, "case": best_case, "verdict": VERDICTS[0]}
    verdict = "MISSED" if not bar.reaches(value, bar.must) else "must"
    if verdict == "must" and bar.moonshot is not None and bar.reaches(value, bar.moonshot):
        verdict = "moonshot"
    return said | {"measured": value, "case": case, "verdict": verdict}


def evaluate(results: Results, goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """Every row with its verdict: the worst of its bars; "not measured" where one is missing and no other is missed."""
    rows = []
    for goal in goals:
        bars = [measure(bar, results) for bar in goal.bars]
        verdicts = [bar["verdict"] for bar in bars]
        row = {"row": goal.row, "work": goal.work, "must": goal.must, "moonshot": goal.moonshot, "bars": bars}
        worst = next((verdict for verdict in VERDICTS[:2] if verdict in verdicts), None)
        reasons = sorted({bar["reason"] for bar in bars if "reason" in bar}) or ([goal.reason] if not bars else [])
        if worst is None:
            hopes = [v for v, bar in zip(verdicts, goal.bars, strict=True) if bar.moonshot is not None]
            worst = "not measured" if reasons else "moonshot" if hopes and set(hopes) == {"moonshot"} else "must"
        rows.append(row | {"verdict": worst} | ({"reason": "; ".join(reasons)} if reasons else {}))
    return rows


def text(rows: Iterable[dict[str, Any]]) -> str:
    """A line a row and a line a bar, as they can be pasted."""
    lines = []
    for row in rows:
        lines.append(f"{row['row']:16}{row['verdict']:18}{row['work']}  [must {row['must']}; moonshot {row['moonshot'] or '-'}]")
        if "reason" in row:
            lines.append(f"{'':16}{row['reason']}")
        for bar in row["bars"]:
            if "measured" in bar:
                lines.append(f"{'':16}{bar['verdict']:18}{bar['measured']:.4g}  {bar['bar']}  ({bar['case']})")
    return "\n".join(lines)
