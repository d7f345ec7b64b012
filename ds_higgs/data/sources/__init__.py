"""What people have before they have a manifest: one module per form."""
