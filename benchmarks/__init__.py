"""A package, and no mere folder: Opacus installs a `benchmarks` of its own, which would be found in its place."""
