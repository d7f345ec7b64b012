"""Data and processes that several tests need."""
