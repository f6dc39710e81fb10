"""Our transformer layers compute the same as torch's and timm's."""

import pytest
import timm.layers
import torch

from models.transformer_layers import PatchEmbed


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
