"""Pretrained weights: Hugging Face directories and GGUF files in, Hugging Face directories out; never a pickle."""
