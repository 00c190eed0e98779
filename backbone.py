"""The pre-trained backbone: AST, the Audio Spectrogram Transformer (Gong et al. 2021).

arXiv 2104.01778. A Vision Transformer on the spectrogram x (1024 frames, 128 mel bins), with tokens
of D dimensions:

    z = [cls, dist, patches(x)] + pos                        1214 tokens: 2, and 12 · 101 patches
    z = z + Attention(LayerNorm(z))                          12 blocks of these two lines
    z = z + MLP(LayerNorm(z))
    tokens = LayerNorm(z)

    Attention(u) = proj(softmax(q kᵀ / √64) v)               q, k, v: linear in u, heads of 64

The tokens then become one vector, the embedding, from which the score is computed:

    embedding = linear(pool(tokens)) / ‖linear(pool(tokens))‖

data.py makes x, lora.py adapts the linear layers, and train.py trains.

    python backbone.py        # downloads the public weights and describes them
"""

import argparse
import contextlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import N_FRAMES, N_MELS, InputError

PATCH, STRIDE = 16, 10  # neighbouring patches overlap by 6


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        # AST stores q, k and v as one fused layer. Three layers compute the same, and "LoRA on q
        # and v" then means exactly two of them.
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(x))
        v = self.split_heads(self.v(x))
        x = F.scaled_dot_product_attention(q, k, v)  # divides by √(D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two layers with the exact (erf) GELU between them, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm Transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)  # as in timm's ViT (PyTorch defaults to 1e-5)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AST(nn.Module):
    """Randomly initialised; see load_ast for pre-trained weights.

    forward: x (B, 1024, 128), normalised log-mel, -> (B, 1214, dim): two class tokens, then the
    patches, all after the final norm.
    Source: github.com/YuanGongND/ast, 31088be.
    """

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12):
        super().__init__()
        self.dim = dim
        across_mel = (N_MELS - PATCH) // STRIDE + 1  # 12 patches
        across_time = (N_FRAMES - PATCH) // STRIDE + 1  # 101 patches
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=PATCH, stride=STRIDE)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))  # DeiT's distillation token
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + across_mel * across_time, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (N_FRAMES, N_MELS):  # transposed, it would fit as well
            raise ValueError(f"the AST needs (B, {N_FRAMES}, {N_MELS}), got {tuple(x.shape)}")
        image = x.transpose(1, 2).unsqueeze(1)  # (B, 1, F, T): frequency is its height
        patches = self.patch_embed(image)  # (B, D, 12, 101)
        patches = patches.flatten(2).transpose(1, 2)  # (B, 1212, D), 101 for each row in mel
        cls = self.cls_token.expand(len(x), 1, -1)  # (B, 1, D)
        dist = self.dist_token.expand(len(x), 1, -1)
        z = torch.cat([cls, dist, patches], dim=1) + self.pos_embed  # (B, 1214, D)
        for block in self.blocks:
            z = block(z)
        return self.norm(z)


class TokenMean(nn.Module):
    """Mean over the tokens that `which` selects, (B, 1214, D) -> (B, D)."""

    def __init__(self, dim: int, which: slice):
        super().__init__()
        self.out_dim, self.which = dim, which

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.which].mean(dim=1)


class AttentiveStatisticsPooling(nn.Module):
    """Weighted mean and standard deviation over the patches h, (B, 1214, D) -> (B, 2 D).

        a = softmax(W₂ tanh(W₁ h + V [mean(h), std(h)]))        over the patches
        out = [Σ a h,  √Σ a (h - Σ a h)²]

    The weights a differ from patch to patch and from dimension to dimension. W₁ has a bias. W₂ has
    none: it would be the same for all patches, so the softmax would cancel it.
    Source: ECAPA-TDNN (Desplanques et al. 2020, arXiv 2005.07143), equations 1 to 4 with the global
    context of their section 3.1, without its batch normalisation.
    """

    def __init__(self, dim: int, hidden: int = 128):
        super().__init__()
        self.out_dim = 2 * dim
        self.W1 = nn.Linear(dim, hidden)
        self.V = nn.Linear(2 * dim, hidden, bias=False)
        self.W2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = tokens[:, 2:]  # (B, 1212, D)
        std, mean = torch.std_mean(h, dim=1, correction=0, keepdim=True)  # (B, 1, D)
        context = self.V(torch.cat([mean, std], dim=2))  # (B, 1, hidden), the same for all patches
        a = self.W2(torch.tanh(self.W1(h) + context)).softmax(dim=1)  # (B, 1212, D)

        mean = (a * h).sum(dim=1, keepdim=True)  # (B, 1, D), now weighted
        variance = (a * (h - mean).square()).sum(dim=1, keepdim=True)
        std = variance.clamp(min=1e-6).sqrt()  # the slope of √ is infinite at 0
        return torch.cat([mean, std], dim=2).squeeze(1)  # (B, 2 D)


POOLINGS = {
    "cls": lambda dim: TokenMean(dim, slice(0, 2)),  # class tokens: what AST was trained with
    "mean": lambda dim: TokenMean(dim, slice(2, None)),  # patches, usual for frozen models
    "asp": AttentiveStatisticsPooling,  # a trained weighting of the patches
}


class Embedder(nn.Module):
    """AST plus a head (pooling and a linear layer); returns unit-length embeddings.

    pooling        a name in POOLINGS
    embedding_dim  of the linear layer; None leaves it out

    forward: x (B, 1024, 128) -> (B, embedding_dim or pool.out_dim)
    """

    def __init__(self, ast: AST, pooling: str, embedding_dim: int | None):
        super().__init__()
        self.ast = ast
        self.pool = POOLINGS[pooling](ast.dim)
        if embedding_dim is None:
            self.linear = nn.Identity()
        else:
            self.linear = nn.Linear(self.pool.out_dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.ast(x))
        return F.normalize(self.linear(pooled).float())  # float32, also under autocast


# ---------------------------------------------- plumbing: not needed to follow the method

WORKER_TIMEOUT = 300  # seconds until a process that reads WAV files counts as stuck
HEAD_DIM = 64  # in every AST and DeiT size
WEIGHTS = "weights/ast.safetensors"  # where fetch_weights puts them
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
REVISION = "f826b80d28226b62986cc218e5cec390b1096902"
WEIGHTS_URL = f"{HUB}/MIT/ast-finetuned-audioset-10-10-0.4593/resolve/{REVISION}/model.safetensors"
WEIGHTS_SHA256 = "ae0c1e2ad4e1381d851fa9bf298ba13ebc9c5a914cdee2dbe427a6583869924d"

# Name in the file -> our name. The order matters, since some names contain others.
RENAMES = {
    "audio_spectrogram_transformer.": "",
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed",
    "encoder.layer.": "blocks.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def load_ast(path: str | Path) -> AST:
    """Load the AST of a safetensors file in the format of the Hugging Face hub, of any DeiT size.

    The AudioSet classifier is dropped. Raises InputError, with the file's name, unless all other
    names and shapes are those of an AST.
    """
    state = {}
    for name, tensor in read_safetensors(path).items():
        if name.startswith("classifier."):
            continue
        for theirs, ours in RENAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    dim = state.get("norm.weight", torch.empty(0)).numel()
    depth = sum(name.endswith("norm1.weight") for name in state)
    if dim == 0 or dim % HEAD_DIM:
        raise InputError(f"{path} is not an AST: its width is {dim}, not a multiple of {HEAD_DIM}")
    with torch.device("meta"):  # no memory and no random numbers: the weights are replaced
        ast = AST(dim, depth, dim // HEAD_DIM)
    try:
        ast.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not an AST in the hub's format: {reason}") from error
    return ast


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """8 bytes of header length, a JSON header (name: shape, data_offsets, ...), float32 numbers."""
    raw = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    try:
        header = dict(json.loads(raw[8:start]))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] != "F32":
                raise ValueError(f"{name} is {entry['dtype']}, not F32")
            first, end = entry["data_offsets"]
            numbers = torch.frombuffer(raw[start + first : start + end], dtype=torch.float32)
            tensors[name] = numbers.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged, or not a safetensors file: {reason}") from error
    return tensors


def fetch_weights(path: str | Path) -> None:
    """Download and verify the public weights if `path` is WEIGHTS. Any other path is left alone."""
    path = Path(path)
    if path != Path(WEIGHTS):
        return
    lock = contextlib.nullcontext() if path.exists() else data.sole_use(path.parent)
    with lock:
        data.download(WEIGHTS_URL, path, "sha256", WEIGHTS_SHA256)


def add_hardware(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    text = "cpu, cuda or cuda:1 (default: cuda if available)"
    add("--device", default="cuda" if gpu else "cpu", type=existing_device, help=text)
    text = "processes that read WAV files; 0: the main process does (4 with a GPU, else 0)"
    add("--workers", default=4 if gpu else 0, type=data.at_least(0), metavar="N", help=text)


def existing_device(name: str) -> torch.device:
    """argparse type: a device that PyTorch can use here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {reason}") from error


def main(argv: list[str] | None = None) -> None:
    about = "Download AST's public weights, verify and describe them."
    argparse.ArgumentParser(description=about).parse_args(argv)
    with data.one_line_errors():
        fetch_weights(WEIGHTS)
        ast = load_ast(WEIGHTS)
        tokens = ast.pos_embed.shape[1]
        size = sum(p.numel() for p in ast.parameters())
        sizes = f"blocks {len(ast.blocks)}, dimensions {ast.dim}, tokens {tokens}"
        print(f"{WEIGHTS}: {sizes}, parameters {size:,}")


if __name__ == "__main__":
    main()
