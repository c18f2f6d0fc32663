"""Base models: where their files are, the device and dtype they run in, quantisation, tokenizers."""
