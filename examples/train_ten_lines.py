"""From a handful of sentence pairs to a saved translator, with nothing but transformers' own Trainer."""

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from urform import UrformConfig, UrformForConditionalGeneration, UrformTokenizer

PAIRS = [("one two three", "eins zwei drei"), ("two one", "zwei eins"), ("three two", "drei zwei")] * 50

tokenizer = UrformTokenizer.train([text for pair in PAIRS for text in pair], vocab_size=300)
config = UrformConfig.from_preset("tiny-encoder-decoder", vocab_size=len(tokenizer))
model = UrformForConditionalGeneration(config)
arguments = Seq2SeqTrainingArguments("outputs/ten-lines", num_train_epochs=8, learning_rate=5e-3, save_strategy="no")
rows = [dict(tokenizer(source, text_target=target)) for source, target in PAIRS]
Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, model)).train()
model.save_pretrained("outputs/ten-lines")
tokenizer.save_pretrained("outputs/ten-lines")

model, tokenizer = (cls.from_pretrained("outputs/ten-lines") for cls in (AutoModelForSeq2SeqLM, AutoTokenizer))
output = model.generate(**tokenizer("two one", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
