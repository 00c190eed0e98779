"""The pre-trained backbone: AST, the Audio Spectrogram Transformer (Gong et al. 2021, 2104.01778).

A Vision Transformer on the spectrogram x (1024 frames, 128 mel bins); a token has D dimensions:

    z = [cls, dist, patches(x)] + pos                        1214 tokens: 2, and 12 · 101 patches
    z = z + Attention(LayerNorm(z))                          12 blocks of these two lines
    z = z + MLP(LayerNorm(z))
    tokens = LayerNorm(z)

    Attention(u) = proj(softmax(q kᵀ / √64) v)               q, k, v: linear in u, heads of 64

The tokens then become one vector, the embedding, from which the score is computed:

    embedding = linear(pool(tokens)) / ‖linear(pool(tokens))‖

data.py makes x, lora.py adapts the linear layers, train.py trains.

    python backbone.py        # fetches the public weights and says what they are
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import N_FRAMES, N_MELS

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
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)  # timm's ViT; PyTorch's own default is 1e-5
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AST(nn.Module):
    """The Transformer with random weights; `load_ast` gives the trained one.

    forward: x (B, 1024, 128), normalised log-mel, -> (B, 1214, dim): two class tokens, then the
    patches, all after the final norm. ValueError: another input shape.
    Source: github.com/YuanGongND/ast, 31088be.
    """

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12):
        super().__init__()
        across_mel = (N_MELS - PATCH) // STRIDE + 1  # 12 patches
        across_time = (N_FRAMES - PATCH) // STRIDE + 1  # 101 patches
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=PATCH, stride=STRIDE)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)  # DeiT's distillation token
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + across_mel * across_time, dim) * 0.02)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (N_FRAMES, N_MELS):
            raise ValueError(f"the AST needs (B, {N_FRAMES}, {N_MELS}), got {tuple(x.shape)}")
        image = x.transpose(1, 2).unsqueeze(1)  # (B, 1, F, T): frequency is its height
        patches = self.patch_embed(image)  # (B, D, 12, 101)
        patches = patches.flatten(2).transpose(1, 2)  # (B, 1212, D): time runs fastest
        cls = self.cls_token.expand(len(x), 1, -1)  # (B, 1, D)
        dist = self.dist_token.expand(len(x), 1, -1)
        z = torch.cat([cls, dist, patches], dim=1) + self.pos_embed  # (B, 1214, D)
        for block in self.blocks:
            z = block(z)
        return self.norm(z)


class ClassTokenPooling(nn.Module):
    """Mean of the two class tokens, as AST was trained: (B, N, D) -> (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :2].mean(dim=1)


class PatchMeanPooling(nn.Module):
    """Mean of the patch tokens, as in published comparisons of untouched models."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 2:].mean(dim=1)


class AttentiveStatisticsPooling(nn.Module):
    """Weighted mean and standard deviation over the patch tokens h, (B, N, D) -> (B, 2 D).

        a = softmax over the tokens of  W₂ tanh(W₁ [h, mean(h), std(h)])
        out = [Σ a h,  √Σ a (h - Σ a h)²]

    The weights a differ from token to token and from dimension to dimension. W₁ has a bias; to W₂
    it would add nothing, as the softmax runs over the tokens.
    Source: ECAPA-TDNN (Desplanques et al. 2020, arXiv 2005.07143), equations 1 to 4 with the global
    context of their section 3.1, without its batch normalisation.
    """

    def __init__(self, dim: int, hidden: int = 128):
        super().__init__()
        # W₁ [h, mean, std] = W_h h + W_c [mean, std]: the second part is the same for every token,
        # so it is computed once and not 1212 times.
        self.hidden_of_token = nn.Linear(dim, hidden)
        self.hidden_of_context = nn.Linear(2 * dim, hidden, bias=False)
        self.weights = nn.Linear(hidden, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = tokens[:, 2:]  # (B, 1212, D)
        std, mean = torch.std_mean(h, dim=1, correction=0, keepdim=True)  # (B, 1, D), unweighted
        context = self.hidden_of_context(torch.cat([mean, std], dim=2))  # (B, 1, hidden)
        hidden = torch.tanh(self.hidden_of_token(h) + context)  # (B, 1212, hidden)
        a = self.weights(hidden).softmax(dim=1)  # (B, 1212, D)

        mean = (a * h).sum(dim=1, keepdim=True)  # (B, 1, D)
        variance = (a * (h - mean).square()).sum(dim=1)  # (B, D)
        std = variance.clamp(min=1e-6).sqrt()  # √ is infinitely steep at 0
        return torch.cat([mean.squeeze(1), std], dim=1)


class Embedder(nn.Module):
    """AST, pooling and linear layer: x (B, 1024, 128) -> (B, embedding), of unit length.

    pooling    "cls" (mean of the class tokens), "mean" (mean of the patch tokens), or "asp"
               (attentive statistics of the patch tokens)
    embedding  dimensions of the result; None: no linear layer (for the untouched AST)
    ValueError: another pooling.
    """

    def __init__(self, ast: AST, pooling: str, embedding: int | None):
        super().__init__()
        dim = ast.norm.weight.numel()
        self.ast = ast
        if pooling == "asp":
            self.pooling, pooled = AttentiveStatisticsPooling(dim), 2 * dim
        elif pooling == "mean":
            self.pooling, pooled = PatchMeanPooling(), dim
        elif pooling == "cls":
            self.pooling, pooled = ClassTokenPooling(), dim
        else:
            raise ValueError(f"the poolings are asp, mean and cls, not {pooling!r}")
        self.linear = nn.Identity() if embedding is None else nn.Linear(pooled, embedding)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooling(self.ast(x))
        return F.normalize(self.linear(pooled).float())


# ---------------------------------------------- plumbing: not needed to follow the method

import io
import json
import pickle
import re
import struct
from pathlib import Path

import data

# Loading public weights

HEAD_DIM = 64  # in every AST and DeiT size
WEIGHTS = "weights/ast.safetensors"  # where fetch_weights puts them
HUB = "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593/resolve"
WEIGHTS_URL = f"{HUB}/f826b80d28226b62986cc218e5cec390b1096902/model.safetensors"
WEIGHTS_SHA256 = "ae0c1e2ad4e1381d851fa9bf298ba13ebc9c5a914cdee2dbe427a6583869924d"

# The same weights are published under other names: by the authors (.pth), on the Hugging Face hub
# (.bin, .safetensors), and as transformers 5 holds them in memory. Left to right gives the names
# above.
RENAMES = [
    (r"^module\.", ""),
    (r"^(v|audio_spectrogram_transformer)\.", ""),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
]
CLASSIFIER = (
    r"(module\.)?(v\.head|v\.head_dist|mlp_head\.[01]|classifier\.(layernorm|dense))\.(weight|bias)"
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_ast(path: str | Path) -> AST:
    """The AST in a weight file: .pth, .bin or .safetensors (told apart by content), any DeiT size.

    float16, bfloat16 and float64 tensors are converted to float32. The AudioSet classifier is
    dropped by name; everything else must match one to one, names and shapes. ValueError (naming
    file and reason): not a weight file, truncated, not an AST. FileNotFoundError: no such file.
    """
    try:
        state = rename(read_tensors(path))
        depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
        dim = state["norm.weight"].numel() if "norm.weight" in state else 0
        if not dim or dim % HEAD_DIM or not depth:
            why = f"no norm.weight of a multiple of {HEAD_DIM}, or no blocks"
            raise ValueError(f"not an AST ({why})")
        with torch.device("meta"):  # shapes without memory: every weight comes from the file
            ast = AST(dim, depth, dim // HEAD_DIM)
        if names := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{names[0]} has values that are not finite")
        weights = {name: tensor.float().clone() for name, tensor in state.items()}
        ast.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # PyTorch's list of what is missing, too much, of another shape
        differs = " ".join(str(error).partition(":")[2].split())[:200]
        what = f"{path}: not this AST (an ImageNet ViT? other strides?)"
        raise ValueError(f"{what}: {differs}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ast


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """To the names of `AST`, without the classifier, the fused qkv split.

    ValueError: two tensors of one name.
    """
    state = {}
    for name, tensor in tensors.items():
        if re.fullmatch(CLASSIFIER, name):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        parts = {name: tensor}
        if ".attn.qkv." in name and tensor.ndim and len(tensor) % 3 == 0:
            parts = {name.replace("qkv", c): part for c, part in zip("qkv", tensor.chunk(3))}
        if doubled := parts.keys() & state.keys():
            raise ValueError(f"two tensors for {min(doubled)}")
        state |= parts
    return state


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor, from a safetensors or a PyTorch file. ValueError: neither, or damaged."""
    raw = Path(path).read_bytes()
    tensors = (read_safetensors if raw[8:9] == b"{" else unpickle)(raw)
    if not isinstance(tensors, dict):
        raise ValueError("holds something else than tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise ValueError("holds something else than tensors by name")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; weights are floating-point tensors")
    return tensors


# What reading raises on files that are not what they should be.
DAMAGE = (pickle.UnpicklingError, struct.error, RuntimeError, EOFError, LookupError, ValueError,
          TypeError, AttributeError)  # fmt: skip


def load_file(path: str | Path) -> object:
    """What `torch.save` wrote, on the CPU. ValueError, naming the file: it is something else."""
    try:
        return unpickle(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def unpickle(raw: bytes) -> object:
    """Tensors and plain containers only: nothing in the file is executed."""
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except DAMAGE as error:
        what = "truncated, damaged, or not a file of tensors"
        if raw.lstrip()[:1] == b"<":
            what = "a web page"
        raise ValueError(f"cannot be loaded: {what}; name another, or fetch it again") from error


def read_safetensors(raw: bytes) -> dict[str, Tensor]:
    """8 bytes of header length, a JSON header (dtype, shape, data_offsets by name), the bytes."""
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        spans = sorted(entry["data_offsets"] for entry in header.values())
        if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), len(raw) - start]:
            raise ValueError("its tensors do not fill it")
        body, tensors = memoryview(raw)[start:], {}
        for name, entry in header.items():
            content = bytearray(body[slice(*entry["data_offsets"])])
            tensor = torch.frombuffer(content, dtype=DTYPES[entry["dtype"]])
            tensors[name] = tensor.reshape(entry["shape"])
        return tensors
    except DAMAGE as error:
        what = f"a truncated or invalid safetensors file ({error})"
        raise ValueError(f"{what}; delete it and fetch it again") from error


def fetch_weights(path: str | Path = WEIGHTS) -> None:
    """Download the public AudioSet weights unless they are there, and verify their SHA-256.

    FileNotFoundError: `path` is another place, where nothing is fetched to, and empty.
    """
    if Path(path) == Path(WEIGHTS):
        data.download(WEIGHTS_URL, Path(path), "sha256", WEIGHTS_SHA256)
    elif not Path(path).exists():
        fetch = f"`python backbone.py` fetches the public weights to {WEIGHTS}"
        raise FileNotFoundError(f"{path} is missing; {fetch}")


def main(argv: list[str] | None = None) -> None:
    about = "Fetch the AST's public weights, check them, describe them."
    parser = data.Parser("backbone.py", about)
    where = "where they are (%(default)s, fetched if missing)"
    parser.add_argument("--weights", default=WEIGHTS, help=where)
    args = parser.parse_args(argv)
    with data.one_line_errors(parser):
        fetch_weights(args.weights)
        ast = load_ast(args.weights)
        digest = data.file_digest(args.weights)
    known = "the public AudioSet AST" if digest == WEIGHTS_SHA256 else "other"
    print(f"{args.weights}  SHA-256 {digest} ({known})")
    tokens, dim = ast.pos_embed.shape[1:]
    print(f"AST: {len(ast.blocks)} blocks, {dim} dimensions, {tokens} tokens")
    print(f"parameters: {sum(parameter.numel() for parameter in ast.parameters()):,}")


if __name__ == "__main__":
    main()
