"""Backends: what computes a row of `normrewrite.norms` in one form. One file a form; `dispatch` is the table of who computes."""
