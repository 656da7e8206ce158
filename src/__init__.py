"""ASCA and a complete BirdCLEF pipeline: folds, cache, train, evaluate, export, infer."""
