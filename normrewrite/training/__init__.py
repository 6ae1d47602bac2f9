"""Fine-tuning, a subject a file: the recipe, what a step is fed, losses, the loop, checkpoints, the machine it runs on."""
