"""Weights from outside: GGUF files, Hugging Face folders, our own checkpoints, tokenizers, and the registry of models
by name.
"""
