"""Attention kernels: pure tensor functions that know nothing of transformers or of the config."""
