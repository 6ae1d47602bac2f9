"""What was done, as data: the report of a rewrite, and the manifest that travels with the file."""
