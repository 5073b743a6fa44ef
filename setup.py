"""Builds fastunlearn._C (csrc/) with ninja; everything else stands in pyproject.toml.

With nvcc: C++ and CUDA. Without nvcc: C++. Without a C++ compiler: a pure-Python install that works.

Environment:
    CXX                       the C++ compiler (default g++, else clang++, else c++)
    FASTUNLEARN_NATIVE=0      no native code, a wheel for every platform; =1: fail instead of installing without it
    FASTUNLEARN_CUDA=0        no CUDA; =1: fail without nvcc
    FASTUNLEARN_CUDA_ARCHS    e.g. "80;90a" (default 80;86;89;90a;100;120, and PTX of the newest)
    CUDA_HOME, NVCC           where nvcc is, when it is not on PATH
    CXXFLAGS                  more for the C++ compiler, behind its own flags
    MAX_JOBS                  compile jobs at once
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
# Files with loops over elements: compiled once per instruction set (csrc/common.h).
ISA_SOURCES = sorted(p.stem for p in CSRC.glob("*.cpp") if p.stem not in {"bindings", "isa"})
CUDA_SOURCES = sorted(p.stem for p in CSRC.glob("*.cu"))
DEFAULT_ARCHS = "80;86;89;90a;100;120"
ISAS = {"isa_base": [], "isa_v3": ["-march=x86-64-v3"], "isa_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


def wanted(name: str) -> str:
    """ "", "0" or "1"."""
    value = os.environ.get(name, "").strip().lower()
    return {"false": "0", "off": "0", "no": "0", "true": "1", "on": "1", "yes": "1"}.get(value, value)


def find_compiler() -> str | None:
    if "CXX" in os.environ:
        return shutil.which(os.environ["CXX"].split()[0]) and os.environ["CXX"]
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def find_nvcc() -> str | None:
    named = os.environ.get("NVCC")
    if named:
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    if not found and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    return found


def ninja_binary() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def architectures(nvcc: str) -> list[str]:
    """FASTUNLEARN_CUDA_ARCHS, or those of the default that this nvcc knows."""
    asked = os.environ.get("FASTUNLEARN_CUDA_ARCHS")
    names = [a.strip() for a in (asked or DEFAULT_ARCHS).replace(",", ";").split(";") if a.strip()]
    if asked:
        return names
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = {line.removeprefix("compute_") for line in listed}
    return [a for a in names if not known or a.rstrip("a") in known]


def arch_flags(names: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    # PTX without the letter that ties it to one chip: of the oldest architecture for those between, of the newest for
    # GPUs to come.
    portable = sorted((a for a in names if a.isdigit()), key=int)
    flags += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in dict.fromkeys(portable[:1] + portable[-1:])]
    return flags


def write_ninja(path: Path, target: Path, *, cxx: str, nvcc: str | None, simt_module: str | None = None) -> None:
    """A ninja file that builds `target`.

    `simt_module`: build the module of that name whose CUDA kernel bodies are compiled for the host instead.
    """
    import pybind11

    includes = [f"-I{CSRC}", f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_paths()['include']}"]
    # The host's own code is in the module of kernel bodies only to be linked: it need not be fast, but soon there.
    flags = [
        "-std=c++20",
        "-O0" if simt_module else "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
    ]
    flags += ["-Wno-unknown-pragmas", *shlex.split(os.environ.get("CXXFLAGS", "")), *includes]
    links = ["-shared"]
    if sys.platform == "darwin":
        links += ["-undefined dynamic_lookup"]
    else:
        flags.append("-fopenmp")
        links += ["-fopenmp", "-Wl,--gc-sections"]
    defines = []
    if simt_module:
        defines += ["-DFU_WITH_CUDA", "-DFU_HOST_SIMT", f"-DFU_MODULE={simt_module}", '-DFU_CUDA_ARCHS=\\"host\\"']
    elif nvcc:
        archs = architectures(nvcc)
        defines += ["-DFU_WITH_CUDA", f'-DFU_CUDA_ARCHS=\\"{",".join(archs)}\\"']
        cuda_home = cuda_root(nvcc)
        includes.append(f"-isystem {cuda_home / 'include'}")
        flags.append(f"-isystem {cuda_home / 'include'}")
        links += [f"-L{d}" for d in (cuda_home / "lib64", cuda_home / "lib") if d.is_dir()]
        links += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    multi_isa = platform.machine().lower() in {"x86_64", "amd64"}
    isas = ISAS if multi_isa else {"isa_base": []}

    lines = [
        "ninja_required_version = 1.5",
        f"flags = {' '.join(flags + defines)}",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in {' '.join(links)} -o $out",
    ]
    objects = []

    def compile_(source: Path, obj: str, extra: str = "") -> None:
        lines.append(f"build {obj}: cxx {source}")
        if extra:
            lines.append(f"  extra = {extra}")
        objects.append(obj)

    compile_(CSRC / "bindings.cpp", "bindings.o")
    compile_(CSRC / "isa.cpp", "isa.o")
    for name in ISA_SOURCES:
        for isa, march in isas.items():
            compile_(CSRC / f"{name}.cpp", f"{name}.{isa}.o", " ".join([*march, f"-DFU_ISA={isa}"]))
    if simt_module:
        for name in CUDA_SOURCES:
            compile_(CSRC / f"{name}.cu", f"{name}.cu.o", "-x c++ -O2")
    elif nvcc:
        cuda_flags = [*arch_flags(archs), "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}"]
        cuda_flags += ["--expt-relaxed-constexpr", "-ccbin", cxx.split()[0], "-t", "0"]
        lines += [
            "rule nvcc",
            f"  command = {nvcc} {' '.join(cuda_flags)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for name in CUDA_SOURCES:
            lines.append(f"build {name}.cu.o: nvcc {CSRC / f'{name}.cu'}")
            objects.append(f"{name}.cu.o")
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def cuda_root(nvcc: str) -> Path:
    """The toolkit of an nvcc; asked from nvcc itself, because the nvcc on PATH may be a wrapper."""
    out = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "-"], input="", capture_output=True, text=True).stderr
    for line in out.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


class BuildNative(build_ext):
    """Compiles with ninja; what cannot be built is said and left out, unless it was asked for."""

    def run(self) -> None:
        if wanted("FASTUNLEARN_NATIVE") == "0":
            print("fastunlearn: FASTUNLEARN_NATIVE=0: installing without native code")
            self.extensions = []
            return
        cxx = find_compiler()
        if cxx is None:
            self.give_up("no C++ compiler found (g++, clang++ or CXX); installing without native code")
            return
        super().run()

    def give_up(self, why: str) -> None:
        for name in ("FASTUNLEARN_NATIVE", "FASTUNLEARN_CUDA"):
            if wanted(name) == "1":
                raise RuntimeError(f"fastunlearn: {name}=1, but {why}")
        print(f"fastunlearn: {why}", file=sys.stderr)
        # What an earlier build left would be loaded in the place of what could not be built now.
        for ext in self.extensions or []:
            for stale in {
                self.get_ext_fullpath(ext.name),
                str(Path(__file__).parent / self.get_ext_filename(ext.name)),
            }:
                Path(stale).unlink(missing_ok=True)
        self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        cxx = find_compiler()
        assert cxx is not None
        nvcc = None if wanted("FASTUNLEARN_CUDA") == "0" else find_nvcc()
        if nvcc is None and wanted("FASTUNLEARN_CUDA") == "1":
            raise RuntimeError("fastunlearn: FASTUNLEARN_CUDA=1, but no nvcc on PATH, in CUDA_HOME or in NVCC")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in [nvcc, None] if nvcc else [None]:
            # One folder a kind: a CPU build never reuses objects compiled with the CUDA defines.
            folder = Path(self.build_temp).resolve() / ("cuda" if attempt else "cpu")
            try:
                write_ninja(folder / "build.ninja", folder / target.name, cxx=cxx, nvcc=attempt)
                jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
                subprocess.run([ninja_binary(), "-C", str(folder), *jobs], check=True)
                shutil.copy2(folder / target.name, target)
                return
            except (subprocess.CalledProcessError, OSError, ImportError) as error:
                if attempt and wanted("FASTUNLEARN_CUDA") != "1":
                    print(f"fastunlearn: CUDA build failed ({error}); building the CPU part", file=sys.stderr)
                    continue
                self.give_up(f"the native build failed ({error}); installing without native code")
                return


if __name__ == "__main__":
    # The sources are listed for the source distribution; BuildNative compiles them.
    listed = [f"csrc/{p.name}" for p in sorted(CSRC.iterdir()) if p.suffix in {".cpp", ".cu"}]
    headers = [f"csrc/{p.name}" for p in sorted(CSRC.iterdir()) if p.suffix in {".h", ".cuh"}]
    extension = Extension("fastunlearn._C", sources=listed, depends=headers)
    # Without native code, and asked for so, a wheel is for every platform.
    pure = wanted("FASTUNLEARN_NATIVE") == "0" and "bdist_wheel" in sys.argv
    setup(ext_modules=[] if pure else [extension], cmdclass={"build_ext": BuildNative})
