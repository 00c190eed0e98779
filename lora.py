"""LoRA: tune a frozen linear layer through a low-rank update (Hu et al. 2021, arXiv 2106.09685).

    y = x Wᵀ + b + alpha/rank · dropout(x) Aᵀ Bᵀ

    x (..., in)      input             W (out, in), b (out)   pre-trained, frozen
    A (rank, in)     trained           B (out, rank)          trained, starts at zero

This is their equation 3, with the scaling from section 4.1 and the dropout from their code.
Because B starts at zero, a freshly adapted model computes exactly what the pre-trained one does.
The update is linear, so it can be merged into W: W' = W + alpha/rank · B A. A merged model costs
nothing extra.

Nothing here knows about audio. The model must have a list `blocks`; the linear layers in them are
found by name.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """Applies the equation above to one nn.Linear, which is frozen and kept as `base`.

    rank     r >= 1; the update has rank · (in + out) weights instead of in · out
    alpha    > 0; scales the update by alpha/rank
    dropout  probability of dropping an input of the update (never of the base layer), 0 <= p < 1

    forward: x (..., in) -> (..., out)
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
            raise ValueError("LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1")
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        bound = 1 / math.sqrt(base.in_features)  # same init as nn.Linear and microsoft/LoRA
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(self.dropout(x), self.A)  # (..., rank)
        # alpha/rank multiplies the small matrix B, not the large output.
        return self.base(x) + F.linear(down, self.scaling * self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new, ordinary layer with W + alpha/rank · B A."""
        layer = copy.deepcopy(self.base)
        layer.weight += self.scaling * (self.B @ self.A)
        return layer


def add_lora(
    model: nn.Module,
    targets: list[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    layers: list[int] | None = None,
) -> None:
    """Wrap the linear layers called `targets` in the chosen `model.blocks`, in place. Freeze the
    model first; this freezes only the layers it wraps.

    targets  names of linear layers inside a block: any of q k v proj fc1 fc2 for the AST
    layers   which blocks: indices into model.blocks, None for all

    Raises ValueError for a block or target that does not exist, and for one that is named twice.
    """
    depth = len(model.blocks)
    if layers is None:
        layers = range(depth)
    if len(set(targets)) < len(targets) or len(set(layers)) < len(layers):
        raise ValueError("a LoRA target or layer is named twice")
    found = set()
    for index in sorted(layers):  # so --layers 9 8 gives the same model as 8 9
        if not 0 <= index < depth:
            raise ValueError(f"LoRA layer {index} does not exist: there are layers 0-{depth - 1}")
        block = model.blocks[index]
        for path, module in list(block.named_modules()):  # list(): the loop changes the block
            name = path.split(".")[-1]
            if name in targets and isinstance(module, nn.Linear):
                block.set_submodule(path, LoRALinear(module, rank, alpha, dropout))
                found.add(name)
    missing = set(targets) - found
    if missing:
        raise ValueError(f"no linear layer in these blocks is called {' or '.join(missing)}")


def merge_lora(model: nn.Module) -> None:
    """Replace every LoRALinear inside `model` by its merged layer, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.merged())


# The trained parameters are those that require a gradient. Only these are saved.


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """{"ast.blocks.0.attn.q.A": (rank, in), ...}"""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into a model that was prepared in the same way; else raise ValueError."""
    here = {name: p.shape for name, p in trained_state(model).items()}
    if here != {name: p.shape for name, p in state.items()}:
        raise ValueError("saved weights do not match the model (different layers, rank or size)")
    model.load_state_dict(state, strict=False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameter counts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())
