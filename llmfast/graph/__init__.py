"""Reading and editing ONNX graphs without loading their weights into memory."""
