"""How float32 results are compared: with float64, by the error that plain float32 has itself.

With a fixed tolerance the processor would decide: oneDNN, MKL and PyTorch add in another order under AVX2, AVX-512 and
AMX. Here float64 decides: a result may be at most twice as far from it as the float32 reference, plus a few roundings.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps


def exact(model: Any) -> Any:
    """Return a copy of a model that computes in float64."""
    with torch.no_grad():
        twin: nn.Module = copy.deepcopy(model)
    return twin.double()


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


def assert_within(found: Any, reference: Any, truth: Any, what: str = "") -> float:
    """Assert `max|found - truth| <= 2 max|reference - truth| + tiny` for every tensor; return the largest difference.

    Args:
        found: What is tested, in float32: a tensor, or a mapping or sequence of tensors.
        reference: The plain computation in float32.
        truth: The plain computation in float64 (where transformers gives a result back in float32, rounded to it).
        what: For the message.

    `tiny` is eight roundings of the tensor's largest value, and one of the largest of all: some gradients cancel to 0.
    """
    mine, theirs, right = (dict(leaves(tree, what)) for tree in (found, reference, truth))
    assert mine.keys() == theirs.keys() == right.keys(), sorted(mine.keys() ^ right.keys())
    overall = max((tensor.abs().max().item() for tensor in right.values() if tensor.numel()), default=0.0)
    worst = 0.0
    for name, want in ((name, tensor.double()) for name, tensor in right.items()):
        assert mine[name].shape == theirs[name].shape == want.shape, f"{name}: {mine[name].shape}, {want.shape}"
        if not want.numel():
            continue
        error, allowed = ((t.double() - want).abs().max().item() for t in (mine[name], theirs[name]))
        bound = 2 * allowed + EPS * (8 * want.abs().max().item() + overall)
        assert error <= bound, f"{name}: {error:.3g} from float64, the reference {allowed:.3g}; allowed {bound:.3g}"
        worst = max(worst, (mine[name] - theirs[name]).abs().max().item())
    return worst
