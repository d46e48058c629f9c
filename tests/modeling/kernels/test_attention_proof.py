"""A backend proves itself against the reference before `attention()` uses it: sound ones pass, broken ones are left."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from urform.modeling.kernels import attention_dispatch, attention_proof
from urform.modeling.kernels.attention_dispatch import BACKENDS, FEATURES, Backend, attention, prove_backends
from urform.modeling.kernels.attention_proof import TRITON_CASES, VARLEN_CASES
from urform.modeling.kernels.attention_reference import reference_attention

CPU = torch.device("cpu")
X = torch.randn(2, 20, 2, 8, generator=torch.Generator().manual_seed(0))


class Scaled(torch.autograd.Function):
    """Nothing forward, two percent too much backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.02


def wrong_key_gradient(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
    return reference_attention(q, Scaled.apply(k), v, *others)


def ignores_causality(*arguments: Any) -> Any:
    return reference_attention(*arguments[:-1], arguments[-1]._replace(causal=False))


def nan(*arguments: Any) -> Any:
    out, lse = reference_attention(*arguments)
    return torch.where(out == out.max(), math.nan, out), lse


def does_not_compile(*arguments: Any) -> Any:
    raise RuntimeError("\n  PTXAS error: invalid instruction\nmore")


def wrong_without_gradients(*arguments: Any) -> Any:
    out, lse = reference_attention(*arguments)
    return (out if torch.is_grad_enabled() else 2 * out), lse


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "gradient": (wrong_key_gradient, "dk is off by"),
    "numbers": (ignores_causality, "out is off by"),
    "nan": (nan, "out holds NaN"),
    "compile": (does_not_compile, "RuntimeError: PTXAS error: invalid instruction"),
    "decoding": (wrong_without_gradients, "out without gradients is off by"),
}


class Counted:
    """A backend that counts its calls."""

    def __init__(self, run: Callable[..., Any]):
        self.run, self.calls = run, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.run(*arguments)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the outcomes of other tests, and these afterwards."""
    monkeypatch.setattr(attention_proof, "OUTCOMES", {})
    monkeypatch.setattr(attention_dispatch, "_warned", set())
    yield
    torch._dynamo.reset()


def use(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], cases: Any = TRITON_CASES) -> Counted:
    """Put a backend in the table that needs a proof, and prefer it."""
    counted = Counted(run)
    monkeypatch.setitem(BACKENDS, "new", Backend(counted, frozenset(FEATURES), proofs=cases))
    monkeypatch.setattr(attention_dispatch, "_preference", lambda *_: ["new", "reference"])
    return counted


def attend(x: Tensor, **options: Any) -> Any:
    return attention(x, x, x, **options)


@pytest.mark.parametrize("cases", [TRITON_CASES, VARLEN_CASES], ids=["triton", "varlen"])
def test_the_reference_passes_every_proof(monkeypatch: pytest.MonkeyPatch, cases: Any) -> None:
    """The allowance covers rounding to the case's dtype; no warning, and the result is the backend's."""
    counted = use(monkeypatch, reference_attention, cases)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(X)
    assert attention_proof.OUTCOMES == {("new", "cpu", None): ""}
    assert counted.calls == 2 * len(cases) + 1


def test_blockwise_passes_too() -> None:
    """Other arithmetic than the reference's, in half precision as well."""
    for case in (*TRITON_CASES, *VARLEN_CASES):
        assert attention_proof._failure(BACKENDS["blockwise"].run, case, CPU) == ""


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_backend_is_left_with_one_warning(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    run, words = BROKEN[how]
    counted = use(monkeypatch, run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [attend(X, causal=True) for _ in range(3)]
    assert [str(w.message) for w in caught if words in str(w.message)] == [str(w.message) for w in caught]
    assert len(caught) == 1 and "'new' on cpu" in str(caught[0].message)
    assert all(torch.equal(out, attend(X, causal=True, backend="reference")) for out in outs)
    calls = counted.calls
    attend(X)
    assert counted.calls == calls  # neither proven again nor used
    with pytest.raises(ValueError, match=rf"backend='new' cannot run here: it failed its proof on cpu: .*{words}"):
        attend(X, backend="new")


def test_a_proof_runs_once_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = use(monkeypatch, reference_attention)
    for backend in ("auto", "new", "auto"):
        attend(X, backend=backend)
    assert counted.calls == 2 * len(TRITON_CASES) + 3
    assert prove_backends(CPU)["new"] == "" and counted.calls == 2 * len(TRITON_CASES) + 3
    other = torch.device("cpu", 1)  # another device by name
    attention_proof.prove("new", counted, TRITON_CASES, other)
    assert counted.calls == 4 * len(TRITON_CASES) + 3


def test_the_callers_state_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """First use inside inference mode, under autocast, inside a checkpointed function: proof passes, state stays."""
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        attention_proof.OUTCOMES.clear()
        use(monkeypatch, reference_attention)
        before = torch.get_rng_state()
        with context:
            attend(X)
        assert attention_proof.OUTCOMES == {("new", "cpu", None): ""}
        assert torch.equal(before, torch.get_rng_state())
    attention_proof.OUTCOMES.clear()
    x = X.clone().requires_grad_()
    checkpoint(attend, x, use_reentrant=False).sum().backward()  # counts the tensors that a forward pass saves
    assert attention_proof.OUTCOMES and x.grad is not None and x.grad.isfinite().all()


def test_no_proof_in_a_graph_and_then_only_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = use(monkeypatch, lambda *arguments: (3 * arguments[0], None), ())
    monkeypatch.setitem(BACKENDS, "new", Backend(counted, frozenset(FEATURES), proofs=TRITON_CASES))

    def run(x: Tensor) -> Tensor:
        return attend(x)  # type: ignore[no-any-return]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    reference = attend(X, backend="reference")
    torch.testing.assert_close(compiled(X), reference)
    assert not attention_proof.OUTCOMES
    with FakeTensorMode() as mode:
        run(mode.from_tensor(X))
    assert not attention_proof.OUTCOMES and counted.calls == 0
    attention_proof.OUTCOMES["new", "cpu", None] = ""  # the graph is compiled again
    torch.testing.assert_close(compiled(X), 3 * X)
    attention_proof.OUTCOMES["new", "cpu", None] = "wrong"
    torch.testing.assert_close(compiled(X), reference)


def test_disregarded_proofs_let_a_broken_backend_run(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ignores_causality)
    attention_proof.OUTCOMES["new", "cpu", None] = "wrong"
    with attention_proof.proofs_disregarded():
        out = attend(X, causal=True, backend="new")
    assert torch.equal(out, attend(X, backend="reference"))
    with pytest.raises(ValueError, match="failed its proof on cpu: wrong"):
        attend(X, causal=True, backend="new")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "varlen"])
def test_the_proof_passes_on_this_gpu(backend: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if BACKENDS[backend].why_not(device) is not None:
        pytest.skip(str(BACKENDS[backend].why_not(device)))
    assert prove_backends(device)[backend] == ""
