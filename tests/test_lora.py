"""lora.py: the equation, its merging, and where it is put."""

import math

import pytest
import torch
from conftest import assert_equal_within
from torch import nn

from backbone import AST
from lora import LoRALinear, add_lora, load_trained_state, trained_state


def adapted_layer(rank=4, alpha=6.0, dropout=0.0, bias=True) -> LoRALinear:
    """A layer 10 -> 7 with B ≠ 0, and alpha ≠ rank, so that a forgotten scaling shows."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(10, 7, bias=bias), rank, alpha, dropout)
    nn.init.normal_(layer.B)
    return layer


def test_a_worked_example():
    """W = 0, A = [[1, 2]], B = [[3], [4]], rank 1, alpha 2: y = 2 · (x₁ + 2 x₂) · (3, 4), so that
    x = (1, 1) gives (18, 24).
    """
    layer = LoRALinear(nn.Linear(2, 2, bias=False), rank=1, alpha=2)
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.B.copy_(torch.tensor([[3.0], [4.0]]))
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [18.0, 24.0]


def test_zero_B_leaves_the_backbone_unchanged():
    torch.manual_seed(0)
    ast, x = AST(dim=64, depth=2, heads=1).eval(), torch.randn(1, 1024, 128)
    with torch.no_grad():
        before = ast(x)
        add_lora(ast, ["q", "k", "v", "proj", "fc1", "fc2"], rank=3, alpha=7)
        assert torch.equal(ast(x), before)


def test_A_starts_as_wide_as_a_linear_layer():
    """Uniform in ±1/√in. A transposed A would be √(in/rank) times too wide."""
    A = LoRALinear(nn.Linear(768, 768), rank=16, alpha=16).A
    assert A.abs().max() <= 1 / math.sqrt(768)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 768), rel=0.03)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_equals_unmerged_and_differs_from_the_base(bias):
    layer, x = adapted_layer(bias=bias), torch.randn(4, 10)
    before, merged = layer.base.weight.clone(), layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x), atol=1e-5, rtol=0)
    assert (merged(x) - layer.base(x)).abs().max() > 0.1
    assert torch.equal(layer.base.weight, before), "merging must not touch the layer itself"


def test_dropout_acts_on_the_update_only_and_only_in_training():
    layer, x = adapted_layer(dropout=0.5), torch.randn(1, 10)
    layer.train()
    outputs = torch.stack([layer(x) for _ in range(2000)])
    assert outputs.std(dim=0).min() > 0
    layer.eval()
    expected = layer(x)
    torch.testing.assert_close(outputs.mean(dim=0), expected, atol=0.3, rtol=0)  # its mean is kept
    assert torch.equal(layer(x), expected)
    nn.init.zeros_(layer.B)
    assert torch.equal(layer.train()(x), layer.base(x)), "the base layer's input is never dropped"


def test_peft_computes_the_same():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours, x, g = adapted_layer(), torch.randn(6, 10), torch.randn(6, 7)
    model = nn.ModuleDict({"layer": nn.Linear(10, 7)})
    model["layer"].load_state_dict(ours.base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], lora_dropout=0.0)
    theirs = peft.inject_adapter_in_model(config, model)["layer"]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.A)
        theirs.lora_B["default"].weight.copy_(ours.B)
    assert_equal_within(1e-5, "LoRA output against peft", ours(x), theirs(x))
    ours(x).backward(g)
    theirs(x).backward(g)
    for matrix in "AB":
        gradient = getattr(theirs, f"lora_{matrix}")["default"].weight.grad
        what = f"LoRA gradient of {matrix} against peft"
        assert_equal_within(1e-5, what, getattr(ours, matrix).grad, gradient)
    theirs.merge()
    merged = theirs.get_base_layer().weight
    assert_equal_within(1e-5, "LoRA merged against peft", ours.merged().weight, merged)


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def small_ast(depth=3) -> AST:
    torch.manual_seed(0)
    return AST(dim=64, depth=depth, heads=1).requires_grad_(False)


def test_add_lora_wraps_exactly_the_named_layers_of_the_chosen_blocks():
    ast = small_ast()
    add_lora(ast, ["v", "fc1"], rank=2, alpha=1, layers=[2, 0])
    names = ["attn.v", "mlp.fc1"]
    assert wrapped(ast) == [f"blocks.{i}.{name}" for i in (0, 2) for name in names]
    trainable = {name for name, p in ast.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{matrix}" for name in wrapped(ast) for matrix in "AB"}
    assert {ast.blocks[i].attn.v.scaling for i in (0, 2)} == {0.5}


WRONG = [
    ({"targets": ["q", "norm1"]}, "no linear layer in these blocks is called norm1"),
    ({"layers": [3]}, "layer 3 does not exist: there are layers 0-2"),
    ({"layers": [-1]}, "layer -1 does not exist"),
    ({"layers": []}, "no linear layer"),
    ({"targets": ["q", "q"]}, "named twice"),
    ({"layers": [0, 0]}, "named twice"),
    ({"rank": 0}, "rank >= 1"),
    ({"alpha": 0.0}, "alpha > 0"),
    ({"dropout": 1.0}, "dropout < 1"),
    ({"dropout": -0.1}, "0 <= dropout"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(small_ast(), **({"targets": ["q"], "rank": 2, "alpha": 2} | arguments))


def test_a_layer_is_wrapped_once():
    ast = small_ast()
    add_lora(ast, ["q"], rank=2, alpha=2, layers=[0])
    with pytest.raises(ValueError, match="no linear layer in these blocks is called q"):
        add_lora(ast, ["q"], rank=2, alpha=2, layers=[0])
    assert wrapped(ast) == ["blocks.0.attn.q"]


@pytest.mark.parametrize(
    "other", [{"rank": 2}, {"targets": ["q"]}, {"targets": ["q", "k"]}, {"layers": [1, 2]}]
)
def test_what_was_trained_otherwise_is_refused(other):
    arguments = {"targets": ["q", "v"], "rank": 4, "alpha": 2, "layers": None}
    ast, prepared = small_ast(), small_ast()
    add_lora(ast, **arguments)
    add_lora(prepared, **(arguments | other))
    with pytest.raises(ValueError, match="saved weights do not match the model"):
        load_trained_state(prepared, trained_state(ast))
