"""LoRA: tune a frozen linear layer through a low-rank update (Hu et al. 2021, arXiv 2106.09685).

    y = x Wᵀ + b + alpha/rank · dropout(x) Aᵀ Bᵀ

    x (..., in)      input             W (out, in), b (out)   pre-trained, frozen
    A (rank, in)     trained           B (out, rank)          trained, starts at zero

This is their equation 3 with the scaling of their section 4.1 and the dropout of their code.
Because B starts at zero, a freshly adapted model computes exactly what the pre-trained one does.
Because the update is linear, it can be merged: W' = W + alpha/rank · B A costs nothing afterwards.

Nothing here knows about audio: the model needs `blocks`, and layers of the names that are given.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """The equation above around one `nn.Linear`, which is frozen and kept as `base`.

    rank     r >= 1; the update has rank · (in + out) weights instead of in · out
    alpha    scales the update by alpha/rank
    dropout  probability of dropping an input of the update (never of the base layer), 0 <= p < 1

    forward: x (..., in) -> (..., out). ValueError: one of them is out of range.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {rank}")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"LoRA alpha must be positive, got {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA dropout must be in [0, 1), got {dropout}")
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        # Uniform in ±1/√in, as nn.Linear starts (microsoft/LoRA). PyTorch takes the last dimension
        # for the fan-in; that must be `in`, so A is (rank, in).
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(self.dropout(x), self.A)  # (..., rank)
        # alpha/rank multiplies the small B, not the large output: same product, one pass less.
        return self.base(x) + F.linear(down, self.scaling * self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new, ordinary layer with W + alpha/rank · B A, summed in float32."""
        W, bias = self.base.weight, self.base.bias
        out_features, in_features = W.shape
        layer = nn.Linear(in_features, out_features, bias is not None, W.device, W.dtype)
        layer.weight.copy_(W.float() + self.scaling * (self.B.float() @ self.A.float()))
        if bias is not None:
            layer.bias.copy_(bias)
        return layer


def add_lora(
    model: nn.Module,
    targets: list[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    layers: list[int] | None = None,
) -> None:
    """Wrap the linear layers called `targets` in the chosen `model.blocks`, in place.

    targets  names of the layers inside a block: any of q k v proj fc1 fc2 for the AST
    layers   indices into model.blocks, None for all

    ValueError: no layer or one that does not exist, no target or one that names no linear layer,
    or that is wrapped already; the model is then unchanged. Or what LoRALinear refuses.
    """
    depth = len(model.blocks)
    layers = range(depth) if layers is None else sorted(set(layers))
    if not layers or not targets:
        raise ValueError("LoRA needs at least one layer and one target")
    found = []
    for index in layers:
        if not 0 <= index < depth:
            raise ValueError(f"LoRA layer {index} does not exist: there are layers 0-{depth - 1}")
        for parent in model.blocks[index].modules():
            for name, child in parent.named_children():
                if name in targets and isinstance(child, nn.Linear | LoRALinear):
                    found.append((parent, name, child))

    names = [name for _, name, _ in found]
    for target in targets:
        if target not in names:
            raise ValueError(f"LoRA target {target!r} names no linear layer of a block")
    if any(isinstance(child, LoRALinear) for _, _, child in found):
        raise ValueError("these layers have LoRA already: merge_lora first")

    for parent, name, child in found:
        setattr(parent, name, LoRALinear(child, rank, alpha, dropout))


def merge_lora(model: nn.Module) -> None:
    """Replace every LoRALinear inside `model` by its merged layer, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())


# ---------------------------------------------- plumbing: not needed to follow the method


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained is what requires a gradient: {"ast.blocks.0.attn.q.A": (rank, in), ...}."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy it into a model that was prepared in the same way.

    ValueError: other layers, targets or parts were trained (the names differ), or another rank or
    size (the shapes differ). Nothing has been changed then.
    """
    trained = trained_state(model)
    if names := sorted(trained.keys() ^ state.keys()):
        differ = f"{len(names)} names differ, {names[0]} for one"
        raise ValueError(f"something else was trained: {differ}")
    for name, tensor in trained.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"another rank or size was trained: {name} is {shapes}")
    model.load_state_dict(state, strict=False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of weights."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())
