"""Compiles Triton kernels ahead of time, without a GPU: reads specs as JSON, writes one line of JSON for each.

Run as a program, because a process that interprets Triton kernels cannot compile them.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def compile_one(spec: dict[str, Any], arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = spec["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    constexprs = dict(spec["constexprs"])
    for key, value in constexprs.items():
        if isinstance(value, str) and value.startswith("tl."):
            constexprs[key] = getattr(importlib.import_module("triton.language"), value.removeprefix("tl."))
    signature = {**spec["signature"], **dict.fromkeys(constexprs, "constexpr")}
    ordered = {argument: signature[argument] for argument in kernel.arg_names}
    source = ASTSource(
        kernel, signature=ordered, constexprs={(kernel.arg_names.index(k),): v for k, v in constexprs.items()}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=spec.get("options") or {})
    return {
        "kernel": name,
        "arch": arch,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "spills": getattr(compiled, "n_spills", None),
    }


if __name__ == "__main__":
    for line in json.load(sys.stdin):
        for architecture in line["archs"]:
            print(json.dumps(compile_one(line, architecture)), flush=True)
