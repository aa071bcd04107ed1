"""Small trained models in real pipeline classes, for demos, tests and benches."""
