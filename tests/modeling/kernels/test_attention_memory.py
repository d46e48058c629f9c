"""attention(): no tensor of L x S, none of uninitialised memory's values, and the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from urform import ALiBi, Layout, RelativeBias, T5Bias, attention
from urform.modeling.kernels.blockwise.attention_buckets import Limits

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (64, 64)},
    "t5": {"bias": lambda: T5Bias(torch.randn(32, 2, requires_grad=True))},
    "alibi": {"bias": lambda: ALiBi(torch.rand(2, requires_grad=True)), "causal": True},
    "relative": {"bias": lambda: RelativeBias(torch.randn(2, 65, requires_grad=True))},
    "padded": {"padded": True},
    "padded-causal": {"padded": True, "causal": True},
    "more-keys": {"causal": True, "more": 500},
    "dropout": {"dropout_p": 0.1},
    "seed": {"dropout_p": 0.1, "seed": 1},
    "softcap": {"softcap": 5.0},
    "lse": {"return_lse": True},
}


class Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor that has memory of its own (an expanded one has not)."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("case", "packed"), [(case, packed) for case in CASES for packed in (False, True) if not (packed and "pad" in case)]
)
def test_memory_is_linear_in_the_lengths(
    case: str, packed: bool, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(CASES[case])
    monkeypatch.setattr(Limits, "elements", 1 << 16)
    length = 1500
    keys = length + options.pop("more", 0)
    q = torch.randn(1, length, 2, 8, requires_grad=trains)
    k = torch.randn(1, keys, 2, 8, requires_grad=trains)
    bias = options.pop("bias", lambda: None)()
    if options.pop("padded", False):
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[:, -7:] = False
        options |= {"q_layout": Layout.padded(mask), "kv_layout": Layout.padded(mask)}
    if packed:
        options |= {"q_layout": Layout.packed(torch.tensor([0, length]))}
        options |= {"kv_layout": Layout.packed(torch.tensor([0, keys]))}
        q, k = q[0], k[0]
    with Largest() as largest, torch.set_grad_enabled(trains):
        result = attention(q, k, k, bias=bias, **options)
        out = result[0] if isinstance(result, tuple) else result
        if trains:
            out.sum().backward()
    assert largest.elements < length * keys // 10


class Poisoned(TorchDispatchMode):
    """Fills memory that nobody has written with NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
        if func.overloadpacket.__name__ in fresh and out.is_floating_point():
            out.fill_(float("nan"))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("window", [None, (3, 1)])
def test_no_value_comes_from_uninitialised_memory_and_bits_repeat(
    window: tuple[int, int] | None, small: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        for name, size in {"elements": 64, "keys": 4, "rows": 2}.items():
            monkeypatch.setattr(Limits, name, size)

    def run(causal: bool, biased: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        layouts = [Layout.packed(torch.tensor([0, *sizes]).cumsum(0)) for sizes in ([5, 0, 9, 3, 70], [7, 4, 0, 2, 66])]
        shapes = ((87, 4, 16), (79, 2, 16), (79, 2, 8))
        leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
        table = torch.randn(8, 4, generator=generator).requires_grad_()
        out, lse = attention(
            *leaves, q_layout=layouts[0], kv_layout=layouts[1], causal=causal, window=window, dropout_p=0.3, seed=3,
            bias=T5Bias(table) if biased else None, return_lse=True, backend="blockwise",
        )  # fmt: skip
        probe = torch.randn(out.shape, generator=generator)
        grads = torch.autograd.grad((out.float() * probe).sum(), [*leaves, table] if biased else leaves)
        return [out.detach(), lse.detach(), *grads]

    for causal in (False, True):
        for biased in (False, True):
            expected = run(causal, biased)
            for mode in (Poisoned(), *(Largest() for _ in range(3))):
                with mode:
                    again = run(causal, biased)
                assert all(torch.equal(x, y) for x, y in zip(expected, again, strict=True))
