"""Random configs of decoder families, over all that each family has."""

import random
from typing import Any

ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


def draw_rope(rng: random.Random, width: int, per_layer_type: bool = False) -> dict[str, Any]:
    """Rotary parameters for `width` rotated features; lengths of 9 are beyond some `original`."""
    kind = rng.choice(ROPES)
    original = rng.choice([6, 8, 16])
    kind = "linear" if width == 2 and kind == "dynamic" else kind  # which divides by width - 2
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice([10.0, 500.0, 10000.0])}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = rng.choice([1.5, 2.0, 4.0])
    if kind == "llama3":
        rope.update(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=original)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
        rope.update(rng.choice([{}, {"attention_factor": 1.2}, {"mscale": 0.7, "mscale_all_dim": 0.4}]))
        rope.update(
            rng.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {} if per_layer_type else {"truncate": False}])
        )
    if kind == "longrope":
        rope["original_max_position_embeddings"] = original
        for name in ("short_factor", "long_factor"):
            rope[name] = [rng.uniform(1.0, 3.0) for _ in range(width // 2)]
        rope.update(rng.choice([{}, {"factor": 4.0}, {"attention_factor": 1.1}]))
    return rope


def draw_window(rng: random.Random, layers: int) -> list[str]:
    return [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]


def draw(name: str, seed: int, padless: bool = False) -> dict[str, Any]:
    """Fields of a random config of a family, over all that it has; `padless`: perhaps without a pad token."""
    rng = random.Random(f"{name} {seed}")
    heads = rng.choice([1, 2, 3, 4, 6])
    layers = rng.choice([1, 2, 3])
    grouped = rng.choice([g for g in range(1, heads + 1) if heads % g == 0])
    width = rng.choice([4, 6, 10])
    hidden = heads * rng.choice([4, 8, 12] if heads > 3 else [16, 24])
    fields: dict[str, Any] = {
        "vocab_size": rng.choice([37, 61, 101]),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice([0, 1, 2, None] if padless else [0, 1, 2]),
        "bos_token_id": rng.choice([None, 1]),
        "eos_token_id": rng.choice([2, [2, 1]]),
        "initializer_range": 0.05,
        "id2label": {i: f"L{i}" for i in range(rng.choice([1, 3]))},
    }
    act = rng.choice(["silu", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "tanh"])
    eps = rng.choice([1e-6, 1e-5, 1e-3])
    inner = rng.choice([13, 40, 64])
    rope = draw_rope(rng, width, name == "gemma3_text")
    positions = rng.choice([7, 32])  # lengths of 9 grow a dynamic rope
    window = rng.choice([2, 3, 5, 20])
    kinds = draw_window(rng, layers)
    bias, other_bias = rng.random() < 0.5, rng.random() < 0.5
    if name in ("gpt2", "opt", "bloom", "gpt_neox"):
        fields["num_attention_heads"] = heads
    if name == "gpt2":
        return {
            **fields,
            "n_positions": 32,
            "n_inner": rng.choice([None, inner]),
            "activation_function": act,
            "layer_norm_epsilon": eps,
            "scale_attn_weights": bias,
        }
    if name == "opt":
        del fields["initializer_range"]
        before = rng.random() < 0.7
        return {
            **fields,
            "ffn_dim": inner,
            "max_position_embeddings": 32,
            "do_layer_norm_before": before,
            "_remove_final_layer_norm": rng.random() < 0.3,
            "enable_bias": bias,
            "activation_function": act,
        }
    if name == "bloom":
        exact, parts = rng.choice([(False, 2), (True, 1), (False, 1)])
        return {**fields, "layer_norm_epsilon": eps, "slow_but_exact": exact, "pretraining_tp": parts}
    if name == "gpt_neox":
        width = hidden // heads
        factor = rng.choice([0.25, 0.5, 1.0]) if width % 8 == 0 else rng.choice([0.5, 1.0]) if width % 4 == 0 else 1.0
        rope = draw_rope(rng, int(width * factor))
        return {
            **fields,
            "intermediate_size": inner,
            "hidden_act": act,
            "layer_norm_eps": eps,
            "max_position_embeddings": positions,
            "use_parallel_residual": other_bias,
            "attention_bias": bias,
            "rope_parameters": {**rope, "partial_rotary_factor": factor},
        }
    fields.update(
        intermediate_size=inner, num_key_value_heads=grouped, max_position_embeddings=positions, rms_norm_eps=eps
    )
    if name in ("gemma2", "gemma3_text"):
        fields.update(hidden_activation=act, head_dim=width, sliding_window=window, layer_types=kinds)
        fields.update(query_pre_attn_scalar=rng.choice([7, 16, 24]), attention_bias=bias)
        fields["attn_logit_softcapping"] = rng.choice([None, 2.0, 50.0])
        fields["final_logit_softcapping"] = rng.choice([None, 1.0, 30.0])
        if name == "gemma3_text":
            local = draw_rope(rng, width, True)
            rope = {"full_attention": rope, "sliding_attention": local}
        return {**fields, "rope_parameters": rope}
    fields["hidden_act"] = act
    if name == "qwen2":
        width = hidden // heads
        rope = draw_rope(rng, width)
    else:
        fields["head_dim"] = width
    if name in ("llama", "qwen3"):
        fields["attention_bias"] = bias
    if name == "llama":
        fields["mlp_bias"] = other_bias
    if name == "mistral":
        fields["sliding_window"] = rng.choice([None, window])
    if name in ("qwen2", "qwen3") and rng.random() < 0.7:
        fields.update(use_sliding_window=True, sliding_window=window, layer_types=kinds)
    return {**fields, "rope_parameters": rope}
