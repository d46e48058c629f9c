"""How float32 results are compared: with float64, by the error that plain float32 has itself.

With a fixed tolerance the processor would decide: oneDNN, MKL and PyTorch add in another order under AVX2, AVX-512 and
AMX. Here float64 decides: a result may be at most twice as far from it as the float32 reference, plus a few roundings.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

EPS = torch.finfo(torch.float32).eps


def exact(model: Any) -> Any:
    """Return a copy of a model that computes in float64."""
    with torch.no_grad():
        twin: nn.Module = copy.deepcopy(model)
    return twin.double()


def double(tree: Any) -> Any:
    """Return a mapping or tensor with its floats in float64."""
    if isinstance(tree, Mapping):
        return {name: double(value) for name, value in tree.items()}
    return tree.double() if isinstance(tree, Tensor) and tree.is_floating_point() else tree


@contextmanager
def finite_masks() -> Iterator[None]:
    """Let stock models compute in float64 what they compute in float32.

    They take the softmax in float32, where the lowest number of float64, of which their masks are made, is -inf: rows
    that see no key, and all that read them, would be NaN.
    """
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    eager = masks["eager"]

    def clamped(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = eager(*args, **kwargs)
        return mask if mask is None else mask.clamp(min=torch.finfo(torch.float32).min)

    masks["eager"] = clamped
    try:
        yield
    finally:
        masks["eager"] = eager


def twice(model: Any, call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return the reference and the truth of `assert_within`: a call with the model, and with it in float64."""
    return call(model), call(exact(model))


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of floats in a tensor, a mapping or a sequence, by name."""
    if isinstance(tree, Tensor):
        yield name, tree.detach()
    else:
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}" if name else str(key))


def compare(found: Any, reference: Any, truth: Any, what: str = "") -> Iterator[tuple[str, float, float]]:
    """Give name, error and bound of every tensor, by the rule of `assert_within`."""
    mine, theirs, right = (dict(leaves(tree, what)) for tree in (found, reference, truth))
    assert mine.keys() == theirs.keys() == right.keys(), sorted(mine.keys() ^ right.keys())
    overall = max((tensor.abs().max().item() for tensor in right.values() if tensor.numel()), default=0.0)
    for name, want in ((name, tensor.double()) for name, tensor in right.items()):
        assert mine[name].shape == theirs[name].shape == want.shape, f"{name}: {mine[name].shape}, {want.shape}"
        if want.numel():
            error, allowed = ((t.double() - want).abs().max().item() for t in (mine[name], theirs[name]))
            yield name, error, 2 * allowed + EPS * (8 * want.abs().max().item() + overall)


def assert_within(found: Any, reference: Any, truth: Any, what: str = "") -> None:
    """Assert `max|found - truth| <= 2 max|reference - truth| + tiny` for every tensor.

    Args:
        found: What is tested, in float32: a tensor, or a mapping or sequence of tensors.
        reference: The plain computation in float32.
        truth: The plain computation in float64 (where transformers gives a result back in float32, rounded to it).
        what: For the message.

    `tiny` is eight roundings of the tensor's largest value, and one of the largest of all: some gradients cancel to 0.
    """
    for name, error, bound in compare(found, reference, truth, what):
        assert error <= bound, f"{name}: {error:.3g} from float64; allowed are {bound:.3g}"
