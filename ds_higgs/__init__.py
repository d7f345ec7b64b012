"""ds_higgs: memory-optimised LoRA fine-tuning of Higgs Audio v2 on DeepSpeed."""

__version__ = "0.1.0"
