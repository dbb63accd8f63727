"""What a bundle takes to the device as it is: standard library, NumPy, Pillow, ONNX Runtime and OpenCV only."""
