"""A small byte-level BPE tokenizer that holds every special token of the released one."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# In the released tokenizer's order: number k here is token 128000 + k there.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|recipient|>",
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
)
VOCAB_SIZE = 512

# What the merges are learned from. Bytes no merge covers are tokens of their own, so any text can be encoded.
_CORPUS = (
    "You are a helpful assistant capable of generating speech in the voice of the provided reference audio.",
    "Please generate speech for: the weather is fine today and the streets of the old town are full of people.",
    "Generate audio following instruction. Audio is recorded from a quiet room. system user assistant",
    "السلام عليكم ورحمة الله وبركاته، كيف حالكم اليوم؟ من فضلك اقرأ النص التالي بصوت واضح.",
    "هذا مثال قصير على الكلام العربي، والجو جميل في المدينة القديمة هذا الصباح.",
)


def build_tiny_tokenizer(corpus: Sequence[str] = _CORPUS, *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Build the tokenizer, its merges learned from `corpus`; the same on every call.

    Text entries come first, special tokens last: `vocab_size` of both, or fewer where `corpus` has no more to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() <= vocab_size
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )
