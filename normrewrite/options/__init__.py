"""The options of the commands, a file each, made by normrewrite.options.fields. No torch: --help does not wait for it."""
