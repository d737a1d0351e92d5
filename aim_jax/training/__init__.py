"""Training of AiM and of the VQ tokenizer."""
