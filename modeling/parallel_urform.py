# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Tensor parallelism: what transformers' styles lack for parts that hold something for every head.

A process has a share of the heads. The norms of queries and keys are whole on every process and see that share alone,
so their gradients are summed. T5's table is split by heads like the projections, and ALiBi's slopes are cut.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

HEADS = "urform_heads"  #: the style's name in plans


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the group.

    The library's `replicated_with_grad_allreduce` sums `param.grad` after each backward pass instead, and so sums what
    earlier passes of the same update have left there again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class HeadsParallel(TensorParallelLayer):
    """Parallel style of the norms over heads and of the position bias."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Split a table `[buckets, H]` by heads; other parameters stay whole."""
        whole = module._parameters[param]
        if isinstance(module, nn.Embedding) and whole is not None:
            from torch.distributed.tensor import Shard, distribute_tensor

            split = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(split, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Tell the position bias its share of the heads; let a norm sum its weight's gradients."""
        if hasattr(module, "share"):
            bias: Any = module
            bias.share = (mesh.get_local_rank(), mesh.size())
        elif not isinstance(module, nn.Embedding):
            _sum_weight_gradients(module, mesh.get_group())
        return module


def _sum_weight_gradients(module: nn.Module, group: Any) -> None:
    forward = module.forward

    def tp_forward(*args: Any, **kwargs: Any) -> Any:
        weight = module._parameters["weight"]
        if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
            module._parameters["weight"] = _SumGradients.apply(weight, group)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters["weight"] = weight

    module.forward = tp_forward


if dist.is_available():
    ALL_PARALLEL_STYLES.register(HEADS, HeadsParallel())  # type: ignore[arg-type]  # annotated for functions; styles are objects


def refuse_uneven(config: PreTrainedConfig, size: int) -> None:
    """Raise ValueError unless a group of `size` processes can share the heads of every stack evenly.

    transformers 5.17 cannot split the feed-forward layer and the vocabulary unevenly either.
    """
    fields = ["num_attention_heads", "num_key_value_heads"]
    if not hasattr(TensorParallelLayer, "_from_local_last_dim_shard"):
        fields.append("intermediate_size")
    names = [*fields, *(f"decoder_{field}" for field in fields if config.is_encoder_decoder)]
    if not hasattr(TensorParallelLayer, "_from_local_last_dim_shard"):
        names.append("vocab_size")
    for name in names:
        value = getattr(config, name)
        if value % size:
            raise ValueError(
                f"{name}={value} cannot be split evenly over tp_size={size} processes; choose a tp_size that divides "
                f"{name}, or fsdp_size={size} (FSDP2), which needs no such thing"
            )
