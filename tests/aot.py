"""Compiles kernel launches ahead of time, with no GPU: records what the launchers would launch, then builds each for a target.

Used by test_compiles.py, which runs it in a process of its own because kernels that the interpreter has wrapped cannot be
compiled. `python -m tests.aot sm_90` prints the table.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "uint8": "*u8", "int32": "*i32", "int64": "*i64"}


@contextmanager
def recorded_launches():
    """A list that collects (kernel, arguments, options) of every launch instead of running it."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            (named if name in self.arg_names else options)[name] = value
        launches.append((self, named, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def source(kernel, arguments):
    """The kernel specialised for these arguments as a launch would: 1 and None are constants, multiples of 16 are known."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name] = "constexpr"
            constants[name] = value
        elif hasattr(value, "data_ptr"):
            signature[name] = POINTERS[str(value.dtype).removeprefix("torch.")]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def build(kernel, arguments, options, target):
    """What the compiler made of one launch: {name, shared, spills, registers, loads, stores, wgmma, atomics}."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(source(kernel, arguments), target=GPUTarget(*TARGETS[target]), options=dict(options))
    result = {"name": kernel.fn.__name__, "shared": compiled.metadata.shared, "wide": {}, "spills": None}
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        for kind in ("ld", "st"):
            widths = re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.b(8|16|32|64)\s", ptx)
            result["wide"][kind] = sorted({int(v or 1) * int(b) // 8 for v, b in widths})
        result["wgmma"] = "wgmma" in ptx
        result["tf32"] = "tf32" in ptx
        result["atomics"] = bool(re.search(r"\b(atom|red)\.", ptx))
        result |= resources(compiled.asm["cubin"])
    return result


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a cubin, and its spills: instructions that touch local memory (a stack frame alone costs nothing)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    assert "EXIT" in sass, "no disassembly"
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    return {"registers": int(registers[1]), "spills": len(re.findall(r"\b(?:LDL|STL)", sass))}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "compile in a process without the interpreter"
    from tests import aot_cases

    for name in sys.argv[1:] or TARGETS:  # sm_90+: with every attention launch of the tables
        target = name.removesuffix("+")
        with recorded_launches() as launches:
            aot_cases.launch_all(target, name.endswith("+"))
        seen = set()
        for kernel, arguments, options in launches:
            key = (kernel.fn.__name__, source(kernel, arguments).hash(), json.dumps(options, sort_keys=True))
            if key in seen:
                continue
            seen.add(key)
            blocks = {name: arguments[name] for name in ("BLOCK", "SAMPLES", "ROWS", "COLUMNS") if name in arguments}
            facts = {"target": target, "options": options, "blocks": blocks, "width": arguments.get("D")}
            first = next(a for a in arguments.values() if hasattr(a, "dtype"))
            facts["operand"] = str(first.dtype).removeprefix("torch.")
            print(json.dumps(facts | build(kernel, arguments, options, target)), flush=True)


if __name__ == "__main__":
    main()
