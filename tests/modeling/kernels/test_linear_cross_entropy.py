"""linear_cross_entropy(): every option against a float64 implementation written here, with all logits in memory.

Shapes: B batch, L length, N rows, E hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within, exact
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from urform.modeling.kernels import loss_linear_cross_entropy as module
from urform.modeling.kernels.loss_linear_cross_entropy import linear_cross_entropy

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "items": {"num_items": 57},
    "sum": {"reduction": "sum"},
    "all": {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 2.0, "logit_scale": 1.7, "num_items": 13},
    "all but softcap": {"label_smoothing": 0.2, "z_loss": 0.02, "logit_scale": 0.7, "ignore_index": 3},
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, blocks and slices at the sizes of tests, none of which divides anything."""
    monkeypatch.setattr(module, "_sizes", lambda device: module._Sizes(200, 5, 70, 30))


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The definition, in the dtype of its inputs."""
    kept = labels.flatten() != ignore_index
    logits = hidden.flatten(0, -2)[kept] @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    target = torch.full_like(logits, label_smoothing / weight.shape[0])
    target[torch.arange(len(logits)), labels.flatten()[kept]] += 1 - label_smoothing
    top = logits.detach().amax(1, keepdim=True)
    lse = (logits - top).exp().sum(1).log() + top.squeeze(1)
    total = (lse - (target * logits).sum(1) + z_loss * lse**2).sum()
    if reduction == "sum":
        return total
    return total / (kept.sum() if num_items is None else num_items)


def make(
    shape: tuple[int, ...],
    embed: int,
    vocabulary: int,
    bias: bool = True,
    ignored: float = 0.4,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden = torch.randn(*shape, embed).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, embed) * embed**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, shape)
    labels[torch.rand(shape) < ignored] = ignore_index
    return hidden, weight, labels, torch.randn(vocabulary).to(dtype).requires_grad_() if bias else None


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The loss and its gradients, in float64."""
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, wanted))]


def truth(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[Tensor]:
    wide = [
        None if t is None else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        for t in (hidden, weight, bias)
    ]
    assert wide[0] is not None and wide[1] is not None
    return gradients(reference(wide[0], wide[1], labels, wide[2], **options), *wide)


def both(*tensors: Any, **options: Any) -> list[list[Tensor]]:
    """The definition's loss and gradients in float32 and in float64."""
    return [truth(*tensors, dtype=dtype, **options) for dtype in (torch.float32, torch.float64)]


def assert_near(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """In half precision: within `tolerance` of the largest element."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        error = (a - b).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance * (b.abs().max().item() if b.numel() else 1), error


# ---- numbers ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("small_pieces")
def test_loss_and_all_gradients_in_float32(name: str, bias: bool) -> None:
    options = OPTIONS[name]
    hidden, weight, labels, b = make((3, 13), 24, 37, bias, ignore_index=options.get("ignore_index", -100))
    ours = gradients(linear_cross_entropy(hidden, weight, labels, bias=b, **options), hidden, weight, b)
    assert_within(ours, *both(hidden, weight, labels, b, **options))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_options_in_any_combination(data: st.DataObject) -> None:
    """Random shapes, options, frozen parts, sizes of the pieces, gradients in float64."""
    draw: Callable[[Any], Any] = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(0,), (1,), (7,), (2, 9), (2, 3, 5), (40,)]))
    options: dict[str, Any] = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "softcap": draw(st.sampled_from([None, 0.7, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, -0.4, 2.0])),
        "ignore_index": draw(st.sampled_from([-100, 2])),
        "num_items": draw(st.sampled_from([11, torch.tensor(17)])),
    }
    if draw(st.booleans()):
        options |= {"num_items": None, "reduction": "sum"}
    ignored = draw(st.sampled_from([0.0, 0.5, 1.0]))
    tensors = make(shape, draw(st.integers(1, 9)), draw(st.integers(3, 50)), draw(st.booleans()), ignored,
                   options["ignore_index"], torch.float64)  # fmt: skip
    hidden, weight, labels, bias = tensors
    frozen = draw(st.sampled_from([(), (0,), (1,), (2,), (0, 2), (1, 2)]))
    for i in frozen:
        if (t := (hidden, weight, bias)[i]) is not None:
            t.requires_grad_(False)
    if not any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        hidden.requires_grad_()
    sizes = module._Sizes(*(draw(st.integers(1, 300)) for _ in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_sizes", lambda device: sizes)
        ours = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias, **options), hidden, weight, bias)
    expected = truth(hidden, weight, labels, bias, **options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float32_at_a_real_size_with_real_pieces(smoothing: float) -> None:
    hidden, weight, labels, _ = make((6, 101), 48, 10007, False, ignored=0.1)
    loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)
    assert_within(gradients(loss, hidden, weight), *both(hidden, weight, labels, None, label_smoothing=smoothing))


@pytest.mark.parametrize("mode", ["parameters", "autocast", "autocast-mixed"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("small_pieces")
def test_bfloat16_errs_no_more_than_torch(name: str, mode: str) -> None:
    """At most twice the error of the same formula with bfloat16 products and a float32 softmax by PyTorch.

    The largest error of several draws: in a single one the roundings of a bias's gradient may cancel.
    """
    options = OPTIONS[name]
    kept_only = {key: options[key] for key in ("label_smoothing", "ignore_index") if key in options}

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(hidden, weight, bias).float().flatten(0, 1) * options.get("logit_scale", 1.0)
        if cap := options.get("softcap"):
            logits = cap * torch.tanh(logits / cap)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum", **kept_only)
        kept = labels.flatten() != options.get("ignore_index", -100)
        loss = loss + options.get("z_loss", 0.0) * logits[kept].logsumexp(1).square().sum()
        return loss / (1 if "reduction" in options else options.get("num_items", kept.sum()))

    errors = []
    for _ in range(8):
        hidden, weight, labels, bias = make((5, 31), 40, 67, ignore_index=options.get("ignore_index", -100))
        assert bias is not None
        if mode == "parameters":
            hidden, weight, bias = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias))
        elif mode == "autocast-mixed":
            hidden = hidden.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode != "parameters"):
            loss = linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
            theirs = gradients(plain(hidden, weight, labels, bias), hidden, weight, bias)
        assert loss.dtype == torch.float32
        loss.backward()
        for t in (hidden, weight, bias):
            assert t.grad is not None and t.grad.dtype == t.dtype and t.grad.shape == t.shape
        ours = [loss.detach().double(), *(t.grad.double() for t in (hidden, weight, bias) if t.grad is not None)]
        expected = truth(hidden, weight, labels, bias, **options)
        errors.append(
            [
                [(x - c).abs().max() / c.abs().max() for x in (a, b)]
                for a, b, c in zip(ours, theirs, expected, strict=True)
            ]
        )
    for mine, their in torch.tensor(errors).amax(0).tolist():
        assert mine <= 2 * their + 1e-5


def test_the_weight_gradient_is_summed_in_float32_under_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks: a bfloat16 sum over them would lose whole digits."""
    monkeypatch.setattr(module, "_sizes", lambda device: module._Sizes(1, 4, 100, 64))
    hidden, weight, labels, _ = make((2000,), 16, 11, False, ignored=0, dtype=torch.bfloat16)
    ours = gradients(linear_cross_entropy(hidden, weight, labels, reduction="sum"), weight)
    logits = F.linear(hidden, weight).float()
    theirs = gradients(F.cross_entropy(logits, labels, reduction="sum"), weight)
    expected = [t for i, t in enumerate(truth(hidden, weight, labels, None, reduction="sum")) if i != 1]
    for a, b, c in zip(ours, theirs, expected, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6


def test_float16_gradients_wait_for_the_loss_scale() -> None:
    """1 / num_items times a small probability is below float16's range; the scaled gradient is not."""
    hidden, weight, labels, _ = make((8,), 16, 300, False, ignored=0, dtype=torch.float16)
    scale, items = 2.0**16, 100_000
    (linear_cross_entropy(hidden, weight, labels, num_items=items) * scale).backward()
    expected = truth(hidden, weight, labels, None, num_items=items)[1:]
    for t, c in zip((hidden, weight), expected, strict=True):
        assert t.grad is not None and t.grad.dtype == torch.float16
        assert (t.grad.double() / scale - c).abs().max() <= 4e-3 * c.abs().max()


@pytest.mark.parametrize("name", ["plain", "all", "all but softcap"])
@pytest.mark.usefixtures("small_pieces")
def test_gradcheck(name: str) -> None:
    options = OPTIONS[name]
    hidden, weight, labels, bias = make(
        (2, 5), 4, 9, dtype=torch.float64, ignore_index=options.get("ignore_index", -100)
    )
    torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, **options), (hidden, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Logits of thousands and labels of probability 0: finite, and right."""
    hidden, weight, labels, _ = make((20,), 8, 50, False, ignored=0, dtype=dtype)
    options: dict[str, Any] = {"logit_scale": 1000.0}
    ours = gradients(linear_cross_entropy(hidden, weight, labels, **options), hidden, weight)
    if dtype == torch.float32:
        assert_within(ours, *both(hidden, weight, labels, None, **options))
    else:
        assert_near(ours, truth(hidden, weight, labels, None, **options), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_on_the_accelerator(name: str, ignored: float, small_pieces: None) -> None:
    options = OPTIONS[name]
    tensors = make((3, 13), 24, 37, True, ignored, options.get("ignore_index", -100))
    device = torch.accelerator.current_accelerator()
    hidden, weight, labels, bias = (None if t is None else t.detach().to(device) for t in tensors)
    assert hidden is not None and weight is not None and labels is not None and bias is not None
    for t in (hidden, weight, bias):
        t.requires_grad_()
    ours = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias, **options), hidden, weight, bias)
    assert_within([t.cpu() for t in ours], *both(*tensors, **options))


# ---- which rows, which parts ----


def test_ignored_rows_are_never_read_and_get_zero() -> None:
    hidden, weight, labels, bias = make((4, 9), 8, 21)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    loss, d_hidden, d_weight, d_bias = gradients(
        linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias
    )
    assert (d_hidden[labels == -100] == 0).all() and (d_hidden[labels != -100] != 0).any(-1).all()
    kept = hidden.detach()[labels != -100].requires_grad_()
    expected = both(kept, weight, labels[labels != -100], bias)
    assert_within([loss, d_hidden[labels != -100], d_weight, d_bias], *expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 4)])
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(0)])
def test_no_kept_label_gives_zero(shape: tuple[int, ...], num_items: Any) -> None:
    hidden, weight, labels, bias = make(shape, 8, 11, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, num_items=num_items, label_smoothing=0.1)
    for tensor in gradients(loss, hidden, weight, bias):
        assert (tensor == 0).all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_shape_and_integer_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = make(shape, 8, 11, False, ignored=0)
    loss = linear_cross_entropy(hidden, weight, labels.to(dtype))
    ours = gradients(loss, hidden, weight)
    expected = []
    for wide in (torch.float32, torch.float64):
        h, w = (t.detach().to(wide, copy=True).requires_grad_() for t in (hidden, weight))
        expected.append(gradients(F.cross_entropy(F.linear(h, w).view(-1, 11), labels.flatten()), h, w))
    assert_within(ours, *expected)


def test_non_contiguous_inputs() -> None:
    hidden, weight, labels, bias = make((6, 10), 8, 22)
    assert bias is not None
    every_other, kept = hidden.transpose(0, 1)[::2], labels.T[::2] // 2  # -100 becomes -50
    loss = linear_cross_entropy(every_other, weight[::2], kept, bias=bias[::2], ignore_index=-50)
    ours = gradients(loss, hidden, weight, bias)
    expected = []
    for dtype in (torch.float32, torch.float64):
        h, w, b = (t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight, bias))
        loss = reference(h.transpose(0, 1)[::2], w[::2], kept, b[::2], ignore_index=-50)
        expected.append(gradients(loss, h, w, b))
    assert_within(ours, *expected)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_frozen_parts_get_no_gradient_and_change_nothing(needs: tuple[bool, ...]) -> None:
    tensors = make((4, 9), 8, 21)
    hidden, weight, labels, bias = tensors
    assert bias is not None
    full = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)
    for t, need in zip((hidden, weight, bias), needs, strict=True):
        t.requires_grad_(need)
    part = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)
    expected = [full[0], *(g for g, need in zip(full[1:], needs, strict=True) if need)]
    for a, b in zip(part, expected, strict=True):
        assert torch.equal(a, b)


def test_tied_weight_and_a_trainer_step() -> None:
    """Embedding and head share a parameter: gradients of both uses add up, over two parts, as in plain PyTorch."""
    vocabulary, tokens = 31, torch.randint(0, 31, (2, 4, 7))
    fused = nn.Embedding(vocabulary, 12)
    plain = [exact(fused).to(dtype) for dtype in (torch.float32, torch.float64)]
    items = torch.tensor(tokens.numel())
    for part in tokens:
        linear_cross_entropy(fused(part), fused.weight, part.flip(1), num_items=items).backward()
        for table in plain:
            logits = F.linear(table(part), table.weight)
            (F.cross_entropy(logits.flatten(0, 1), part.flip(1).flatten(), reduction="sum") / items).backward()
    assert_within(fused.weight.grad, *(table.weight.grad for table in plain))


def test_accumulation_over_parts_equals_the_whole() -> None:
    hidden, weight, labels, bias = make((8, 9), 8, 21, dtype=torch.float64)
    items = (labels != -100).sum()
    whole = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)
    losses = [
        linear_cross_entropy(h, weight, y, bias=bias, num_items=items)
        for h, y in zip(hidden.split(3), labels.split(3), strict=True)
    ]
    parts = gradients(torch.stack(losses).sum(), hidden, weight, bias)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_incoming_gradient_scales_and_saved_gradients_survive_it() -> None:
    hidden, weight, labels, bias = make((4, 9), 8, 21)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    tensors = (hidden, weight, bias)
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    loss.backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    for t, g in zip(tensors, once, strict=True):
        assert t is not None and t.grad is not None
        torch.testing.assert_close(t.grad, 5 * g)


def test_runs_are_bit_equal() -> None:
    hidden, weight, labels, bias = make((300,), 16, 1001)
    runs = [gradients(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_pieces")
def test_uninitialized_memory_is_not_read(dtype: torch.dtype) -> None:
    """`torch.use_deterministic_algorithms` fills what `torch.empty` returns with NaN."""
    hidden, weight, labels, bias = make((40,), 8, 21, dtype=dtype)
    before = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)
    torch.use_deterministic_algorithms(True)
    try:
        after = gradients(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- memory and work ----


class Outputs(TorchDispatchMode):
    """Records the number of elements of every operation's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.sizes.append((str(func), tensor.numel()))
        return result


@pytest.mark.parametrize("name", ["smoothing", "all"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_operation_makes_full_logits(name: str, autocast: bool) -> None:
    rows, vocabulary = 2003, 5003
    hidden, weight, labels, bias = make((rows,), 8, vocabulary, ignored=0.05)
    with Outputs() as outputs, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(hidden, weight, labels, bias=bias, **OPTIONS[name]).backward()
    largest = max(outputs.sizes, key=lambda item: item[1])
    assert largest[1] <= 1 << 21 < rows * vocabulary / 4, largest


def test_ignored_rows_cost_no_work() -> None:
    hidden, weight, labels, _ = make((500,), 8, 5003, False, ignored=0)
    labels[20:] = -100
    with Outputs() as outputs:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert max(size for _, size in outputs.sizes) <= 20 * 5003


def test_evaluation_computes_the_loss_alone() -> None:
    hidden, weight, labels, bias = make((50,), 8, 303)
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias).detach()
    with torch.inference_mode():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, bias=bias), expected)
    with torch.no_grad(), Outputs() as outputs:
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    assert torch.equal(loss, expected) and not loss.requires_grad
    names = [name for name, _ in outputs.sizes]
    assert sum("addmm" in name for name in names) == 1 and not any("scatter" in name or ".mm" in name for name in names)


# ---- tracing ----


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_in_one_graph_for_all_lengths(autocast: bool) -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, num_items: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
            return 2 * linear_cross_entropy(hidden * 2, weight, labels, bias=bias, num_items=num_items, **options)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compilations = 0
    for rows in (5, 17, 40):
        hidden, weight, labels, bias = make((2, rows), 8, 21)
        assert bias is not None
        items = torch.tensor(31)
        ours = gradients(compiled(hidden, weight, labels, bias, items), hidden, weight, bias)
        eager = gradients(step(hidden, weight, labels, bias, items), hidden, weight, bias)
        if autocast:
            assert_near(ours, eager, 1e-2)
        else:
            wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
            exact_step = gradients(step(wide[0], wide[1], labels, wide[2], items), *wide)
            assert_within(ours, eager, exact_step)
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_with_frozen_weight_and_plain_mean() -> None:
    hidden, weight, labels, _ = make((2, 9), 8, 21, False)
    weight.requires_grad_(False)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for options in ({}, {"num_items": 7}, {"reduction": "sum"}):
        ours = gradients(compiled(hidden, weight, labels, **options), hidden, weight)
        assert_within(ours, *both(hidden, weight, labels, None, **options))


def test_exports() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 21)

        def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, self.linear.weight, labels, bias=self.linear.bias)

    head = Head()
    hidden, _, labels, _ = make((2, 9), 8, 21)
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(head, (hidden, labels), dynamic_shapes=({1: rows}, {1: rows}))
    hidden, _, labels, _ = make((2, 31), 8, 21)
    truth = exact(head)(hidden.double(), labels)
    assert_within(program.module()(hidden, labels), head(hidden, labels), truth)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(needs: list[bool], dtype: torch.dtype) -> None:
    hidden, weight, labels, bias = make((2, 9), 8, 21, needs[2])
    for t, need in zip((hidden, weight, bias), needs, strict=True):
        if t is not None:
            t.requires_grad_(need)
    arguments = (hidden, weight, bias, labels, torch.tensor(7), 0.1, 0.01, None, 1.0, -100, dtype, needs)
    torch.library.opcheck(torch.ops.urform.linear_cross_entropy.default, arguments)


# ---- refusals ----


def test_second_derivatives_are_refused_by_name() -> None:
    hidden, weight, labels, _ = make((4,), 8, 21, False)
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy .* differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("bad", [21, 40, -1, -101])
def test_labels_outside_the_vocabulary_are_named(bad: int) -> None:
    hidden, weight, labels, _ = make((2, 3), 8, 21, False)
    labels[1, 1] = bad
    with pytest.raises(ValueError, match=rf"labels contains {bad}, outside the vocabulary of 21 "):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"z_loss": -1.0}, "z_loss must be 0 or more, got -1.0"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"reduction": "sum", "num_items": 3}, "divides by nothing"),
        ({"num_items": 0}, "num_items must be positive, got 0"),
        ({"num_items": torch.tensor(0)}, "num_items must be positive, got 0.0 with 6 labels"),
        ({"num_items": torch.ones(2)}, r"num_items must be one number, got a tensor of shape \(2,\)"),
        (
            {"labels": torch.zeros(2, 4, dtype=torch.int64)},
            r"labels must have hidden's shape .* \(2, 3\), got \(2, 4\)",
        ),
        ({"labels": torch.zeros(2, 3)}, "integer dtype, got torch.float32"),
        ({"weight": torch.zeros(21, 9)}, r"got \(2, 3, 8\) and \(21, 9\)"),
        ({"weight": torch.zeros(21, 8, dtype=torch.bfloat16)}, "hidden is torch.float32 but weight torch.bfloat16"),
        ({"bias": torch.zeros(20)}, r"bias must be \[21\] like weight's rows, got \(20,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    hidden, weight, labels, _ = make((2, 3), 8, 21, False, ignored=0)
    arguments: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
