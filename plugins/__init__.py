"""TensorRT plugins for norms whose statistics live at inference. None yet: every norm with running statistics is exported
folded into its neighbours, and needs no plugin."""
