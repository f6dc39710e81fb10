"""Our transformer layers compute the same as torch's and timm's, and keep the bounds that their papers state."""

import pytest
import timm.layers
import torch
from torch.nn import functional

from models.transformer_layers import QK_NORMS, Mlp, PatchEmbed, RmsNorm, SelfAttention, SwiGlu
from options import UsageError


@pytest.mark.parametrize(("patch", "sides"), [(1, (3, 3)), (2, (4, 6)), (4, (8, 4))])
def test_patch_embedding_equals_timms(patch, sides):
    torch.manual_seed(0)
    timms = timm.layers.PatchEmbed(None, patch, 3, 16, strict_img_size=False)
    ours = PatchEmbed(patch, 3, 16)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 3, *sides)
    tokens = ours(x)
    torch.testing.assert_close(tokens, timms(x))
    assert tokens.is_contiguous()
    assert torch.equal(tokens, ours.requires_grad_(False)(x))


def count(layer):
    return sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("width", [64, 128, 192, 384, 768, 1024, 1152])
def test_swiglu_has_the_parameters_of_the_mlp(width):
    with torch.device("meta"):
        assert count(SwiGlu(width)) == pytest.approx(count(Mlp(width)), rel=0.01)


def test_swiglu_is_timms():
    torch.manual_seed(0)
    ours = SwiGlu(24)
    theirs = timm.layers.SwiGLU(24, 64)
    gate, value = ours.w12.weight.chunk(2)
    gate_bias, value_bias = ours.w12.bias.chunk(2)
    names = ("fc1_g.weight", "fc1_x.weight", "fc2.weight", "fc1_g.bias", "fc1_x.bias", "fc2.bias")
    parts = (gate, value, ours.w3.weight, gate_bias, value_bias, ours.w3.bias)
    theirs.load_state_dict(dict(zip(names, parts, strict=True)))
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("affine", [False, True])
def test_rms_norm_is_torchs_in_float32(affine):
    torch.manual_seed(0)
    norm, x = RmsNorm(12, affine=affine), 3 + torch.randn(4, 12)
    if affine:
        torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (norm.weight if affine else 1)
    torch.testing.assert_close(norm(x), expected)
    assert len(list(norm.parameters())) == affine
    low = norm(x.bfloat16())
    assert low.dtype == torch.float32
    assert torch.equal(low, norm(x.bfloat16().float()))


@pytest.mark.parametrize("name", QK_NORMS)
def test_normalized_queries_and_keys_bound_the_logits(name):
    """|q . k| / sqrt(d) <= |g_q| |g_k| sqrt(d), with the largest scales, for RMSNorm and layer norm without bias."""
    torch.manual_seed(0)
    logits, bounds = [], []
    for qk_norm in (None, QK_NORMS[name]):
        layer = SelfAttention(32, 4, qk_norm)
        layer.qkv.weight.data.mul_(50)

        def record(query, key, value):
            logits.append((query @ key.mT / 8**0.5).abs().max().item())
            return functional.scaled_dot_product_attention(query, key, value)

        layer.attention = record
        if qk_norm:
            for norm in (layer.q_norm, layer.k_norm):
                torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
                bounds.append(norm.weight.abs().max().item())
        layer(torch.randn(2, 6, 32))
    limit = bounds[0] * bounds[1] * 8**0.5
    assert logits[0] > 10 * limit
    assert logits[1] <= limit * (1 + 1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(UsageError, match="a width of 10 cannot be divided among 4 attention heads"):
        SelfAttention(10, 4)
