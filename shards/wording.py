"""Counts and articles in messages."""


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 sample, 0 samples, 2 samples."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def with_article(noun: str) -> str:
    """A noun with a or an before it."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
