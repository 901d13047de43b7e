"""Exporting a trained LoRA: merging it into the base model, and converting to GGUF."""
