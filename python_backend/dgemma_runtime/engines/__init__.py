"""Engines: one module per library, each the only one to import it. Importing this package imports none."""
