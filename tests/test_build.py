"""The three builds: with nvcc, without nvcc, without a compiler. Each is built, installed and used apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.serial, pytest.mark.slow]

USE = """
import sys
# An editable install's finder would lend its own _C to a package that has none.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "").lower()]
import torch, fastunlearn
from fastunlearn import BitMask, _native
mask = torch.rand(100, 77) < 0.5
assert torch.equal(BitMask.pack(mask).unpack(), mask)
print(fastunlearn.__file__)
print(fastunlearn.explain("bitmask").last)
print(_native._C.build_info() if _native._C else None)
print(_native._C.cuda_devices() if _native._C else _native._why_missing)
"""


def build(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of a copy of the tree, unpacked: (folder to import from, what the build printed)."""
    source = tmp_path / "source"
    keep = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "tests", ".*_cache", "results"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=keep)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path / "dist"),
            ".",
        ],
        cwd=source,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site, done.stdout + done.stderr


def use(site: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert Path(lines[0]).is_relative_to(site), f"imported {lines[0]}"
    return lines


def test_without_a_compiler(tmp_path):
    site, _ = build(tmp_path, CXX="/nonexistent/g++", NVCC="/nonexistent/nvcc")
    assert not list((site / "fastunlearn").glob("_C*"))
    lines = use(site)
    assert lines[1] == "reference:cpu"
    assert lines[3] == "fastunlearn._C is not built"
    assert (site / "fastunlearn" / "kernels" / "_common.py").is_file()
    assert (site / "fastunlearn" / "gpu_runs.json").is_file()
    assert (site / "fastunlearn" / "assets" / "canvas" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (site / "fastunlearn" / "assets" / "canvas_classifiers.safetensors").is_file()


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on this machine")
def test_without_nvcc(tmp_path):
    site, _ = build(tmp_path, NVCC="/nonexistent/nvcc", CXXFLAGS="-O0")
    lines = use(site)
    assert lines[1] == "native:cpu"
    assert "'cuda': False" in lines[2]
    assert "built without nvcc" in lines[3]


@pytest.mark.skipif(not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")), reason="no nvcc on this machine")
def test_with_nvcc(tmp_path):
    """More architectures are compiled by the install itself; here one without optimisation, to keep the test short."""
    site, _ = build(tmp_path, FASTUNLEARN_CUDA="1", FASTUNLEARN_CUDA_ARCHS="80", CXXFLAGS="-O0")
    lines = use(site)
    assert lines[1] == "native:cpu"
    assert "'cuda': True" in lines[2]
    assert "'cuda_archs': '80'" in lines[2]


def test_a_broken_compiler_still_installs(tmp_path):
    """A compiler that fails leaves a package that works, and says so in the build's output."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    site, _ = build(tmp_path, CXX=str(broken), FASTUNLEARN_CUDA="0")
    assert use(site)[1] == "reference:cpu"


def test_native_code_demanded_and_not_there_fails(tmp_path):
    with pytest.raises(AssertionError, match="FASTUNLEARN_NATIVE=1, but no C\\+\\+ compiler found"):
        build(tmp_path, CXX="/nonexistent/g++", FASTUNLEARN_NATIVE="1")


def test_a_failed_rebuild_leaves_no_stale_module(tmp_path):
    """Else the code of an earlier build would run, and nobody would know."""
    folder = tmp_path / "tree"
    keep = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "__pycache__", "tests", ".*_cache", "*.so", "results"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=keep)
    suffix = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    stale = folder / "fastunlearn" / f"_C{suffix}"
    stale.write_bytes(b"from an earlier build")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "CXX": "/nonexistent/g++", "NVCC": "/nonexistent/nvcc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stderr
    assert not stale.exists()


def source_distribution(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    keep = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "tests", ".*_cache", "results"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=keep)
    (source / "tests").mkdir()
    (source / "tests" / "test_a.py").touch()
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('out'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = (source / "out").glob("*.tar.gz")
    return archive


def test_the_source_distribution_holds_the_native_sources(tmp_path):
    with tarfile.open(source_distribution(tmp_path)) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    native = {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    assert native <= names, native - names
    assert "fastunlearn/kernels/_common.py" in names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.thorough
def test_a_wheel_of_the_source_distribution_works_anywhere(tmp_path):
    """sdist -> a wheel for every platform -> a fresh environment and an empty folder: import, doctor, the demo's help."""
    with tarfile.open(source_distribution(tmp_path)) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"
    environment = {**os.environ, "FASTUNLEARN_NATIVE": "0", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (folder / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        # The kernels' folder is a symlink in the repository; a wheel holds the files.
        assert "fastunlearn/kernels/_common.py" in names
        assert not [i for i in file.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    # torch and the rest are borrowed from this environment; its own fastunlearn is not (a .pth of a .pth is not read).
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        str(wheel),
    ]
    subprocess.run(install, check=True, env=environment)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    command = str(python.with_name("fastunlearn"))
    for words, said in {
        (str(python), "-c", "import fastunlearn; print(fastunlearn.__file__)"): str(site),
        (command, "doctor"): "fastunlearn._C is not built",
        (command, "demo", "--help"): "usage: fastunlearn demo",
        (command, "--version"): "fastunlearn",
    }.items():
        done = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr[-2000:])
        assert said in done.stdout, (words, done.stdout[-2000:])
    assert not list(empty.iterdir())
