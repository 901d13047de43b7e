"""The model: the policy with its LoRA, its forward pass, its sampling engine, and log-probabilities."""
