"""From a manifest to label-free batches of codes."""
