"""One clip's way through the method: what each stage of the real code makes of it, a line a stage.

    python tests/walk.py                                  # a made-up clip, the tiny AST
    python tests/walk.py CLIP.wav --weights weights/ast.safetensors

Made with the public functions and forward hooks, so that it cannot say anything else than they do.
The shapes are what a trained model has; pooling, linear layer and adapters are random, with B moved
away from its zero.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import demo

from backbone import Embedder, load_ast
from data import FRAME, HOP, SpecAug, fit_frames, list_clips, log_mel, normalise, read_wav
from lora import LoRALinear, add_lora
from score import distances, nearest


def show(where: str, symbol: str, x: torch.Tensor, more: str = "") -> torch.Tensor:
    shape = str(tuple(x.shape)).replace(",)", ")")
    print(
        f"{where:40} {symbol:12} {shape:16} "
        f"mean {x.mean():6.3f}  std {x.std(correction=0):5.3f}  {more}".rstrip()
    )
    return x


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "walk.py", description="One clip through every stage of the method."
    )
    parser.add_argument("clip", nargs="?", help="a WAV file (a made-up test clip of tests/demo.py)")
    parser.add_argument(
        "--weights", default=demo.WEIGHTS, help="the AST's weights (tests/tiny_ast.pth)"
    )
    args = parser.parse_args(argv)
    demo.make_machine("data/demo", "fan")
    clip = args.clip or list_clips("data/demo", "fan", "test")[0].path
    torch.manual_seed(0)

    print(f"{Path(clip).name}; random adapters and head: shapes as after training, values not")
    print(f"{'where':40} {'what':12} {'shape':16} mean and standard deviation")
    wave = show("data.py: read_wav", "wave", read_wav(clip))[None]
    show("data.py: filter_bank takes", "frame t", wave.unfold(1, FRAME, HOP))
    x = show("data.py: log_mel", "X[t, m]", log_mel(wave))
    x = show("data.py: fit_frames", "X, padded", fit_frames(x))
    x = show("data.py: normalise", "x", normalise(x))
    show("data.py: SpecAug", "in training", SpecAug(80, 80)(x), "not passed on here")

    model = Embedder(load_ast(args.weights).eval(), "asp", 256)
    ast, shown = model.ast, [0, len(model.ast.blocks) - 1]
    plain = {}
    hooks = [
        ast.patch_embed.register_forward_hook(
            lambda _, __, y: show("backbone.py: patch_embed", "patches(x)", y)
        )
    ]
    hooks += [
        ast.blocks[i].register_forward_hook(lambda _, __, y, i=i: plain.update({i: y}))
        for i in shown
    ]
    tokens = ast(x)
    for hook in hooks:
        hook.remove()
    add_lora(ast, ["q", "v"], rank=8, alpha=8)
    for layer in (module for module in ast.modules() if isinstance(module, LoRALinear)):
        torch.nn.init.normal_(layer.B, std=0.02)

    def moved(i: int, y: torch.Tensor) -> None:
        by = (y - plain[i]).norm() / plain[i].norm()
        show(
            f"backbone.py: Block {i + 1} of {len(ast.blocks)}",
            "z",
            y,
            f"LoRA has moved it by {by:.1%}",
        )

    hooks = [ast.blocks[i].register_forward_hook(lambda _, __, y, i=i: moved(i, y)) for i in shown]
    adapted = ast(x)
    for hook in hooks:
        hook.remove()
    by = (adapted - tokens).norm() / tokens.norm()
    show("backbone.py: AST", "tokens", adapted, f"LoRA has moved it by {by:.1%}")
    show("backbone.py: AttentiveStatisticsPooling", "pool(tokens)", model.pooling(adapted))
    e = model(x)
    show("backbone.py: Embedder", "e", e, f"length {e.norm():.3f}")
    paths = sorted((Path(clip).parent.parent / "train").glob("*.wav"))[:8]
    if paths:
        bank = torch.cat(
            [model(normalise(fit_frames(log_mel(read_wav(path)[None])))) for path in paths]
        )
        show(
            "score.py: nearest",
            "score(x)",
            torch.from_numpy(nearest(distances(e.numpy(), bank.numpy()))),
        )
        print(f"nearest training clip, of {len(paths)}: {paths[(e @ bank.T).argmax()].name}")


if __name__ == "__main__":
    main()
