"""What is drawn anew every epoch, as the rules ask: parts of prompts that are left out, references."""

import logging

from ds_higgs.data.conditions import PromptParts
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.redrawing import check_speakers
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.sample_table import SampleTable

logger = logging.getLogger("ds_higgs")


def check_can_vary(manifest: str, samples: SampleTable, rules: SampleRules) -> None:
    """Raises UserError where references are to be redrawn, and no sample names its speaker."""
    if rules.redraw:
        check_speakers(manifest, samples, PromptParts.of(rules.tokenizer, rules.layout))


def vary(dataset: HiggsDataset, rules: SampleRules, *, tell: bool) -> HiggsDataset:
    """Let the data set differ from epoch to epoch as `rules` ask; tell: whether to say for how many samples."""
    if not (rules.drops.any() or rules.redraw):
        return dataset
    parts = PromptParts.of(rules.tokenizer, rules.layout)
    if rules.drops.any():
        dataset.leave_out(rules.drops, parts)
    if rules.redraw:
        dataset.redraw_references(parts, rules.max_tokens)
        if tell:
            _tell(dataset)
    return dataset


def _tell(dataset: HiggsDataset) -> None:
    references = dataset.references
    redrawn, all_of_them = len(references.rows), references.num_samples
    name, kept = dataset.manifest.name, all_of_them - redrawn
    logger.info("%s: references of %d samples of %d speakers are redrawn", name, redrawn, references.num_speakers)
    if kept:
        why = "no other clip of its speaker that fits, several references, or words that nobody can tell apart"
        logger.warning("%s: %d of %d samples keep their own reference (%s)", name, kept, all_of_them, why)
