"""Dropout by sixteen random bits an element: its statistics, its gradient, and the contract of PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from urform.modeling.kernels.dropout_bits import dropout, dropout_add

STEP = 2.0**-17  # how far a probability of sixteen bits may be from the one asked for


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_share_and_mean_within_four_sigma(p: float) -> None:
    count = 1_000_003
    out = dropout(torch.ones(count), p, True)
    kept = out != 0
    assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count) + STEP
    assert abs(out.double().mean() - 1) < 4 * math.sqrt(p / (1 - p) / count) + 1e-6
    values = out[kept].unique()
    assert len(values) == 1 and abs(1 / values.item() - (1 - p)) < STEP + 1e-7


def test_neighbours_are_independent() -> None:
    """Four elements share a random word: what survives of one says nothing of the others."""
    count, p = 1_000_000, 0.3
    kept = (dropout(torch.ones(count + 8), p, True) != 0).double()
    for lag in range(1, 9):
        both = (kept[:count] * kept[lag : count + lag]).mean()
        share = (1 - p) ** 2
        assert abs(both - share) < 5 * math.sqrt(share * (1 - share) / count) + 2 * STEP, lag
    for phase in range(4):
        assert abs(kept[phase::4].mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / (count / 4)) + STEP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0, 4), (2, 3, 11)])
def test_gradient_is_the_same_mask(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.4, True)
    assert out.dtype == dtype and out.shape == x.shape
    upstream = torch.randn(shape).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    exact = upstream.double() / (1 - round(0.4 * 65536) / 65536)
    torch.testing.assert_close(gradient, torch.where(out != 0, exact, 0).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_values_of_strided_inputs_are_scaled() -> None:
    x = torch.randn(9, 14)[:, ::2].t()
    assert not x.is_contiguous()
    out = dropout(x, 0.25, True)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.75)


@pytest.mark.parametrize("residual", [False, True])
def test_follows_torchs_seed(residual: bool) -> None:
    x = torch.randn(33, 7)

    def run() -> torch.Tensor:
        return dropout_add(x, x, 0.5, True) if residual else dropout(x, 0.5, True)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    torch.manual_seed(6)
    assert not torch.equal(run(), first) and not torch.equal(first, second)


def test_contract_of_pytorchs_dropout() -> None:
    x = torch.randn(50)
    assert torch.equal(dropout(x, 0.0, True), x) and torch.equal(dropout(x, 0.7, False), x)
    assert torch.equal(dropout(x, 1.0, True), F.dropout(x, 1.0, True))
    assert torch.equal(dropout_add(x, x, 0.7, False), x + x) and torch.equal(dropout_add(x, x, 1.0, True), x)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dropout(x, p, True)


def test_close_to_one_something_survives() -> None:
    """The largest probability of sixteen bits is below 1, so nothing is divided by 0."""
    out = dropout(torch.ones(4_000_000), 1 - 1e-9, True)
    kept = out != 0
    assert out.isfinite().all() and 20 < kept.sum() < 120  # 61 expected
    assert out.max() == 1 << 16


@pytest.mark.parametrize(
    ("residual_dtype", "dtype"),
    [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)],
)
def test_sum_with_the_residual(residual_dtype: torch.dtype, dtype: torch.dtype) -> None:
    residual = torch.randn(7, 13).to(residual_dtype).requires_grad_()
    x = torch.randn(7, 13).to(dtype).requires_grad_()
    upstream = torch.randn(7, 13).to(torch.promote_types(residual_dtype, dtype))
    torch.manual_seed(1)
    out = dropout_add(residual, x, 0.3, True)
    found = torch.autograd.grad(out, (residual, x), upstream)
    torch.manual_seed(1)
    wide = dropout(x.detach().double(), 0.3, True)  # the same draws, as they do not depend on the dtype
    want = residual.double() + wide
    assert out.dtype == upstream.dtype
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=2 * eps, atol=4 * eps)
    assert torch.equal(found[0], upstream.to(residual_dtype))
    mask = (wide != 0).double() / (1 - round(0.3 * 65536) / 65536)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1].double(), upstream.double() * mask, rtol=2 * eps, atol=0)


def test_shapes_that_broadcast() -> None:
    residual, x = torch.zeros(5, 4), torch.ones(4)
    out = dropout_add(residual, x, 0.5, True)
    assert out.shape == (5, 4) and torch.equal(out, out[:1].expand(5, 4)) and set(out.unique().tolist()) <= {0.0, 2.0}


def test_second_derivative() -> None:
    """The product is linear: the gradient of its gradient by the input is 0, by the upstream gradient the mask."""
    x = torch.randn(11, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.5, True)
    upstream = torch.randn(11, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(out, x, upstream, create_graph=True)
    (mask,) = torch.autograd.grad(gradient.sum(), upstream)
    torch.testing.assert_close(mask * x, out)
