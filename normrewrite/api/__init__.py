"""What is done with a model, a verb a file: from `import normrewrite as nr`, or behind a command."""
