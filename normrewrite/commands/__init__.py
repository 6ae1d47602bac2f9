"""The verbs from file to file, a file for each of normrewrite.cli's: what they return prints itself and has `as_dict()`."""
