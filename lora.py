"""LoRA: fine-tune a frozen linear layer through a low-rank update (Hu et al. 2021, arXiv 2106.09685).

    y = x Wᵀ + b + alpha/rank · dropout(x) Aᵀ Bᵀ          (their equation 3)

    x (..., in)      input             W (out, in), b (out)   pre-trained, frozen
    A (rank, in)     trained           B (out, rank)          trained, starts at zero

Because B starts at zero, a freshly adapted model computes exactly what the pre-trained one does.
Because the update is linear, it can be merged: W' = W + alpha/rank · B A costs nothing at inference.

Nothing here knows about audio. backbone.py has the layers that are wrapped; train.py does the wrapping:

    add_lora(ast, targets=["q", "v"], rank=64, alpha=64)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """The equation above around one `nn.Linear`, which is frozen and kept as `base`.

    base     the pre-trained layer, in -> out
    rank     r >= 1; the update has rank · (in + out) weights instead of in · out
    alpha    the update is scaled by alpha/rank, so that another rank needs no other learning rate
    dropout  probability of dropping an input of the update (never of the base layer), 0 <= p < 1

    forward: x (..., in) -> (..., out). ValueError: rank, alpha or dropout out of range.
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
        # Uniform in ±1/√in, as nn.Linear starts (microsoft/LoRA). It must see in as the second
        # dimension: on a transposed A it would read rank as the fan-in and be far too wide.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        # alpha/rank multiplies the small B, not the large output: same product, one pass less.
        return self.base(x) + F.linear(F.linear(self.dropout(x), self.A), self.scaling * self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new, ordinary layer with W + alpha/rank · B A, summed in float32. This layer is unchanged."""
        out_features, in_features = self.base.weight.shape
        device, dtype = self.base.weight.device, self.base.weight.dtype
        layer = nn.Linear(in_features, out_features, self.base.bias is not None, device, dtype)
        layer.weight.copy_(self.base.weight.float() + self.scaling * (self.B.float() @ self.A.float()))
        if self.base.bias is not None:
            layer.bias.copy_(self.base.bias)
        return layer


def add_lora(
    model: nn.Module, targets: list[str], rank: int, alpha: float, dropout: float = 0.0, layers: list[int] | None = None
) -> None:
    """Wrap the linear layers called `targets` in the chosen `model.blocks`, in place.

    targets  names of the layers inside a block: any of q k v proj fc1 fc2 for the AST
    layers   indices into model.blocks, None for all

    ValueError: a layer that does not exist, a target that names no linear layer, or one that is
    wrapped already; nothing has been changed then.
    """
    depth = len(model.blocks)
    layers = list(range(depth)) if layers is None else layers
    if not layers or not targets:
        raise ValueError("LoRA needs at least one layer and one target")
    for index in layers:
        if not 0 <= index < depth:
            raise ValueError(f"LoRA layer {index} does not exist: this model has layers 0-{depth - 1}")

    found = []  # (parent module, name of the child)
    for index in sorted(set(layers)):
        children = [(parent, name) for parent in model.blocks[index].modules() for name, _ in parent.named_children()]
        for target in sorted(set(targets)):
            matches = [(parent, name) for parent, name in children if name == target]
            if any(isinstance(getattr(parent, name), LoRALinear) for parent, name in matches):
                raise ValueError(f"layer {index} {target} has LoRA already: merge_lora first")
            matches = [(parent, name) for parent, name in matches if isinstance(getattr(parent, name), nn.Linear)]
            if not matches:
                raise ValueError(f"LoRA target {target!r} names no linear layer of block {index}")
            found += matches
    for parent, name in found:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha, dropout))


def merge_lora(model: nn.Module) -> None:
    """Replace every LoRALinear inside `model` by its merged layer, in place; without any, do nothing."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Only the adapters: {"blocks.0.attn.q.A": (rank, in), "blocks.0.attn.q.B": (out, rank), ...}."""
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    return {f"{name}.{matrix}": getattr(module, matrix).detach() for name, module in adapters for matrix in "AB"}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy adapters into a model that `add_lora` has prepared in the same way.

    ValueError: other layers or targets (the sets of names differ) or another rank or size (the shapes
    differ); nothing has been changed then.
    """
    own = lora_state_dict(model)
    if own.keys() != state.keys():
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise ValueError(f"adapter of other layers or targets: it lacks {missing[:3]}, it should not have {extra[:3]}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model needs {tuple(tensor.shape)}"
            raise ValueError(f"adapter of another rank or model size: {name} is {shapes}")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of weights."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
