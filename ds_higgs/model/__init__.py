"""Loading, adapting and patching HiggsAudioModel; the only importers of boson_multimodal.model."""
