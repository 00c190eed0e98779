"""backbone.py: the AST is the official one; its weight file is read, or refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    REAL,
    ROOT,
    assert_equal_within,
    hub_state,
    lively_ast,
    needs_real,
    write_ast,
    write_safetensors,
)
from torch import nn

import backbone
from backbone import AST, AttentiveStatisticsPooling, Block, Embedder, load_ast
from data import InputError
from lora import add_lora, count_parameters


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


@pytest.mark.parametrize("shape", [(1, 1023, 128), (1, 128, 1024), (1, 1024, 64)])
def test_another_input_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"needs \(B, 1024, 128\)"):
        AST(dim=64, depth=1, heads=1)(torch.zeros(shape))


def test_pooling_tokens_that_are_all_alike_has_a_finite_gradient():
    """The two class tokens are no patches."""
    pool, tokens = AttentiveStatisticsPooling(8), torch.ones(1, 14, 8)
    tokens[:, :2] = 100
    pooled = pool(tokens.requires_grad_())
    assert pooled[0].tolist() == pytest.approx(8 * [1.0] + 8 * [1e-3])
    pooled.sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize(("pooling", "which"), [("cls", slice(0, 2)), ("mean", slice(2, 1214))])
def test_a_mean_of_tokens_can_have_a_linear_layer_too(ast, pooling, which):
    embedder, x = Embedder(ast, pooling, embedding_dim=5), torch.randn(2, 1024, 128)
    with torch.no_grad():
        pooled = ast(x)[:, which].sum(dim=1) / (which.stop - which.start)
        expected = pooled @ embedder.linear.weight.T + embedder.linear.bias
        torch.testing.assert_close(embedder(x), expected / expected.norm(dim=1, keepdim=True))


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
        embedding = ast(torch.from_numpy(x.astype(np.float32)))[:, :2].mean(dim=1)
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
        pooled = load_ast(weights)(x)[:, :2].mean(dim=1)
        norm = [tensors[f"classifier.layernorm.{name}"] for name in ("weight", "bias")]
        h = F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-12)
        return F.linear(h, tensors["classifier.dense.weight"], tensors["classifier.dense.bias"])


@pytest.fixture
def ast():
    return lively_ast()


HUB = "audio_spectrogram_transformer."
CHANGES = [
    ("layernorm.bias", torch.zeros(5), "size mismatch for norm.bias"),
    ("embeddings.cls_token", None, "Missing key.*cls_token"),
    ("layernorm.weight", None, "its width is 0"),
    ("decoder.weight", torch.zeros(5), "Unexpected key.*decoder"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), CHANGES)
def test_another_model_is_refused_in_one_line(ast, tmp_path, name, tensor, message):
    state = hub_state(ast) | {HUB + name: tensor}
    path = tmp_path / "ast.safetensors"
    write_safetensors(path, {name: t for name, t in state.items() if t is not None})
    with pytest.raises(ValueError, match=message) as error:
        load_ast(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_width_that_is_no_multiple_of_64_is_refused(tmp_path):
    """Its heads would be of another size than AST's."""
    write_ast(tmp_path / "ast", AST(dim=96, depth=1, heads=1))
    with pytest.raises(InputError, match="its width is 96, not a multiple of 64"):
        load_ast(tmp_path / "ast")


def test_what_is_no_weight_file_is_refused(ast, tmp_path):
    """Empty, a web page, cut somewhere, of another precision, with a header of another kind."""
    path = tmp_path / "ast.safetensors"
    write_ast(path, ast)
    whole = path.read_bytes()
    cut = [whole[: int(share * len(whole))] for share in (0.001, 0.1, 0.5, 0.999)]
    headers = [b"null", b"[]", b"[1]", b'{"a": []}', b'{"a": {"data_offsets": ["x", 0]}}']
    headers = [len(header).to_bytes(8, "little") + header for header in headers]
    other = whole.replace(b'"F32"', b'"F64"')
    for content in (b"", b"<!doctype html>", *cut, *headers, other):
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=r"ast\.safetensors is (damaged, or not a s|not an AST)"
        ):
            load_ast(path)


def test_the_command_fetches_verifies_and_describes(ast, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_ast("there.safetensors", ast)
    server.files["/model.safetensors"] = content = Path("there.safetensors").read_bytes()
    monkeypatch.setattr(backbone, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    backbone.main([])
    out = capsys.readouterr().out
    assert Path("weights/ast.safetensors").read_bytes() == content
    assert "blocks 2, dimensions 64, tokens 1214" in out
    assert f"parameters {count_parameters(ast)[1]:,}\n" in out


def test_a_mirror_of_the_hub_can_be_named():
    """HF_ENDPOINT is read when the module is imported, so by another process."""
    code = "import backbone; print(backbone.WEIGHTS_URL)"
    environment = os.environ | {"HF_ENDPOINT": "http://mirror.local/hub/"}
    command = [sys.executable, "-c", code]
    url = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert url.startswith("http://mirror.local/hub/MIT/ast-finetuned-audioset-10-10-0.4593/")


def test_the_sizes_that_the_readme_prints():
    with torch.device("meta"):
        model = Embedder(AST().requires_grad_(False), "asp", 256)
    head, total = count_parameters(model)
    add_lora(model.ast, ["q", "v"], 64, 64)
    lora = count_parameters(model)[0] - head
    assert (total - head, lora, head) == (86_187_264, 2_359_296, 786_816)
    assert model.ast.blocks[0].attn.heads == 768 // backbone.HEAD_DIM
    for number in (total - head, lora, head):
        assert f"{number:,}" in (ROOT / "README.md").read_text()
