"""`fastprompt doctor`: what is installed, what can run here, whether it computes what it should, and how to mend what does not.

Every operator runs forward and backward on small inputs, on each path that this machine has, beside the reference, which reads
float64 (images of 8 bits it computes in float32).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastprompt
from fastprompt import _runtime, functional

OLDEST = {"torch": (2, 11), "triton": (3, 6)}
VARIABLES = {
    "TRITON_INTERPRET": "1: kernels run in Triton's interpreter, on CPU tensors",
    "TRITON_CACHE_DIR": "where compiled kernels are kept",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "FASTPROMPT_CHECK": "1: values are checked on a GPU too, at the price of a sync",
    "FASTPROMPT_LOG": "path: every operator says which path it took",
}
TOLERANCE = 1e-4  # of float32, relative to the largest value of the reference


class Finding(NamedTuple):
    """A line of the page; `fix` is said where something is wrong."""

    line: str
    fix: str = ""


def examine(device: str | None = None) -> int:
    """Prints the page; 0 when nothing is wrong, else 1."""
    wrong = 0
    for title, found in (
        ("versions", _versions()),
        ("devices", _devices(device)),
        ("kernels", _kernels()),
        ("environment", _environment()),
        ("self-checks in float32, beside the reference in float64", _self_checks(device)),
    ):
        print(title, flush=True)
        for line, fix in found:
            print(f"  {'WRONG' if fix else 'ok':5}  {line}", flush=True)
            if fix:
                print(f"         to mend it: {fix}", flush=True)
                wrong += 1
    print(f"\n{wrong or 'nothing'} {'is' if wrong < 2 else 'are'} wrong", flush=True)
    return 1 if wrong else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding(f"fastprompt {fastprompt.__version__} in {Path(fastprompt.__file__).parent}")
    yield Finding(f"Python {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "numpy", "safetensors", "transformers", "peft"):
        version = torch.__version__ if package == "torch" else _version(package)
        yield Finding(f"{package}: not installed (optional)") if version is None else _old_enough(package, version)


def _old_enough(package: str, version: str) -> Finding:
    oldest = OLDEST.get(package)
    if oldest is None or tuple(int(part) for part in version.split(".")[:2]) >= oldest:
        return Finding(f"{package} {version}")
    wanted = ".".join(map(str, oldest))
    return Finding(f"{package} {version}, older than {wanted}", f'pip install "{package}>={wanted}"')


def _devices(device: str | None) -> Iterator[Finding]:
    yield Finding(f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        size = properties.total_memory / 2**30
        yield Finding(f"cuda:{number}: {properties.name}, {_runtime.arch(torch.device('cuda', number))}, {size:.0f} GiB")
    if not count:
        built = torch.version.cuda or torch.version.hip
        line = f"no GPU is seen by this build of PyTorch ({f'for {built}' if built else 'for CPUs'})"
        asked = device is not None and device.startswith("cuda")
        yield Finding(line, "install a driver and a PyTorch built for it, see https://pytorch.org" if asked else "")


def _kernels() -> Iterator[Finding]:
    if not _runtime.HAS_TRITON:
        line = "Triton is not installed: GPU tensors run plain PyTorch; CPU tensors need none"
        yield Finding(line, 'pip install "triton>=3.6"' if sys.platform == "linux" else "")
        return
    version = _version("triton")
    yield _old_enough("triton", version) if version else Finding("triton, of no known version")
    try:
        from fastprompt.ops import attention, embedding, mapping, perturbation  # noqa: F401  these import the kernels
    except Exception as error:
        yield Finding(f"the kernels cannot be imported: {type(error).__name__}: {error}", "reinstall triton and fastprompt")
        return
    if torch.cuda.is_available():
        yield Finding("kernels run on the GPU")
    else:
        where = (
            "in the interpreter, on CPU tensors"
            if _runtime.INTERPRETING
            else "on no device here: no GPU, TRITON_INTERPRET is not 1"
        )
        yield Finding(f"kernels run {where}")
    yield _cache()


def _cache() -> Finding:
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        line = f"the cache folder {folder} cannot be written ({error.strerror}): every process compiles every kernel again"
        return Finding(line, "set TRITON_CACHE_DIR to a folder that can be written, with some space")
    return Finding(f"the cache folder {folder} can be written")


def _environment() -> Iterator[Finding]:
    for name, meaning in VARIABLES.items():
        value = os.environ.get(name)
        if value is None:
            continue
        fix = ""
        if name == "TRITON_INTERPRET" and value == "1" and torch.cuda.is_available():
            fix = "unset TRITON_INTERPRET: there is a GPU, and the interpreter is thousands of times slower"
        elif name == "FASTPROMPT_LOG" and value != "path":
            fix = "FASTPROMPT_LOG=path is what is known"
        elif name == "FASTPROMPT_CHECK" and value not in ("0", "1"):
            fix = "FASTPROMPT_CHECK is 0 or 1"
        yield Finding(f"{name}={value} ({meaning})", fix)
    for name in sorted(os.environ):
        if name.startswith("FASTPROMPT_") and name not in VARIABLES:
            yield Finding(f"{name}: nothing here reads it", f"one of {', '.join(n for n in VARIABLES if 'FASTPROMPT' in n)}")
    if not any(name in os.environ for name in VARIABLES):
        yield Finding("no variable that matters is set")


# ---- Self-checks ----

Case = Callable[[torch.device, torch.dtype, str], tuple[Tensor, list[Tensor]]]  # (the result, what has a gradient)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """The same numbers for every dtype."""
    count = torch.tensor(shape).prod().item()
    t = torch.sin(torch.arange(1, int(count) + 1, dtype=torch.float64) * 7.3).view(shape)
    return t.to(device, dtype).requires_grad_()


def _perturb(device: torch.device, dtype: torch.dtype, impl: str) -> tuple[Tensor, list[Tensor]]:
    image = (torch.arange(3 * 3 * 9 * 9, device=device) * 37 % 256).view(3, 3, 9, 9).to(torch.uint8)
    prompt = _random(device, dtype, 3, 16, 16)
    norm = functional.normalization(0.5, 0.25, device=device)
    given: dict[str, Any] = {"canvas": 16, "resize": 12, "hole": "image", "squash": "sigmoid", "norm": norm, "dtype": dtype}
    return functional.perturb(image, prompt, impl=impl, **given), [prompt]


def _soft_gather(device: torch.device, dtype: torch.dtype, impl: str) -> tuple[Tensor, list[Tensor]]:
    soft = _random(device, dtype, 3, 8)
    ids = torch.tensor([[-1, -2, -3, 4, 5], [-1, -2, -3, 0, 6]], device=device)
    return functional.soft_gather(ids, _random(device, dtype, 7, 8).detach(), soft, impl=impl), [soft]


def _prefix_attention(device: torch.device, dtype: torch.dtype, impl: str) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (_random(device, dtype, 2, heads, 5, 16) for heads in (4, 2, 2))
    prefix = [_random(device, dtype, 1, 2, 3, 16) for _ in range(2)]
    out = functional.prefix_attention(q, k, v, *prefix, causal=True, impl=impl)
    assert isinstance(out, Tensor)
    return out, [q, k, v, *prefix]


def _map_labels(device: torch.device, dtype: torch.dtype, impl: str) -> tuple[Tensor, list[Tensor]]:
    scores = _random(device, dtype, 4, 20)
    return functional.map_labels(scores, torch.tensor([3, 0, 19], device=device), impl=impl), [scores]


def _mapped_cross_entropy(device: torch.device, dtype: torch.dtype, impl: str) -> tuple[Tensor, list[Tensor]]:
    scores = _random(device, dtype, 4, 20)
    labels = functional.segments([[0, 1], [5], [7, 9, 19]], 20).to(device)
    target = torch.tensor([0, 2, 1, 2], device=device)
    return functional.mapped_cross_entropy(scores, labels, target, impl=impl), [scores]


def _count_labels(device: torch.device, dtype: torch.dtype, impl: str) -> tuple[Tensor, list[Tensor]]:
    counts = torch.zeros(20, 3, dtype=torch.int64, device=device)
    target = torch.tensor([0, 2, 1, 2], device=device)
    return functional.count_labels_(counts, _random(device, dtype, 4, 20), target, impl=impl), []


CASES: dict[str, Case] = {
    "perturb": _perturb,
    "soft_gather": _soft_gather,
    "prefix_attention": _prefix_attention,
    "map_labels": _map_labels,
    "mapped_cross_entropy": _mapped_cross_entropy,
    "count_labels_": _count_labels,
}


def _self_checks(device: str | None) -> Iterator[Finding]:
    gpu = torch.cuda.is_available()
    place = torch.device(device or ("cuda" if gpu else "cpu"))
    if place.type == "cuda" and not gpu:
        return  # said among the devices
    paths = {"auto": "auto"}
    if _runtime.INTERPRETING and place.type == "cpu":
        paths["triton"] = "Triton's interpreter"
    for name, case in CASES.items():
        for impl, path in paths.items():
            yield _check(name, case, place, impl, path)


def _check(name: str, case: Case, device: torch.device, impl: str, path: str) -> Finding:
    fix = (
        'until it is mended, impl="torch" is right; empty the cache folder of Triton, install the torch and triton that '
        "fastprompt names, and report this page"
    )
    seen: list[str] = []
    before, _runtime.watch = _runtime.watch, lambda op, path, *_: seen.append(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from the interpreter, of rows that a mask drops
            found = _results(case, device, torch.float32, impl)
    except Exception as error:
        return Finding(f"{name} ({path} on {device}) raises {type(error).__name__}: {error}", fix)
    finally:
        _runtime.watch = before
    title = f"{name}: {seen[0] if seen else path}"
    errors = []
    for ours, true in zip(found, _results(case, device, torch.float64, "torch"), strict=True):
        scale = true.abs().max().clamp(min=1).double()
        errors.append(float(((ours.double() - true).abs() / scale).nan_to_num(torch.inf).max()))
    shown = f"error {errors[0]:.1e} forward" + (f", {max(errors[1:]):.1e} backward" if errors[1:] else "")
    if max(errors) <= TOLERANCE:
        return Finding(f"{title}: {shown}")
    return Finding(f"{title}: {shown}, at most {TOLERANCE:.0e} is right", fix)


def _results(case: Case, device: torch.device, dtype: torch.dtype, impl: str) -> list[Tensor]:
    """The result and the gradients."""
    out, trained = case(device, dtype, impl)
    if not trained:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, trained, _random(device, out.dtype, *out.shape).detach())]
