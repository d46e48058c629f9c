"""The fast path: training without padding, without scores of L x S, without logits; equal to the plain path.

The plain path is "eager": padded tensors, masks, full scores; and the loss from full logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import support
import torch
from numerics import assert_within, exact, twice
from support import HEADS, POSITIONS, WINDOW, batch, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from urform import Layout, UrformConfig, UrformForCausalLM
from urform.modeling.kernels import loss_linear_cross_entropy as fused
from urform.modeling.kernels.blockwise.attention_buckets import Limits

NORMS = ("pre", "post", "sandwich", "parallel")
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}

every_architecture = pytest.mark.parametrize("architecture", HEADS)


def make(architecture: str, implementation: str | None = None, **fields: Any) -> Any:
    """A small random model in training mode, every parameter non-zero; the same one for the same arguments."""
    return support.make(
        architecture, implementation=implementation, **{"spread": 0.2, "hidden_size": 24, **fields}
    ).train()


def step(model: Any, inputs: dict[str, Any], seed: int = 3, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Outputs and gradients of a training step."""
    torch.manual_seed(seed)
    outputs = model(**inputs, **kwargs)
    return outputs, gradients(model, outputs.loss)


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal to a share of the largest expected value, or of 1e-3 where all are as good as 0."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key], tolerance)
        return
    atol = tolerance * max(expected.abs().max().item() if expected.numel() else 0.0, 1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@contextmanager
def linears(model: nn.Module) -> Iterator[dict[str, tuple[int, ...]]]:
    """The leading shape of what every Linear of the layers was given."""
    seen: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:

            def note(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                seen[name] = tuple(args[0].shape[:-1])

            hooks.append(module.register_forward_hook(note))
    yield seen
    for hook in hooks:
        hook.remove()


def check_packed(seen: dict[str, tuple[int, ...]], sources: int, targets: int) -> None:
    """Every Linear of the layers saw one row of so many tokens."""
    assert seen
    for name, shape in seen.items():
        of_source = ".encoder." in name or "cross_attn.k_proj" in name or "cross_attn.v_proj" in name
        assert shape == (1, sources if of_source else targets), name


class Allocations(TorchDispatchMode):
    """The largest new tensors by their storage, in elements, each with its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[tuple[int, str, tuple[int, ...]]] = []
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.shapes.add(tuple(x.shape))
                if x.untyped_storage().data_ptr() not in old:
                    elements = x.untyped_storage().nbytes() // x.element_size()
                    self.largest.append((elements, str(func), tuple(x.shape)))
        self.largest = sorted(self.largest, reverse=True)[:20]
        return result


LONG = [
    ("rope", {}, 0.1),
    ("rope", {}, 0.0),
    ("t5", {}, 0.1),
    ("alibi", {}, 0.1),
    ("rope", {"sliding_window": 40, "layer_types": ["sliding_attention"]}, 0.1),
    ("t5", {"sliding_window": 40, "layer_types": ["sliding_attention"], "attn_logit_softcapping": 5.0}, 0.1),
]


@every_architecture
@pytest.mark.parametrize(("position", "fields", "dropout"), LONG)
def test_training_step_makes_neither_scores_nor_logits(
    architecture: str, position: str, fields: dict[str, Any], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is larger than the parameters, the tokens' widest features, or the blocks that the limits allow."""
    monkeypatch.setattr(Limits, "elements", 1 << 15)
    monkeypatch.setattr(Limits, "keys", 256)
    monkeypatch.setattr(fused, "_sizes", lambda device: fused._Sizes(1 << 16, 16, 1 << 14, 1 << 14))
    model = make(
        architecture, position_encoding=position, num_hidden_layers=1, vocab_size=5000, hidden_size=16, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, **DROPOUT, **fields,
    )  # fmt: skip
    model.config.attention_dropout = dropout
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.dropout = dropout
    inputs = batch(architecture, lengths=(1535, 1100))
    length, tokens = inputs["labels"].shape[1], int(inputs["attention_mask"].sum())
    targets = int(inputs.get("decoder_attention_mask", inputs["attention_mask"]).sum())
    blocks = max(Limits.elements, 2 * Limits.rows * Limits.keys)
    bound = max(tokens * 32, 5000 * 16, 16 * 5000, blocks)
    assert 20 * bound < length * inputs["input_ids"].shape[1] and 100 * bound < targets * 5000
    with linears(model) as seen, Allocations() as made:
        step(model, inputs)
    assert made.largest[0][0] <= bound, made.largest
    check_packed(seen, tokens, targets)


def test_targets_of_labels_alone_leave_padding_out() -> None:
    """Labels padded on the right or left, also with the decoder's input made by the collator: no pad is computed."""
    model = make("encoder-decoder")
    rows = [torch.randint(3, 99, (n,)) for n in (5, 3)]
    source = torch.randint(3, 99, (2, 6))
    alone = twice(
        model,
        lambda m: torch.stack(
            [m(input_ids=source[i : i + 1], labels=x[None], num_items_in_batch=1).loss for i, x in enumerate(rows)]
        ),
    )
    for left in (False, True):
        labels = torch.full((2, 9), -100)
        for i, row in enumerate(rows):
            labels[i, slice(9 - len(row), None) if left else slice(len(row))] = row
        inputs = {"input_ids": source, "labels": labels}
        with linears(model) as seen:
            loss = model(**inputs, num_items_in_batch=1).loss
        assert_within(loss, *(losses.sum() for losses in alone))
        check_packed(seen, 12, 8)
        if not left:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
            with linears(model) as seen:
                loss = model(**inputs, num_items_in_batch=1).loss
            assert_within(loss, *(losses.sum() for losses in alone))
            check_packed(seen, 12, 8)
    labels[0] = -100  # a row that has no target at all
    assert_within(model(**inputs | {"labels": labels}, num_items_in_batch=1).loss, *(losses[1] for losses in alone))


# --- equal to the padded path ------------------------------------------------------------------------------------
def check_equal(architecture: str, inputs: dict[str, Any], dtype: torch.dtype, **fields: Any) -> None:
    """Logits at real tokens, loss and gradients of the packed path against "eager": to 1e-9 in float64."""
    ours, plain = (make(architecture, name, **fields).to(dtype) for name in (None, "eager"))
    real = inputs["labels"] != -100
    mask = inputs.get("decoder_attention_mask" if architecture == "encoder-decoder" else "attention_mask")
    real = torch.ones_like(real) if mask is None else mask.bool()
    with linears(ours) as seen:
        outputs, found = step(ours, inputs, skip_logits=False)
    assert all(shape[0] == 1 and shape[1] > 0 for shape in seen.values())
    expected_outputs, expected = step(plain, inputs, skip_logits=False)
    assert outputs.logits.dtype == dtype
    have = (outputs.logits[real], outputs.loss, found)
    want = (expected_outputs.logits[real], expected_outputs.loss, expected)
    if dtype == torch.float32:
        truth, gradients_of_truth = step(exact(plain), inputs, skip_logits=False)
        assert_within(have, want, (truth.logits[real], truth.loss, gradients_of_truth))
        return
    for ours_, theirs in zip(have, want, strict=True):
        close(ours_, theirs, 1e-9)


MATRIX = [(position, window) for position in POSITIONS for window in ({}, WINDOW)]


@every_architecture
@pytest.mark.parametrize("case", range(len(MATRIX)), ids=lambda i: MATRIX[i][0] + ("-window" if MATRIX[i][1] else ""))
def test_padded_batches_in_float64(architecture: str, case: int) -> None:
    """Positions x windows; norm positions, key/value heads and sides of the padding take turns."""
    position, window = MATRIX[case]
    sides = (("right", "left"), ("left", "right"), ("left", "left"), ("right", "right"))[(case // 2) % 4]
    fields = {"norm_position": NORMS[(case + case // 4) % 4], "num_key_value_heads": (1, 2, 4)[case % 3]}
    if case % 3 == 1:
        fields |= {"qk_norm": True, "norm_type": "rmsnorm", "attn_logit_softcapping": 4.0}
    inputs = batch(architecture, sides)
    check_equal(architecture, inputs, torch.float64, position_encoding=position, **fields, **window)


@every_architecture
@pytest.mark.parametrize("norm_position", NORMS)
def test_padded_batches_in_float32(architecture: str, norm_position: str) -> None:
    fields = {"norm_position": norm_position, "num_key_value_heads": 2, **WINDOW}
    check_equal(architecture, batch(architecture), torch.float32, **fields)


def in_one_row(architecture: str, how: str) -> dict[str, Any]:
    """Three documents in one row, told by positions or by their starts."""
    generator = torch.Generator().manual_seed(2)

    def side(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        return torch.randint(3, 99, positions.shape, generator=generator), positions, starts

    ids, positions, starts = side((4, 1, 6))
    inputs: dict[str, Any] = {"input_ids": ids}
    target = ids
    if architecture == "encoder-decoder":
        target, target_positions, target_starts = side((2, 5, 3))
        inputs["decoder_input_ids"] = target
    if how == "positions":
        inputs["position_ids"] = positions
        if architecture == "encoder-decoder":
            inputs["decoder_position_ids"] = target_positions
    else:
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
        if architecture == "encoder-decoder":
            inputs |= {"cu_seq_lens_q": target_starts, "max_length_q": 5}
    return {**inputs, "labels": torch.randint(3, 99, target.shape, generator=generator)}


@every_architecture
@pytest.mark.parametrize("how", ["no mask", "ones", "positions", "starts", "two rows of documents", "types"])
@pytest.mark.parametrize("position", ["rope", "t5"])
def test_layouts(architecture: str, how: str, position: str) -> None:
    inputs, fields = batch(architecture, lengths=(7, 6, 9)), {"position_encoding": position, **WINDOW}
    if how in ("no mask", "ones"):
        for key in [key for key in inputs if key.endswith("attention_mask")]:
            inputs[key] = torch.ones_like(inputs[key])
            if how == "no mask":
                del inputs[key]
    elif how in ("positions", "starts"):
        inputs = in_one_row(architecture, how)
    elif how == "two rows of documents":
        parts = [in_one_row(architecture, "positions") for _ in range(2)]
        inputs = {}
        for key in parts[0]:
            rows = [parts[0][key][0], parts[1][key][0].flip(0) if "input_ids" in key else parts[1][key][0]]
            inputs[key] = torch.stack([nn.functional.pad(row, (0, 3), value=-100 * (key == "labels")) for row in rows])
            if "input_ids" in key:
                mask = nn.functional.pad(torch.ones_like(torch.stack(rows)), (0, 3))
                inputs[key.replace("input_ids", "attention_mask")] = mask
    elif architecture == "encoder":
        inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
        fields |= {"type_vocab_size": 2, "embedding_norm": True}
    check_equal(architecture, inputs, torch.float64, **fields)


@every_architecture
def test_embeddings_as_input(architecture: str) -> None:
    """`inputs_embeds` get the same gradients, exactly 0 at padding."""
    inputs, found = batch(architecture), []
    for name in (None, "eager"):
        model = make(architecture, name).double()
        given = dict(inputs)
        embeds = model.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
        _, grads = step(model, {**given, "inputs_embeds": embeds})
        found.append(grads | {"embeds": embeds.grad})
    close(found[0], found[1], 1e-9)
    assert not found[0]["embeds"][inputs["attention_mask"] == 0].any()


@every_architecture
@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_zero(architecture: str, padded: bool) -> None:
    """What stands at padding of the hidden states is 0, not something finite; also where recording asks for padding."""
    inputs = batch(architecture)
    del inputs["labels"]
    options = {} if architecture == "encoder" else {"use_cache": False}
    model = make(architecture).model
    with linears(model) as seen:
        outputs = model(**inputs, **options, output_hidden_states=padded)
    assert {shape[0] for shape in seen.values()} == {4 if padded else 1}
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    sides = [(outputs.last_hidden_state, mask)]
    if architecture == "encoder-decoder":
        sides.append((outputs.encoder_last_hidden_state, inputs["attention_mask"]))
    for states, mask in sides:
        assert not states[mask == 0].any()
        assert states[mask == 1].abs().amax(-1).min() > 0


@every_architecture
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["rope", "t5"])
def test_gradient_checkpointing_is_bit_equal(architecture: str, reentrant: bool, position: str) -> None:
    """Dropout on: the recomputed layers draw the same masks."""
    model, inputs = make(architecture, position_encoding=position, **DROPOUT, **WINDOW).double(), batch(architecture)
    _, expected = step(model, inputs)
    _, other = step(model, inputs, seed=4)
    assert any(not torch.equal(expected[name], other[name]) for name in expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with linears(model) as seen:
        _, found = step(model, inputs)
    assert all(shape[0] == 1 for shape in seen.values())
    if reentrant and architecture == "encoder-decoder":  # it sums the layers' gradients of the encoder's states apart
        close(found, expected, 1e-13)
        return
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_architecture
def test_who_takes_the_padded_path(architecture: str) -> None:
    """Another attention, recorded states or weights, a cache: padded tensors, and the same logits at real tokens."""
    model, inputs = make(architecture).eval(), batch(architecture)
    del inputs["labels"]
    real = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    packed_way = {} if architecture == "encoder" else {"use_cache": False}
    with torch.no_grad():
        truth = exact(model)(**inputs, **packed_way).logits
    with torch.no_grad(), linears(model) as seen:
        want = model(**inputs, **packed_way).logits
        assert {shape[0] for shape in seen.values()} == {1}
        ways: list[dict[str, Any]] = [{"output_hidden_states": True}, {"output_attentions": True}]
        if architecture != "encoder":
            ways.append({"use_cache": True})
        for way in ways:
            outputs = model(**inputs, **way)
            own = {shape[0] for name, shape in seen.items() if architecture == "encoder" or ".encoder." not in name}
            assert own == {4}, way
            assert_within(outputs.logits[real], want[real], truth[real])
        states = model(**inputs, output_hidden_states=True)
        states = states.get("decoder_hidden_states", states.get("hidden_states"))
        assert len(states) == 3 and states[0].shape[:2] == real.shape
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            assert_within(model(**inputs).logits[real], want[real], truth[real])
            assert {shape[0] for shape in seen.values()} == {4}
        model.set_attn_implementation("eager")
        outputs = model(**inputs, output_attentions=True)
        weights = outputs.get("decoder_attentions", outputs.get("attentions"))
        assert weights[0].shape[:2] == (4, 4)
        model.set_attn_implementation("urform")
        model(**inputs, **packed_way)
        assert {shape[0] for shape in seen.values()} == {1}


@every_architecture
def test_inference_mode(architecture: str) -> None:
    """Tensors without a version counter, with and without a cache."""
    model, inputs = make(architecture).eval(), batch(architecture)
    del inputs["labels"]
    ways: list[dict[str, Any]] = [{}] if architecture == "encoder" else [{"use_cache": False}, {"use_cache": True}]
    for way in ways:
        want = twice(model, lambda m, way=way: m(**inputs, **way).logits)
        with torch.inference_mode():
            found = model(**{key: value.clone() for key, value in inputs.items()}, **way).logits
        assert_within(found, *want)


def test_compiled_in_one_graph() -> None:
    model, inputs = make("encoder-decoder", num_hidden_layers=1).eval(), batch("encoder-decoder")
    del inputs["labels"]
    real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        want = twice(model, lambda m: m(**inputs, use_cache=False).logits[real])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(**inputs, use_cache=False).logits
    assert_within(found[real], *want)


@every_architecture
def test_hooks_on_embeddings_see_the_batch(architecture: str) -> None:
    """NEFTune's noise depends on the batch's shape."""
    inputs, found = batch(architecture), []
    for name in (None, "eager"):
        model, shapes = make(architecture, name).double(), []

        def noise(module: nn.Module, args: Any, output: Tensor, shapes: list[Any] = shapes) -> Tensor:
            shapes.append(tuple(output.shape))
            return output + torch.empty_like(output).uniform_(-1, 1)

        model.get_input_embeddings().register_forward_hook(noise)
        with linears(model) as seen:
            outputs, grads = step(model, inputs)
        assert {shape[0] for shape in seen.values()} == ({1} if name is None else {4})
        assert shapes[0] == (*inputs["input_ids"].shape, 24)
        found.append((outputs.loss, grads))
    close(found[0][0], found[1][0], 1e-9)
    close(found[0][1], found[1][1], 1e-9)


# --- the loss without logits -------------------------------------------------------------------------------------
HEAD_FIELDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "lm_head_bias": True},
    "capped": {"final_logit_softcapping": 3.0, "logit_scale": 0.5},
}


def smoothed(logits: Tensor, labels: Tensor, smoothing: float, z_loss: float, items: float | None) -> Tensor:
    """Label smoothing and z-loss from logits, by their formulas."""
    kept = labels != -100
    x, y = logits[kept], labels[kept]
    lse = x.exp().sum(-1).log()
    nll = lse - x.gather(1, y[:, None])[:, 0]
    uniform = lse - x.mean(-1)
    loss = (1 - smoothing) * nll + smoothing * uniform + z_loss * lse**2
    return loss.sum() / (items or kept.sum())


@every_architecture
@pytest.mark.parametrize("fields", HEAD_FIELDS)
@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": torch.tensor(40)}, {"label_smoothing": 0.1, "z_loss": 1e-2}]
)
def test_fused_loss_is_the_loss_of_logits(architecture: str, fields: str, options: dict[str, Any]) -> None:
    """Against the formulas: in float64, and in float32 no worse than twice the plain path; with left padding."""
    extra = {"lm_head_transform": True} if architecture == "encoder" else {}
    inputs = batch(architecture, ("left", "left"))
    labels, causal = inputs["labels"], architecture == "decoder"
    if causal:  # a row begins with its first real token: nothing predicts that
        before = nn.functional.pad(inputs["attention_mask"], (1, 0))[:, :-1]
        labels = labels.masked_fill(before == 0, -100)[:, 1:]

    def expected(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        names = ("label_smoothing", "z_loss", "num_items_in_batch")
        smoothing, z_loss, items = (
            options.get(name, default) for name, default in zip(names, (0, 0, None), strict=True)
        )
        loss = smoothed(logits[:, :-1] if causal else logits, labels, smoothing, z_loss, items)
        return loss, gradients(model, loss)

    model = make(architecture, **HEAD_FIELDS[fields], **extra)
    outputs, found = step(model, inputs, **options)
    assert outputs.logits is None
    loss32, want32 = expected(model)
    if "z_loss" not in options:
        plain, want32 = step(model, inputs, skip_logits=False, **options)
        assert plain.logits is not None
        loss32 = plain.loss
    model.double()
    loss, want = expected(model)
    assert_within((outputs.loss, found), (loss32, want32), (loss, want))
    outputs, found = step(model, inputs, **options)
    close(outputs.loss, loss, 1e-12)
    close(found, want, 1e-11)


@every_architecture
def test_when_there_are_logits(architecture: str) -> None:
    model, inputs = make(architecture), batch(architecture)
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits is not None
    assert model(**inputs, skip_logits=False, label_smoothing=0.1).logits is not None
    assert model(**unlabelled).logits is not None and model(**unlabelled).loss is None
    with torch.no_grad():
        assert model(**inputs).logits is not None
    model.eval()
    assert model(**inputs).logits is not None
    skipped = model(**inputs, skip_logits=True)
    assert skipped.logits is None
    assert_within(skipped.loss, *twice(model, lambda m: m(**inputs).loss))
    assert model(**inputs, skip_logits=True, return_dict=False)[0].ndim == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_loss_of_padded_rows_is_that_of_the_rows(side: str) -> None:
    model, inputs = make("decoder"), batch("decoder", (side, side), lengths=(5, 9, 2))
    total = model(**inputs, num_items_in_batch=1).loss
    rows = [ids[mask][None] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]
    alone = twice(model, lambda m: sum(m(input_ids=ids, labels=ids, num_items_in_batch=1).loss for ids in rows))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert not torch.equal(total, model(**inputs, num_items_in_batch=1).loss)
    assert_within(model(**inputs, num_items_in_batch=1).loss, *alone)


def test_masked_lm_projects_masked_positions_alone() -> None:
    model = make("encoder", lm_head_transform=True, vocab_size=991)
    inputs = batch("encoder", lengths=(60, 31))
    inputs["labels"].fill_(-100)
    inputs["labels"][0, [3, 50]] = inputs["labels"][1, 30] = 5
    shapes: list[tuple[int, ...]] = []
    model.transform.dense.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    with Allocations() as made:
        step(model, inputs)
    assert shapes == [(3, 24)]
    rows = {shape[0] for shape in made.shapes if len(shape) == 2 and shape[1] == 991 and shape[0] != 24}
    assert rows and max(rows) <= 3


@every_architecture
def test_no_label_at_all(architecture: str) -> None:
    """A batch without labels has loss 0 and finite gradients."""
    model, inputs = make(architecture), batch(architecture)
    inputs["labels"].fill_(-100)
    outputs, found = step(model, inputs)
    assert outputs.loss == 0 and all(gradient.isfinite().all() for gradient in found.values())


@every_architecture
def test_loss_function_of_the_user(architecture: str) -> None:
    model, inputs = make(architecture), batch(architecture)

    def own(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return logits.square().mean() * kwargs["num_items_in_batch"]

    model.loss_function = own
    outputs = model(**inputs, num_items_in_batch=3)
    assert_within(outputs.loss, *twice(model, lambda m: 3 * m(**inputs, num_items_in_batch=3).logits.square().mean()))
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 .* loss_function is set"):
        model(**inputs, label_smoothing=0.1, num_items_in_batch=3)


@every_architecture
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_adapter_on_the_projection(architecture: str, how: str) -> None:
    """The adapter counts: the loss goes through it, with smoothing and z-loss too."""
    peft = pytest.importorskip("peft")
    model, inputs = make(architecture, tie_word_embeddings=False), batch(architecture)
    before = model(**inputs).loss
    targets = {"target_modules": ["lm_head"]} if how == "target_modules" else {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}  # fmt: skip
    tuned = peft.get_peft_model(model, peft.LoraConfig(**targets, init_lora_weights=how != "target_modules"))
    outputs = tuned(**inputs)
    assert outputs.logits is not None
    if how == "target_modules":
        assert not torch.allclose(outputs.loss, before)
    outputs.loss.backward()
    assert any("lm_head" in name and gradient.any() for name, gradient in gradients(tuned).items())
    found = tuned(**inputs, label_smoothing=0.1, z_loss=0.01)
    logits, labels = found.logits.detach(), inputs["labels"]
    if architecture == "decoder":
        logits, labels = logits[:, :-1], labels[:, 1:]
    want = []
    for x in (logits, logits.double()):
        loss = nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        want.append(loss + 0.01 * x[labels != -100].logsumexp(-1).square().mean())
    assert_within(found.loss, *want)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda head: head.register_forward_hook(lambda module, args, output: 0.5 * output),
    "pre": lambda head: head.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_projection_count(kind: str) -> None:
    model, inputs = make("decoder"), batch("decoder")
    before = model(**inputs).loss
    HOOKS[kind](model.lm_head)
    outputs = model(**inputs)
    assert outputs.logits is not None and not torch.allclose(outputs.loss, before)


@pytest.mark.parametrize("position", ["rope", "alibi", "t5"])
def test_what_a_layer_is_given_moves_to_its_device(position: str) -> None:
    """A model that is spread over devices moves the arguments of each layer, layouts and biases too."""
    from accelerate.utils import send_to_device

    config = UrformConfig(
        architecture="decoder",
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        position_encoding=position,
    )
    model = UrformForCausalLM(config).eval()
    seen: list[Any] = []
    layer = model.model.decoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.extend(send_to_device(args, "meta")))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model(torch.randint(3, 40, (2, 4)), attention_mask=mask, use_cache=False)
    moved = [x for x in tree_leaves(seen) if x is not None and not isinstance(x, (bool, str))]
    devices = {(x.weight if hasattr(x, "weight") else getattr(x, "lengths", x)).device.type for x in moved}
    assert devices == {"meta"} and len(moved) >= 3
    assert len({id(x) for x in moved if isinstance(x, Layout)}) == 1  # still one layout for queries and keys
