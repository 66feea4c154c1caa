"""The gradient of a SIREN's squared error, and the derivative of that gradient, as plain tensor code without autograd.

Notation, for one signal; layers 0 (input) to L, all sine, then a linear head A, a and the output scale o:

    z_0 = omega (x W_0 + b_0),  z_i = s_(i-1) W_i + b_i,    s_i = sin z_i,  c_i = cos z_i
    f = s_L A^T + a,  r = f o - values,  e = 2 r o          error = sum r^2
    u_L = e A,  q_i = u_i c_i,  u_(i-1) = q_i W_i^T         gradients: W_i: s_(i-1)^T q_i,  b_i: sum q_i

so u_i and q_i are the derivatives of the error by s_i and z_i. The forward sweep computes this; the backward sweep
takes what the outer loss says about the error and about its gradients (`error_bar`, `bars`) and gives the derivatives
by weights and head: reverse-mode differentiation by hand, of a chain that was itself a gradient.

The error is a sum, not a mean: in half precision the gradient of a mean over 100,000 pixels underflows.

Precision: `dtype` is that of the matrix products between layers and of what is kept for the backward sweep. Layer 0 is
always in that of the coordinates (coordinates times omega need more digits than bf16 has), and so are errors and
residuals. A hidden layer's weight gradient is what its product gives, in `dtype`; the others are in full precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Network(NamedTuple):
    """The tensors of a SIREN: weight [in, H] and bias [H] of each sine layer, or [B, in, H] and [B, H]; the rest."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    head_weight: Tensor
    """[C, H]"""
    head_bias: Tensor
    """[C]"""
    out_scale: Tensor
    """[C]"""


class States(NamedTuple):
    """What the backward sweep needs of the forward sweep, per layer: s_i, c_i and u_i, in the products' dtype."""

    sin: tuple[Tensor, ...]
    cos: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


class Layers(NamedTuple):
    """Tensors in the form of the sine layers: gradients and what else is [B, in, H] and [B, H] for each."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def sincos(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sin z, cos z) in `dtype`; compiled for the CPU in half precision, by polynomials that are good to 1e-6.

    There the library's sine and cosine, made for the last bit of fp32, were the largest part of what is not a product.
    Uncompiled, each term would be a pass over memory; GPUs have both in hardware.
    """
    if dtype.itemsize > 2 or z.device.type != "cpu" or not torch.compiler.is_compiling():
        return z.sin().to(dtype), z.cos().to(dtype)
    turns = torch.round(z * (1 / (2 * math.pi)))
    # Half the angle, reduced to [-pi/2, pi/2]. The first part of 2 pi has few bits: its product with `turns` is exact.
    half = 0.5 * ((z - turns * 6.28125) - turns * (2 * math.pi - 6.28125))
    square = half * half
    sin, cos = half * _polynomial(square, _SIN), _polynomial(square, _COS)
    return (2 * sin * cos).to(dtype), (1 - 2 * sin * sin).to(dtype)


# sin(x) / x and cos(x) as polynomials in x^2 on [-pi/2, pi/2], interpolated at Chebyshev nodes; to 7e-9 and 5e-8.
_SIN = (0.9999999957158403, -0.16666657969904866, 0.008333050617330431, -0.00019809046357531517, 2.6051662763292757e-06)
_COS = (0.9999999532476094, -0.4999990506281102, 0.041663578930703604, -0.0013853666933065503, 2.3153174156359584e-05)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        result = result * x + coefficient
    return result


def _times_coords(coords: Tensor, weight: Tensor) -> Tensor:
    """x W for the two or three columns of x: as a sum it fuses with its neighbours, as a product it cannot."""
    terms = [coords[..., d, None] * weight[..., d, None, :] for d in range(coords.shape[-1])]
    return sum(terms[1:], terms[0])


def _coords_times(coords: Tensor, x: Tensor) -> Tensor:
    """x^T of the coordinates times a [..., P, H] tensor: [..., D, H]."""
    return torch.stack([(coords[..., d, None] * x).sum(-2) for d in range(coords.shape[-1])], dim=-2)


def _hidden(net: Network, coords: Tensor, omega: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """s_i and c_i of every layer; [P, H] where neither coordinates nor weights have a batch, else [B, P, H]."""
    s, c = sincos(omega * (_times_coords(coords, net.weights[0]) + net.biases[0].unsqueeze(-2)), dtype)
    sin, cos = [s], [c]
    for weight, bias in zip(net.weights[1:], net.biases[1:], strict=True):
        s, c = sincos(sin[-1] @ weight.to(dtype) + bias.unsqueeze(-2), dtype)
        sin.append(s)
        cos.append(c)
    return sin, cos


def forward_sweep(
    net: Network, coords: Tensor, values: Tensor, omega: float, dtype: torch.dtype
) -> tuple[Tensor, Layers, States]:
    """Error [B] of each signal, its gradient, and the states.

    Args:
        net: with or without a batch in its layers; at least one of layers and coordinates has one.
        coords: [P, D] or [B, P, D].
        values: [B, P, C].
    """
    sin, cos = _hidden(net, coords, omega, dtype)
    head = net.head_weight.to(dtype)
    residual = (sin[-1] @ head.mT + net.head_bias) * net.out_scale - values
    error = residual.square().sum((-2, -1))

    u = (residual * (2 * net.out_scale)).to(dtype) @ head
    upstream, weight_gradients, bias_gradients = [u], [], []
    for i in range(len(sin) - 1, 0, -1):
        q = u * cos[i]
        weight_gradients.append(sin[i - 1].mT @ q)
        bias_gradients.append(q.sum(-2, dtype=error.dtype))
        u = q @ net.weights[i].to(dtype).mT
        upstream.append(u)
    q = omega * (u.to(error.dtype) * cos[0])
    weight_gradients.append(_coords_times(coords, q))
    bias_gradients.append(q.sum(-2))
    gradients = Layers(tuple(weight_gradients[::-1]), tuple(bias_gradients[::-1]))
    return error, gradients, States(tuple(sin), tuple(cos), tuple(upstream[::-1]))


def backward_sweep(
    net: Network,
    coords: Tensor,
    values: Tensor,
    omega: float,
    dtype: torch.dtype,
    states: States,
    error_bar: Tensor,
    bars: Layers,
) -> Network:
    """Derivatives by every tensor of the network, of a loss whose derivatives by `forward_sweep`'s results are given.

    Args:
        error_bar: [B], derivative by the error.
        bars: derivatives by its gradients.

    Returns:
        derivatives in the form of `net`; those of the layers have a batch dimension if the layers have.
    """
    sin, cos, upstream = states
    low, full, layers = [w.to(dtype) for w in net.weights], error_bar.dtype, len(sin)

    # Along the gradient's chain against its direction, layer 0 to L: q_bar, u_bar and q_bar u s, the part of z_bar that
    # comes from cos; W_i's part from u_(i-1) = q_i W_i^T.
    q_bar = omega * (_times_coords(coords, bars.weights[0]) + bars.biases[0].unsqueeze(-2))
    u_bar, turned = (q_bar * cos[0]).to(dtype), [(q_bar * upstream[0] * sin[0]).to(dtype)]
    weight_bars, q = [], [upstream[0]]
    for i in range(1, layers):
        q.append(upstream[i] * cos[i])
        weight_bars.append(_matched(u_bar, q[i], net.weights[i]))
        q_bar = (sin[i - 1] @ bars.weights[i].to(dtype)).to(full) + u_bar @ low[i] + bars.biases[i].unsqueeze(-2)
        u_bar = (q_bar * cos[i]).to(dtype)
        turned.append((q_bar * upstream[i] * sin[i]).to(dtype))

    # Head: u_L = e A, e = 2 r o, r = f o - values, f = s_L A^T + a.
    head = net.head_weight.to(dtype)
    f = sin[-1] @ head.mT + net.head_bias
    residual = f * net.out_scale - values
    e_bar = 2 * (u_bar @ head.mT).to(full)
    r_bar = e_bar * net.out_scale + 2 * error_bar[:, None, None] * residual
    f_bar = r_bar * net.out_scale
    head_bar = 2 * _outer(residual * net.out_scale, u_bar) + _outer(f_bar, sin[-1])
    scale_bar = (e_bar * residual + r_bar * f).sum((0, 1))

    # Back through the layers, L to 0.
    s_bar = (f_bar.to(dtype) @ head).to(full)
    bias_bars = []
    for i in range(layers - 1, 0, -1):
        z_bar = s_bar * cos[i] - turned[i]
        bias_bars.append(z_bar.sum(-2))
        z_bar = z_bar.to(dtype)
        weight_bars[i - 1] = weight_bars[i - 1] + _matched(sin[i - 1], z_bar, net.weights[i])
        s_bar = (z_bar @ low[i].mT).to(full) + q[i] @ bars.weights[i].to(dtype).mT
    z_bar = omega * (s_bar * cos[0] - turned[0])
    bias_bars.append(z_bar.sum(-2))
    weight_bars.insert(0, _coords_times(coords, z_bar))
    if net.weights[0].ndim == 2:
        weight_bars[0] = weight_bars[0].sum(0)
        bias_bars = [bar.sum(0) for bar in bias_bars]
    return Network(tuple(weight_bars), tuple(bias_bars[::-1]), head_bar, f_bar.sum((0, 1)), scale_bar)


def _matched(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x^T y over the points of each signal; where the weight has no batch, over the signals too; as the weight."""
    if weight.ndim == 2:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    return (x.mT @ y).to(weight.dtype)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x^T y over points and signals: [C, H] of [B, P, C] in full precision and [B, P, H]."""
    return (x.flatten(0, -2).to(y.dtype).mT @ y.flatten(0, -2)).to(x.dtype)


def render_sweep(net: Network, coords: Tensor, omega: float, dtype: torch.dtype) -> tuple[Tensor, States]:
    """The values [B, P, C] of networks with a batch in their layers, and the states without `upstream`."""
    sin, cos = _hidden(net, coords, omega, dtype)
    prediction = (sin[-1] @ net.head_weight.to(dtype).mT + net.head_bias) * net.out_scale
    return prediction, States(tuple(sin), tuple(cos), ())


def render_backward_sweep(
    net: Network, coords: Tensor, omega: float, dtype: torch.dtype, states: States, bar: Tensor
) -> Network:
    """Derivatives by every tensor of the network, of a loss whose derivative by the values is `bar` [B, P, C]."""
    sin, cos, _ = states
    head = net.head_weight.to(dtype)
    f = sin[-1] @ head.mT + net.head_bias
    f_bar = bar * net.out_scale
    s_bar = f_bar.to(dtype) @ head
    weight_bars, bias_bars = [], []
    for i in range(len(sin) - 1, 0, -1):
        z_bar = s_bar * cos[i]
        bias_bars.append(z_bar.sum(-2, dtype=bar.dtype))
        weight_bars.append((sin[i - 1].mT @ z_bar).to(bar.dtype))
        s_bar = z_bar @ net.weights[i].to(dtype).mT
    z_bar = omega * (s_bar.to(bar.dtype) * cos[0])
    bias_bars.append(z_bar.sum(-2))
    weight_bars.append(_coords_times(coords, z_bar))
    head_bar, scale_bar = _outer(f_bar, sin[-1]), (bar * f).sum((0, 1))
    return Network(tuple(weight_bars[::-1]), tuple(bias_bars[::-1]), head_bar, f_bar.sum((0, 1)), scale_bar)


# ---- the first step, where every signal starts from the same base at the same points --------------------------------
#
# There s_i, c_i and the prediction have no batch, and u_i is linear in e, which has: u_i = sum over channels of e[c]
# times U_i[c], the derivative of channel c by s_i. So the chain runs once a channel instead of once a signal, and all
# products with signals are single large ones: tensors lie as [P, B, H] here, the signals side by side.


def shared_forward_sweep(
    net: Network, coords: Tensor, values: Tensor, omega: float, dtype: torch.dtype
) -> tuple[Tensor, Layers, States]:
    """`forward_sweep` for layers without a batch and coords [P, D]; `upstream` holds U_i [channels, P, H]."""
    sin, cos = _hidden(net, coords, omega, dtype)
    head = net.head_weight.to(dtype)
    residual = (sin[-1] @ head.mT + net.head_bias) * net.out_scale - values
    error = residual.square().sum((-2, -1))
    e = (residual * (2 * net.out_scale)).transpose(0, 1)

    u = head.unsqueeze(1).expand(-1, *sin[-1].shape)
    upstream, weight_gradients, bias_gradients = [u], [], []
    for i in range(len(sin) - 1, -1, -1):
        m = u * cos[i]
        q = _mixed(e, m)
        if i:
            product = sin[i - 1].mT @ q.to(dtype).flatten(1)
            weight_gradients.append(product.view(-1, *q.shape[1:]).transpose(0, 1).contiguous())
            bias_gradients.append(q.sum(0))
            u = m @ net.weights[i].to(dtype).mT
            upstream.append(u)
    columns = [(coords[:, d, None, None] * q).sum(0) for d in range(coords.shape[-1])]
    weight_gradients.append(omega * torch.stack(columns, dim=1))
    bias_gradients.append(omega * q.sum(0))
    gradients = Layers(tuple(weight_gradients[::-1]), tuple(bias_gradients[::-1]))
    return error, gradients, States(tuple(sin), tuple(cos), tuple(upstream[::-1]))


def shared_backward_sweep(
    net: Network,
    coords: Tensor,
    values: Tensor,
    omega: float,
    dtype: torch.dtype,
    states: States,
    error_bar: Tensor,
    bars: Layers,
) -> Network:
    """`backward_sweep` for the same case."""
    sin, cos, upstream = states
    low, full, layers = [w.to(dtype) for w in net.weights], error_bar.dtype, len(sin)
    head = net.head_weight.to(dtype)
    f = sin[-1] @ head.mT + net.head_bias
    residual = f * net.out_scale - values
    e = (residual * (2 * net.out_scale)).transpose(0, 1)

    # What the gradients of the signals say about e and U, and about the states that they multiply.
    e_bar = torch.zeros_like(e)
    s_bars, u_bar, turned, weight_bars = [], None, [], []
    for i in range(layers):
        m = upstream[i] * cos[i]
        if i == 0:
            terms = [coords[:, d, None, None] * bars.weights[0][:, d] for d in range(coords.shape[-1])]
            q_bar = omega * (sum(terms[1:], terms[0]) + bars.biases[0])
        else:
            across = bars.weights[i].to(dtype).transpose(0, 1).flatten(1)
            q_bar = (sin[i - 1] @ across).view(len(sin[0]), *bars.biases[i].shape).to(full) + bars.biases[i]
            s_bars.append((_mixed(e, m).to(dtype).flatten(1) @ across.mT).to(full))
        e_bar = e_bar + torch.stack([(q_bar * m_c.unsqueeze(1)).sum(-1) for m_c in m], dim=-1)
        m_bar = torch.stack([(e[..., c, None] * q_bar).sum(1) for c in range(e.shape[-1])])
        if u_bar is not None:
            weight_bars.append((u_bar.flatten(0, 1).mT @ m.flatten(0, 1)).to(full))
            m_bar = m_bar + u_bar @ low[i]
        u_bar = (m_bar * cos[i]).to(dtype)
        turned.append((m_bar * upstream[i]).sum(0) * sin[i])

    r_bar = 2 * (e_bar * net.out_scale).transpose(0, 1) + 2 * error_bar[:, None, None] * residual
    scale_bar = (2 * e_bar.transpose(0, 1) * residual + r_bar * f).sum((0, 1))
    f_bar = r_bar.sum(0) * net.out_scale
    assert u_bar is not None
    head_bar = u_bar.sum(1, dtype=full) + _outer(f_bar, sin[-1])

    s_bar = (f_bar.to(dtype) @ head).to(full)
    bias_bars = []
    for i in range(layers - 1, 0, -1):
        z_bar = s_bar * cos[i] - turned[i]
        bias_bars.append(z_bar.sum(0))
        z_bar = z_bar.to(dtype)
        weight_bars[i - 1] = weight_bars[i - 1] + (sin[i - 1].mT @ z_bar).to(full)
        s_bar = z_bar @ low[i].mT + s_bars[i - 1]
    z_bar = omega * (s_bar * cos[0] - turned[0])
    bias_bars.append(z_bar.sum(0))
    weight_bars.insert(0, _coords_times(coords, z_bar))
    return Network(tuple(weight_bars), tuple(bias_bars[::-1]), head_bar, f_bar.sum(0), scale_bar)


def _mixed(e: Tensor, m: Tensor) -> Tensor:
    """q [P, B, H] = sum over channels of e [P, B, C] times m [C, P, H], in full precision."""
    terms = [e[..., c, None] * m_c.unsqueeze(1) for c, m_c in enumerate(m)]
    return sum(terms[1:], terms[0])
