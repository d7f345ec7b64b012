"""What is no mistake for certain, but likely one: warnings about a manifest's texts, sound and samples together."""
