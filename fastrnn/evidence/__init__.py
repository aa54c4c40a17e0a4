"""What is known of the backends, on this machine and elsewhere, and how it is found to be right."""

from .lookup import (
    BATCH,
    FASTER,
    HIDDEN,
    LARGER,
    PLAIN,
    STEPS,
    Book,
    Finding,
    book,
    cell_name,
    clear,
    dtype_name,
    keep,
    key_of,
    key_of_check,
    kind_of,
)

__all__ = [
    "BATCH", "FASTER", "HIDDEN", "LARGER", "PLAIN", "STEPS", "Book", "Finding", "book", "cell_name", "clear",
    "dtype_name", "keep", "key_of", "key_of_check", "kind_of",
]  # fmt: skip
