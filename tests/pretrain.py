"""Pre-train the demo's tiny AST: from the spectrogram of any made-up sound to the numbers that it
was made from.

    python tests/pretrain.py            # 5,000 steps of 32 windows; 45 minutes on two busy CPU cores

wrote tests/tiny_ast.pth (3 blocks, 64 dimensions, float16, 0.5 MB) with a final loss of 0.123
(smooth L1 in units of each number's standard deviation, mean of the last 100 steps), from 0.33
after the first 100. It plays the part that AudioSet plays for the real AST: what it learns is
general, and none of the demo's machines is in it.

Windows have 256 frames instead of 1024, a quarter of the work; the positional embeddings of their
25 columns of patches are then repeated along time to 101 columns, as AST's own were stretched from
images.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import demo

import backbone
from data import FRAME, HOP, SAMPLE_RATE, log_mel, normalise

FRAMES, BATCH, SEED, RATE = 256, 32, 0, 2e-3
SECONDS = (FRAME + (FRAMES - 1) * HOP) / SAMPLE_RATE


def numbers_of(sound: demo.Sound) -> tuple[np.ndarray, np.ndarray]:
    """What a sound was made from, about standardised, and which of it can be heard: (31,) each."""
    audible = np.arange(1, demo.HARMONICS + 1) * sound.pitch < 0.45 * SAMPLE_RATE
    power = (10 ** (sound.harmonics / 10) * audible).sum()
    (rate, depth), (knock_rate, strength), (slope, level) = (
        sound.modulation,
        sound.knocks,
        sound.noise,
    )
    values = [
        (np.log(sound.pitch) - 4.84) / 0.66,
        (depth - 0.22) / 0.27,
        (np.log(rate) - 1.13) / 0.78,
    ]
    values += [
        (knock_rate - 5.5) / 2,
        (strength - 0.8) / 0.97,
        (slope + 1.5) / 2.6,
        (level + 10) / 8.7,
    ]
    values += list((sound.harmonics - 10 * np.log10(power) + 19) / 12)
    heard = [1, 1, depth > 0, strength > 0, 1, 1, 1, *audible]
    return np.array(values, np.float32), np.array(heard, np.float32)


class Sounds(torch.utils.data.Dataset):
    """Item i is the i-th sound of the seed: (spectrogram (256, 128), numbers (31,), which can be
    heard (31,))."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        random = np.random.default_rng((SEED, i))
        sound = demo.any_sound(random)
        wave = torch.from_numpy(demo.synthesise(random, sound, SECONDS).astype(np.float32))
        return normalise(log_mel(wave[None]))[0], *numbers_of(sound)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=demo.WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    backbone.N_FRAMES = FRAMES
    ast = backbone.AST(dim=64, depth=3, heads=1)
    # Both the class tokens and the patches learn to tell the numbers: the demo uses either.
    of_class_tokens, of_patches = (nn.Linear(64, 7 + demo.HARMONICS) for _ in range(2))
    parameters = [*ast.parameters(), *of_class_tokens.parameters(), *of_patches.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=args.steps, pct_start=0.1
    )
    loader = torch.utils.data.DataLoader(
        Sounds(args.steps * BATCH),
        BATCH,
        num_workers=2,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    mean_loss = None
    bar = tqdm(loader, "pre-training")
    for x, values, heard in bar:
        tokens = ast(x)
        loss = 0
        for part, head in ((tokens[:, :2], of_class_tokens), (tokens[:, 2:], of_patches)):
            error = F.smooth_l1_loss(head(part.mean(dim=1)), values, reduction="none")
            loss = loss + (error * heard).sum() / heard.sum() / 2
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)

    state = {name: tensor.detach() for name, tensor in ast.state_dict().items()}
    class_tokens, patches = (
        state["pos_embed"][:, :2],
        state["pos_embed"][:, 2:].unflatten(1, (12, 25)),
    )
    patches = patches.repeat(1, 1, 5, 1)[:, :, :101].flatten(
        1, 2
    )  # (1, 12, 25, D) -> (1, 12 · 101, D)
    state["pos_embed"] = torch.cat([class_tokens, patches], dim=1)
    torch.save({name: tensor.half() for name, tensor in state.items()}, args.out)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.2f} MB, loss {mean_loss:.4f}")


if __name__ == "__main__":
    main()
