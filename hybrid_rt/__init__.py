"""The model and the engine: attention, router, experts, cache, tokenizer, sampling and generation."""
