"""The verbs from file to file, as normrewrite.cli calls them: what they return prints itself and has `as_dict()`."""
