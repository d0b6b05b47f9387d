"""The rules of the house that can be read from the source, and what importing the package may do.

Each rule is a function from source text to a list of sentences, so that a planted violation shows
that the rule can still fail.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FAMILIES = ("perturbation", "embedding", "attention", "mapping")

# A second file of a family in a layer, where one would tell two stories.
SECOND = {
    "nn/verbalizers": "mapping", "nn/trained_verbalizers": "mapping",
    "functional/mapping_heads": "mapping", "functional/mapping_counts": "mapping",
    "ops/mapping_cpu": "mapping", "ops/mapping_counts": "mapping",
}  # fmt: skip

# A module may import what stands lower, and its own group. "" is the package itself.
RANK = {
    "_runtime": 0, "taxonomy": 0, "checkpoint": 0,
    "kernels": 1, "reference": 1, "tuning": 1, "answers": 1,
    "ops": 2,
    "functional": 3,
    "nn": 4, "hoist": 4,
    "reprogram": 5, "integrations": 5, "data": 5, "clip": 5, "instruction": 5,
    "methods": 6,
    "training": 7, "blackbox": 7, "tune": 7, "warming": 7, "profiling": 7,
    "": 8,
    "demo": 9, "benchmarks": 9, "doctor": 9,
    "__main__": 10,
}  # fmt: skip


def modules():
    """Every file of the package with the name it is imported by."""
    for folder, package in (
        (ROOT / "fastprompt", "fastprompt"),
        (ROOT / "kernels", "fastprompt.kernels"),
        (ROOT / "benchmarks", "fastprompt.benchmarks"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if "__pycache__" in parts or (package == "fastprompt" and parts[0] in ("kernels", "benchmarks")):
                continue  # Python 3.13 and newer follow the links
            yield ".".join((package, *parts)), path.read_text()


def imports(name, source):
    """(line, absolute dotted target) of every import, wherever it stands in the file."""
    package = name.removesuffix(".__init__").split(".")
    if not name.endswith(".__init__"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join((*base, alias.name))


def place(name):
    """(group, family or None) of a dotted name inside the package."""
    _, *parts = name.removesuffix(".__init__").split(".")
    group = parts[0] if parts else ""
    own = SECOND.get("/".join(parts[:2]), parts[1]) if len(parts) > 1 else None
    return group, own if own in FAMILIES else None


def arrows(name, source):
    group, family = place(name)
    if group not in RANK:
        return [f"{name}: {group!r} has no place in the house"]
    wrong = []
    for line, target in imports(name, source):
        if target.split(".")[0] != "fastprompt":
            continue
        target_group, target_family = place(target)
        target_group = target_group if target_group in RANK else ""  # a name of the package itself
        if target_group != group and RANK[target_group] >= RANK[group]:
            wrong.append(f"{name}:{line}: {group or 'fastprompt'} imports {target}, which is not below")
        if family and target_family and family != target_family:
            wrong.append(f"{name}:{line}: family {family} imports its sibling {target}")
    return wrong


def dotted(node):
    """ "a.b.c" for that expression, else ""."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


CODE_RUNNERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def no_code_from_data(name, source):
    wrong = []
    for line, target in imports(name, source):
        if target.split(".")[0] in CODE_RUNNERS or target in ("torch.load", "torch.save"):
            wrong.append(f"{name}:{line}: imports {target}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and dotted(node) in ("torch.load", "torch.save"):
            wrong.append(f"{name}:{node.lineno}: uses {dotted(node)}")
        if isinstance(node, ast.Call):
            if dotted(node.func) in ("eval", "exec", "compile", "__import__"):
                wrong.append(f"{name}:{node.lineno}: calls {dotted(node.func)}")
            if any(k.arg == "allow_pickle" for k in node.keywords):
                wrong.append(f"{name}:{node.lineno}: says allow_pickle")
    return wrong


def triton_at_home(name, source):
    """Only kernels/ imports Triton when it is itself imported; commands may inside a function."""
    lines = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return [
        f"{name}:{line}: imports {target} outside kernels/"
        for line, target in imports(name, source)
        if target.split(".")[0] == "triton" and place(name)[0] != "kernels" and line not in lines
    ]


def kernel_imports(name, source):
    family = place(name)[1]
    own = ("fastprompt.kernels._shared", f"fastprompt.kernels.{family}." if family else "-")
    return [
        f"{name}:{line}: imports {target}; kernels import triton, torch, ._shared, their own family"
        for line, target in imports(name, source)
        if not (
            target.split(".")[0] in ("triton", "torch", "math", "__future__")
            or any(target == o or target.startswith(o.rstrip(".") + ".") for o in own)
        )
        or target.startswith("torch.library")
    ] + [
        f"{name}:{node.lineno}: an absolute import of the package; kernels import relatively"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in ("fastprompt", "kernels")
    ]


GONE = {"make_block_ptr", "advance", "libdevice", "autotune"}


def kernel_calls(name, source):
    """What a kernel file may not say, or has to."""
    wrong, tree = [], ast.parse(source)

    def refuse(node, sentence):
        wrong.append(f"{name}:{node.lineno}: {sentence}")

    # Names that hold a bare 32-bit program id
    program_ids = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and dotted(getattr(node.value, "func", None)) == "tl.program_id"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for line, target in imports(name, source):
        if GONE & set(target.split(".")):
            wrong.append(f"{name}:{line}: imports {target}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in GONE and dotted(node).split(".")[0] in ("tl", "triton", "libdevice"):
                refuse(node, f"uses {dotted(node)}")
            if dotted(node) == "torch.library":
                refuse(node, "uses torch.library; operators are registered in fastprompt/ops")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = (node.left, node.right)
            small = any(
                (isinstance(s, ast.Name) and s.id in program_ids) or dotted(getattr(s, "func", None)) == "tl.program_id"
                for s in sides
            )
            if small and any(isinstance(s, ast.Name) and "stride" in s.id.lower() for s in sides):
                refuse(node, "program id times stride in 32 bits; say .to(tl.int64) first")
        if not isinstance(node, ast.Call):
            continue
        said = {k.arg for k in node.keywords}
        if dotted(node.func) == "tl.load":
            masked = "mask" in said or len(node.args) > 1
            if masked and "other" not in said and len(node.args) < 3:
                refuse(node, "a masked load without other=")
        if dotted(node.func) == "tl.dot" and "input_precision" not in said:
            refuse(node, "a dot without input_precision=")
        if isinstance(node.func, ast.Subscript) and "enable_fp_fusion" not in said:
            refuse(node, "a launch without enable_fp_fusion=True")
    return wrong


def cells(paths):
    """The grid: `paths` are like "ops/mapping.py", "kernels/mapping/forward.py", "tests/..."."""
    wrong, have = [], {}
    for path in paths:
        layer, *rest = path.split("/")
        own = rest[0].removesuffix(".py") if rest else ""
        if layer in ("reference", "tuning", "ops", "nn", "kernels"):
            own = SECOND.get(f"{layer}/{own}", own)
            have.setdefault(layer, set()).add(own)
            if own not in FAMILIES and not own.startswith("_"):
                wrong.append(f"{path}: {own!r} is not a family")
        if path == "kernels/__init__.py":
            wrong.append("kernels/__init__.py: hides Hugging Face's kernels from transformers")
    needs = {"kernels": ("reference", "tuning", "ops"), "ops": ("reference",), "nn": ("reference",)}
    for layer, others in needs.items():
        for family in sorted(have.get(layer, set()) & set(FAMILIES)):
            for other in others:
                if family not in have.get(other, ()):
                    wrong.append(f"{layer}/{family}: there is no {other}/{family}")
            if not any(path.startswith(f"tests/test_{family}") for path in paths):
                wrong.append(f"{layer}/{family}: there is no tests/test_{family}*.py")
    return wrong


def stub(name, source):
    """A cell defines something. Package files may only gather names."""
    if name.endswith(".__init__") or place(name)[1] is None:
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    if any(isinstance(node, kinds) for node in ast.parse(source).body):
        return []
    return [f"{name}: a stub; a family that has nothing to say in a layer has no file there"]


EVERYWHERE = (arrows, no_code_from_data, triton_at_home, stub)
IN_KERNELS = (kernel_imports, kernel_calls)


@pytest.mark.parametrize("rule", EVERYWHERE + IN_KERNELS, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    checked = [(name, source) for name, source in modules() if rule in EVERYWHERE or place(name)[0] == "kernels"]
    assert checked
    assert [sentence for name, source in checked for sentence in rule(name, source)] == []


def test_every_family_has_its_cells():
    files = [*(ROOT / "fastprompt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    paths = {p.relative_to(ROOT).as_posix().removeprefix("fastprompt/") for p in files}
    paths |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    assert cells(sorted(paths)) == []


PLANTED = [
    (arrows, "ops.mapping", "import fastprompt.nn"),
    (arrows, "ops.mapping", "from fastprompt import functional"),
    (arrows, "ops.mapping", "def f():\n    from ..nn.mapping import LabelMap"),
    (arrows, "ops.mapping", "from .perturbation import x"),
    (arrows, "nn.verbalizers", "from .attention import x"),
    (arrows, "ops.mapping", "from ..reference import perturbation"),
    (arrows, "ops.mapping", "from .. import __version__"),
    (arrows, "nn.__init__", "from .. import reprogram"),
    (arrows, "nn.mapping", "from ..hoist import x"),
    (arrows, "reference.mapping", "from ..tuning.mapping import pick"),
    (arrows, "kernels.mapping.forward", "from ..perturbation.pixel import x"),
    (arrows, "taxonomy", "from ._runtime import x"),
    (arrows, "training", "from .demo import x"),
    (arrows, "demo.digits", "from ..__main__ import main"),
    (arrows, "utils", ""),
    (no_code_from_data, "nn.mapping", "import pickle"),
    (no_code_from_data, "nn.mapping", "from pickle import loads"),
    (no_code_from_data, "nn.mapping", "import torch\ntorch.load('x')"),
    (no_code_from_data, "nn.mapping", "f = torch.save"),
    (no_code_from_data, "nn.mapping", "from torch import load as fetch"),
    (no_code_from_data, "nn.mapping", "eval('1')"),
    (no_code_from_data, "nn.mapping", "exec('1')"),
    (no_code_from_data, "nn.mapping", "np.load('x', allow_pickle=True)"),
    (triton_at_home, "ops.mapping", "import triton.language as tl"),
    (triton_at_home, "ops.mapping", "if x:\n    from triton import jit"),
    (kernel_imports, "kernels.mapping.forward", "import numpy"),
    (kernel_imports, "kernels.mapping.forward", "from ..._runtime import arch"),
    (kernel_imports, "kernels.mapping.forward", "from ..perturbation import pixel"),
    (kernel_imports, "kernels.mapping.forward", "from fastprompt.kernels._shared import dot"),
    (kernel_imports, "kernels.mapping.forward", "from torch.library import Library"),
    (kernel_imports, "kernels._shared", "from .mapping.forward import x"),
    (kernel_calls, "kernels.mapping.forward", "torch.library.Library('x', 'DEF')"),
    (kernel_calls, "kernels.mapping.forward", "p = tl.make_block_ptr(x)"),
    (kernel_calls, "kernels.mapping.forward", "p = tl.advance(p, 1)"),
    (kernel_calls, "kernels.mapping.forward", "from triton.language.extra import libdevice"),
    (kernel_calls, "kernels.mapping.forward", "@triton.autotune([])\ndef f(): pass"),
    (kernel_calls, "kernels.mapping.forward", "from triton import autotune"),
    (kernel_calls, "kernels.mapping.forward", "x = tl.load(p, mask=m)"),
    (kernel_calls, "kernels.mapping.forward", "x = tl.load(p, m)"),
    (kernel_calls, "kernels.mapping.forward", "x = tl.dot(a, b)"),
    (kernel_calls, "kernels.mapping.forward", "f[grid](x, num_warps=4)"),
    (kernel_calls, "kernels.mapping.forward", "i = tl.program_id(0)\nx = p + i * stride_x"),
    (kernel_calls, "kernels.mapping.forward", "x = p + STRIDE * tl.program_id(0)"),
    (stub, "ops.mapping", '"""Nothing yet."""'),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "source"), PLANTED)
def test_a_planted_violation_is_caught(rule, name, source):
    assert len(rule(f"fastprompt.{name}", source)) == 1


KERNEL = """
from __future__ import annotations
import torch, triton
import triton.language as tl
from .._shared import dot
from . import pixel
from .pixel import squash

@triton.jit
def kernel(x, stride_x):
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    a = tl.load(x + i * stride_x + j * 8, mask=i > j, other=0.0)
    b = tl.load(x, i > j, 0.0)
    c = tl.load(x) + tl.dot(a, b, input_precision="ieee")

def launch(x, optimizer):
    kernel[(1,)](x, num_warps=4, enable_fp_fusion=True)
    optimizer.advance()
"""
CLEAN = """
from __future__ import annotations
import torch
from .. import functional, taxonomy
from .._runtime import arch
from ..reference.mapping import map_labels
from ._shared import x
model.eval()
torch.compile(model)
def versions():
    import triton
"""


@pytest.mark.parametrize(
    ("rules", "name", "source"),
    [
        (EVERYWHERE + IN_KERNELS, "kernels.mapping.forward", KERNEL),
        (EVERYWHERE, "nn.mapping", CLEAN),
        (EVERYWHERE, "__main__", "from . import __version__\nfrom .demo import digits"),
        (EVERYWHERE, "__init__", "from .training import fit\nfrom . import nn"),
    ],
)
def test_clean_code_passes(rules, name, source):
    if name == "nn.mapping":
        source += "class LabelMap: pass"
    assert [s for rule in rules for s in rule(f"fastprompt.{name}", source)] == []


def test_the_grid_check_sees_gaps():
    whole = [f"{layer}/mapping.py" for layer in ("reference", "tuning", "ops", "nn")]
    whole += ["kernels/mapping/forward.py", "tests/test_mapping.py"]
    assert cells(whole) == []
    for gap in (
        "reference/mapping.py",
        "tuning/mapping.py",
        "ops/mapping.py",
        "tests/test_mapping.py",
    ):
        assert cells([path for path in whole if path != gap])
    assert cells([path for path in whole if "kernels" not in path and "nn" not in path]) == []
    for stray in ("nn/labels.py", "kernels/__init__.py", "kernels/labels/forward.py"):
        assert cells([*whole, stray])


# What importing does


def python(code):
    """Run in the repository root, in a fresh interpreter; its output."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_without_triton():
    out = ("kernels", "demo", "integrations", "benchmarks")
    names = [name.removesuffix(".__init__") for name, _ in modules() if place(name)[0] not in out]
    python(
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "loaded = [n for n in sys.modules if n.startswith('fastprompt.kernels.')]\n"
        "assert not loaded, loaded\n"
    )


IMPORT = """
import io, os, sys, time
import torch
def state():
    return (dict(os.environ), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.cuda.is_initialized(),
            sys.path[:], os.getcwd())
before = state()
sys.stdout = sys.stderr = io.StringIO()
start = time.perf_counter()
import fastprompt
cost = time.perf_counter() - start
said = sys.stdout.getvalue()
sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
assert not said, said
assert state() == before, "importing fastprompt changed the process"
assert not torch.cuda.is_initialized()
for name in getattr(fastprompt, "__all__", ()):
    getattr(fastprompt, name)
print(cost)
"""


def test_import_does_no_work_and_costs_little():
    """At most 0.3 s over torch's own import. Other load only adds, so the best run is the cost."""
    costs = []
    for _ in range(5):
        costs.append(float(python(IMPORT)))
        if min(costs) <= 0.3:
            return
    pytest.fail(f"importing fastprompt costs {min(costs):.2f} s over torch, expected at most 0.3")


def test_hugging_face_kernels_is_not_hidden():
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    if not {"kernels", "transformers"} <= installed:
        pytest.skip("needs transformers and Hugging Face's kernels")
    assert importlib.util.find_spec("kernels") is not None
    code = "import kernels\nfrom transformers import LlamaModel\nprint(kernels.get_kernel.__name__)"
    assert python(code) == "get_kernel\n"


# What conftest.py promises


@pytest.mark.parametrize(
    ("reason", "status"),
    [("needs a file system to fill", 0), ("could not import 'x'", 1)],
)
def test_a_skip_outside_the_budget_fails_the_run(tmp_path, reason, status):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    body = f"import pytest\ndef test_skips(): pytest.skip({reason!r})\ndef test_passes(): pass\n"
    (tmp_path / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == status, result.stdout
    assert f"{'SKIP OUTSIDE THE BUDGET' if status else 'skip'}: test_it.py" in result.stdout
    assert reason in result.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_poison_fills_fresh_memory(poison, device, dtype):
    like = torch.ones(4, 2, dtype=dtype, device=device)
    for fresh in (
        torch.empty(3, dtype=dtype, device=device),
        torch.empty_like(like),
        like.new_empty(5),
    ):
        worst = torch.iinfo(dtype).max if dtype == torch.int64 else float("nan")
        assert torch.equal(fresh, torch.full_like(fresh, worst)) or fresh.isnan().all()


def test_kernels_run_here():
    """Without a GPU, Triton interprets: the variable is set before anything imports Triton."""
    if torch.cuda.is_available():
        assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    else:
        assert os.environ["TRITON_INTERPRET"] == "1"
