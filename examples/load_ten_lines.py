"""Load what `train_ten_lines.py` has saved, and use Urform's attention or Urform's classes for another model."""

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import urform

tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForSeq2SeqLM.from_pretrained("out")
output = model.generate(**tokenizer("two one", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))  # zwei eins
stock = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", attn_implementation="urform")  # any model
ours = urform.from_transformers(stock)  # the same weights as UrformForCausalLM, with the same logits
back = urform.to_transformers(ours)  # Qwen3ForCausalLM again, bit for bit
