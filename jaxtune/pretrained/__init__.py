"""A folder of Hugging Face's format -> model, parameters, tokenizer, and back."""
