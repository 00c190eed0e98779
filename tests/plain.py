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
    full_scale = 32768 if samples.dtype == np.int16 else 1
    return torch.from_numpy(samples.astype(np.float32) / full_scale)


def mel_frames(wave: Tensor) -> Tensor:
    """(T, 128), the call of the official AST."""
    return fbank(wave[None], htk_compat=True, sample_frequency=16000, use_energy=False,
                 window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)  # fmt: skip


def window_at(wave: Tensor, start: int) -> Tensor:
    """10 s of the wave; a shorter one runs to its end, back to its start, and so on: 012210012."""
    if len(wave) >= 160000:
        return wave[start : start + 160000]
    place = torch.arange(160000) % (2 * len(wave))
    return wave[torch.where(place < len(wave), place, 2 * len(wave) - 1 - place)]


def network_input(frames: Tensor) -> Tensor:
    """Zeros after the 998 frames of 10 s."""
    return (F.pad(frames, (0, 0, 0, 1024 - len(frames))) + 4.2677393) / (2 * 4.5689974)


def tokens(w: dict[str, Tensor], x: Tensor, scaling: float) -> Tensor:
    """x (B, 1024, 128) -> (B, 1214, D): a ViT from its weights, with scaling · B A added where w
    has A and B."""
    image = x.transpose(1, 2)[:, None]
    patches = F.conv2d(image, w["patch_embed.weight"], w["patch_embed.bias"], stride=10)
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
        q, k, v = (linear(f"blocks.{i}.attn.{c}", n) for c in "qkv")
        q, k, v = (u.unflatten(2, (-1, 64)).transpose(1, 2) for u in (q, k, v))
        attended = (q @ k.transpose(2, 3) / 8).softmax(3) @ v
        z = z + linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        h = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", z))
        z = z + linear(f"blocks.{i}.mlp.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    return norm("norm", z)


def embedding(w: dict, head: dict | None, x: Tensor, scaling: float = 1.0) -> Tensor:
    """Unit length (B, E). head {}: the mean of the class tokens; None: that of the patches."""
    z = tokens(w, x, scaling)
    if head is None:
        return F.normalize(z[:, 2:].sum(1))
    if not head:
        return F.normalize((z[:, 0] + z[:, 1]) / 2)
    h = z[:, 2:]
    context = torch.cat([h, h.mean(1, keepdim=True).expand_as(h),
                         h.std(1, correction=0, keepdim=True).expand_as(h)], 2)  # fmt: skip
    W = torch.cat([head["pool.W1.weight"], head["pool.V.weight"]], 1)
    hidden = torch.tanh(context @ W.T + head["pool.W1.bias"])
    a = (hidden @ head["pool.W2.weight"].T).softmax(1)
    mean = (a * h).sum(1)
    std = ((a * (h - mean[:, None]) ** 2).sum(1)).sqrt()
    return F.normalize(torch.cat([mean, std], 1) @ head["linear.weight"].T + head["linear.bias"])


# ---------------------------------------------------------------- training


def train(waves, labels, public, *, tuning, epochs, batch, seed, lr, ast_lr, warmup, rank, alpha,
          masks, scale, margin, weight_decay):  # fmt: skip
    """-> (weights of the AST with adapters, head, class centres, log).

    The log has (epoch, step, rate of its last step, mean loss) for each epoch.
    """
    torch.manual_seed(1_000_000 * seed)
    D, E, C, clips = public["norm.weight"].numel(), 256, max(labels) + 1, len(waves)
    w = {name: tensor.clone() for name, tensor in public.items()}

    def uniform(*shape: int, bound: float) -> Tensor:
        return torch.empty(*shape).uniform_(-bound, bound)

    trained = {}
    for i in range(sum(name.endswith("norm1.weight") for name in w)) if tuning == "lora" else ():
        for letter in "qv":
            name = f"blocks.{i}.attn.{letter}"
            trained[name + ".A"] = uniform(rank, D, bound=1 / math.sqrt(D))
            trained[name + ".B"] = torch.zeros(D, rank)
    if tuning == "full":
        trained |= w
    sizes = {"pool.W1": (D, 128, True), "pool.V": (2 * D, 128, False),
             "pool.W2": (128, D, False), "linear": (2 * D, E, True)}  # fmt: skip
    head = {}
    for name, (fan_in, fan_out, bias) in sizes.items():
        head[name + ".weight"] = uniform(fan_out, fan_in, bound=1 / math.sqrt(fan_in))
        if bias:
            head[name + ".bias"] = uniform(fan_out, bound=1 / math.sqrt(fan_in))
    centres = uniform(C, E, bound=math.sqrt(6 / (C + E)))
    ast_rate = ast_lr if tuning == "full" else lr
    groups = [(list(trained.values()), ast_rate), ([*head.values(), centres], lr)]
    for parameter in (p for group, _ in groups for p in group):
        parameter.requires_grad_()
    w |= trained

    moments = {}  # of AdamW: parameter -> running means of g and g²
    ramp = warmup * math.ceil(clips / batch)
    step, log = 0, []
    for epoch in range(1, epochs + 1):
        torch.manual_seed(1_000_000 * seed + epoch)
        u = torch.rand(clips).tolist()
        order = torch.randperm(clips).tolist()
        total_loss = 0
        for begin in range(0, clips, batch):
            members, windows = order[begin : begin + batch], []
            for i, place in zip(members, u[begin : begin + batch]):
                first = int(place * (max(0, len(waves[i]) - 160000) + 1))
                windows.append(mel_frames(window_at(waves[i], first)))
            x = torch.stack([network_input(frames) for frames in windows])
            for size, largest in ((1024, masks[0]), (128, masks[1])):  # first all time masks
                width = torch.randint(largest + 1, (len(members), 1))
                start = (torch.rand(len(members), 1) * (size - width + 1)).long()
                for clip, s, n in zip(x, start[:, 0].tolist(), width[:, 0].tolist()):
                    (clip if size == 1024 else clip.T)[s : s + n] = 0
            directions = centres / centres.norm(dim=1, keepdim=True)
            cos = embedding(w, head, x, alpha / rank) @ directions.T
            y = torch.tensor([labels[i] for i in members])
            angle = torch.acos(cos.clamp(-1, 1))
            true = F.one_hot(y, C).bool()
            logits = scale * torch.where(true, torch.cos(angle + margin), cos)
            losses = torch.logsumexp(logits, 1) - logits[true]
            losses.mean().backward()
            total_loss += losses.sum().item()
            step += 1
            factor = min(1.0, step / ramp) if ramp else 1.0
            with torch.no_grad():
                for group, rate in groups:
                    for p in group:
                        m, v = moments.setdefault(p, (torch.zeros_like(p), torch.zeros_like(p)))
                        m.mul_(0.9).add_(0.1 * p.grad)
                        v.mul_(0.999).add_(0.001 * p.grad**2)
                        size = (v / (1 - 0.999**step)).sqrt() + 1e-8
                        p *= 1 - rate * factor * weight_decay
                        p -= rate * factor * (m / (1 - 0.9**step)) / size
                        p.grad = None
        log.append((epoch, step, lr * factor, total_loss / clips))
    return w, head, centres, log


# ---------------------------------------------------------------- scoring


def embed(w: dict, head: dict | None, wave: Tensor, scaling: float = 1.0) -> list[np.ndarray]:
    """The embeddings of the fewest evenly spaced windows of 10 s that cover the clip."""
    count = math.ceil(len(wave) / 160000)
    starts = [0]
    if count > 1:
        starts = [round(i * (len(wave) - 160000) / (count - 1)) for i in range(count)]
    windows = []
    with torch.no_grad():
        for s in starts:
            window = network_input(mel_frames(window_at(wave, s)))[None]
            windows.append(embedding(w, head, window, scaling)[0].numpy().astype(np.float64))
    return windows


def neighbours(query: np.ndarray, bank: list[np.ndarray], k: int) -> float:
    """Mean cosine distance to the k nearest, by scikit-learn."""
    found = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank)
    return found.kneighbors(query[None])[0].mean()


def score(train: list[list], test: list[list], is_target: list[bool], normalize: str, k: int):
    """Clips as lists of windows -> (score of each test clip, threshold, its most anomalous window).

    Every window by itself, in loops: one window, one bank, one back-end at a time.
    """

    def others(clip: int | None, domain: bool | None = None) -> list[np.ndarray]:
        """The windows of all training clips but one, of one domain or of both."""
        rows = []
        for i, windows in enumerate(train):
            if i != clip and domain in (None, is_target[i]):
                rows += windows
        return rows

    def by_density(query: np.ndarray, clip: int | None) -> float:
        ratios = []
        for i, windows in enumerate(train):
            for y in windows if i != clip else ():
                ratios.append((1 - query @ y) / max(neighbours(y, others(i), 4), 1e-6))
        return np.mean(sorted(ratios)[:k])

    def standardised(query: np.ndarray, clip: int | None) -> float:
        values = []
        for domain in (False, True):
            mean, std = statistics[domain]
            values.append((neighbours(query, others(clip, domain), k) - mean) / std)
        return min(values)

    statistics = {}
    for domain in (False, True) if normalize == "test" else ():
        reference = []
        for windows in test:
            reference += [neighbours(x, others(None, domain), k) for x in windows]
        statistics[domain] = (np.mean(reference), np.std(reference))

    def of_window(query: np.ndarray, clip: int | None) -> float:
        if normalize == "density":
            return by_density(query, clip)
        if normalize == "none":
            return neighbours(query, others(clip), k)
        return standardised(query, clip)

    of_test = [[of_window(x, None) for x in windows] for windows in test]
    of_train = [max(of_window(x, i) for x in windows) for i, windows in enumerate(train)]
    scores = np.array([max(values) for values in of_test])
    return scores, np.percentile(of_train, 90), np.array([np.argmax(v) for v in of_test])
