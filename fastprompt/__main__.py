"""The command line: `fastprompt demo`, `methods`, `bench`, `profile`, `tune`, `doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 when it did what it says."""
    parser = argparse.ArgumentParser(prog="fastprompt", description="Reprogram a frozen PyTorch model.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="reprogram a frozen model of printed characters to read handwritten digits")
    demo.add_argument("--out", default="fastprompt-demo", help="folder for pictures and checkpoint (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=3, help="how many seeds to average over (default: %(default)s)")
    demo.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    demo.add_argument(
        "--alignment", nargs="+", metavar="NAME",
        help="compare output alignments instead, accuracy and cost: all, or some of random first frequent iterative optimal "
        "many-to-one blm blm+ linear",
    )  # fmt: skip
    tune = commands.add_parser("tune", help="measure launch configurations on this machine's GPU and keep the fastest")
    tune.add_argument("--family", action="append", help="perturbation, embedding, attention or mapping (default: all)")
    tune.add_argument("--minutes", type=float, default=8.0, help="start nothing new after this long (default: %(default)s)")
    tune.add_argument("--out", metavar="FILE", help="default: where fastprompt looks for it")
    tune.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter: does the command itself work?")
    commands.add_parser("methods", help="list the methods and where they lie in the taxonomy")
    profile = commands.add_parser("profile", help="run a script's first steps: where their time goes, and what to change")
    for name, what in (("samples", "samples of a step (default: seen)"), ("tokens", "tokens of a step (default: seen)")):
        profile.add_argument(f"--{name}", type=float, help=what)
    profile.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    profile.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    profile.add_argument("--out", help="folder for a Perfetto trace and a report")
    profile.add_argument("script", help="a training or inference script; it is stopped when its training steps are measured")
    profile.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    doctor = commands.add_parser("doctor", help="check this installation: versions, devices, every kernel against its reference")
    doctor.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    bench = commands.add_parser("bench", help="time fastprompt beside its rivals", add_help=False, prefix_chars="\0")
    bench.add_argument("options", nargs="*")  # benchmarks/__main__.py reads them: nothing looks like an option here
    options = parser.parse_args(arguments)
    # torch is imported inside the commands: --help answers at once.
    if options.command == "methods":
        from fastprompt.methods import table

        try:
            print(table(), flush=True)
        except BrokenPipeError:  # `fastprompt methods | head`: nobody reads on, and Python's last flush must not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if options.command == "bench":
        from fastprompt.benchmarks.__main__ import main as run_benchmarks

        return run_benchmarks(options.options, prog="fastprompt bench")
    if options.command == "tune":
        if options.dry:
            os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
        from fastprompt.tune import tune as measure

        try:
            measure(options.family, dry=options.dry, minutes=options.minutes, path=options.out)
        except (RuntimeError, ValueError, OSError) as error:
            print(f"fastprompt tune: {error}", file=sys.stderr)
            return 1
        return 0
    if options.command == "doctor":
        from fastprompt.doctor import examine

        return examine(options.device)
    if options.command == "profile":
        if not os.path.isfile(options.script):
            profile.error(f"script: expected a Python file, got {options.script!r}")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler talks to stderr
        from fastprompt.profiling import TooFewSteps, run_script

        measured = ("samples", "tokens", "steps", "warmup", "out")
        try:
            run_script(options.script, options.arguments, **{name: getattr(options, name) for name in measured})
        except TooFewSteps as error:
            print(f"fastprompt profile: {error}", file=sys.stderr)
            return 1
        return 0
    from fastprompt.demo.compare import compare
    from fastprompt.demo.run import run

    try:
        if options.alignment:
            compare(options.out, options.alignment, seeds=options.seeds, device=options.device)
            return 0
        run(options.out, seeds=options.seeds, device=options.device)
    except (ImportError, ValueError, OSError) as error:
        print(f"fastprompt demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
