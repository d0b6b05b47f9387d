"""Launch configurations that `fastprompt tune` measured: one JSON file a GPU, read once, at its first launch.

    {"format": 1, "gpu": "NVIDIA H200", "arch": "sm_90", "launches": {"mapping": {"forward": {"ROWS": 8, ...}}}, ...}

The file is $FASTPROMPT_TUNING/<gpu>.json where that is set (an empty folder switches all files off); else that of the user's
cache folder ($XDG_CACHE_HOME or ~/.cache, fastprompt/tuning), else the one that the package ships in tuning/configs. What
it does not name keeps the family's own table. A file that cannot be read, or whose family holds a name or number that no
launch has, is a warning that names it, and the family's own table is used: a slower launch is no reason to stop a training.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastprompt import _runtime

FORMAT = 1
FAMILIES = ("perturbation", "embedding", "attention", "mapping")
SHIPPED = Path(__file__).parent / "configs"
Table = dict[Any, Any]  # kernel -> a frozen dataclass
Launch = TypeVar("Launch")

_tables: dict[tuple[str, str], Table] = {}


def table(family: str, arch: str, defaults: Callable[[str], Table]) -> Table:
    """The launches of a family on an architecture: `defaults(arch)`, and what was measured on this machine's GPU."""
    found = _tables.get((family, arch))
    if found is None:
        found = _tables[family, arch] = _read(family, arch, dict(defaults(arch)))
    return found


def forget() -> None:
    """The next launch reads the files again."""
    _tables.clear()


@contextmanager
def trying(launches: Table, kernel: Any, launch: Any) -> Iterator[None]:
    """Calls inside use another launch of one kernel."""
    kept = launches[kernel]
    launches[kernel] = launch
    try:
        yield
    finally:
        launches[kernel] = kept


# ---- Files ----


def gpu_name(arch: str) -> str | None:
    """The name of this machine's GPU when that is its architecture; "cpu" for the interpreter."""
    if arch == "cpu":
        return "cpu"
    if not torch.cuda.is_available() or _runtime.arch(torch.device("cuda", torch.cuda.current_device())) != arch:
        return None  # compiled ahead of time for another machine
    return torch.cuda.get_device_name()


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def _user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprompt" / "tuning"


def _folders() -> list[Path]:
    given = os.environ.get("FASTPROMPT_TUNING")
    return [Path(given)] if given else [_user_folder(), SHIPPED]


def target(gpu: str) -> Path:
    """Where a new file of this GPU goes: where the one in use lies, else the package where it can be written, else the user's."""
    given = os.environ.get("FASTPROMPT_TUNING")
    if given:
        return Path(given) / file_name(gpu)
    own = _user_folder() / file_name(gpu)
    if own.exists() or not os.access(SHIPPED if SHIPPED.exists() else SHIPPED.parent, os.W_OK):
        return own
    return SHIPPED / file_name(gpu)


def write(path: Path, gpu: str, arch: str, launches: dict[str, Table], **facts: Any) -> None:
    """Writes a file that `table` reads; whole or not at all."""
    named = {
        family: {_name(kernel): asdict(launch) for kernel, launch in found.items()} for family, found in launches.items() if found
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"format": FORMAT, "gpu": gpu, "arch": arch, "launches": named, **facts}, indent=1) + "\n")
    draft.replace(path)


def _name(kernel: Any) -> str:
    return " ".join(map(str, kernel)) if isinstance(kernel, tuple) else kernel


def _read(family: str, arch: str, launches: Table) -> Table:
    gpu = gpu_name(arch)
    if gpu is None:
        return launches
    for path in (folder / file_name(gpu) for folder in _folders()):
        if not path.is_file():
            continue
        try:
            return launches | _checked(json.loads(path.read_text()), family, gpu, arch, launches)
        except (OSError, ValueError) as reason:
            warnings.warn(
                f"{path}: {reason}; the launches of {family} are the built-in ones. `fastprompt tune` writes the file anew",
                stacklevel=2,
            )
            return launches
    return launches


def _checked(found: Any, family: str, gpu: str, arch: str, launches: Table) -> Table:
    """The launches of a family in a file's content. Every name and number is one that `launches` could have."""
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in (("format", FORMAT), ("gpu", gpu), ("arch", arch))):
        raise ValueError(f"expected launches of format {FORMAT} for {gpu} ({arch})")
    families = found.get("launches")
    if not isinstance(families, dict) or not set(families) <= set(FAMILIES):
        raise ValueError(f"launches: expected families of {', '.join(FAMILIES)}")
    kernels = {_name(kernel): kernel for kernel in launches}
    chosen = families.get(family, {})
    if not isinstance(chosen, dict) or not set(chosen) <= set(kernels):
        raise ValueError(f"launches of {family}: expected kernels of {', '.join(kernels)}")
    return {kernels[name]: _launch(name, values, launches[kernels[name]]) for name, values in chosen.items()}


def _launch(name: str, values: Any, like: Launch) -> Launch:
    names = {field.name for field in fields(like)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"{name}: expected {', '.join(sorted(names))}")
    for key, value in values.items():
        power = key.isupper() or key == "num_warps"  # sizes of a tile and its warps
        least, most = int(key != "programs"), {"num_warps": 32, "num_stages": 8}.get(key, 65536)
        if type(value) is not int or not least <= value <= most or (power and value & (value - 1)):
            raise ValueError(f"{name}: {key} cannot be {value!r}")
    return type(like)(**values)
