"""Scripts that run on the device, unchanged: standard library, NumPy, Pillow, psutil, ONNX Runtime and OpenCV only."""
