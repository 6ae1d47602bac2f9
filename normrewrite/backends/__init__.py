"""Lowerings: what turns the rows of `normrewrite.norms` into one target's form. One file a target."""
