"""What is measured on networks: the inputs of norms, how exact a rewritten site is, and where two forms of a network part."""
