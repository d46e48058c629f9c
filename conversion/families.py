# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""All families: those of one file below each other, in the order in which `to_transformers` tries them."""

from .families_decoder import DECODERS
from .families_encoder import ENCODERS
from .families_encoder_decoder import ENCODER_DECODERS
from .family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)}
