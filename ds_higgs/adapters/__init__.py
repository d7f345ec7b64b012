"""What a run hands out: saving, opening, merging, native form, card."""
