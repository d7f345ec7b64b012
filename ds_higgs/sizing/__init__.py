"""Memory terms and estimator: arithmetic alone."""
