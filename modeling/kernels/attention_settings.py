"""What every attention backend is asked for, as one object.

Every backend is `backend(q, k, v, q_layout, kv_layout, settings)` and returns `(out, lse)`, where `lse` is None unless
`settings.return_lse`. `attention()` checks the arguments and builds the settings; a backend trusts them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .attention_biases import Bias

Window = tuple[int | None, int | None]  #: keys visible before and after a query's position; None is unbounded


class AttentionSettings(NamedTuple):
    """How attention is computed, apart from its tensors and layouts. Immutable, and cheap to make for each call.

    Attributes:
        causal: a query attends only to keys up to its position.
        window: `(left, right)` keeps keys in `[position - left, position + right]`; None keeps all.
        bias: what is added to the scores, after scale and softcap.
        softcap: bound of the scores.
        scale: factor of the products of queries and keys.
        dropout_p: probability of dropping an attention weight.
        seed: of counter-based dropout; None: the backend draws from torch's default generator.
        return_lse: also return the log of the softmax's denominator.
    """

    causal: bool = False
    window: Window | None = None
    bias: Bias | None = None
    softcap: float | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: int | Tensor | None = None
    return_lse: bool = False

    @property
    def reach(self) -> Window:
        """Return how many keys are visible before and after a position, causality included; None is unbounded."""
        left, right = self.window or (None, None)
        return left, 0 if self.causal else right

    def with_bias(self, bias: Bias | None) -> AttentionSettings:
        """Return the same settings with another bias."""
        return AttentionSettings(
            self.causal, self.window, bias, self.softcap, self.scale, self.dropout_p, self.seed, self.return_lse
        )
