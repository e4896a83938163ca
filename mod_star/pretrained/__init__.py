"""Pretrained weights: Hugging Face directories and GGUF files in, Hugging Face directories out; never a pickle.

Import `import_model` from `mod_star.pretrained.importing`, `export_model` from `mod_star.pretrained.export`, and
`upcycle` from `mod_star.pretrained.upcycle`.
"""
