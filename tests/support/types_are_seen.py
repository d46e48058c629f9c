"""Hold what the type checker must refuse.

`make types` reports an unused comment here when torch or transformers are no longer seen and their classes are `Any`.
"""

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

tensor: Tensor = "not a tensor"  # type: ignore[assignment]
model: PreTrainedModel = "not a model"  # type: ignore[assignment]
steps: str = TrainingArguments().max_steps  # type: ignore[assignment]
