"""The questions of `urform doctor isolation`, put to one model; see `isolation.py` for what the answers mean.

Shapes: B batch, L length, E hidden (or vocabulary).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

ISOLATED, LEAKS, SHIFTED = "isolated", "LEAKS", "shifted"
NOT_APPLICABLE, REFUSED, INCONCLUSIVE = "not applicable", "refused", "inconclusive"
STATUSES = (ISOLATED, LEAKS, SHIFTED, REFUSED, INCONCLUSIVE, NOT_APPLICABLE)

CHECKS: dict[str, str] = {
    "mask-function": "the attention function has a mask function of the same name",
    "padding-right": "content of padding on the right",
    "padding-left": "content of padding on the left",
    "cross-attention": "content of padding in the source, seen through cross-attention",
    "causality": "later tokens",
    "packing-position-ids": "neighbours packed by position_ids that restart, no attention_mask, no cache",
    "packing-ones-mask": "the same with an attention_mask of ones",
    "packing-cu-seqlens": "neighbours packed by cu_seq_lens_q/k and max_length_q/k (and position_ids)",
    "packing-cache": "neighbours packed by position_ids, with use_cache=True",
    "packing-given-cache": "neighbours packed by position_ids, with a DynamicCache given",
}  #: name -> what must not move the outputs

_ADVICE = {
    "mask-function": "register a mask function under the same name: AttentionMaskInterface.register(name, sdpa_mask); "
    "without it transformers drops padding, packing and causality from the mask",
    "padding": "use attn_implementation='sdpa', 'eager' or 'urform'; until then, batch rows of one length",
    "cross-attention": "use attn_implementation='sdpa', 'eager' or 'urform'; until then, batch sources of one length",
    "causality": "use attn_implementation='sdpa', 'eager' or 'urform'; check that the mask function is registered",
    "packing-position-ids": "pass cu_seq_lens_q/k and max_length_q/k with attn_implementation='urform' or a flash "
    "attention; position_ids alone are enough if the model passes them to an attention that reads them",
    "packing-ones-mask": "pass no attention_mask with packed position_ids, or use attn_implementation='urform' "
    "(with cu_seq_lens_q/k, if the model does not pass position_ids to its attention)",
    "packing-cu-seqlens": "sdpa, eager and flex_attention ignore cu_seq_lens: use attn_implementation='urform' or a "
    "flash attention, which read them",
    "packing-cache": "pass use_cache=False (transformers looks for documents only without a cache), or use "
    "attn_implementation='urform'",
    "inconclusive": "look in float32 (--dtype float32), or at trained weights",
}

_SIZES = (6, 5, 7)  # documents of a packed row, and rows of a padded batch
_TARGETS = (4, 8, 5)  # the decoder's, on purpose others than the encoder's


@dataclass(frozen=True)
class IsolationCheck:
    """One question and its answer.

    Attributes:
        name: a key of `CHECKS`.
        status: "isolated", "LEAKS", "shifted" (nothing leaks, but positions are not those of the text alone, and this
            model takes none from outside), "not applicable", "refused" (the model raised), "inconclusive".
        movement: largest absolute change of an output that must not change; None where nothing was run.
        tolerance: what rounding explains.
        power: change of the same outputs for a token that they are meant to see.
        where: which output moved, for what.
        detail: reason or message.
        advice: what to do about it.
    """

    name: str
    status: str
    movement: float | None = None
    tolerance: float | None = None
    power: float | None = None
    where: str = ""
    detail: str = ""
    advice: str = ""


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Return every config object of the model and its submodels that chooses an attention implementation."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


@dataclass
class _Finding:
    """What one check has seen so far; `add` keeps the worst."""

    movement: float = 0.0
    tolerance: float = 0.0
    power: float = math.inf
    where: str = ""
    leaks: bool = False
    content: bool = False  # the content of something else leaks, which says more than "not as alone"
    shifted: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)

    def add(self, movement: float, tolerance: float, where: str, content: bool) -> None:
        leaks = movement > tolerance
        if (leaks, content, movement) >= (self.leaks, self.content, self.movement):
            self.movement, self.tolerance, self.where = movement, tolerance, where if leaks else ""
            self.leaks, self.content = leaks, content


Outputs = dict[str, Tensor]  # "encoder" and/or "decoder" -> [B, L, E], float64


class _RefusedError(Exception):
    """The model raised; the message is its own."""


class _NotApplicableError(Exception):
    """The question does not make sense for this model."""


class Probe:
    """Asks one model; it is in evaluation mode and has its attention set."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config = model, model.config
        self.text_config = model.config.get_text_config()
        signatures = [inspect.signature(m.forward).parameters for m in (model, model.base_model)]
        self.parameters = {name for signature in signatures for name in signature}
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in signatures[0].values())
        self.cache_name = "cache" if "cache" in self.parameters else "past_key_values"  # before transformers 5.24
        if "input_ids" not in self.parameters:
            raise ValueError(
                f"model {type(model).__name__} has no input_ids in its forward(); isolation is checked "
                "for models that read tokens"
            )
        self.both_sides = bool(self.config.is_encoder_decoder) and "decoder_input_ids" in self.parameters
        self.generator = torch.Generator().manual_seed(0)
        self.ids = self._usable_ids()
        self.device: torch.device = self._embeddings().device
        self.noise = 0.0
        self.readers = list(dict.fromkeys((model, model.base_model)))  # a classifier itself has no output per token
        self.side = "encoder"  # of the only input, where there is one
        if not self.both_sides and self._is_causal():
            self.side = "decoder"
        self.kind = "encoder-decoder" if self.both_sides else self.side
        #: side -> what the names of its inputs begin with
        self.prefixes = {"encoder": "", "decoder": "decoder_"} if self.both_sides else {self.side: ""}

    def _is_causal(self) -> bool:
        """Return what the model's config or its attention modules say. Where they say nothing, try it."""
        if getattr(self.text_config, "is_causal", None) is False:
            return False
        said = [m.is_causal for m in self.model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
        if said:
            return any(said)
        ids, last = self.random(2, 8), torch.arange(8) == 7
        try:
            moved = _distance(
                self.run(input_ids=ids)["encoder"][:, :7], self.run(input_ids=self.other(ids, last))["encoder"][:, :7]
            )
        except _RefusedError:
            return False
        return moved == 0

    def _embeddings(self) -> Tensor:
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight

    def _usable_ids(self) -> Tensor:
        """Return ordinary ids: the model's code may read special ones (RoBERTa counts padding by its id)."""
        embeddings = self._embeddings().shape[0]
        size = min(embeddings, getattr(self.text_config, "vocab_size", None) or embeddings)
        special: set[int] = set()
        for name, value in {**self.config.to_dict(), **self.text_config.to_dict()}.items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                special.update(value if isinstance(value, list) else [value])
        usable = [i for i in range(size) if i not in special]
        if len(usable) < 4:
            raise ValueError(
                f"model {type(self.model).__name__} has a vocabulary of {size} ids, {len(usable)} of them "
                "ordinary; probing needs at least 4"
            )
        return torch.tensor(usable)

    def random(self, *shape: int) -> Tensor:
        """Draw random ids."""
        return self.ids[torch.randint(len(self.ids), shape, generator=self.generator)]

    def other(self, ids: Tensor, where: Tensor) -> Tensor:
        """Exchange ids for different ones where `where` (broadcast over the batch) says so."""
        step = torch.randint(1, len(self.ids), ids.shape, generator=self.generator)
        exchanged = self.ids[(torch.searchsorted(self.ids, ids) + step) % len(self.ids)]
        return torch.where(where, exchanged, ids)

    def run(self, **inputs: Any) -> Outputs:
        """Run one forward pass; return hidden states or logits per token of each side."""
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items() if v is not None}
        if "use_cache" in self.parameters:
            inputs = {"use_cache": False, **inputs}
        length = inputs["decoder_input_ids" if self.both_sides else "input_ids"].shape[1]
        try:
            outputs, found = self._read(inputs, length)
        except Exception as error:  # whatever it raises is the answer
            raise _RefusedError(f"{type(error).__name__}: {_first_line(error)}") from error
        if found is None:
            raise ValueError(
                f"model {type(self.model).__name__} gives neither last_hidden_state nor logits per token; "
                "pass its backbone (AutoModel)"
            )
        if not self.both_sides:
            return {self.side: found.double().cpu()}
        source = outputs.get("encoder_last_hidden_state")
        sides = {"decoder": found.double().cpu()}
        return sides if source is None else {"encoder": source.double().cpu(), **sides}

    def _read(self, inputs: dict[str, Any], length: int) -> tuple[Any, Tensor | None]:
        """Run the model, or else its backbone. The first with an output `[B, length, E]` is run from then on."""
        outputs: Any = {}
        for model in self.readers:
            outputs = model(**inputs, return_dict=True)
            for name in ("last_hidden_state", "logits"):
                found = outputs.get(name)
                if isinstance(found, Tensor) and found.dim() == 3 and found.shape[1] == length:
                    self.readers = [model]
                    return outputs, found
        return outputs, None

    def tolerance(self, outputs: Outputs, side: str, alone: bool = False) -> float:
        """Return what rounding explains: more where tensors of other shapes go through other code (alone)."""
        eps = torch.finfo(self.model.dtype).eps
        factor = 4 if not alone else 64 if eps < 1e-5 else 16
        return max(4 * self.noise, factor * eps * outputs[side].nan_to_num(0, 0, 0).abs().max().item())

    def compare(self, finding: _Finding, base: Outputs, changed: Outputs, keep: dict[str, Tensor], what: str) -> None:
        """Note how far outputs moved that must not; `keep` holds them by side, bool `[B, L]`."""
        for side, keep_BL in keep.items():
            if keep_BL.any():
                moved = _distance(base[side][keep_BL], changed[side][keep_BL])
                finding.add(moved, self.tolerance(base, side), f"the {side}'s outputs move with {what}", True)

    def compare_alone(
        self,
        finding: _Finding,
        base: Outputs,
        alone: Outputs,
        rows: dict[str, tuple[int, slice]],
        what: str,
        positions_given: bool,
    ) -> None:
        """Note how far a text's outputs (by side: row and columns of `base`) are from the text's alone."""
        for side, (row, columns) in rows.items():
            moved = _distance(base[side][row, columns], alone[side][0])
            tolerance = self.tolerance(base, side, alone=True)
            if moved > tolerance and not positions_given:
                finding.shifted.append(f"the {side}'s outputs are {moved:.1e} from {what}")
            elif moved > tolerance:
                finding.add(moved, tolerance, f"the {side}'s outputs are not those of {what}", False)

    def set_power(self, finding: _Finding, base: Outputs, changed: Outputs, keep: dict[str, Tensor]) -> None:
        """Note whether outputs moved that must move, `keep` as in `compare`: ten times what did not, at the least."""
        for side, keep_BL in keep.items():
            moved = _distance(base[side][keep_BL], changed[side][keep_BL])
            finding.power = min(finding.power, moved)
            smallest = torch.finfo(self.model.dtype).eps * base[side].nan_to_num(0, 0, 0).abs().max().item()
            if not moved > max(smallest, 10 * finding.movement) or not base[side][keep_BL].isfinite().all():
                finding.weak.append(side)

    def answers(self, checks: Sequence[str]) -> tuple[IsolationCheck, ...]:
        """Put the questions that `checks` names, in the order of `CHECKS`."""
        questions: dict[str, Callable[[_Finding], None]] = {
            "padding-right": lambda finding: self.padding(finding, "right"),
            "padding-left": lambda finding: self.padding(finding, "left"),
            "cross-attention": self.cross_attention,
            "causality": self.causality,
            "packing-position-ids": lambda finding: self.packing(finding, by_positions=True),
            "packing-ones-mask": lambda finding: self.packing(finding, by_positions=True, ones=True),
            "packing-cu-seqlens": lambda finding: self.packing(finding, by_lengths=True),
            "packing-cache": lambda finding: self.packing(finding, by_positions=True, cache="own"),
            "packing-given-cache": lambda finding: self.packing(finding, by_positions=True, cache="given"),
        }
        ids = {"input_ids": self.random(2, 7), **({"decoder_input_ids": self.random(2, 5)} if self.both_sides else {})}
        try:
            first, second = self.run(**ids), self.run(**ids)
            self.noise = max(_distance(first[side], second[side]) for side in first)
        except _RefusedError as error:
            raise ValueError(
                f"model {type(self.model).__name__} rejects plain input_ids of shape (2, 7): {error}; "
                "it cannot be tested"
            ) from error
        found = {check: self.ask(check, questions[check]) for check in CHECKS if check in checks and check in questions}
        structure = self.mask_function([c for c in found.values() if c.status == LEAKS])
        if structure.status != ISOLATED:  # the reason of all of them
            found = {k: replace(c, advice=structure.advice) if c.status == LEAKS else c for k, c in found.items()}
        if "mask-function" in checks:
            found["mask-function"] = structure
        return tuple(found[check] for check in CHECKS if check in found)

    def ask(self, name: str, question: Callable[[_Finding], None]) -> IsolationCheck:
        """Put one question and word the answer."""
        finding = _Finding()
        try:
            question(finding)
        except _NotApplicableError as reason:
            return IsolationCheck(name, NOT_APPLICABLE, detail=str(reason))
        except _RefusedError as reason:
            return IsolationCheck(name, REFUSED, detail=str(reason))
        power = finding.power if math.isfinite(finding.power) else None
        advice = _ADVICE.get(name, _ADVICE["packing-cache" if name == "packing-given-cache" else "padding"])
        status, detail = ISOLATED, ""
        if finding.leaks:
            status = LEAKS
            detail = f"{finding.movement / max(finding.tolerance, 1e-300):.0f} times the tolerance"
        elif finding.weak:
            status, advice = INCONCLUSIVE, _ADVICE["inconclusive"]
            detail = f"the {finding.weak[0]}'s outputs hardly move for the tokens that they should see, or are NaN"
        elif finding.shifted:
            status, detail = SHIFTED, f"{finding.shifted[0]}: its positions start elsewhere; no content leaks"
            advice = "pad on the right" if name == "padding-left" else "give this model one text per row"
        return IsolationCheck(
            name,
            status,
            finding.movement,
            finding.tolerance,
            power,
            finding.where,
            detail,
            "" if status == ISOLATED else advice,
        )

    # ------------------------------------------------------------------------------------------------- questions

    def mask_function(self, leaks: list[IsolationCheck]) -> IsolationCheck:
        """Check that every attention implementation in use has a mask function of the same name."""
        registered = set(AttentionMaskInterface().valid_keys())
        used = {str(config._attn_implementation) for config in configs_of(self.model)} - {"None"}
        missing = sorted(used - registered)
        if not missing:
            return IsolationCheck("mask-function", ISOLATED)
        detail = f"no mask function is registered under {', '.join(map(repr, missing))}, so models get no mask at all"
        if not leaks:
            return IsolationCheck(
                "mask-function",
                INCONCLUSIVE,
                where=detail,
                advice=_ADVICE["mask-function"],
                detail="but none of the checks that ran found a leak",
            )
        return IsolationCheck(
            "mask-function",
            LEAKS,
            where=detail,
            advice=_ADVICE["mask-function"],
            detail=f"found in {', '.join(c.name for c in leaks)}",
        )

    def padded(self, sizes: Sequence[int], side: str, prefix: str = "") -> tuple[dict[str, Any], Tensor]:
        """Make a padded batch of one side with its mask; return the mask as bool `[B, L]`, too."""
        length = max(sizes) + 2  # padding in every row
        places, sizes_B1 = torch.arange(length), torch.tensor(sizes)[:, None]
        mask = places < sizes_B1 if side == "right" else places >= length - sizes_B1
        inputs = {f"{prefix}input_ids": self.random(len(sizes), length), f"{prefix}attention_mask": mask.long()}
        if f"{prefix}position_ids" in self.parameters:
            inputs[f"{prefix}position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs, mask

    def padding(self, finding: _Finding, side: str) -> None:
        """Exchange the content of padding; then run each row alone; then exchange a real token for the power."""
        for prefix in self.prefixes.values():
            if f"{prefix}attention_mask" not in self.parameters:
                raise _NotApplicableError(f"forward() takes no {prefix}attention_mask")
        inputs: dict[str, Any] = {}
        masks: dict[str, Tensor] = {}
        for name, prefix in self.prefixes.items():
            padded, masks[name] = self.padded(_TARGETS if prefix else _SIZES, side, prefix)
            inputs |= padded
        base = self.run(**inputs)
        masks = {name: mask for name, mask in masks.items() if name in base}
        for name, prefix in self.prefixes.items():
            padding = ~inputs[f"{prefix}attention_mask"].bool()
            changed = self.run(**inputs | self._exchanged(inputs, {name: padding}))
            self.compare(finding, base, changed, masks, f"the content of the {name}'s padding")
        counted = side == "right" or all(f"{prefix}position_ids" in inputs for prefix in self.prefixes.values())
        for row in range(len(_SIZES)):
            spans = {name: (row, _span(mask[row])) for name, mask in masks.items()}
            alone = self.run(**self._row_alone(inputs, row))
            self.compare_alone(finding, base, alone, spans, "the row alone", counted)
        self._power_of_first_tokens(finding, inputs, base, masks)

    def _row_alone(self, inputs: dict[str, Any], row: int) -> dict[str, Tensor]:
        """Cut one row's real tokens out of a padded batch."""
        alone = {}
        for prefix in self.prefixes.values():
            real = inputs[f"{prefix}attention_mask"][row].bool()
            for key in (f"{prefix}input_ids", f"{prefix}position_ids"):
                if key in inputs:
                    alone[key] = inputs[key][row : row + 1, real]
        return alone

    def _power_of_first_tokens(
        self, finding: _Finding, inputs: dict[str, Any], base: Outputs, masks: dict[str, Tensor]
    ) -> None:
        """Exchange each text's first token: the rest of the text must move, on each side for its own tokens."""
        for name, mask in masks.items():
            first = mask & (mask.cumsum(-1) == 1)
            changed = self.run(**inputs | self._exchanged(inputs, {name: first}))
            self.set_power(finding, base, changed, {name: mask & ~first})

    def _exchanged(self, inputs: dict[str, Any], where: dict[str, Tensor]) -> dict[str, Tensor]:
        """Exchange the ids of each side where `where` says so; return the changed inputs alone."""
        keys = {name: f"{self.prefixes[name]}input_ids" for name in where}
        return {key: self.other(inputs[key], where[name]) for name, key in keys.items()}

    def cross_attention(self, finding: _Finding) -> None:
        """Replace the encoder's states at padding: the decoder must not notice. Then at a real token: it must."""
        if not self.both_sides or "encoder_outputs" not in self.parameters:
            raise _NotApplicableError("no cross-attention over an encoder's states")
        for side in ("right", "left"):
            source, mask = self.padded(_SIZES, side)
            target, target_mask = self.padded(_TARGETS, side, "decoder_")
            encoded = self.encode(source["input_ids"], source["attention_mask"])
            states = encoded.last_hidden_state
            noise = torch.randn(states.shape, generator=self.generator).to(states) * states.std()

            def run(
                states: Tensor,
                target: dict[str, Any] = target,
                mask: Tensor = source["attention_mask"],
                encoded: Any = encoded,
            ) -> Outputs:
                encoded = type(encoded)(**{**encoded, "last_hidden_state": states})
                return self.run(encoder_outputs=encoded, attention_mask=mask, **target)

            base, real = run(states), {"decoder": target_mask}
            padding = ~mask[..., None].to(states.device)
            changed = run(torch.where(padding, noise, states))
            self.compare(finding, base, changed, real, f"the states at the source's padding ({side})")
            self.set_power(finding, base, run(torch.where(padding, states, noise)), real)

    def encode(self, ids: Tensor, mask: Tensor) -> Any:
        """Return the encoder's output, in the class that the model's decoder expects."""
        try:
            return self.model.get_encoder()(ids.to(self.device), attention_mask=mask.to(self.device), return_dict=True)
        except Exception as error:  # whatever it raises is the answer
            raise _RefusedError(f"{type(error).__name__}: {_first_line(error)}") from error

    def causality(self, finding: _Finding) -> None:
        """Exchange the second half: the first half must not move; exchange the first half: the second must."""
        if self.kind == "encoder":
            raise _NotApplicableError("the model is bidirectional")
        prefix = "decoder_" if self.both_sides else ""
        length, half = 12, 6
        early = (torch.arange(length) < half).expand(2, -1)
        for side in (None, "right", "left"):  # without a mask, and padded
            inputs: dict[str, Any] = {"input_ids": self.random(2, length)}
            mask = torch.ones(2, length, dtype=torch.bool)
            if self.both_sides:
                inputs[f"{prefix}input_ids"] = self.random(2, length)
            if side is not None:
                mask[:, slice(10, None) if side == "right" else slice(2)] = False
                inputs[f"{prefix}attention_mask"] = mask.long()
            key, what = f"{prefix}input_ids", "later tokens" + (f" (padded {side})" if side else "")
            base = self.run(**inputs)
            later = self.run(**inputs | {key: self.other(inputs[key], ~early & mask)})
            self.compare(finding, base, later, {"decoder": early & mask}, what)
            sooner = self.run(**inputs | {key: self.other(inputs[key], early & mask)})
            self.set_power(finding, base, sooner, {"decoder": ~early & mask})

    def packing(
        self,
        finding: _Finding,
        by_positions: bool = False,
        by_lengths: bool = False,
        ones: bool = False,
        cache: str = "",
    ) -> None:
        """Exchange the first document, then the last: the others must not move; then run each alone.

        Args:
            finding: what is found is added to it.
            by_positions: whether positions alone say where a document begins.
            by_lengths: whether `cu_seq_lens_q` and `cu_seq_lens_k` say it.
            ones: whether there is an attention mask, of ones.
            cache: "own" for a cache that the model makes, "given" for one that it is given, "" for none.
        """
        missing = [f"{p}position_ids" for p in self.prefixes.values() if f"{p}position_ids" not in self.parameters]
        if by_positions and missing:
            raise _NotApplicableError(f"forward() takes no {' and no '.join(missing)}")
        if by_lengths and not (self.takes_any or "cu_seq_lens_q" in self.parameters):
            raise _NotApplicableError("forward() takes no cu_seq_lens_q")
        inputs = self.packed(with_positions=not missing, with_lengths=by_lengths, ones=ones)
        if cache:
            self.require_cache()

        def run(**inputs: Any) -> Outputs:
            if cache:
                inputs |= {"use_cache": True, **({self.cache_name: self.cache()} if cache == "given" else {})}
            return self.run(**inputs)

        base = run(**inputs)
        self._exchange_documents(finding, inputs, base, run)
        shown = {name: of for name, of in self._documents().items() if name in base}
        for document in range(3):
            spans = {name: (0, _span(of[0] == document)) for name, of in shown.items()}
            alone = self.run(**self._document_alone(inputs, document))
            self.compare_alone(finding, base, alone, spans, "the document alone", not missing)
        self._power_of_documents(finding, inputs, base, shown, run)

    def _exchange_documents(
        self, finding: _Finding, inputs: dict[str, Any], base: Outputs, run: Callable[..., Outputs]
    ) -> None:
        """Exchange the first document, then the last: the others must not move."""
        documents = self._documents()
        for document, which in ((0, "first"), (2, "last")):
            changed = run(**inputs | self._exchanged(inputs, {name: of == document for name, of in documents.items()}))
            others = {name: of != document for name, of in documents.items() if name in base}
            self.compare(finding, base, changed, others, f"the tokens of the {which} document")

    def _documents(self) -> dict[str, Tensor]:
        """Return which document each token of a packed row belongs to, `[1, L]` for each side."""
        return {
            name: torch.repeat_interleave(torch.arange(3), torch.tensor(_TARGETS if prefix else _SIZES))[None]
            for name, prefix in self.prefixes.items()
        }

    def packed(self, with_positions: bool, with_lengths: bool, ones: bool) -> dict[str, Any]:
        """Make the inputs of a row of three documents, on both sides where there are two."""
        inputs: dict[str, Any] = {}
        for prefix in self.prefixes.values():
            sizes = _TARGETS if prefix else _SIZES
            inputs[f"{prefix}input_ids"] = self.random(1, sum(sizes))
            if with_positions:
                inputs[f"{prefix}position_ids"] = torch.cat([torch.arange(n) for n in sizes])[None]
            if ones:
                inputs[f"{prefix}attention_mask"] = torch.ones(1, sum(sizes), dtype=torch.long)
        if with_lengths:
            for letter, sizes in (("q", _TARGETS if self.both_sides else _SIZES), ("k", _SIZES)):
                starts = torch.tensor([0, *sizes]).cumsum(0)
                inputs |= {f"cu_seq_lens_{letter}": starts.to(torch.int32), f"max_length_{letter}": max(sizes)}
        return inputs

    def _document_alone(self, inputs: dict[str, Any], document: int) -> dict[str, Tensor]:
        """Cut one document's tokens out of a packed row."""
        alone = {}
        for name, of in self._documents().items():
            for key in (f"{self.prefixes[name]}input_ids", f"{self.prefixes[name]}position_ids"):
                if key in inputs:
                    alone[key] = inputs[key][:, of[0] == document]
        return alone

    def _power_of_documents(
        self,
        finding: _Finding,
        inputs: dict[str, Any],
        base: Outputs,
        documents: dict[str, Tensor],
        run: Callable[..., Outputs],
    ) -> None:
        """Exchange each document's first token: its other tokens must move."""
        for name, of in documents.items():
            first = nn.functional.pad(of.diff(dim=-1) != 0, (1, 0), value=True)
            changed = run(**inputs | self._exchanged(inputs, {name: first}))
            self.set_power(finding, base, changed, {name: ~first})

    def cache(self) -> Any:
        """Make an empty cache of the kind that the model takes."""
        own = DynamicCache(config=self.config)
        return EncoderDecoderCache(own, DynamicCache()) if self.both_sides else own

    def require_cache(self) -> None:
        """Refuse the question for a model that keeps no cache."""
        if self.kind == "encoder" or not {"use_cache", self.cache_name} <= self.parameters:
            raise _NotApplicableError("the model keeps no cache")


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinite where one is NaN and the other is not."""
    if a.numel() == 0:
        return 0.0
    difference = torch.where(a.isnan() & b.isnan() | (a == b), 0.0, (a - b).abs())
    return difference.nan_to_num(math.inf, math.inf).max().item()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _span(mask: Tensor) -> slice:
    """Return the places that a mask `[L]` without holes keeps."""
    places = mask.nonzero().flatten()
    return slice(int(places[0]), int(places[-1]) + 1)
