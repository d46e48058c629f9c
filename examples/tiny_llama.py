"""Save a stock Llama with random weights to `llama-tiny`, for `urform doctor isolation llama-tiny`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
LlamaForCausalLM(config).save_pretrained("llama-tiny")
