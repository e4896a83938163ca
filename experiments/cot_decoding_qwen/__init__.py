"""CoT-decoding on a pretrained model that can do arithmetic: see README.md."""
