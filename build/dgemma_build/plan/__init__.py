"""Memory and speed of an engine before it is built, from a checkpoint's `config.json` alone."""
