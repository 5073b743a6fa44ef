"""A question and all answers to it as one sequence: a tree of tokens in which what they share stands once.

The prompt is the trunk, each answer a path from its end; answers that begin alike share their beginning. Under a mask that shows a
token its ancestors alone, and with positions counted along the path, one forward pass gives every answer what a pass of its own
would give it. TOFU asks for seven answers a row: 2.3 times fewer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TokenTree:
    """A prompt and its answers.

    Attributes:
        ids: of all nodes, the prompt's first, every node behind its parent.
        parents: of each node, its parent's number; -1 for the first.
        paths: of each answer, the nodes of its tokens.
        prompt: how many nodes are the prompt's.

    Raises:
        ValueError: no prompt, no answers, or an empty answer.
    """

    def __init__(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]):
        if not prompt:
            raise ValueError("prompt: empty; nothing predicts the first token of an answer")
        if not answers or not all(len(answer) for answer in answers):
            raise ValueError("answers: want at least one, none of them empty")
        self.prompt = len(prompt)
        self.ids = list(prompt)
        self.parents = list(range(-1, len(prompt) - 1))
        self.paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}
        for answer in answers:
            at, path = len(prompt) - 1, []
            for token in answer:
                node = children.get((at, token))
                if node is None:
                    node = children[at, token] = len(self.ids)
                    self.ids.append(token)
                    self.parents.append(at)
                path.append(node)
                at = node
            self.paths.append(path)

    def __len__(self) -> int:
        return len(self.ids)

    def depths(self) -> list[int]:
        """Positions along the path."""
        out: list[int] = []
        for parent in self.parents:
            out.append(0 if parent < 0 else out[parent] + 1)
        return out

    def visible(self) -> NDArray[np.bool_]:
        """bool [nodes, nodes]: whether row may look at column, itself and its ancestors."""
        out = np.eye(len(self), dtype=bool)
        out[: self.prompt, : self.prompt] = np.tri(self.prompt, dtype=bool)
        for node in range(self.prompt, len(self)):
            out[node] |= out[self.parents[node]]
        return out


@dataclass
class TreeBatch:
    """Trees side by side.

    Attributes:
        inputs: input_ids, position_ids int64 [rows, longest]; attention_mask [rows, 1, longest, longest], 0 where a token may look
            and the least number of its dtype elsewhere.
        edges: int64 [edges], row * longest + the node that predicts, one for every node of an answer; in the trees' order.
        tokens: int64 [edges], what is to be predicted there.
        starts: of each row, the number of its first edge.
    """

    inputs: dict[str, Tensor]
    edges: Tensor
    tokens: Tensor
    starts: list[int]


def batch_trees(trees: Sequence[TokenTree], pad_id: int, dtype: torch.dtype) -> TreeBatch:
    """One padded batch of trees, on the CPU.

    Args:
        pad_id: any token. dtype: of the model's activations, for the mask.
    """
    width = max(map(len, trees))
    ids = torch.full((len(trees), width), pad_id, dtype=torch.int64)
    positions = torch.zeros(len(trees), width, dtype=torch.int64)
    seen = np.zeros((len(trees), width, width), dtype=bool)
    # Padding looks at itself: a row of the mask without an entry would give NaN.
    seen[:, range(width), range(width)] = True
    edges: list[int] = []
    tokens: list[int] = []
    starts: list[int] = []
    for i, tree in enumerate(trees):
        n = len(tree)
        ids[i, :n] = torch.tensor(tree.ids)
        positions[i, :n] = torch.tensor(tree.depths())
        seen[i, :n, :n] = tree.visible()
        starts.append(len(edges))
        edges += [i * width + parent for parent in tree.parents[tree.prompt :]]
        tokens += tree.ids[tree.prompt :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen), torch.finfo(dtype).min)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask.unsqueeze(1)}
    return TreeBatch(inputs, torch.tensor(edges), torch.tensor(tokens), starts)
