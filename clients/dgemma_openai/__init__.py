"""OpenAI- and NIM-compatible HTTP front end: a stateless gRPC client of Triton. Knows no engine and no tokenizer."""
