"""backbone.py: the AST is the official one, its weight files are read in all their spellings or
refused."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, assert_equal_within, needs_real
from torch import nn

import backbone
from backbone import (
    AST,
    AttentiveStatisticsPooling,
    Block,
    ClassTokenPooling,
    Embedder,
    PatchMeanPooling,
    load_ast,
)
from lora import add_lora, count_parameters

# ---------------------------------------------------------------- the computation


def test_a_block_is_torchs_own_encoder_layer():
    torch.manual_seed(0)
    ours = Block(dim=128, heads=2).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = {
        "dropout": 0.0,
        "activation": "gelu",
        "layer_norm_eps": 1e-6,
        "batch_first": True,
        "norm_first": True,
    }
    theirs = nn.TransformerEncoderLayer(128, 2, 512, **options).eval()
    a, m = ours.attn, ours.mlp
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([a.q.weight, a.k.weight, a.v.weight]),
            "self_attn.in_proj_bias": torch.cat([a.q.bias, a.k.bias, a.v.bias]),
            **{f"self_attn.out_proj.{name}": p for name, p in a.proj.named_parameters()},
            **{f"linear1.{name}": p for name, p in m.fc1.named_parameters()},
            **{f"linear2.{name}": p for name, p in m.fc2.named_parameters()},
            **{f"norm1.{name}": p for name, p in ours.norm1.named_parameters()},
            **{f"norm2.{name}": p for name, p in ours.norm2.named_parameters()},
        }
    )
    x = torch.randn(2, 9, 128)
    with torch.no_grad():
        assert_equal_within(
            2e-5, "AST block against torch.nn.TransformerEncoderLayer", ours(x), theirs(x)
        )


def test_layer_norm_eps_is_1e_6():
    """On an input of variance 1e-6, eps = 1e-6 gives 1/√2 of unit variance; PyTorch's 1e-5 would
    give 0.3."""
    block, x = Block(dim=64, heads=1), torch.randn(1, 1, 64)
    x = 1e-3 * (x - x.mean()) / x.std(correction=0)
    for norm in (block.norm1, block.norm2, AST(dim=64, depth=1, heads=1).norm):
        assert norm(x).std(correction=0).item() == pytest.approx(1 / 2**0.5, rel=1e-3)


def test_patch_order_is_frequency_major():
    """The patch at frequency row f and time column t is token 2 + 101 f + t: seen by switching one
    patch on."""
    ast = AST(dim=64, depth=0, heads=1)
    nn.init.ones_(ast.patch_embed.weight)
    nn.init.zeros_(ast.patch_embed.bias)
    nn.init.zeros_(ast.pos_embed)
    ast.norm = nn.Identity()
    x = torch.zeros(1, 1024, 128)
    x[0, 10 * 50 + 8, 10 * 3 + 8] = (
        1  # frame 508 and bin 38 lie in the middle of column 50, row 3 (and no other)
    )
    with torch.no_grad():
        lit = ast(x)[0, 2:].sum(dim=1).nonzero().flatten().tolist()
    assert lit == [3 * 101 + 50]


def test_tokens_are_cls_dist_patches_plus_positions():
    ast = AST(dim=64, depth=0, heads=1)
    ast.norm = nn.Identity()
    tokens = ast(torch.zeros(2, 1024, 128))
    assert tokens.shape == (2, 1214, 64)
    torch.testing.assert_close(tokens[1, 0], ast.cls_token[0, 0] + ast.pos_embed[0, 0])
    torch.testing.assert_close(tokens[1, 1], ast.dist_token[0, 0] + ast.pos_embed[0, 1])
    torch.testing.assert_close(tokens[1, 1213], ast.patch_embed.bias + ast.pos_embed[0, 1213])


def test_random_weights_begin_as_a_vision_transformers_do():
    ast = AST(dim=768, depth=0)
    for parameter in (ast.cls_token, ast.dist_token, ast.pos_embed):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("shape", [(1, 1023, 128), (1, 128, 1024), (1, 1024, 64)])
def test_another_input_shape_is_refused(shape):
    with pytest.raises(ValueError, match="needs \\(B, 1024, 128\\)"):
        AST(dim=64, depth=1, heads=1)(torch.zeros(shape))


def test_means_of_both_class_tokens_or_of_the_patches():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0], [50.0, 0.0]]])
    assert ClassTokenPooling()(tokens).tolist() == [[2.0, 4.0]]
    assert PatchMeanPooling()(tokens).tolist() == [[75.0, 50.0]]


def test_attentive_statistics_pooling_is_the_equation():
    """Written out for one clip in float64, with the context concatenated to every token as the
    paper has it."""
    torch.manual_seed(0)
    pool, tokens = (
        AttentiveStatisticsPooling(8, hidden=5).double(),
        torch.randn(2, 12, 8, dtype=torch.float64),
    )
    for parameter in pool.parameters():
        nn.init.normal_(parameter)
    h = tokens[1, 2:]  # the class tokens take no part
    W1 = torch.cat([pool.hidden_of_token.weight, pool.hidden_of_context.weight], dim=1)
    context = torch.cat([h.mean(0), h.std(0, correction=0)]).expand(10, -1)
    e = (
        torch.tanh(torch.cat([h, context], 1) @ W1.T + pool.hidden_of_token.bias)
        @ pool.weights.weight.T
    )
    a = e.exp() / e.exp().sum(0)
    mean = (a * h).sum(0)
    std = ((a * h**2).sum(0) - mean**2).sqrt()
    torch.testing.assert_close(pool(tokens)[1], torch.cat([mean, std]))


def test_pooling_tokens_that_are_all_alike_has_a_finite_gradient():
    pool, tokens = AttentiveStatisticsPooling(8), torch.ones(1, 12, 8, requires_grad=True)
    pooled = pool(tokens)
    assert pooled[0].tolist() == pytest.approx(8 * [1.0] + 8 * [1e-3])
    pooled.sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize(
    ("pooling", "size"), [("cls", 16), ("asp", 16), ("cls", None), ("mean", None)]
)
def test_embeddings_have_unit_length(pooling, size):
    model = Embedder(AST(dim=64, depth=1, heads=1), pooling, size)
    embedding = model(torch.randn(2, 1024, 128))
    assert embedding.shape == (2, size or 64)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


def test_another_pooling_is_refused():
    with pytest.raises(ValueError, match="asp, mean and cls, not 'max'"):
        Embedder(AST(dim=64, depth=0, heads=1), "max", 16)


# ---------------------------------------------------------------- against other implementations


def golden(size: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What the official code printed for made-up weights, and those weights (the file's `how` is
    the rule)."""
    case = json.loads((REAL / "golden" / "ast_official.json").read_text())[size]
    weights = {}
    for k, name in enumerate(case["names"]):
        values = (
            np.random.RandomState(case["weight_seed_offset"] + k).standard_normal(
                case["shapes"][name]
            )
            * 0.02
        )
        if ("norm" in name and name.endswith("weight")) or name == "mlp_head.0.weight":
            values += 1
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return case, weights


@needs_real
@pytest.mark.parametrize(
    ("size", "prefix"), [("tiny224", ""), ("tiny224", "module."), ("base384", "module.")]
)
def test_embeddings_equal_the_official_codes(size, prefix, tmp_path):
    case, weights = golden(size)
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "ast.pth")
    ast = load_ast(tmp_path / "ast.pth").eval()
    x = (
        np.random.RandomState(case["input_seed"]).standard_normal((2, 1024, 128)).astype(np.float32)
        * 0.5
    )
    with torch.no_grad():
        embedding = ClassTokenPooling()(ast(torch.from_numpy(x)))
        h = F.layer_norm(
            embedding, embedding.shape[1:], weights["mlp_head.0.weight"], weights["mlp_head.0.bias"]
        )
        logits = F.linear(h, weights["mlp_head.1.weight"], weights["mlp_head.1.bias"])
    assert_equal_within(
        1e-5, f"AST {size}, embedding against the official code", embedding, case["embedding"]
    )
    assert_equal_within(
        1e-5, f"AST {size}, logits against the official code", logits[:, :8], case["logits_first8"]
    )


def test_tokens_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=192, num_hidden_layers=3, num_attention_heads=3, intermediate_size=768
    )
    theirs = transformers.ASTModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "ast.bin")
    ours = load_ast(tmp_path / "ast.bin").eval()
    x = torch.randn(2, 1024, 128)
    with torch.no_grad():
        assert_equal_within(
            1e-5, "AST tokens against transformers", ours(x), theirs(x).last_hidden_state
        )


# ---------------------------------------------------------------- weight files


@pytest.fixture
def ast():
    torch.manual_seed(0)
    return AST(dim=64, depth=2, heads=1)


def official(ast: AST) -> dict[str, torch.Tensor]:
    """Our weights in the names of the authors' .pth, with q, k and v fused and the unused heads."""
    state = {}
    for name, tensor in ast.state_dict().items():
        if ".attn.q." in name:
            fused = [ast.state_dict()[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            state["v." + name.replace(".q.", ".qkv.")] = torch.cat(fused)
        elif ".attn.k." not in name and ".attn.v." not in name:
            state["v." + name.replace("patch_embed.", "patch_embed.proj.")] = tensor
    for head in ("v.head", "v.head_dist", "mlp_head.0", "mlp_head.1"):
        state |= {f"{head}.weight": torch.zeros(5, 64), f"{head}.bias": torch.zeros(5)}
    return state


def hub(ast: AST) -> dict[str, torch.Tensor]:
    """The names in the Hugging Face hub's files."""
    renames = {
        "blocks.": "encoder.layer.",
        "attn.q.": "attention.attention.query.",
        "attn.k.": "attention.attention.key.",
        "attn.v.": "attention.attention.value.",
        "attn.proj.": "attention.output.dense.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection",
    }
    return _renamed(ast, renames) | {
        f"classifier.{name}": torch.zeros(5)
        for name in ("layernorm.weight", "layernorm.bias", "dense.weight", "dense.bias")
    }


def transformers5(ast: AST) -> dict[str, torch.Tensor]:
    """The names that transformers 5 has in memory."""
    renames = {
        "blocks.": "layers.",
        "attn.q.": "attention.q_proj.",
        "attn.k.": "attention.k_proj.",
        "attn.v.": "attention.v_proj.",
        "attn.proj.": "attention.o_proj.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection",
    }
    return _renamed(ast, renames)


def _renamed(ast: AST, renames: dict[str, str]) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in ast.state_dict().items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm\.", "layernorm.", name)
        state["audio_spectrogram_transformer." + name] = tensor
    return state


def write_safetensors(
    path: Path, state: dict[str, torch.Tensor], lie=lambda header: header, tail=b""
) -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float64: "F64",
    }
    for name, tensor in state.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(body), len(body) + len(content)]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        body += content
    text = json.dumps(lie(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body + tail)


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    (
        write_safetensors
        if path.suffix == ".safetensors"
        else lambda path, state: torch.save(state, path)
    )(path, state)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("spelling", [official, hub, transformers5])
def test_every_spelling_in_every_format_gives_the_same_weights(ast, spelling, suffix, tmp_path):
    loaded = load_ast(save(tmp_path / f"ast{suffix}", spelling(ast)))
    assert loaded.state_dict().keys() == ast.state_dict().keys()
    assert all(
        torch.equal(loaded.state_dict()[name], tensor) for name, tensor in ast.state_dict().items()
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


def test_the_fused_layer_is_split_in_the_order_q_k_v(ast, tmp_path):
    state = official(ast)
    for i in range(3):
        state["v.blocks.1.attn.qkv.bias"][64 * i : 64 * (i + 1)] = i
        state["v.blocks.1.attn.qkv.weight"][64 * i : 64 * (i + 1)] = 10 + i
    attn = load_ast(save(tmp_path / "ast.pth", state)).blocks[1].attn
    for i, letter in enumerate("qkv"):
        layer = getattr(attn, letter)
        assert (layer.bias == i).all() and (layer.weight == 10 + i).all()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(ast, dtype, suffix, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in official(ast).items()}
    loaded = load_ast(save(tmp_path / f"ast{suffix}", state)).state_dict()
    assert all(
        torch.equal(loaded[name], tensor.to(dtype).float())
        for name, tensor in ast.state_dict().items()
    )


def vit(state):
    """An ImageNet DeiT: three input channels, 14 x 14 patches, no prefix."""
    state = {
        name.removeprefix("v."): tensor for name, tensor in state.items() if "mlp_head" not in name
    }
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    return state | {
        "patch_embed.proj.weight": torch.zeros(64, 3, 16, 16),
        "pos_embed": torch.zeros(1, 198, 64),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (vit, "an ImageNet ViT.*pos_embed: .*\\[1, 198, 64\\].*\\[1, 1214, 64\\]"),
        (
            lambda s: s | {"v.pos_embed": torch.zeros(1, 146, 64)},
            "size mismatch for pos_embed: .*\\[1, 146, 64\\]",
        ),
        (
            lambda s: s | {"v.patch_embed.proj.weight": torch.zeros(64, 1, 8, 8)},
            "size mismatch for patch_embed.weight",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "v.dist_token"},
            'Missing key.*"dist_token"',
        ),
        (lambda s: {k: v for k, v in s.items() if "blocks.0" not in k}, "Missing key"),
        (
            lambda s: s | {"v.blocks.0.attn.gate": torch.zeros(3)},
            'Unexpected key.*"blocks.0.attn.gate"',
        ),
        (
            lambda s: s | {"v.blocks.0.mlp.fc1.bias": torch.zeros(9)},
            "mismatch for blocks.0.mlp.fc1.bias: .*\\[9\\]",
        ),
        (lambda s: s | {"v.blocks.0.attn.qkv.bias": torch.tensor(0.0)}, "Missing key"),
        (
            lambda s: s | {"v.norm.bias": torch.full((64,), float("nan"))},
            "norm.bias has values that are not finite",
        ),
        (
            lambda s: s | {"v.norm.bias": torch.zeros(64, dtype=torch.int64)},
            "norm.bias is torch.int64",
        ),
        (lambda s: s | {"module.v.norm.bias": torch.zeros(64)}, "two tensors for norm.bias"),
        (lambda s: {}, "not an AST"),
        (lambda s: {"v.norm.weight": torch.zeros(100)}, "multiple of 64"),
    ],
)
def test_tensors_that_are_no_ast_are_refused_in_one_line(ast, change, message, tmp_path):
    path = save(tmp_path / "ast.pth", change(official(ast)))
    with pytest.raises(ValueError, match=message) as error:
        load_ast(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


class Hostile:
    """A pickle that would create a file when it is executed."""

    def __reduce__(self):
        return (open, ("hostile-was-here", "w"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html><html>Not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ae0c\nsize 346404948\n",
        pickle.dumps({"v.cls_token": Hostile()}),
        pickle.dumps([1, 2, 3]),
        b"PK\x03\x04" + bytes(200),
        bytes(1000),
        b"\x08\x00\x00\x00\x00\x00\x00\x00{notjson",
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b"\xff" * 8 + b"{}",
    ],
)
def test_files_that_are_no_weights_are_refused_unexecuted(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ast.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"ast\.pth") as error:
        load_ast("ast.pth")
    assert "\n" not in str(error.value)
    assert [path.name for path in Path().iterdir()] == ["ast.pth"]


def test_a_hostile_pickle_in_a_zip_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"v.cls_token": Hostile()}, "ast.pth")
    with pytest.raises(ValueError, match="not a file of tensors"):
        load_ast("ast.pth")
    assert [path.name for path in Path().iterdir()] == ["ast.pth"]


def legacy(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """PyTorch's format before 1.6, in which the authors' .pth may be."""
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def test_the_old_file_format_is_read_and_refused_when_truncated(ast, tmp_path):
    path = legacy(tmp_path / "ast.pth", official(ast))
    assert torch.equal(load_ast(path).pos_embed, ast.pos_embed)
    content = path.read_bytes()
    for share in (0.001, 0.01, 0.03, 0.1, 0.5, 0.9, 1 - 1 / len(content)):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="truncated"):
            load_ast(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_truncated_anywhere_is_refused(ast, suffix, tmp_path):
    path = save(tmp_path / f"ast{suffix}", official(ast))
    content = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.999, 1 - 1 / len(content)):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="truncated"):
            load_ast(path)


def entry(**changes):
    return lambda header: header | {"v.norm.bias": header["v.norm.bias"] | changes}


@pytest.mark.parametrize(
    "lie",
    [
        entry(data_offsets=[0, 10**12]),
        entry(data_offsets=[-256, 0]),
        entry(data_offsets=[0, 256]),  # another tensor's bytes
        entry(data_offsets=["0", "256"]),
        entry(data_offsets=[0]),
        entry(shape=[65]),
        entry(shape=[-64]),
        entry(shape=[10**18, 10**18]),
        entry(shape=[0]),
        entry(shape="64"),
        entry(dtype="F16"),
        entry(dtype="I4"),
        entry(dtype=None),
        lambda header: header | {"v.norm.bias": None},
        lambda header: header | {"v.norm.bias": {}},
        lambda header: {name: value for name, value in header.items() if name != "v.norm.bias"},
        list,
    ],
)
def test_a_safetensors_header_that_lies_is_refused(ast, lie, tmp_path):
    write_safetensors(tmp_path / "ast.safetensors", official(ast), lie)
    with pytest.raises(ValueError, match="safetensors"):
        load_ast(tmp_path / "ast.safetensors")


def test_bytes_after_the_last_tensor_are_refused(ast, tmp_path):
    write_safetensors(tmp_path / "ast.safetensors", official(ast), tail=b"x")
    with pytest.raises(ValueError, match="its tensors do not fill it"):
        load_ast(tmp_path / "ast.safetensors")


def test_mutated_weight_files_load_or_are_refused(ast, tmp_path):
    """300 seeded mutations of headers: an AST or a ValueError, nothing else."""
    random = np.random.default_rng(0)
    small = {name: tensor for name, tensor in official(ast).items() if "blocks.1" not in name}
    outcomes = {"loaded": 0, "refused": 0}
    for suffix in (".pth", ".safetensors"):
        content = bytearray(save(tmp_path / f"ast{suffix}", small).read_bytes())
        for _ in range(150):
            mutated = bytearray(content)
            for _ in range(random.integers(1, 5)):
                region = random.choice([30, 3000, len(content)])
                mutated[random.integers(region)] = random.integers(256)
            (tmp_path / "mutated").write_bytes(mutated)
            try:
                load_ast(tmp_path / "mutated")
                outcomes["loaded"] += 1
            except ValueError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and sum(outcomes.values()) == 300


# ---------------------------------------------------------------- the command


def test_the_command_fetches_verifies_and_describes(ast, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    server.files["/model.safetensors"] = content = save(
        tmp_path / "ast.safetensors", hub(ast)
    ).read_bytes()
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    backbone.main([])
    out = capsys.readouterr().out
    assert Path("weights/ast.safetensors").read_bytes() == content
    assert "the public AudioSet AST" in out and "AST: 2 blocks, 64 dimensions, 1214 tokens" in out
    assert f"parameters: {count_parameters(ast)[1]:,}" in out


def test_weights_with_another_checksum_are_refused_and_deleted(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    server.files["/model.safetensors"] = b"something else"
    with pytest.raises(SystemExit) as stop:
        backbone.main([])
    assert stop.value.code == 2 and "checksum" in capsys.readouterr().err
    assert list(Path("weights").iterdir()) == []


def test_nothing_is_fetched_under_a_name_of_ones_own(server, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"mistyped\.pth is missing; `python backbone\.py` fetches"
    ):
        backbone.fetch_weights(tmp_path / "mistyped.pth")
    assert server.requests == []


def test_weights_put_in_place_by_hand_are_verified_and_never_deleted(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("weights/ast.safetensors")
    path.parent.mkdir()
    for content, message in (
        (b"<!doctype html>", "is a web page"),
        (b"other", "has not the SHA256 checksum ae0c1e2a"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=f"weights/ast.safetensors {message}.*; delete it, or replace it by what",
        ):
            backbone.fetch_weights()
        assert path.read_bytes() == content
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", hashlib.sha256(b"other").hexdigest())
    backbone.fetch_weights()
    assert server.requests == []


def test_the_sizes_that_the_readme_prints():
    with torch.device("meta"):
        model = backbone.Embedder(AST().requires_grad_(False), "asp", 256)
    assert model.ast.blocks[0].attn.heads == 12
    head, total = count_parameters(model)
    add_lora(model.ast, ["q", "v"], 64, 64)
    lora = count_parameters(model)[0] - head
    sizes = f"{total - head:,}; {lora:,}; {head:,}"
    assert sizes == "86,187,264; 2,359,296; 786,816"
    assert sizes in (ROOT / "README.md").read_text()
