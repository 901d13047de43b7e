"""Export of a trained LoRA: merging it into the base model, GGUF files, and uploads to the Hugging Face Hub."""
