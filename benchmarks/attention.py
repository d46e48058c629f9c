"""`urform.attention` forward and backward against PyTorch's kernels: time and peak memory.

    python benchmarks/attention.py                                      # CPU, a few minutes
    python benchmarks/attention.py --only packed --backend auto blockwise reference
    python benchmarks/attention.py --device cuda --plot attention.png

A call is attention and its backward pass for q, k, v (and the bias table). Tensors are [batch, length, heads, head dim]
or packed, as a model's projections leave them; PyTorch gets transposed views. Layouts and masks exist before the clock
starts, because they serve all layers; the dense mask of the packed cases counts as memory. GFLOP are those of the
attended pairs (forward 4, backward 10 per pair and head dim), whatever a kernel really computes.

CPU, float32 and bfloat16, each compared by itself:
- packed-causal, packed-full: 8 documents of 1024 tokens end to end against `scaled_dot_product_attention` over the
  8192 tokens with a block-diagonal bool mask ("sdpa"), and, as the bound of what packing can give, over a batch of 8
  without a mask ("sdpa-batch").
- short-17, short-128: 128 packed documents of Multi30k's lengths (about 17 tokens), 32 of 128 tokens, against SDPA over
  the padded batch with its padding mask, and against plain batched matmuls ("eager").
- t5-1024: a trainable T5 bias against SDPA with the bias as a dense mask that is computed from the table in each call.

CUDA, bfloat16 (16,384 tokens, heads x head dim = 2048, as in Dao 2023, FlashAttention-2, section 4.1):
- causal-d64-1024 ... full-d128-16384: dense, against SDPA's flash and cuDNN backends and compiled FlexAttention.
- t5-4096, t5-32768: the T5 bias as above; the dense mask of 32k tokens is not expected to fit.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import OURS, Bench, Contender, arguments
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import ENGLISH

import urform
from urform import Layout, T5Bias

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Attend = Callable[..., Tensor]  # (q, k, v [, table]) -> out


def passes(attend: Attend, shape: Sequence[int], dtype: torch.dtype, device: str, table: Tensor | None = None) -> Any:
    """Give a call of attention and its backward pass on fresh q, k, v of that shape."""
    leaves = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    if table is not None:
        leaves.append(table.clone().to(device).requires_grad_())  # a parameter: float32
    grads: list[Tensor] = []  # made at the first call, which shows the output's layout

    def call(round_: int) -> None:
        out = attend(*leaves)
        if not grads:
            grads.append(torch.randn_like(out))
        out.backward(grads[0])
        for leaf in leaves:
            leaf.grad = None

    return call


def ours(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, *, layout: Layout | None, **options: Any
) -> Tensor:
    bias = None if table is None else T5Bias(table, bidirectional=True, max_distance=128)
    return urform.attention(q, k, v, q_layout=layout, kv_layout=layout, bias=bias, **options)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend | None = None, **options: Any) -> Tensor:
    """Run PyTorch's attention on [B, L, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def sdpa_t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, buckets: Tensor) -> Tensor:
    """Run PyTorch's attention with the bias [1, H, L, S] as its mask, as the stock T5 does."""
    return sdpa(q, k, v, attn_mask=F.embedding(buckets, table.to(q.dtype)).permute(2, 0, 1)[None])


def eager(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ v


def gflop(pairs: int, heads: int, dim: int) -> float:
    return 14e-9 * pairs * heads * dim


def our_contenders(
    bench: Bench, shape: Sequence[int], layout: Layout | None, table: Tensor | None = None, **options: Any
) -> list[Contender]:
    """Make ours with each dtype of the device and each backend that is asked for."""
    found = []
    for dtype, backend in itertools.product(dtypes(bench), bench.options.backend):
        attend = partial(ours, layout=layout, backend=backend, **options)
        variant = "" if backend == "auto" else backend
        found.append(Contender(OURS, variant, passes(attend, shape, DTYPES[dtype], bench.device, table), dtype))
    return found


def peers(
    bench: Bench, side: str, shape: Sequence[int], attend: Attend, table: Tensor | None = None, held: int = 0
) -> list[Contender]:
    return [
        Contender(side, "", passes(attend, shape, DTYPES[dtype], bench.device, table), dtype, held)
        for dtype in dtypes(bench)
    ]


def dtypes(bench: Bench) -> list[str]:
    return ["bf16"] if bench.device == "cuda" else list(DTYPES)


def packed_layout(lengths: Tensor, device: str) -> Layout:
    return Layout.packed(F.pad(lengths.cumsum(0), (1, 0)).to(device))


# ----------------------------------------------------------------------------------------------------------- cases


def packed(bench: Bench, name: str, causal: bool) -> None:
    documents, length, heads, dim = (2, 48, 2, 16) if bench.options.quick else (8, 1024, 8, 64)
    total = documents * length
    layout = packed_layout(torch.full((documents,), length), bench.device)
    sequence = torch.arange(total, device=bench.device) // length
    mask = sequence[:, None] == sequence[None]
    if causal:
        mask = mask.tril()
    batch = (documents, length, heads, dim)
    contenders = [
        *our_contenders(bench, (total, heads, dim), layout, causal=causal),
        *peers(bench, "sdpa", (1, total, heads, dim), partial(sdpa, attn_mask=mask), held=mask.nbytes),
        *peers(bench, "sdpa-batch", batch, partial(sdpa, is_causal=causal)),
    ]
    work = gflop(int(mask.sum()), heads, dim)
    configuration = {"documents": documents, "tokens": length, "heads": heads, "head_dim": dim, "causal": causal}
    bench.compare(name, configuration, contenders, work=lambda i: work, unit="GFLOP", memory=True)


def short(bench: Bench, name: str, documents: int, length: int | None) -> None:
    """Short documents of one length, or of Multi30k's lengths."""
    documents, heads, dim = (4, 2, 16) if bench.options.quick else (documents, 8, 64)
    generator = torch.Generator().manual_seed(0)
    lengths = ENGLISH.draw(documents, generator) if length is None else torch.full((documents,), length)
    longest, total = int(lengths.max()), int(lengths.sum())
    keep = (torch.arange(longest) < lengths[:, None]).to(bench.device)
    mask = None if bool(keep.all()) else keep[:, None, None, :]  # as transformers gives it
    contenders = [
        *our_contenders(bench, (total, heads, dim), packed_layout(lengths, bench.device)),
        *peers(bench, "sdpa", (documents, longest, heads, dim), partial(sdpa, attn_mask=mask)),
        *peers(bench, "eager", (documents, longest, heads, dim), partial(eager, attn_mask=mask)),
    ]
    work = gflop(int((lengths**2).sum()), heads, dim)
    configuration = {"documents": documents, "tokens": total, "longest": longest, "heads": heads, "head_dim": dim}
    bench.compare(name, configuration, contenders, work=lambda i: work, unit="GFLOP", memory=True)


def t5(bench: Bench, name: str, batch: int, length: int) -> None:
    batch, length, heads, dim = (2, 40, 2, 16) if bench.options.quick else (batch, length, 8, 64)
    table = torch.randn(32, heads, generator=torch.Generator().manual_seed(0))
    shape = (batch, length, heads, dim)

    def dense(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """Find the buckets only when called, so that a length at which this cannot fit harms nobody else."""
        if not buckets:
            places = torch.arange(length, device=bench.device)
            buckets.append(T5Bias(table, bidirectional=True, max_distance=128).bucket(places[None] - places[:, None]))
        return sdpa_t5(q, k, v, weight, buckets=buckets[0])

    buckets: list[Tensor] = []
    contenders = [*our_contenders(bench, shape, None, table), *peers(bench, "sdpa", shape, dense, table)]
    work = gflop(batch * length**2, heads, dim)
    configuration = {"batch": batch, "tokens": length, "heads": heads, "head_dim": dim, "buckets": 32}
    bench.compare(name, configuration, contenders, work=lambda i: work, unit="GFLOP", memory=True)


def dense(bench: Bench, name: str, causal: bool, dim: int, length: int) -> None:
    tokens, hidden = (64, 32) if bench.options.quick else (16_384, 2048)
    length = min(length, tokens)
    shape = (tokens // length, length, max(hidden // dim, 1), dim)
    sides: dict[str, Attend] = {
        "sdpa-flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION, is_causal=causal),
        "sdpa-cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION, is_causal=causal),
        "flex": flex(length, causal, bench.device),
    }
    contenders = our_contenders(bench, shape, None, causal=causal)
    for side, attend in sides.items():
        contenders += peers(bench, side, shape, attend)
    work = gflop(tokens * length, shape[2], dim) / (2 if causal else 1)
    configuration = {"batch": shape[0], "tokens": length, "heads": shape[2], "head_dim": dim, "causal": causal}
    bench.compare(name, configuration, contenders, work=lambda i: work, unit="GFLOP", memory=True)


def flex(length: int, causal: bool, device: str) -> Attend:
    """Compile FlexAttention for one length, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # else the number of recompilations reaches its limit and the rest runs uncompiled
    block_mask = None
    if causal:
        block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask)

    return attend


CASES: dict[str, tuple[str, Callable[[Bench, str], None]]] = {
    "packed-causal": ("cpu", partial(packed, causal=True)),
    "packed-full": ("cpu", partial(packed, causal=False)),
    "short-17": ("cpu", partial(short, documents=128, length=None)),
    "short-128": ("cpu", partial(short, documents=32, length=128)),
    "t5-1024": ("cpu", partial(t5, batch=2, length=1024)),
    **{
        f"{kind}-d{dim}-{length}": ("cuda", partial(dense, causal=kind == "causal", dim=dim, length=length))
        for kind, dim, length in itertools.product(("causal", "full"), (64, 128), (1024, 2048, 4096, 8192, 16_384))
    },
    "t5-4096": ("cuda", partial(t5, batch=4, length=4096)),
    "t5-32768": ("cuda", partial(t5, batch=1, length=32_768)),
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, repeats=9, sizes=list(CASES))
    parser.add_argument("--backend", nargs="+", default=["auto"], help="ours: names of urform.attention_backends()")
    options = parser.parse_args(argv)
    bench = Bench("attention", options, argv)
    for name, (device, run) in CASES.items():
        if bench.wants(name) and (options.only or device == options.device):
            run(bench, name)
    return bench.finish()


if __name__ == "__main__":
    main()
