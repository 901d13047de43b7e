"""Export of a trained LoRA: merged models, GGUF files, and uploads to the Hugging Face Hub."""
