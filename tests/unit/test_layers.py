"""The layers that every family is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.kernels.dispatch import KernelSet, reference_kernels, select_kernels
from safelight.runtime.layers.embeddings import packed_to_latents, patchify, timestep_sinusoids, unpatchify
from safelight.runtime.layers.linear import Adapter, Linear, scoped
from safelight.runtime.layers.norm import HeadNorm, LayerNorm, RMSNorm
from safelight.runtime.layers.rope import Rope3D

KERNELS = reference_kernels()


def fill(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def test_linear_is_x_times_w_plus_b() -> None:
    layer = Linear(6, 4)
    fill(layer)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), x @ layer.get_parameter("weight").T + layer.get_parameter("bias"))


def test_linear_without_bias_has_one_parameter() -> None:
    assert [name for name, _ in Linear(6, 4, bias=False).named_parameters()] == ["weight"]


def test_adapters_of_a_call_add_up() -> None:
    layer = Linear(6, 4)
    fill(layer)
    x, first, second = torch.randn(3, 6), torch.randn(1, 6), torch.randn(2, 6)
    adapters = (Adapter(first, torch.ones(4, 1), 0.5), Adapter(second, torch.ones(4, 2), -2.0))
    expected = layer(x) + 0.5 * (x @ first.T).sum(-1, keepdim=True) - 2 * (x @ second.T).sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x, adapters), expected.expand(-1, 4))


def test_adapters_are_found_under_their_local_names() -> None:
    adapter = (Adapter(torch.ones(1, 1), torch.ones(1, 1), 1.0),)
    adapters = {"blocks.1.out": adapter, "blocks.10.out": adapter, "blocks.1.ffn.up": adapter}
    assert set(scoped(adapters, "blocks.1") or {}) == {"out", "ffn.up"}
    assert scoped(adapters, "blocks.2") is None
    assert scoped(None, "blocks.1") is None


@dataclass(frozen=True)
class HalvedWeight:
    """A weight format of another kind: stores half of each weight, and a factor."""

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        return {"halves": (out_features, in_features), "factor": (1,)}

    def apply(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, stored["halves"] * stored["factor"], bias)

    def apply_gelu(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor, kernels: KernelSet) -> Tensor:
        return kernels.gelu(self.apply(x, stored, bias), None)


@dataclass(frozen=True)
class Recorded:
    """A placement that notes what was fetched."""

    fetched: list[str] = field(default_factory=list)

    def fetch(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.fetched.extend(stored)
        return stored


def test_weight_format_and_placement_are_seams_of_linear() -> None:
    placement = Recorded()
    layer = Linear(6, 4, weight_format=HalvedWeight(), placement=placement)
    fill(layer)
    layer.get_parameter("factor").data.fill_(2.0)
    x = torch.randn(3, 6)
    expected = x @ (2 * layer.get_parameter("halves")).T + layer.get_parameter("bias")
    torch.testing.assert_close(layer(x), expected)
    assert placement.fetched == ["halves", "factor"]
    torch.testing.assert_close(layer.gelu(x, KERNELS), F.gelu(expected, approximate="tanh"))
    assert placement.fetched == ["halves", "factor"] * 2


def test_gelu_follows_the_whole_linear_layer_with_its_adapters() -> None:
    layer, x = Linear(6, 4), torch.randn(2, 3, 6)
    fill(layer)
    adapter = Adapter(torch.randn(2, 6), torch.randn(4, 2), 0.5)
    for adapters in ((), (adapter,)):
        made = layer.gelu(x, KERNELS, adapters)
        torch.testing.assert_close(made, F.gelu(layer(x, adapters), approximate="tanh"))
    assert not torch.equal(layer.gelu(x, KERNELS), layer.gelu(x, KERNELS, (adapter,)))


def test_ops_write_where_they_are_told() -> None:
    x, angles, weight = torch.randn(2, 5, 16), torch.randn(5, 4), torch.randn(8)
    place = torch.zeros(2, 9, 20)
    out = place[:, 3:8, 4:]
    ops: list[Callable[[Tensor | None], Tensor]] = [
        lambda to: KERNELS.gelu(x, to),
        lambda to: KERNELS.rms_norm_rope_heads(x, weight, angles.cos(), angles.sin(), 1e-6, to),
    ]
    for op in ops:
        assert op(out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, op(None), rtol=0, atol=0)
    assert place[:, :3].abs().sum() == place[:, 8:].abs().sum() == place[..., :4].abs().sum() == 0


def test_rms_norm_equals_torch() -> None:
    layer = RMSNorm(12, 1e-6, KERNELS)
    fill(layer)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), F.rms_norm(x, (12,), layer.weight, 1e-6))


def test_layer_norm_keeps_the_input_dtype_and_float32_arithmetic() -> None:
    layer = LayerNorm(12, 1e-6, KERNELS)
    fill(layer)
    x = (torch.randn(2, 5, 12) * 3 + 40).bfloat16()
    expected = F.layer_norm(x.float(), (12,), layer.weight, layer.bias, 1e-6).bfloat16()
    assert torch.equal(layer(x), expected)


def test_rotation_keeps_lengths_and_scores_depend_on_distance_alone() -> None:
    norm = RMSNorm(16, 1e-6, KERNELS)
    norm.weight.data = torch.ones(16)
    cos, sin = Rope3D((8, 4, 4), 32)((6, 5, 4))
    row = torch.randn(16)
    rotated = norm.rotated(row.expand(1, 120, 16), cos, sin)[0].view(6, 5, 4, 16)
    torch.testing.assert_close(rotated.norm(dim=-1), torch.full((6, 5, 4), 4.0))
    score = (rotated[1, 2, 3] * rotated[3, 3, 1]).sum()
    torch.testing.assert_close((rotated[2, 3, 2] * rotated[4, 4, 0]).sum(), score)
    assert ((rotated[2, 3, 2] * rotated[5, 4, 0]).sum() - score).abs() > 1e-2


def test_rotary_angles_are_exact_far_from_the_origin() -> None:
    cos, sin = Rope3D((4, 4, 4), 1024)((1000, 1, 1))
    angle = torch.tensor(999.0, dtype=torch.float64)
    torch.testing.assert_close(cos[999, 0].double(), angle.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[999, 1].double(), (angle / 100).sin(), rtol=0, atol=1e-7)
    assert torch.equal(cos[999, 2:], torch.ones(4))


def test_patches_times_weights_are_a_convolution() -> None:
    latents, weight = torch.randn(2, 3, 2, 4, 6), torch.randn(5, 3, 1, 2, 2)
    expected = F.conv3d(latents, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(latents, (1, 2, 2)) @ weight.flatten(1).T, expected)


def test_unpatchify_puts_every_value_at_its_place() -> None:
    video = torch.arange(2 * 3 * 2 * 4 * 6.0).view(2, 3, 2, 4, 6)
    tokens = patchify(video, (1, 2, 2)).view(2, 12, 3, 4).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(tokens, (2, 2, 3), (1, 2, 2)), video)


def test_packed_patches_unpack_to_the_latents() -> None:
    latents = torch.randn(2, 3, 2, 4, 6)
    assert torch.equal(packed_to_latents(patchify(latents, (1, 2, 2)), (2, 2, 3), (1, 2, 2)), latents)


def test_a_head_is_normed_and_rotated_by_itself() -> None:
    norm, whole = HeadNorm(8, 1e-6, KERNELS), RMSNorm(8, 1e-6, KERNELS)
    norm.weight.data = whole.weight.data = torch.randn(8)
    x, angles = torch.randn(2, 5, 24), torch.randn(5, 4)
    made = norm(x, angles.cos(), angles.sin())
    for head in range(3):
        expected = whole.rotated(x[..., 8 * head : 8 * head + 8], angles.cos(), angles.sin())
        torch.testing.assert_close(made[:, :, head], expected)


def test_sinusoids_start_with_cosines() -> None:
    embedded = timestep_sinusoids(torch.tensor([[0.0, 3.0]]), 8)
    assert embedded.shape == (1, 2, 8)
    assert embedded[0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    torch.testing.assert_close(embedded[0, 1, 5], torch.tensor(3.0 * 0.1).sin())


def test_attention_is_softmax_of_scaled_scores() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 6, 3, 8), torch.randn(2, 6, 3, 8)
    weights = torch.einsum("bshd,bthd->bhst", q, k).mul(8**-0.5).softmax(-1)
    torch.testing.assert_close(KERNELS.attention(q, k, v), torch.einsum("bhst,bthd->bshd", weights, v))


@pytest.mark.parametrize("per_token", [False, True])
def test_modulation_and_gate_act_per_sample_or_per_token(per_token: bool) -> None:
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    scale, shift, gate = torch.randn(3, 2, 5 if per_token else 1, 8)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(KERNELS.layer_norm_modulate(x, scale, shift, 1e-6), normed * (1 + scale) + shift)
    torch.testing.assert_close(KERNELS.gated_residual(x, y, gate), x + y * gate)


def test_plain_torch_serves_the_cpu() -> None:
    assert select_kernels(torch.device("cpu")).name == "reference"
