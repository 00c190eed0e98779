"""backbone.py: the AST is the official one; its weight file is read, or refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    REAL,
    ROOT,
    assert_equal_within,
    error_of,
    hub_state,
    lively_ast,
    needs_real,
    write_ast,
    write_safetensors,
)
from torch import nn

import backbone
from backbone import (
    AST,
    AttentiveStatisticsPooling,
    Block,
    Embedder,
    load_ast,
    mean_of_class_tokens,
    mean_of_patches,
)
from lora import add_lora, count_parameters

# ---------------------------------------------------------------- the computation


def test_a_block_is_torchs_own_encoder_layer():
    torch.manual_seed(0)
    ours = Block(dim=128, heads=2).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = {"dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-6,
               "batch_first": True, "norm_first": True}  # fmt: skip
    theirs = nn.TransformerEncoderLayer(128, 2, 512, **options).eval()
    a, state = ours.attn, {}
    state["self_attn.in_proj_weight"] = torch.cat([a.q.weight, a.k.weight, a.v.weight])
    state["self_attn.in_proj_bias"] = torch.cat([a.q.bias, a.k.bias, a.v.bias])
    pairs = {"self_attn.out_proj": a.proj, "linear1": ours.mlp.fc1, "linear2": ours.mlp.fc2,
             "norm1": ours.norm1, "norm2": ours.norm2}  # fmt: skip
    for name, layer in pairs.items():
        state |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    theirs.load_state_dict(state)
    x = torch.randn(2, 9, 128)
    with torch.no_grad():
        what = "AST block against torch.nn.TransformerEncoderLayer"
        assert_equal_within(2e-5, what, ours(x), theirs(x))


def test_layer_norm_eps_is_1e_6():
    """Variance 1e-6: eps = 1e-6 gives 1/√2 of unit variance; PyTorch's 1e-5 would give 0.3."""
    block, x = Block(dim=64, heads=1), torch.randn(1, 1, 64)
    x = 1e-3 * (x - x.mean()) / x.std(correction=0)
    for norm in (block.norm1, block.norm2, AST(dim=64, depth=1, heads=1).norm):
        assert norm(x).std(correction=0).item() == pytest.approx(1 / 2**0.5, rel=1e-3)


def test_patch_order_is_frequency_major():
    """The patch at frequency row f and time column t is token 2 + 101 f + t. Frame 508 and bin 38
    lie in the middle of column 50, row 3, and in no other patch.
    """
    ast = AST(dim=64, depth=0, heads=1)
    nn.init.ones_(ast.patch_embed.weight)
    nn.init.zeros_(ast.patch_embed.bias)
    nn.init.zeros_(ast.pos_embed)
    ast.norm = nn.Identity()
    x = torch.zeros(1, 1024, 128)
    x[0, 10 * 50 + 8, 10 * 3 + 8] = 1
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
    with pytest.raises(ValueError, match=r"needs \(B, 1024, 128\)"):
        AST(dim=64, depth=1, heads=1)(torch.zeros(shape))


def test_means_of_both_class_tokens_or_of_the_patches():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0], [50.0, 0.0]]])
    assert mean_of_class_tokens(tokens).tolist() == [[2.0, 4.0]]
    assert mean_of_patches(tokens).tolist() == [[75.0, 50.0]]


def test_attentive_statistics_pooling_is_the_equation():
    """Written out for one clip in float64, with the context concatenated to every token."""
    torch.manual_seed(0)
    pool = AttentiveStatisticsPooling(8, hidden=5).double()
    tokens = torch.randn(2, 12, 8, dtype=torch.float64)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)
    h = tokens[1, 2:]  # the class tokens take no part
    W1 = torch.cat([pool.W1_token.weight, pool.W1_context.weight], dim=1)
    context = torch.cat([h.mean(0), h.std(0, correction=0)]).expand(10, -1)
    hidden = torch.tanh(torch.cat([h, context], 1) @ W1.T + pool.W1_token.bias)
    e = hidden @ pool.W2.weight.T
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


@pytest.mark.parametrize("pooling", ["cls", "asp", "mean"])
@pytest.mark.parametrize("size", [16, None])
def test_embeddings_have_unit_length(pooling, size):
    model = Embedder(AST(dim=64, depth=1, heads=1), pooling, size)
    embedding = model(torch.randn(2, 1024, 128))
    assert embedding.shape == (2, size or (128 if pooling == "asp" else 64))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


# ---------------------------------------------------------------- against other implementations


def from_official(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' names -> ours, the fused qkv split, the heads left out."""
    state = {}
    for name, tensor in weights.items():
        if not name.startswith("v.") or name.startswith("v.head"):
            continue
        name = name.removeprefix("v.").replace("patch_embed.proj", "patch_embed")
        if "qkv" in name:
            parts = zip("qkv", tensor.chunk(3))
            state |= {name.replace("qkv", letter): part for letter, part in parts}
        else:
            state[name] = tensor
    return state


@needs_real
@pytest.mark.parametrize("size", ["tiny224", "base384"])
def test_embeddings_equal_the_official_codes(size):
    """What the official code printed for made-up weights (the file's `how` is the rule)."""
    case = json.loads((REAL / "golden" / "ast_official.json").read_text())[size]
    weights = {}
    for k, name in enumerate(case["names"]):
        random = np.random.RandomState(case["weight_seed_offset"] + k)
        values = random.standard_normal(case["shapes"][name]) * 0.02
        if ("norm" in name and name.endswith("weight")) or name == "mlp_head.0.weight":
            values += 1
        weights[name] = torch.from_numpy(values.astype(np.float32))
    state = from_official(weights)
    dim = len(state["norm.weight"])
    with torch.device("meta"):
        ast = AST(dim, depth=12, heads=dim // 64)
    ast.load_state_dict(state, assign=True)
    x = np.random.RandomState(case["input_seed"]).standard_normal((2, 1024, 128)) * 0.5
    with torch.no_grad():
        embedding = mean_of_class_tokens(ast(torch.from_numpy(x.astype(np.float32))))
    what = f"AST {size}, embedding against the official code"
    assert_equal_within(1e-5, what, embedding, case["embedding"])


def test_tokens_and_logits_equal_transformers(tmp_path):
    """Written as the hub's file is, classifier and all."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ASTConfig(**sizes, intermediate_size=768, num_labels=7)
    theirs = transformers.ASTForAudioClassification(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    ours = load_ast(tmp_path / "model.safetensors")
    x = torch.randn(2, 1024, 128)
    with torch.no_grad():
        expected = theirs.audio_spectrogram_transformer(x).last_hidden_state
        assert_equal_within(1e-5, "AST tokens against transformers", ours(x), expected)
        logits = public_logits(tmp_path / "model.safetensors", x)
        assert_equal_within(1e-5, "logits against transformers", logits, theirs(x).logits)


def public_logits(weights: Path, x: torch.Tensor) -> torch.Tensor:
    """(B, labels): our AST, and the classifier of the same file, as the hub's model has it."""
    tensors = backbone.read_safetensors(weights)
    with torch.no_grad():
        pooled = mean_of_class_tokens(load_ast(weights)(x))
        norm = [tensors[f"classifier.layernorm.{name}"] for name in ("weight", "bias")]
        h = F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-12)
        return F.linear(h, tensors["classifier.dense.weight"], tensors["classifier.dense.bias"])


# ---------------------------------------------------------------- the weight file


@pytest.fixture
def ast():
    return lively_ast()


def test_the_hubs_file_gives_the_same_weights(ast, tmp_path):
    write_ast(tmp_path / "ast.safetensors", ast)
    loaded = load_ast(tmp_path / "ast.safetensors")
    assert loaded.state_dict().keys() == ast.state_dict().keys()
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, ast.state_dict()[name]) and tensor.requires_grad
    assert loaded.blocks[0].attn.heads == 1


HUB = "audio_spectrogram_transformer."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({HUB + "layernorm.bias": torch.zeros(5)}, "size mismatch for norm.bias"),
        (
            {HUB + "embeddings.position_embeddings": torch.zeros(1, 198, 64)},
            "mismatch for pos_embed",
        ),
        ({HUB + "embeddings.cls_token": None}, "Missing key.*cls_token"),
        ({HUB + "layernorm.weight": None}, "norm.weight"),
        ({HUB + "decoder.weight": torch.zeros(5)}, "Unexpected key.*decoder"),
    ],
)
def test_another_model_is_refused_in_one_line(ast, tmp_path, change, message):
    state = hub_state(ast) | change
    path = tmp_path / "ast.safetensors"
    write_safetensors(path, {name: t for name, t in state.items() if t is not None})
    with pytest.raises(ValueError, match=message) as error:
        load_ast(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<!doctype html><html>Not found</html>", bytes(1000)])
def test_files_that_are_no_weights_are_refused(content, tmp_path):
    (tmp_path / "ast.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"ast\.safetensors is not an AST"):
        load_ast(tmp_path / "ast.safetensors")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(ast, share, tmp_path):
    path = tmp_path / "ast.safetensors"
    write_ast(path, ast)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"ast\.safetensors is not an AST"):
        load_ast(path)


def test_other_precisions_are_refused(ast, tmp_path):
    path = tmp_path / "ast.safetensors"
    write_ast(path, ast)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"'))
    with pytest.raises(ValueError, match="is F64, not F32"):
        load_ast(path)


def test_the_command_fetches_verifies_and_describes(ast, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_ast("there.safetensors", ast)
    server.files["/model.safetensors"] = content = Path("there.safetensors").read_bytes()
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    backbone.main([])
    out = capsys.readouterr().out
    assert Path("weights/ast.safetensors").read_bytes() == content
    assert "AST: 2 blocks, 64 dimensions, 1214 tokens" in out
    assert f"parameters: {count_parameters(ast)[1]:,}" in out


@pytest.mark.parametrize("by_hand", [True, False])
def test_weights_with_another_checksum_are_refused(server, tmp_path, monkeypatch, capsys, by_hand):
    monkeypatch.chdir(tmp_path)
    server.files["/model.safetensors"] = b"something else"
    if by_hand:
        Path("weights").mkdir()
        Path("weights/ast.safetensors").write_bytes(b"something else")
    message = error_of(backbone.main, [], capsys)
    assert "weights/ast.safetensors has not the sha256 ae0c1e2a" in message
    assert len(server.requests) == (not by_hand)


def test_nothing_is_fetched_under_a_name_of_ones_own(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mistyped is missing; `python backbone\.py`"):
        backbone.fetch_weights(tmp_path / "mistyped")
    assert server.requests == []


def test_the_sizes_that_the_readme_prints():
    with torch.device("meta"):
        model = Embedder(AST().requires_grad_(False), "asp", 256)
    head, total = count_parameters(model)
    add_lora(model.ast, ["q", "v"], 64, 64)
    lora = count_parameters(model)[0] - head
    assert (total - head, lora, head) == (86_187_264, 2_359_296, 786_816)
    for number in (total - head, lora, head):
        assert f"{number:,}" in (ROOT / "README.md").read_text()
