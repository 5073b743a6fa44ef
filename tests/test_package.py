"""The house: what imports what, what an import costs, where the kernels live, what the top level holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "fastunlearn"
#: a layer may import those after it (design: imports run one way)
LAYERS = [
    {"cli"},
    {"methods"},
    {"trainer", "diffusion_trainer"},
    {"two_terms"},
    {"masked_trainer", "callbacks"},
    {"certified", "arguments", "resuming"},
    {"sharded_trainer"},
    {"sharded"},
    {"checkpoint", "localize", "objectives", "updates", "parametrize", "optim", "data", "evaluation", "report"},
    {"ops"},
    {"reference", "kernels", "_C", "_native", "_backend", "_version"},
]


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def layer(parts: tuple[str, ...]) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if parts and parts[0] in names), None)


def test_imports_run_one_way():
    files = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    assert len(files) > 10
    wrong = []
    for path in files:
        mine = layer(path.relative_to(PACKAGE).with_suffix("").parts)
        if mine is None:
            continue
        for name in imports_of(path):
            parts = name.split(".")
            theirs = layer(tuple(parts[1:])) if parts[0] == "fastunlearn" else None
            # _backend.explain imports the ops to list them: the one upward look, inside a function.
            if theirs is not None and theirs < mine and path.name != "_backend.py":
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("folder", ["ops", "reference", "optim"])
def test_ops_import_no_model_library(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        heavy = {n.split(".")[0] for n in imports_of(path)} & {"transformers", "diffusers", "peft", "accelerate"}
        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.serial
def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import torch; u = time.perf_counter(); import fastunlearn; "
        "print(u - t, time.perf_counter() - u); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    outs = [python(code).splitlines() for _ in range(3)]
    # As a share of what torch costs in the same process: that holds on a busy or slow machine too.
    share = sorted(float(ours) / float(torchs) for torchs, ours in (line.split() for line, _ in outs))[1]
    assert share < 0.5, outs
    modules = outs[0][1]
    assert not {"transformers", "diffusers", "peft", "datasets", "triton"} & set(modules.split())


def test_import_needs_no_tools_and_no_gpu(tmp_path):
    """No CUDA, no shell, no compiler, no folder of the repository: an empty PATH, and ops that run all the same."""
    code = (
        "import shutil, torch, fastunlearn; from fastunlearn import BitMask, ops; assert not shutil.which('sh'); "
        "mask = ops.topk_mask([torch.arange(10.0)], 0.3)[0]; print(mask.unpack().nonzero().flatten().tolist()); "
        "print(torch.cuda.is_available())"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[7, 8, 9]", "False"]
    assert not list(tmp_path.iterdir())


def test_kernels_live_at_the_root(tmp_path):
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # An installed package of that name wins, though the repository root comes before it: the folder has no __init__.py.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARKER = 'installed'\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels; print(kernels.MARKER)"
    assert python(code) == "installed"


def test_top_level_holds_what_the_design_says():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    folders = {"csrc", "kernels", "fastunlearn", "benchmarks", "docs", "examples", "tests", ".github", ".ci"}
    files = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    files |= {"mkdocs.yml", "constraints.txt", "MANIFEST.in", ".pre-commit-config.yaml", ".gitignore", ".clang-format"}
    assert top <= folders | files, f"unexpected: {top - folders - files}"
    assert {"csrc", "kernels", "fastunlearn", "benchmarks", "tests", "README.md"} <= top


def test_every_kernel_has_its_reference_and_its_proof():
    ops = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    native = {p.stem for p in (ROOT / "csrc").glob("*.h")} - {"common", "simt"}
    triton = {p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")}
    for name in ops:
        assert (PACKAGE / "reference" / f"{name}.py").exists(), f"ops/{name}.py has no reference"
        assert (ROOT / "tests" / "ops" / f"test_{name}.py").exists(), f"ops/{name}.py has no proof"
        assert (ROOT / "benchmarks" / "ops" / f"{name}.py").exists(), f"ops/{name}.py has no price"
    assert triton <= ops
    assert {p.stem for p in (ROOT / "csrc").glob("*.cu")} <= ops
    assert ops & native, "no op has native code"


def test_packages_are_all_listed():
    """A package that setuptools is not told of is missing from the wheel, and only there."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        str(p.parent.relative_to(ROOT)).replace(os.sep, ".")
        for p in PACKAGE.rglob("__init__.py")
        if "kernels" not in p.relative_to(PACKAGE).parts
    }
    assert listed == found | {"fastunlearn.kernels"}


def test_public_names_exist_and_are_documented():
    import fastunlearn

    for module in (fastunlearn, fastunlearn.ops, fastunlearn.optim):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.{name}"
            thing = getattr(module, name)
            if callable(thing):
                assert thing.__doc__, f"{module.__name__}.{name} has no docstring"


def test_trainers_are_loaded_when_they_are_asked_for():
    code = "import sys, fastunlearn; assert 'transformers' not in sys.modules; print(fastunlearn.SAUTrainer.__name__)"
    assert python(code) == "SAUTrainer"
    code = "import sys; sys.modules['transformers'] = None; import fastunlearn; fastunlearn.UnlearnTrainer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "fastunlearn.UnlearnTrainer needs transformers: pip install 'fastunlearn[llm]'" in done.stderr


def test_readme_leads_somewhere():
    """Files and headings that README links to, and that they are in the repository, where it is one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert len(targets) > 30
    paths = {link.split("#")[0] for link in targets} - {""}
    assert not [link for link in targets if link.startswith("#") and link[1:] not in headings]
    assert not [path for path in paths if not (ROOT / path).exists()]
    if (ROOT / ".git").exists() and shutil.which("git"):
        known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        assert not [path for path in paths if not any(f == path or f.startswith(path.rstrip("/") + "/") for f in known)]
