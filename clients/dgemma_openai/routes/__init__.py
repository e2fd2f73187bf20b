"""The endpoints, one API a file."""
