"""A checkpoint is whole or absent, damage is seen, and nothing in it can run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastprompt import checkpoint
from fastprompt.checkpoint import CONFIG, PAYLOAD, CheckpointError, check_match, load, save

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
ALLOWED = {"name", "size"}
CONFIG_1 = {"name": "padded", "size": [224, 160]}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


def tensors(value=1.0):
    return {"delta": torch.full((2, 3), value), "map": torch.tensor([3, 1])}


def same(a, b):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().view(bits[a[k].element_size()]),
                        b[k].contiguous().view(bits[b[k].element_size()]))
        for k in a
    )  # fmt: skip


def strict_load(folder, allowed=ALLOWED):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, allowed=allowed)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path, tensors(), CONFIG_1)
    return tmp_path


# Round trips


def test_round_trip_is_bitwise(tmp_path):
    state = {f"{dtype}".replace("torch.", ""): torch.randn(3, 5).mul(40).abs().to(dtype) for dtype in DTYPES}
    state |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5)}
    state |= {"empty": torch.empty(0, 4), "odd": torch.tensor([float("nan"), -0.0, float("inf")])}
    config = {"name": "é漢", "size": [1, 2.5, None, True, {"a": []}, 10**400]}
    save(tmp_path / "new" / "folder", state, config)
    got, got_config = strict_load(tmp_path / "new" / "folder")
    assert same(got, state)
    assert got_config == config
    got["scalar"].add_(1)  # what is loaded is ours to change


def test_any_layout_and_shared_memory(tmp_path):
    base = torch.randn(2, 3, 4, 5)
    state = {
        "whole": base,
        "transposed": base.transpose(1, 3),
        "sliced": base[:, ::2, 1:],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "channels_last": base.to(memory_format=torch.channels_last),
        "tied": base,
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(base),
    }
    save(tmp_path, state, {})
    assert same(strict_load(tmp_path)[0], {k: t.detach().resolve_neg() for k, t in state.items()})


def test_saving_over_what_was_loaded(saved):
    state, config = strict_load(saved)
    save(saved, state, config)
    assert same(strict_load(saved)[0], tensors())


def test_same_content_gives_same_bytes(tmp_path):
    for name in "ab":
        save(tmp_path / name, tensors(), CONFIG_1)
    assert (tmp_path / "a" / PAYLOAD).read_bytes() == (tmp_path / "b" / PAYLOAD).read_bytes()


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_mode_honours_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(tmp_path, tensors(), CONFIG_1)
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {mode}


# Damage


@pytest.mark.parametrize("name", [PAYLOAD, CONFIG])
def test_every_truncation_is_refused(saved, name):
    data = (saved / name).read_bytes()
    end = len(data) - (name == CONFIG)  # without its last newline the JSON is still whole
    for length in range(end):
        (saved / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="expected"):
            load(saved, allowed=ALLOWED)


def test_every_bit_flip_of_the_payload_is_refused(saved):
    data = (saved / PAYLOAD).read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (saved / PAYLOAD).write_bytes(flipped)
        with pytest.raises(CheckpointError, match="expected"):
            load(saved, allowed=ALLOWED)


def test_a_bit_flip_of_the_config_never_changes_what_is_loaded(saved):
    data = (saved / CONFIG).read_bytes()
    outcomes = set()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (saved / CONFIG).write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got, config = load(saved, allowed=ALLOWED)
            except CheckpointError:
                outcomes.add("refused")
            else:
                assert (config, same(got, tensors())) == (CONFIG_1, True)
                outcomes.add("loaded")
    assert outcomes == {"refused", "loaded"}


def test_trailing_bytes_are_refused(saved):
    with open(saved / PAYLOAD, "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        load(saved, allowed=ALLOWED)


@pytest.mark.parametrize("size", [5 << 20, 1 << 40, 2**64 - 1])
def test_a_huge_header_is_refused_at_once(saved, size):
    data = size.to_bytes(8, "little") + (saved / PAYLOAD).read_bytes()[8:]
    with open(saved / PAYLOAD, "wb") as file:
        file.write(data)
        file.truncate(6 << 20)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="expected"):
        load(saved, allowed=ALLOWED)
    assert time.perf_counter() - start < 1


def test_a_huge_header_with_the_right_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_HEADER", 1 << 30)
    save(tmp_path, {"a" * (5 << 20): torch.ones(1)}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="something else"):
        load(tmp_path, allowed=ALLOWED)


# Things that are no checkpoint


class Canary:
    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "zip"])
def test_a_pickle_is_refused_and_never_runs(saved, protocol):
    canary = Canary()
    canary.path = str(saved / "ran")
    if protocol == "zip":
        torch.save(canary, saved / PAYLOAD)
    else:
        (saved / PAYLOAD).write_bytes(pickle.dumps(canary, protocol=protocol))
    with pytest.raises(CheckpointError, match="a pickle, which is never read"):
        load(saved, allowed=ALLOWED)
    (saved / PAYLOAD).rename(saved / "model.pt")
    with pytest.raises(CheckpointError, match="are never read"):
        load(saved / "model.pt", allowed=ALLOWED)
    with pytest.raises(CheckpointError, match=r"fastprompt\.safetensors: .* got none"):
        load(saved, allowed=ALLOWED)
    assert not (saved / "ran").exists()


def test_the_canary_is_live(tmp_path):
    canary = Canary()
    canary.path = str(tmp_path / "ran")
    pickle.loads(pickle.dumps(canary)).close()
    assert (tmp_path / "ran").exists()


def test_an_absent_or_foreign_folder_is_refused(tmp_path):
    for folder, got in [(tmp_path, "got none"), (tmp_path / "no", "got nothing")]:
        with pytest.raises(CheckpointError, match=got):
            load(folder, allowed=ALLOWED)
    safetensors.torch.save_file(tensors(), tmp_path / PAYLOAD)
    with pytest.raises(CheckpointError, match="something else"):
        load(tmp_path, allowed=ALLOWED)


@posix
def test_a_named_pipe_does_not_block(saved):
    for name in (PAYLOAD, CONFIG):
        (saved / name).unlink(missing_ok=True)
        os.mkfifo(saved / name)
        with pytest.raises(CheckpointError, match="got none"):
            load(saved, allowed=ALLOWED)
        (saved / name).unlink()
        save(saved, tensors(), CONFIG_1)


HOSTILE = {
    "unknown key": ('{"format": 1, "auto_map": "x"}', r"no keys but \['name', 'size'\]"),
    "twice": ('{"format": 1, "name": "a", "name": "b"}', "twice"),
    "twice inside": ('{"format": 1, "size": [{"a": 1, "a": 2}]}', "twice"),
    "up": ('{"format": 1, "name": ".."}', "printable name"),
    "up and over": ('{"format": 1, "name": "../../etc/passwd"}', "printable name"),
    "absolute": ('{"format": 1, "name": "/etc/passwd"}', "printable name"),
    "windows": (r'{"format": 1, "name": "C:\\x"}', "printable name"),
    "escaped": (r'{"format": 1, "name": "\u002e\u002e\u002f"}', "printable name"),
    "nul": (r'{"format": 1, "name": "a\u0000"}', "printable name"),
    "surrogate": (r'{"format": 1, "name": "\ud800"}', "printable name"),
    "in a list": ('{"format": 1, "size": [["a/b"]]}', "printable name"),
    "in a key": ('{"format": 1, "size": {"../x": 1}}', "printable name"),
    "NaN": ('{"format": 1, "size": NaN}', "finite"),
    "Infinity": ('{"format": 1, "size": [-Infinity]}', "finite"),
    "overflow": ('{"format": 1, "size": 1e999}', "finite"),
    "digits": ('{"format": 1, "size": ' + "9" * 5000 + "}", "expected JSON"),
    "deep": ('{"format": 1, "size": ' + "[" * 40 + "]" * 40 + "}", "levels"),
    "very deep": ('{"format": 1, "size": ' + "[" * 200_000 + "]" * 200_000 + "}", "JSON|levels"),
    "a list": ("[1]", "JSON object"),
    "a string": ('"format"', "JSON object"),
    "no format": ('{"name": "a"}', "format"),
    "a later format": ('{"format": 2}', "format"),
    "a format of another type": ('{"format": [1]}', "format"),
    "not JSON": ("{'format': 1}", "expected JSON"),
    "not UTF-8": (b'{"format": 1, "name": "\xff"}', "expected JSON"),
    "long": (b'{"format": 1}' + b" " * (1 << 20), "at most"),
    "nothing": ("", "expected JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused(saved, case):
    text, message = HOSTILE[case]
    (saved / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=message) as error:
        load(saved, allowed=ALLOWED)
    assert str(saved / CONFIG) in str(error.value)


@pytest.mark.parametrize("case", [c for c in HOSTILE if HOSTILE[c][1] == "printable name"])
def test_a_hostile_config_inside_a_right_payload_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.setattr(checkpoint, "_check_data", lambda *_: None)
    save(
        tmp_path,
        tensors(),
        {k: v for k, v in json.loads(HOSTILE[case][0]).items() if k != "format"},
    )
    monkeypatch.undo()
    (tmp_path / CONFIG).write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="printable name"):
        load(tmp_path, allowed=ALLOWED)


def test_unknown_keys_inside_a_right_payload_are_refused(saved):
    (saved / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"got also \['size'\]"):
        load(saved, allowed={"name"})


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        ({"a": [1.0]}, {}, "a plain tensor"),
        ({1: torch.ones(1)}, {}, "a name that is a string"),
        ({"a": torch.ones(2).to_sparse()}, {}, "a dense tensor"),
        ({"a": torch.ones(2, device="meta")}, {}, "a dense tensor"),
        ({"a": torch.nn.UninitializedParameter()}, {}, "a plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, "a safetensors file can hold"),
        ({"__metadata__": torch.ones(2)}, {}, "not '__metadata__'"),
        ({"a" * (5 << 20): torch.ones(2)}, {}, "names that fit"),
        ({}, {"format": 1}, 'no key "format"'),
        ({}, {"name": "a/b"}, r"config\['name'\]: expected a printable name"),
        ({}, {"name": float("nan")}, "finite JSON data"),
        ({}, {"name": Path("a")}, "finite JSON data"),
        ({}, {1: 2}, "keys that are strings"),
        ({}, {"name": ["a" * 200] * 6000}, "bytes of JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_a_file_is_touched(saved, state, config, message):
    with pytest.raises(CheckpointError, match=message):
        save(saved, state, config)
    assert same(strict_load(saved)[0], tensors())
    assert {f.name for f in saved.iterdir()} == {PAYLOAD, CONFIG}


def test_check_match():
    check_match(tensors(2.0), tensors())
    for wrong in (
        {"delta": torch.ones(2, 3)},
        tensors() | {"more": torch.ones(1)},
        tensors() | {"delta": torch.ones(3, 2)},
        tensors() | {"delta": torch.ones(2, 3, dtype=torch.float16)},
    ):
        with pytest.raises(CheckpointError, match="expected"):
            check_match(wrong, tensors())


# Saves that fail or die


def test_a_save_between_its_two_renames_is_the_new_checkpoint(saved):
    before = (saved / CONFIG).read_bytes()
    save(saved, tensors(2.0), {"name": "new"})
    (saved / CONFIG).write_bytes(before)
    with pytest.warns(UserWarning, match="differs"):
        state, config = load(saved, allowed=ALLOWED)
    assert (same(state, tensors(2.0)), config) == (True, {"name": "new"})
    (saved / CONFIG).unlink()
    with pytest.warns(UserWarning, match="missing"):
        assert load(saved, allowed=ALLOWED)[1] == {"name": "new"}


@pytest.mark.parametrize("call", range(5))
def test_a_failing_call_leaves_a_whole_checkpoint(saved, monkeypatch, call):
    """ENOSPC from each fsync and each rename in turn: two files, two renames, the folder."""
    calls = []

    def failing(function):
        def wrapper(*args):
            calls.append(function)
            if len(calls) == call + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args)

        return wrapper

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    with pytest.raises(OSError, match=r"No space left .* is whole") as error:
        save(saved, tensors(2.0), {"name": "new"})
    monkeypatch.undo()
    assert error.value.filename == str(saved)
    assert error.value.errno == errno.ENOSPC
    renamed = calls.count(os.replace) - (call in (2, 3)) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if call == 3 else "error")  # 3: between the two renames
        state, config = load(saved, allowed=ALLOWED)
    expected = (tensors(2.0), {"name": "new"}) if renamed else (tensors(), CONFIG_1)
    assert (same(state, expected[0]), config) == (True, expected[1])
    assert {f.name for f in saved.iterdir()} == {PAYLOAD, CONFIG}


@posix
def test_a_file_that_cannot_grow(saved):
    """A real short write, in the middle of the payload, without having to fill a disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="is whole"):
            save(saved, {"delta": torch.ones(1 << 16)}, CONFIG_1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(strict_load(saved)[0], tensors())
    assert {f.name for f in saved.iterdir()} == {PAYLOAD, CONFIG}


def test_a_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                save(tmp_path, tensors(), CONFIG_1)
                with pytest.raises(OSError, match=r"No space left on device.* is whole"):
                    save(tmp_path, {"delta": torch.ones(1 << 16)}, CONFIG_1)
                assert same(strict_load(tmp_path)[0], tensors())
                assert {f.name for f in tmp_path.iterdir()} == {PAYLOAD, CONFIG}
                save(tmp_path, tensors(2.0), CONFIG_1)
                assert same(strict_load(tmp_path)[0], tensors(2.0))
            finally:
                subprocess.run(["umount", str(tmp_path)], check=True)
            return
    pytest.skip("needs a file system to fill")


# One process imports torch and forks the victims, so that a kill costs milliseconds.
KILLS = """
import os, random, signal, sys, time, warnings
import torch
from fastprompt import checkpoint

folder, kills, allowed = sys.argv[1], int(sys.argv[2]), {"step"}
torch.set_num_threads(1)

def save(step):
    checkpoint.save(folder, {"w": torch.full((1 << 19,), float(step))}, {"step": step})

def check(*expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, config = checkpoint.load(folder, allowed=allowed)
    assert config["step"] in expected, (config, expected)
    assert (state["w"] == config["step"]).all(), "a mix of two checkpoints"
    return config["step"]

def fork(victim):
    pid = os.fork()
    if pid == 0:
        try:
            victim()
        finally:
            os._exit(7)
    return pid

def orphans():
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]

# Death at each point of one save: open, fsync, open, fsync, replace, replace, fsync of the folder.
save(0)
seen, left = [], 0
for point in range(7):
    def victim():
        count = iter(range(100))
        def dying(function):
            def wrapper(*args, **kwargs):
                if next(count) == point:
                    os._exit(9)
                return function(*args, **kwargs)
            return wrapper
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        checkpoint.open = dying(open)
        save(1)
    save(0)
    assert not orphans()
    assert os.waitstatus_to_exitcode(os.waitpid(fork(victim), 0)[1]) == 9
    left += len(orphans())
    seen.append(check(0, 1))
assert seen == [0] * 5 + [1] * 2, seen
assert left > 0

# SIGKILL at random moments of a loop that saves.
def loop():
    step = check(*range(100_000))
    while True:
        save(step := step + 1)

random.seed(0)
step, advanced = 0, 0
save(step)
for _ in range(kills):
    pid = fork(loop)
    time.sleep(random.uniform(0.01, 0.12))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    now = check(*range(step, 100_000))
    advanced += now > step
    step = now
assert advanced > kills / 3, advanced
save(step)
assert not orphans()
print("whole")
"""


@posix
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path, kills):
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(kills)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.returncode) == ("whole\n", 0), result.stderr
