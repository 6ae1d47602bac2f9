"""What is done with a model, a function of `nr` a file: from `import normrewrite as nr`, or behind a command."""
