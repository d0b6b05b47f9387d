"""Checkpoints: a folder of two files, never a pickle, whole or absent.

    fastprompt.safetensors     the tensors; its metadata holds the whole config and a SHA-256
    fastprompt_config.json     the same config, for people to read

The payload alone is a whole checkpoint, so it decides: `load` returns what the payload says and
only compares the JSON file with it. A save that dies between its two renames leaves the new
checkpoint and an old copy of the config, which is a warning and no error. One process at a time
saves to a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

PAYLOAD = "fastprompt.safetensors"
CONFIG = "fastprompt_config.json"
FORMAT = 1

_METADATA = "fastprompt"  # one metadata key: safetensors writes several in random order
_DIGEST = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # escaped: it is JSON inside JSON
_BLANK = b"0" * 64  # stands for the digest while the file is hashed
_MAX_HEADER, _MAX_CONFIG, _MAX_DEPTH = 4 << 20, 1 << 20, 16


class CheckpointError(ValueError):
    """A refused checkpoint, on disk or about to be. The message says what, expected and got."""


def save(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a checkpoint to `folder`, which is made if it is not there.

    tensors: plain dense tensors by name (a state_dict), of any layout, on any device.
    config:  JSON data. Its strings are names, never paths: no `/`, `\\`, `..`, control characters.

    When it returns, the checkpoint is on the disk. When it raises or the process is killed, the
    folder holds the previous checkpoint or the new one, whole.
    """
    if "format" in config:
        raise _error("config", 'no key "format", which `save` adds', repr(config["format"]))
    config = {"format": FORMAT, **config}
    _check_data(config, "config")
    text = json.dumps(config, indent=2).encode() + b"\n"
    if len(text) > _MAX_CONFIG:
        raise _error("config", f"at most {_MAX_CONFIG} bytes of JSON", len(text))
    write(Path(folder), {PAYLOAD: _pack(tensors, config), CONFIG: text})


def load(folder: str | os.PathLike[str], *, allowed: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the checkpoint in `folder`: its tensors, on the CPU, and its config.

    allowed: the top-level keys that the caller understands; any other in the config is refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file; pickles (.pt, .bin, .pkl) are never read" if folder.exists() else "nothing"
        raise _error(folder, "a folder that `save` wrote", kind)
    tensors, config = _unpack(folder / PAYLOAD, allowed)
    copy = folder / CONFIG
    if not copy.exists():
        message = f"{copy} is missing, as after an interrupted save"
    elif _parse(_read(copy, _MAX_CONFIG), copy, allowed) != config:
        message = f"{copy} differs, as after an interrupted save or an edit by hand"
    else:
        return tensors, config
    warnings.warn(f"{message}; the config inside {PAYLOAD} is used", stacklevel=2)
    return tensors, config


def check_match(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse `tensors` unless names, shapes and dtypes are those of `expected` (a state_dict)."""
    if tensors.keys() != expected.keys():
        raise _error("checkpoint", f"the tensors {sorted(expected)}", sorted(tensors))
    for name, t in expected.items():
        got, want = ((tuple(x.shape), x.dtype) for x in (tensors[name], t))
        if got != want:
            raise _error(f"checkpoint, tensor {name!r}", want, got)


def _error(where: object, expected: object, got: object) -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}, got {got}")


# The payload


def _pack(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bytes:
    plain = {}
    for name, t in tensors.items():
        where = f"tensors[{name!r}]"
        if not isinstance(name, str) or name == "__metadata__":  # which safetensors would drop
            raise _error(where, "a name that is a string, not '__metadata__'", repr(name))
        if type(t) not in (Tensor, torch.nn.Parameter):
            raise _error(where, "a plain tensor", type(t))
        if t.layout != torch.strided or t.is_quantized or t.is_meta:
            raise _error(where, "a dense tensor with data", f"{t.layout}, {t.dtype} on {t.device}")
        # Always a copy of its own: safetensors refuses views, and tensors that share memory.
        plain[name] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    metadata = {_METADATA: json.dumps({"sha256": _BLANK.decode(), "config": config})}
    try:
        data = safetensors.torch.save(plain, metadata)
    except Exception as e:  # its exception types differ from version to version
        raise _error("tensors", "what a safetensors file can hold", e) from e
    span = _digest_span(data)
    if span is None or int.from_bytes(data[:8], "little") > _MAX_HEADER:
        raise _error("tensors", f"names that fit in {_MAX_HEADER} bytes", f"{len(plain)} tensors")
    return data[: span[0]] + _sha256(data, span) + data[span[1] :]


def _unpack(path: Path, allowed: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = _read(path)
    what = "a safetensors file that `save` wrote"
    header_size, span = int.from_bytes(data[:8], "little"), _digest_span(data)
    if span is None or header_size > min(len(data) - 8, _MAX_HEADER):
        pickle = re.match(rb"PK\x03\x04|\x80[\0-\5]|[c(]", data)
        raise _error(path, what, "a pickle, which is never read" if pickle else "something else")
    if _sha256(data, span) != data[span[0] : span[1]]:
        raise _error(path, "the SHA-256 that it was saved with", "another: the file is damaged")
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + header_size])["__metadata__"][_METADATA]
        text = json.dumps(json.loads(metadata, object_pairs_hook=no_duplicates)["config"])
    except Exception as e:
        raise _error(path, what, e) from e
    return tensors, _parse(text.encode(), path, allowed)


def _digest_span(data: bytes) -> tuple[int, int] | None:
    """Where the digest stands: metadata comes first in the header, the digest first in ours."""
    match = _DIGEST.search(data, 8, 8 + _MAX_HEADER)
    return match.span(1) if match else None


def _sha256(data: bytes, span: tuple[int, int]) -> bytes:
    """Of the whole file with the digest itself blanked, so that no bit of it goes unchecked."""
    digest = hashlib.sha256(memoryview(data)[: span[0]])
    digest.update(_BLANK)
    digest.update(memoryview(data)[span[1] :])
    return digest.hexdigest().encode()


# The config


def _parse(text: bytes, where: object, allowed: Collection[str]) -> dict[str, Any]:
    try:
        config = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as e:
        raise _error(where, "JSON", e) from e
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise _error(where, f'a JSON object with "format": {FORMAT}', repr(text[:80]))
    if unknown := sorted(config.keys() - set(allowed)):
        raise _error(where, f"no keys but {sorted(allowed)}", f"also {unknown}")
    _check_data(config, where)
    return config


def _check_data(value: object, where: object, depth: int = 0) -> None:
    """Refuse all but finite JSON data whose strings cannot be taken for paths."""
    if depth > _MAX_DEPTH:
        raise _error(where, f"at most {_MAX_DEPTH} levels", "more")
    if isinstance(value, str):
        if not value.isprintable() or any(part in value for part in ("/", "\\", "..")):
            raise _error(where, "a printable name without '/', '\\' and '..'", repr(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _error(where, "keys that are strings", repr(key))
            _check_data(key, where, depth + 1)
            _check_data(item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_data(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, float) and math.isfinite(value):
        pass
    elif value is not None and not isinstance(value, int):
        raise _error(where, "finite JSON data", f"{value!r} ({type(value).__name__})")


def no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} twice")
        result[key] = value
    return result


# Files


def _read(path: Path, limit: float = math.inf) -> bytes:
    if not path.is_file():  # nor a named pipe, which would block for ever
        raise _error(path, "a file that `save` wrote", "none")
    if path.stat().st_size > limit:
        raise _error(path, f"at most {limit} bytes", path.stat().st_size)
    return path.read_bytes()


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files beside their places and sync them; only then rename them, in order."""
    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for orphan in folder.glob(".fastprompt*.tmp"):  # of a save that was killed
            orphan.unlink(missing_ok=True)
        for name, temporary in temporaries.items():
            # open() honours the umask, where safetensors' own writer makes every file 0600.
            with open(temporary, "xb") as file:
                file.write(files[name])
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
        _sync_folder(folder)
    except OSError as e:
        message = f"{e.strerror}: the save failed; a checkpoint already in this folder is whole"
        raise OSError(e.errno, message, str(folder)) from e
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves survive a power cut. Windows has no call for it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
