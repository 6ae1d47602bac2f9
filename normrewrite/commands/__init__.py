"""The commands from file to file, one file each: a job takes the model file, its options and a callback, and returns a result."""
