"""What people ask servers for: the text, what the reference says (None: no reference), a system text (None: usual)."""

QUIET_ROOM = """Generate audio following instruction.

<|scene_desc_start|>
Audio is recorded from a quiet room.
<|scene_desc_end|>"""
CONVERSATIONS: tuple[tuple[str, str | None, str | None], ...] = (
    ("The sun rises in the east.", None, None),
    ("The sun rises in the east.", None, QUIET_ROOM),
    ("The sun rises in the east.", "It was the night before my birthday.", None),
    ("The sun rises in the east.", "It was the night before my birthday.", QUIET_ROOM),
    ("كيف حالك اليوم؟", None, None),
    ("كيف حالك اليوم؟", "صباح الخير يا أصدقاء.", None),
    ("السَّلامُ عَلَيْكُم وَرَحْمَةُ اللهِ.", "مرحبا بكم، كيف الحال؟", QUIET_ROOM),
    ("قال لي: hello, my friend.", "He said: مرحبا.", None),
    ("  white space around  \n", "\tand here ", None),
    ("First line.\nSecond line; 3.14 % of 2 000 €.", "Two  spaces.", None),
    ("Please generate speech for: a phrase that is meant.", "Please: yes.", None),
    ("😀 — “quotes” and … dots", "Ça va ? 你好。", None),
)
