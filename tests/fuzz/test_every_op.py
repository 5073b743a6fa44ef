"""Every public op has cases drawn for it."""

from __future__ import annotations

import inspect

from fastunlearn import _backend, ops
from tests.fuzz import FILES, test_layers, test_lists, test_losses, test_matrices, test_selection
from tests.fuzz.draws import TESTED

#: no op on tensors
OTHERS = {"release_buffers"}
#: name of an op on tensors -> in `fastunlearn.explain()`, where that is another
REGISTERED = {"BitMask": "bitmask", "masked_lora_weight": "masked_lora_linear"}


def test_every_op_is_drawn_for():
    public = {name for name in ops.__all__ if inspect.isroutine(getattr(ops, name))} | {"BitMask"}
    assert {name for tested in TESTED for name in tested.ops} == public - OTHERS
    modules = (test_layers, test_lists, test_losses, test_matrices, test_selection)
    assert {m.__name__.rsplit(".", 1)[1] for m in modules} == set(FILES)


def test_every_backend_is_drawn_for():
    for name, op in _backend._ops.items():
        names = {public for public, registered in REGISTERED.items() if registered == name} | {name}
        drawn = {backend for tested in TESTED if names & set(tested.ops) for backend in tested.backends}
        assert set(op.backends) - {"reference"} <= drawn, f"{name}: {set(op.backends) - drawn} has no cases"
