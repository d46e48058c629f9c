"""Check and bundle what `train_ten_lines.py` has saved, as `urform push` does before it uploads."""

from urform.hub_upload import publish

card = {"license": "apache-2.0", "language": ["en", "de"], "example": "two one"}  # for the model card
# Checks the folder, adds the code, and loads the result in clean processes. Without dry_run it also uploads it.
publish("out", "NAMESPACE/NAME", card_data=card, private=True, dry_run=True, say=print)
