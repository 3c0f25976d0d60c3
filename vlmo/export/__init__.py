"""Checkpoints as graphs that other runtimes take: ONNX, OpenVINO, torch.export."""
