"""Judging speech by what can be heard: audio measures, transcripts, speakers, and the samples of a run."""
