"""Linear layer and cross-entropy as one function: the loss of a language model without its logits.

The full logits are the largest tensor of a training step. Here rows with an ignored label are dropped first (a masked
language model projects its masked positions alone), the rest go through in chunks, and each chunk's part of the
gradients is made while its probabilities are at hand. Memory beyond the gradients is one chunk; the time of the passes
that logits, log-softmax and its backward make over memory is gone.

Eager mode runs an `autograd.Function`; `torch.compile` and `torch.export` see the operator
`urform::linear_cross_entropy` around the same code.

Shapes: N rows, K kept rows, R rows of a block, E hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]


class _Sizes(NamedTuple):
    """How much is worked on at once (measured with benchmarks/loss.py)."""

    chunk_elements: int  # logits of one matrix product
    chunk_rows: int  # at least so many rows, however large the vocabulary: every chunk passes over weight and gradient
    block_elements: int  # logits that go through the passes of the softmax together, in the caches of one core
    slice_elements: int  # of the low-precision product that is added to the float32 gradient of the weight


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross-entropy of `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`.

    Products run in the inputs' dtype, or autocast's; the softmax, the loss and the sum of the weight's gradient over
    rows are in float32 (float64 for float64 inputs). Gradients are computed in the forward pass, for what requires
    them, and come back in the dtype of their tensor. Rows with an ignored label are never read. If no label is kept,
    loss and gradients are 0, where `torch.nn.functional.cross_entropy` gives NaN and so loses the run to one batch.

    Args:
        hidden: `[..., E]`.
        weight: `[V, E]`, tied to an embedding or not.
        labels: Integers `[...]` in [0, V), or `ignore_index`.
        bias: `[V]`.
        label_smoothing: Share of the target spread evenly over the vocabulary, as in
            `torch.nn.functional.cross_entropy` (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        z_loss: Factor of `logsumexp(logits)^2`, added to every kept row's loss (PaLM: Chowdhery et al. 2022,
            arXiv:2204.02311, section 5, with 1e-4).
        softcap: Bound of the logits (Gemma 2, arXiv:2408.00118, section 2), or None.
        logit_scale: Factor of the logits before the softcap (muP's output multiplier, Cohere's `logit_scale`).
        ignore_index: Label of rows that do not count.
        num_items: What the sum over rows is divided by: a number or a 0-dim tensor (transformers'
            `num_items_in_batch`: the labels of a whole update), or None for the number of kept labels.
        reduction: "mean" or "sum"; "sum" divides by nothing.

    Returns:
        0-dim, float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or options that do not fit; on CPU also a label outside [0, V).
        RuntimeError: In a backward pass with `create_graph=True`: there is no second derivative.
    """
    _check_tensors(hidden, weight, labels, bias)
    _check_options(label_smoothing, z_loss, softcap, reduction, num_items)
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        others = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ValueError(f"hidden is {dtype} but {others}; convert one, or run under torch.autocast")
    if reduction == "sum":
        num_items = 1
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.int64)
    graph = torch.is_grad_enabled()
    needs = [graph and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    options = (float(label_smoothing), float(z_loss), softcap, float(logit_scale), ignore_index, dtype, needs)
    if torch.compiler.is_compiling():
        loss: Tensor = torch.ops.urform.linear_cross_entropy(hidden, weight, bias, labels, num_items, *options)[0]
    else:
        loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels, num_items, *options)
    return loss


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Check that the tensors fit; raise ValueError for what the operator would misread."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., E] and weight [V, E], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have hidden's shape without its last dimension {tuple(hidden.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels must be class indices of an integer dtype, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] like weight's rows, got {tuple(bias.shape)}")


def _check_options(
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, num_items: int | Tensor | None
) -> None:
    """Check the options; raise ValueError with the argument and its value."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be 0 or more, got {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if num_items is None:
        return
    if reduction == "sum":
        raise ValueError(f"reduction='sum' divides by nothing, but num_items is {num_items}; use reduction='mean'")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}")
    elif num_items <= 0:
        raise ValueError(f"num_items must be positive, got {num_items}")


def _sizes(device: str) -> _Sizes:
    if device == "cpu":
        return _Sizes(1 << 21, 256, torch.get_num_threads() << 18, 1 << 20)
    return _Sizes(1 << 25, 1024, 1 << 25, 1 << 26)


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a gradient waits for the backward pass: float16's range needs the loss scale first."""
    return torch.float32 if dtype == torch.float16 else dtype


def _kept_rows(labels_N: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor | None, Tensor]:
    """Return the indices of the rows that count (None for all of them) and their labels, checked where that is free."""
    index_K = labels_N.ne(ignore_index).nonzero().squeeze(1)
    everything = len(index_K) == len(labels_N)
    labels_K = labels_N.long() if everything else labels_N[index_K].long()
    if labels_K.device.type == "cpu" and len(labels_K):
        low, high = (int(x) for x in labels_K.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"labels contains {low if low < 0 else high}, outside the vocabulary of {vocabulary} rows of weight; "
                f"rows to leave out carry ignore_index={ignore_index}"
            )
    return (None if everything else index_K), labels_K


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by hidden, weight and bias; an empty tensor where none is needed.

    The gradient of a row's logits is `softmax * (1 + 2 z lse) - (1 - s) onehot - s / V`. Without a softcap the last
    term is the same for all logits: its part of every gradient, and of the loss, follows from the sums of the rows of
    hidden and of weight, and no pass over the logits is spent on it.
    """
    V, E = weight.shape
    index_K, labels_K = _kept_rows(labels.flatten(), ignore_index, V)
    hidden_NE = hidden.reshape(-1, E)
    hidden_KE = (hidden_NE if index_K is None else hidden_NE[index_K]).to(dtype)
    weight_VE, bias_V = weight.to(dtype), None if bias is None else bias.to(dtype)
    scale = _share(len(labels_K), num_items)
    wide = torch.promote_types(dtype, torch.float32)
    sums = _Sums(hidden, weight, wide, needs, step=scale * logit_scale)
    if softcap is None and label_smoothing:
        sums.begin_with_smoothing(label_smoothing / V, logit_scale, hidden_KE, weight, bias_V)
    else:
        sums.begin()
    if index_K is not None:
        sums.d_hidden.zero_()

    sizes = _sizes(hidden.device.type)
    size, block = _chunk_rows(len(labels_K), V, sizes)
    buffer_RV = hidden.new_empty((size, V), dtype=dtype)
    wide_RV = hidden.new_empty((min(block, size), V), dtype=wide) if dtype != wide else None
    factor = logit_scale if softcap is None else logit_scale / softcap  # of the product, before tanh
    for start in range(0, len(labels_K), size):
        h_RE, y_R1 = hidden_KE[start : start + size], labels_K[start : start + size, None]
        x_RV = _logits(h_RE, weight_VE, bias_V, factor, out=buffer_RV[: len(h_RE)])
        for part_RV, label_R1 in zip(x_RV.split(block), y_R1.split(block), strict=True):
            g_RV = part_RV if wide_RV is None else wide_RV[: len(part_RV)].copy_(part_RV)
            sums.total += _softmax_block(g_RV, label_R1, label_smoothing, z_loss, softcap, any(needs))
            sums.add_block(g_RV, part_RV)
        rows = slice(start, start + size) if index_K is None else index_K[start : start + size]
        sums.add_products(x_RV, h_RE, weight_VE, rows, sizes.slice_elements)
    d_hidden = sums.d_hidden.view(hidden.shape) if needs[0] else sums.d_hidden
    d_weight = sums.d_weight.to(_saved_dtype(weight.dtype))
    d_bias = sums.d_bias.to(_saved_dtype((weight if bias is None else bias).dtype))
    return (sums.total * scale).to(wide), d_hidden, d_weight, d_bias


def _share(kept: int, num_items: Tensor | None) -> float:
    """Return the factor of the sum over rows: one over the items, 0 where no label is kept."""
    items = float(kept if num_items is None else num_items)
    if kept and not items > 0:
        raise ValueError(f"num_items must be positive, got {items} with {kept} labels that are kept")
    return 1 / items if kept else 0.0


def _chunk_rows(kept: int, vocabulary: int, sizes: _Sizes) -> tuple[int, int]:
    """Return how many rows one matrix product takes, and how many of them the softmax takes at once."""
    chunks = math.ceil(kept / max(sizes.chunk_rows, sizes.chunk_elements // vocabulary))
    return math.ceil(kept / max(chunks, 1)) or 1, max(1, sizes.block_elements // vocabulary)


def _logits(h_RE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, factor: float, out: Tensor) -> Tensor:
    """Fill `out` `[R, V]` with `factor * (h weight^T + bias)`."""
    if bias_V is None:
        return out.addmm_(h_RE, weight_VE.t(), beta=0, alpha=factor)
    return torch.addmm(bias_V, h_RE, weight_VE.t(), beta=factor, alpha=factor, out=out)


class _Sums:
    """The loss and the gradients while the chunks are added up; an empty tensor for a gradient that nobody needs.

    Args:
        hidden: `[..., E]`; weight: `[V, E]`.
        wide: dtype of the sums.
        needs: which gradients are wanted, of hidden, weight and bias.
        step: from a gradient of logits to one of their product, divided by the items.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wide: torch.dtype, needs: list[bool], step: float):
        rows = hidden.numel() // max(weight.shape[1], 1)
        new = hidden.new_empty
        self.needs, self.step = needs, step
        self.total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        self.d_hidden = new((rows, weight.shape[1]) if needs[0] else 0, dtype=_saved_dtype(hidden.dtype))
        self.d_weight = new(weight.shape if needs[1] else 0, dtype=wide)
        self.d_bias = new(weight.shape[0] if needs[2] else 0, dtype=wide)
        self.shift_E: Tensor | None = None

    def begin(self) -> None:
        """Clear the sums."""
        self.d_weight.zero_()
        self.d_bias.zero_()

    def begin_with_smoothing(
        self, spread: float, logit_scale: float, hidden_KE: Tensor, weight_VE: Tensor, bias_V: Tensor | None
    ) -> None:
        """Begin with what smoothing adds to all logits alike: `spread` is the target probability of every class."""
        wide = self.d_weight.dtype
        rows_E, columns_E = hidden_KE.sum(0, dtype=wide), weight_VE.sum(0, dtype=wide)
        self.total -= spread * logit_scale * rows_E.double().dot(columns_E.double())
        if bias_V is not None:
            self.total -= spread * logit_scale * len(hidden_KE) * bias_V.sum(dtype=torch.float64)
        self.shift_E = columns_E * (spread * self.step)
        self.d_bias.fill_(-len(hidden_KE) * spread * self.step)
        if self.needs[1]:
            self.d_weight[:] = rows_E * (-spread * self.step)

    def add_block(self, g_RV: Tensor, part_RV: Tensor) -> None:
        """Add the gradients of some rows' logits to the bias's, and write them where the products read them."""
        if self.needs[2]:
            self.d_bias.add_(g_RV.sum(0), alpha=self.step)
        if g_RV is not part_RV and any(self.needs):
            part_RV.copy_(g_RV)

    def add_products(
        self, g_RV: Tensor, h_RE: Tensor, weight_VE: Tensor, rows: slice | Tensor, slice_elements: int
    ) -> None:
        """Write the gradient of a chunk's rows of hidden, and add to the weight's."""
        if self.needs[0]:
            d_RE = torch.mm(g_RV, weight_VE).to(self.d_weight.dtype).mul_(self.step)
            if self.shift_E is not None:
                d_RE -= self.shift_E
            self.d_hidden[rows] = d_RE.to(self.d_hidden.dtype)
        if self.needs[1]:
            _add_product(self.d_weight, g_RV, h_RE, self.step, slice_elements)


def _softmax_block(
    x_RV: Tensor, label_R1: Tensor, smoothing: float, z_loss: float, softcap: float | None, gradient: bool
) -> Tensor:
    """Return the sum of the rows' losses; what they divide by and, without a softcap, the smoothing are left out.

    `x_RV` (the logits, before the softcap) is overwritten by the loss's gradient if one is wanted.
    """
    tanh_RV = None
    if softcap is not None:
        tanh_RV = x_RV.tanh_().clone()
        x_RV.mul_(softcap)
    # log(sum(exp(x))) from the largest logit and the largest probability, which is at least 1/V: one pass each, where
    # logsumexp would take the exponentials a second time.
    top_R1 = x_RV.amax(1, keepdim=True)
    loss_R1 = (smoothing - 1) * x_RV.gather(1, label_R1)
    if smoothing and tanh_RV is not None:
        loss_R1 -= smoothing * x_RV.mean(1, keepdim=True)
    if x_RV.device.type == "cpu":
        torch.softmax(x_RV, 1, out=x_RV)  # row by row: maximum, exponentials and sum, division
    else:
        x_RV.copy_(torch.softmax(x_RV, 1))
    lse_R1 = top_R1 - x_RV.amax(1, keepdim=True).log_()
    loss_R1 += lse_R1
    if z_loss:
        loss_R1 += z_loss * lse_R1.square()
    if gradient:
        if z_loss:
            x_RV *= 1 + 2 * z_loss * lse_R1
        x_RV.scatter_add_(1, label_R1, torch.full_like(lse_R1, smoothing - 1))
        if tanh_RV is not None:
            if smoothing:
                x_RV -= smoothing / x_RV.shape[1]
            x_RV.addcmul_(x_RV, tanh_RV.square_(), value=-1)
    return loss_R1.sum(dtype=torch.float64)


def _add_product(sum_VE: Tensor, g_RV: Tensor, h_RE: Tensor, alpha: float, slice_elements: int) -> None:
    """Add `alpha * g^T h` to a sum that may be wider than the factors."""
    if sum_VE.dtype == g_RV.dtype:
        sum_VE.addmm_(g_RV.t(), h_RE, alpha=alpha)
        return
    size = max(1, slice_elements // sum_VE.shape[1])
    for sum_SE, g_RS in zip(sum_VE.split(size), g_RV.split(size, dim=1), strict=True):
        sum_SE.add_(torch.mm(g_RS.t(), h_RE).to(sum_VE.dtype), alpha=alpha)


def _scaled(
    grad_output: Tensor, gradients: tuple[Tensor, ...], needs: list[bool], dtypes: list[torch.dtype]
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy computes its gradients in the forward pass and cannot be differentiated twice: "
            "call backward without create_graph=True, or compute logits and torch.nn.functional.cross_entropy"
        )
    return tuple(
        (gradient * grad_output).to(dtype) if need else None
        for gradient, need, dtype in zip(gradients, needs, dtypes, strict=True)
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """The eager mode's form: a dispatch through `torch.library` costs what a small loss does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.needs = options[-1]
        ctx.dtypes = [t.dtype if t is not None else weight.dtype for t in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            loss, *gradients = _loss_and_gradients(hidden, weight, bias, *options)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,), gradients = grad_outputs, ctx.saved_tensors
        unused = (None,) * 9
        # One process asks for exactly these gradients; a scaled copy would be a pass over memory for nothing.
        same = all(g.dtype == dtype for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        if same and not torch.is_grad_enabled() and grad_output.device.type == "cpu" and grad_output.item() == 1:
            return (*(g if need else None for g, need in zip(gradients, ctx.needs, strict=True)), *unused)
        return (*_scaled(grad_output, gradients, ctx.needs, ctx.dtypes), *unused)


@torch.library.custom_op("urform::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (label_smoothing, z_loss, softcap, logit_scale, ignore_index, dtype, needs)
    with torch.autocast(hidden.device.type, enabled=False):
        return _loss_and_gradients(hidden, weight, bias, labels, num_items, *options)


@_linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_items: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    dtype, needs = options[-2:]
    tensors = (hidden, weight, weight[:, 0] if bias is None else bias)
    gradients = (
        hidden.new_empty(t.shape if need else 0, dtype=_saved_dtype(t.dtype))
        for t, need in zip(tensors, needs, strict=True)
    )
    return hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32)), *gradients


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.dtypes = [t.dtype if t is not None else inputs[1].dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, grad_output: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    return (*_scaled(grad_output, ctx.saved_tensors, ctx.needs, ctx.dtypes), *(None,) * 9)


_linear_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
