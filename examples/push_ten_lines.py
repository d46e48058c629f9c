"""Check and bundle what `train_ten_lines.py` has saved, and load it in clean processes, as `urform push` does."""

from urform.hub_upload import publish

card = {"license": "apache-2.0", "language": ["en", "de"], "example": "two one"}  # for the model card
publish("out", "NAMESPACE/NAME", card_data=card, private=True, dry_run=True)  # all checks; without dry_run: upload
