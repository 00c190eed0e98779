"""The whole method once more, as plainly as it can be written, sharing no line with the six
scripts.

Log-mel by torchaudio, one clip at a time; the network from matrix products; AdamW by hand;
neighbours by scikit-learn. tests/test_train.py and tests/test_score.py hold the scripts against it,
tensor by tensor: the parts have tests of their own, this is the proof of how they are put together.
Only the order of the random draws is common.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torchaudio.compliance.kaldi import fbank

# ---------------------------------------------------------------- WAV file to embedding


def read(path) -> Tensor:
    """A 16 kHz mono file of int16 or of float32 in [-1, 1]."""
    _, samples = wavfile.read(path)
    return torch.from_numpy(
        samples.astype(np.float32) / (32768 if samples.dtype == np.int16 else 1)
    )


def mel_frames(wave: Tensor) -> Tensor:
    """(T, 128), the call of the official AST."""
    return fbank(wave[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
                 num_mel_bins=128, dither=0.0, frame_shift=10)  # fmt: skip


def network_input(frames: Tensor) -> Tensor:
    return (F.pad(frames, (0, 0, 0, 1024 - len(frames))) + 4.2677393) / (2 * 4.5689974)


def tokens(w: dict[str, Tensor], x: Tensor, scaling: float) -> Tensor:
    """x (B, 1024, 128) -> (B, 1214, D): a ViT from its weights, with scaling · B A added where w
    has A and B."""
    patches = F.conv2d(
        x.transpose(1, 2)[:, None], w["patch_embed.weight"], w["patch_embed.bias"], stride=10
    )
    patches = patches.flatten(2).transpose(1, 2)
    first = torch.cat([w["cls_token"], w["dist_token"]], 1).expand(len(x), -1, -1)
    z = torch.cat([first, patches], 1) + w["pos_embed"]

    def norm(name: str, z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-6)

    def linear(name: str, z: Tensor) -> Tensor:
        weight = w.get(name + ".weight", w.get(name + ".base.weight"))
        if name + ".A" in w:
            weight = weight + scaling * w[name + ".B"] @ w[name + ".A"]
        return z @ weight.T + w.get(name + ".bias", w.get(name + ".base.bias"))

    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        n = norm(f"blocks.{i}.norm1", z)
        q, k, v = (
            linear(f"blocks.{i}.attn.{c}", n).unflatten(2, (-1, 64)).transpose(1, 2) for c in "qkv"
        )
        attended = (q @ k.transpose(2, 3) / 8).softmax(3) @ v
        z = z + linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        h = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", z))
        z = z + linear(f"blocks.{i}.mlp.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    return norm("norm", z)


def embedding(
    w: dict[str, Tensor], head: dict[str, Tensor], x: Tensor, scaling: float = 1.0
) -> Tensor:
    """Unit length (B, E); without a head, the mean of the class tokens."""
    z = tokens(w, x, scaling)
    if not head:
        return F.normalize((z[:, 0] + z[:, 1]) / 2)
    h = z[:, 2:]
    context = torch.cat([h, h.mean(1, keepdim=True).expand_as(h),
                         h.std(1, correction=0, keepdim=True).expand_as(h)], 2)  # fmt: skip
    W = torch.cat(
        [head["pooling.hidden_of_token.weight"], head["pooling.hidden_of_context.weight"]], 1
    )
    hidden = torch.tanh(context @ W.T + head["pooling.hidden_of_token.bias"])
    a = (hidden @ head["pooling.weights.weight"].T + head["pooling.weights.bias"]).softmax(1)
    mean = (a * h).sum(1)
    std = ((a * (h - mean[:, None]) ** 2).sum(1)).sqrt()
    return F.normalize(torch.cat([mean, std], 1) @ head["linear.weight"].T + head["linear.bias"])


# ---------------------------------------------------------------- training


def train(waves: list[Tensor], labels: list[int], public: dict[str, Tensor], *, tuning: str, epochs: int,
          batch: int, accumulate: int = 1, seed: int = 0, lr: float, ast_lr: float = 1e-5, warmup: int,
          rank: int = 4, alpha: float = 6.0, masks: tuple[int, int] = (80, 80), scale: float = 30.0,
          margin: float = 0.2, weight_decay: float = 0.01):  # fmt: skip
    """-> (weights of the AST with adapters, head, class centres, [(step, lr, loss, accuracy) an
    epoch])."""
    torch.manual_seed(1_000_000 * seed)
    D, E, C, clips = public["norm.weight"].numel(), 256, max(labels) + 1, len(waves)
    w = {name: tensor.clone() for name, tensor in public.items()}
    trained = {}
    for i in range(sum(name.endswith("norm1.weight") for name in w)) if tuning == "lora" else ():
        for letter in "qv":
            name = f"blocks.{i}.attn.{letter}"
            trained[name + ".A"] = torch.empty(rank, D).uniform_(
                -1 / math.sqrt(D), 1 / math.sqrt(D)
            )
            trained[name + ".B"] = torch.zeros(D, rank)
    if tuning == "full":
        trained |= w
    sizes = {"pooling.hidden_of_token": (D, 128, True), "pooling.hidden_of_context": (2 * D, 128, False),
             "pooling.weights": (128, D, True), "linear": (2 * D, E, True)}  # fmt: skip
    head = {}
    for name, (fan_in, fan_out, bias) in sizes.items():
        head[name + ".weight"] = torch.empty(fan_out, fan_in).uniform_(
            -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)
        )
        if bias:
            head[name + ".bias"] = torch.empty(fan_out).uniform_(
                -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)
            )
    bound = math.sqrt(6 / (C + E))
    centres = torch.empty(C, E).uniform_(-bound, bound)
    groups = [
        (list(trained.values()), ast_lr if tuning == "full" else lr),
        ([*head.values(), centres], lr),
    ]
    for parameter in (p for group, _ in groups for p in group):
        parameter.requires_grad_()
    w |= trained

    moments = {}  # of AdamW: parameter -> running means of g and g²
    per_epoch = math.ceil(math.ceil(clips / batch) / accumulate)
    ramp = min(warmup, epochs * per_epoch // 10)
    step, log = 0, []
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(1_000_000 * seed + 2 * epoch)
        torch.manual_seed(1_000_000 * seed + 2 * epoch + 1)
        spare = [max(0, 1 + (len(wave) - 400) // 160 - 1024) for wave in waves]
        first = [
            int(u * (n + 1))
            for u, n in zip(torch.rand(clips, generator=generator), spare, strict=True)
        ]
        order = torch.randperm(clips, generator=generator).tolist()
        total_loss = total_hits = 0
        batches = [order[i : i + batch] for i in range(0, clips, batch)]
        for begin in range(0, len(batches), accumulate):
            in_step = batches[begin : begin + accumulate]
            for members in in_step:
                x = torch.stack(
                    [
                        network_input(mel_frames(waves[i])[first[i] : first[i] + 1024])
                        for i in members
                    ]
                )
                for size, largest in (
                    (1024, masks[0]),
                    (128, masks[1]),
                ):  # first all time masks, then all frequency
                    width = torch.randint(largest + 1, (len(members), 1))
                    start = (torch.rand(len(members), 1) * (size - width + 1)).long()
                    for clip, s, n in zip(
                        x, start[:, 0].tolist(), width[:, 0].tolist(), strict=True
                    ):
                        (clip if size == 1024 else clip.T)[s : s + n] = 0
                cos = (
                    embedding(w, head, x, alpha / rank)
                    @ (centres / centres.norm(dim=1, keepdim=True)).T
                )
                y = torch.tensor([labels[i] for i in members])
                angle = torch.acos(cos.clamp(-1, 1))
                true = F.one_hot(y, C).bool()
                logits = scale * torch.where(true, torch.cos(angle + margin), cos)
                losses = torch.logsumexp(logits, 1) - logits[true]
                (losses.sum() / sum(map(len, in_step))).backward()
                total_loss += losses.sum().item()
                total_hits += (cos.argmax(1) == y).sum().item()
            step += 1
            factor = min(1.0, step / ramp) if ramp else 1.0
            with torch.no_grad():
                for group, rate in groups:
                    for p in group:
                        m, v = moments.setdefault(p, (torch.zeros_like(p), torch.zeros_like(p)))
                        m.mul_(0.9).add_(0.1 * p.grad)
                        v.mul_(0.999).add_(0.001 * p.grad**2)
                        p *= 1 - rate * factor * weight_decay
                        p -= (
                            rate
                            * factor
                            * (m / (1 - 0.9**step))
                            / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                        )
                        p.grad = None
        log.append((step, lr * factor, total_loss / clips, total_hits / clips))
    return w, head, centres, log


# ---------------------------------------------------------------- scoring


def embed(
    w: dict[str, Tensor], head: dict[str, Tensor], wave: Tensor, scaling: float = 1.0
) -> np.ndarray:
    """Mean over the fewest evenly spaced windows of 1024 frames that cover the clip, to unit
    length."""
    frames = mel_frames(wave)
    count = math.ceil(len(frames) / 1024)
    starts = (
        [round(i * (len(frames) - 1024) / (count - 1)) for i in range(count)] if count > 1 else [0]
    )
    with torch.no_grad():
        windows = [
            embedding(w, head, network_input(frames[s : s + 1024])[None], scaling) for s in starts
        ]
    return F.normalize(sum(windows))[0].numpy().astype(np.float64)


def distances(
    queries: np.ndarray, bank: np.ndarray, k: int, leave_one_out: bool = False
) -> np.ndarray:
    """Mean cosine distance to the k nearest rows of the bank; a row of the bank is not its own
    neighbour."""
    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank)
    return neighbours.kneighbors(None if leave_one_out else queries)[0].mean(1)


def score(train: np.ndarray, test: np.ndarray, is_target: list[bool], normalize: str = "none", k: int = 1,
          smote: float = 0.0) -> tuple[np.ndarray, float]:  # fmt: skip
    """-> (score of each test clip, threshold)."""
    is_target = np.array(is_target)
    source, target = train[~is_target], train[is_target]
    made = np.empty((0, train.shape[1]))
    if smote:
        draw, count = np.random.default_rng(0), int(smote * len(source)) - len(target)
        near = NearestNeighbors(n_neighbors=2).fit(target).kneighbors(return_distance=False)
        x = draw.integers(len(target), size=count)
        other = near[x, draw.integers(2, size=count)]
        made = target[x] + draw.random((count, 1), dtype=np.float32) * (target[other] - target[x])
        made /= np.linalg.norm(made, axis=1, keepdims=True)
    if normalize == "density":
        bank = np.concatenate([train, made])
        density = np.maximum(distances(None, bank, 4, leave_one_out=True), 1e-6)

        def ratios(queries: np.ndarray, columns: int, own: bool) -> np.ndarray:
            d = (1 - queries @ bank[:columns].T) / density[:columns]
            if own:
                np.fill_diagonal(d, np.inf)
            return np.sort(d, axis=1)[:, :k].mean(1)

        return ratios(test, len(bank), False), np.percentile(ratios(train, len(train), True), 90)
    if normalize == "none":
        scores = distances(test, np.concatenate([train, made]), k)
        return scores, np.percentile(distances(None, train, k, leave_one_out=True), 90)
    of_test, of_train = [], np.full((2, len(train)), np.nan)
    for i, (real, bank) in enumerate(((source, source), (target, np.concatenate([target, made])))):
        mine = is_target == bool(i)
        d = distances(test, bank, k)
        of_train[i, mine] = distances(None, real, k, leave_one_out=True)
        of_train[i, ~mine] = distances(train[~mine], real, k)
        reference = of_train[i, mine] if normalize == "train" else d
        of_test.append((d - reference.mean()) / reference.std())
        of_train[i] = (of_train[i] - reference.mean()) / reference.std()
    return np.min(of_test, axis=0), np.percentile(of_train.min(axis=0), 90)
