"""Starting points by what is wanted and by what there is to train on; none of them is proven, all are written down."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """What a fine-tuning is for, and the settings to begin with.

    data: how much of what it is meant for.
    typical_samples, typical_seconds: of the data that the ready recipes are written for.
    samples_per_step: of all GPUs, however many there are.
    reasons: why, by key.
    """

    name: str
    data: str
    typical_samples: int
    typical_seconds: float
    learning_rate: float
    rank: int
    epochs: int
    text_weight: float
    samples_per_step: int
    reasons: dict[str, str]


@dataclass(frozen=True)
class Card:
    """What to train on. gib: of one GPU, 0 for a CPU."""

    name: str
    gib: float
    num_gpus: int
    quantization: str | None = None


GOALS = {
    goal.name: goal
    for goal in (
        Goal(
            name="voice",
            data="10 to 60 minutes of one person",
            typical_samples=360,
            typical_seconds=5.0,
            learning_rate=5e-5,
            rank=16,
            epochs=5,
            text_weight=0.1,
            samples_per_step=8,
            reasons={
                "learning_rate": "little data: a higher rate learns the recordings' noise and forgets other voices",
                "rank": "one voice is a small change of what the base can do already",
                "epochs": "stopped before, where validation gets worse (eval.patience)",
                "text_weight": "a few sentences teach no language, only these sentences",
            },
        ),
        Goal(
            name="language",
            data="25 to 1,000 hours of many speakers",
            typical_samples=45_000,
            typical_seconds=8.0,
            learning_rate=1e-4,
            rank=64,
            epochs=2,
            text_weight=1.0,
            samples_per_step=64,
            reasons={
                "learning_rate": "new sounds are a larger change, and there is data to keep it in bounds",
                "rank": "a language or dialect needs more room than a voice",
                "epochs": "every epoch after the second mostly repeats what was said",
                "text_weight": "the texts are many and new: the text stream may learn from them",
            },
        ),
        Goal(
            name="style",
            data="1 to 10 hours of one way of speaking",
            typical_samples=1_800,
            typical_seconds=6.0,
            learning_rate=5e-5,
            rank=32,
            epochs=3,
            text_weight=0.3,
            samples_per_step=16,
            reasons={
                "learning_rate": "as for a voice: what the base knows shall stay",
                "rank": "a style touches rhythm and melody of all voices: between a voice and a language",
                "epochs": "stopped before, where validation gets worse (eval.patience)",
                "text_weight": "the way of speaking is in the audio; texts that belong to it help a little",
            },
        ),
    )
}
CARDS = {
    card.name: card
    for card in (
        Card("16gb", 16, 1, quantization="nf4"),
        Card("24gb", 24, 1),
        Card("80gb", 80, 1),
        Card("8xh200", 141, 8),
    )
}


def find_card(gib: float, num_gpus: int) -> Card:
    """The settings for a machine with `num_gpus` GPUs of `gib` each; for none, those to try things out on a CPU."""
    if num_gpus == 0:
        return Card("cpu", 0, 1)
    fitting = [card for card in CARDS.values() if card.gib <= gib * 1.1] or [CARDS["16gb"]]  # sold as 24, found as 23.6
    nearest = max(fitting, key=lambda card: card.gib)
    return Card(f"{num_gpus} x {gib:.0f} GiB", gib, num_gpus, nearest.quantization)
