"""A package, and no mere folder: Opacus installs an `examples` of its own, which would be found in its place."""
