"""From a handful of sentence pairs to a saved translator, with transformers' own Trainer: README, "Ten lines"."""

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from urform import UrformConfig, UrformForConditionalGeneration, UrformTokenizer

pairs = [("one two three", "eins zwei drei"), ("two one", "zwei eins"), ("three two", "drei zwei")] * 50
tokenizer = UrformTokenizer.train([text for pair in pairs for text in pair], vocab_size=300)
config = UrformConfig.from_preset("tiny-encoder-decoder", vocab_size=len(tokenizer))
model = UrformForConditionalGeneration(config)
arguments = Seq2SeqTrainingArguments("out", num_train_epochs=8, learning_rate=5e-3, save_strategy="no")
rows = [dict(tokenizer(source, text_target=target)) for source, target in pairs]
collator = DataCollatorForSeq2Seq(tokenizer, model)
trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
trainer.train()
trainer.save_model()  # model and tokenizer, to "out"
