"""Where other programs show a run: TensorBoard, Weights & Biases, MLflow."""
