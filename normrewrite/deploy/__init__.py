"""ONNX files and engines: precisions, 8-bit ranges, and the builders of TensorRT."""
