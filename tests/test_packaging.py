"""The wheel and the sdist hold what they should, and each works away from the source tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("benchmarks", "kernels")  # folders of the tree that are packages of fastprompt
BUILD = "from setuptools import build_meta as b; import sys; print(b.build_{}(sys.argv[1]))"


def run(*args, cwd, **env):
    result = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind, tree, out):
    """Through the standard build hook, with no network. It writes into `tree`."""
    return out / run("-c", BUILD.format(kind), out, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the source tree without its links, its sdist, and the wheels of both."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", *LINKED)
    for name in ("fastprompt", *LINKED, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    sdist = build("sdist", tree, folder)
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    for name in ("from-tree", "from-sdist"):
        (folder / name).mkdir()
    wheels = [build("wheel", t, folder / n) for t, n in ((tree, "from-tree"), (unpacked, "from-sdist"))]
    return unpacked, wheels


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    options = ("--target", target, "--no-deps", "--no-index", "--no-compile", "--quiet")
    run("-m", "pip", "install", *options, built[1][1], cwd=target)
    return target


def expected_files():
    """What the wheel must hold: every module and every data file in the tree."""
    kinds = (".py", ".json", ".safetensors", ".typed")
    for folder, prefix in ((ROOT / "fastprompt", "fastprompt"), *((ROOT / name, f"fastprompt/{name}") for name in LINKED)):
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            linked = prefix == "fastprompt" and relative.parts[0] in LINKED
            result = prefix == "fastprompt/benchmarks" and path.suffix == ".json"  # figures of one machine stay in the tree
            if path.suffix in kinds and path.is_file() and not linked and not result:
                yield f"{prefix}/{relative.as_posix()}"


def test_the_wheel_holds_the_package_and_nothing_else(built):
    for wheel in built[1]:
        with zipfile.ZipFile(wheel) as file:
            names = {n for n in file.namelist() if ".dist-info/" not in n}
            info = {Path(n).name: n for n in file.namelist() if ".dist-info/" in n}
            metadata = file.read(info["METADATA"]).decode()
            scripts = file.read(info["entry_points.txt"]).decode()
        assert names == set(expected_files())
        assert "fastprompt/py.typed" in names
        assert any(n.startswith("fastprompt/demo/") and n.endswith(".safetensors") for n in names)
        assert "LICENSE" in info
        assert "fastprompt = fastprompt.__main__:main" in scripts
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert '\nRequires-Dist: triton>=3.6; platform_system == "Linux"\n' in metadata


def test_the_sdist_holds_the_sources_and_no_tests(built):
    unpacked, _ = built
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    sources = {re.sub("^fastprompt/(benchmarks|kernels)/", r"\1/", n) for n in expected_files()}
    assert sources <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/results/", ".ci/"))]


USE = """
import importlib, pathlib, sys, fastprompt, fastprompt.checkpoint as checkpoint
home = pathlib.Path(fastprompt.__file__).parent
assert home == pathlib.Path(sys.argv[1]) / "fastprompt", home
if importlib.util.find_spec("triton"):
    for path in sorted((home / "kernels").rglob("*.py")):
        parts = path.relative_to(home).with_suffix("").parts
        name = ".".join(("fastprompt", *parts)).removesuffix(".__init__")
        module = importlib.import_module(name)
        assert pathlib.Path(module.__file__).is_relative_to(home)
for name in fastprompt.__all__:
    getattr(fastprompt, name)
"""


@pytest.mark.parametrize("cwd", ["elsewhere", "the repository root"])
def test_the_installed_wheel_works(installed, tmp_path, cwd):
    """-P keeps the source tree, where we stand, out of the way of the installed package."""
    cwd = ROOT if cwd == "the repository root" else tmp_path
    safe = ["-P"] if sys.version_info >= (3, 11) else ["-I"]
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{USE}"
    run(*safe, "-c", code, installed, cwd=cwd)


def test_the_source_tree_works_with_nothing_installed(tmp_path):
    for name in LINKED:
        assert os.readlink(ROOT / "fastprompt" / name) == os.path.join("..", name)
    run("-c", USE, ROOT, cwd=ROOT)
    run("-c", USE, ROOT, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_the_command_line_answers(installed, tmp_path):
    assert "methods" in run("-m", "fastprompt", "--help", cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_installed_wheel_runs_the_benchmarks(installed, tmp_path):
    """The same command as `python -m benchmarks` in the tree; no commit is claimed where there is no checkout."""
    case = ("--family", "mapping", "--case", "label head", "--shape", "B=4,V=99,d=8,K=3", "--rival", "eager")
    options = ("--device", "cpu", "--threads", "1", "--quick", "--json", tmp_path / "out.json")
    said = run("-m", "fastprompt", "bench", *case, *options, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "2 cases, 0 refused, 0 not run" in said
    conditions = json.loads((tmp_path / "out.json").read_text())["conditions"]
    assert conditions["commit"] == "unknown"
    assert conditions["fastprompt"] in installed.joinpath("fastprompt", "__init__.py").read_text()
